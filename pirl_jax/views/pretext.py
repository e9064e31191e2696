"""What a pretext transform is.

A transform t of PIRL changes an image so that its content stays recognisable; the network learns that t(image) is the
same image (invariant, paper equation 1), or which t it was (covariant, equation 2). docs/systems.md shows how to add
one.

Letters: S side of the crop that is transformed, P views that a transform makes of it, h w their sides, T transforms.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class Pretext(abc.ABC):
  """A set of transforms. Hashable, and equal to another one with the same values.

  Attributes:
    crop_size: S, in pixels.
    crop_scale: range of the share of the image's area that the crop covers, within (0, 1].
    head: head g, built as head(dim, mlp=...): pooled features f32[B, P, C] -> f32[B, D].
    covariant_head: built as covariant_head(T): f32[B, P, C] -> logits f32[B, T].
    settings: name of the config group whose fields are keyword arguments of the class; "": it has none.
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
    """Returns T; 0 where they are too many to be told apart by a label."""

  @abc.abstractmethod
  def __call__(self, key: jax.Array, crop: jax.Array, augment: Callable[[jax.Array], jax.Array]) -> tuple[
      jax.Array, jax.Array]:
    """Returns (views f32[P, h, w, 3], normalised, label i32[]) of one image; 0 <= label < T, -1 where T is 0.

    Args:
      key: of the transform alone.
      crop: u8[S, S, 3].
      augment: [n, H, W, 3] -> f32[n, H, W, 3], normalised: the photometric list and the flip, drawn anew for each of
        the n images. A transform decides whether that comes before or after it.
    """
