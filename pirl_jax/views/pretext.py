"""The interface of a pretext transform.

A transform t of PIRL changes an image so that its content stays recognisable. The network learns that t(image) shows
the same image (invariant, paper equation 1), or it learns to predict t (covariant, equation 2). docs/systems.md shows
how to add a transform.

Letters: S side of the crop that is transformed, P views that a transform makes of the crop, h w sides of a view, T
number of different transforms, B batch, C trunk features, D dimensions of an embedding.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class Pretext(abc.ABC):
  """A set of transforms u8[S, S, 3] -> f32[P, h, w, 3]. Instances are hashable, and equal if their values are equal.

  Attributes:
    crop_size: S, in pixels.
    crop_scale: range of the share of the image's area that the crop covers, within (0, 1].
    head: class of the head g, created by head(dim, mlp=...): pooled features f32[B, P, C] -> f32[B, D].
    covariant_head: class of the classifier, created by covariant_head(T): f32[B, P, C] -> logits f32[B, T].
    settings: name of the config group whose fields are keyword arguments of the class; "" if there is none.
  """

  crop_size: int
  crop_scale: tuple[float, float]
  head: ClassVar[type[nn.Module]]
  covariant_head: ClassVar[type[nn.Module]]
  settings: ClassVar[str] = ""

  @property
  @abc.abstractmethod
  def view_shape(self) -> tuple[int, int, int, int]:
    """Returns (P, h, w, 3)."""

  @property
  @abc.abstractmethod
  def num_labels(self) -> int:
    """Returns T, or 0 if there are too many transforms to have labels."""

  @abc.abstractmethod
  def __call__(self, key: jax.Array, crop: jax.Array, augment: Callable[[jax.Array], jax.Array]) -> tuple[
      jax.Array, jax.Array]:
    """Returns (normalised views f32[P, h, w, 3], label i32[]) of one image; 0 <= label < T, or -1 if `num_labels` is 0.

    Args:
      key: for the transform only.
      crop: u8[S, S, 3].
      augment: function [n, H, W, 3] -> normalised f32[n, H, W, 3] that applies the photometric augmentations and the
        flip, drawn independently for each of the n images. The transform calls it before or after its own change.
    """
