"""Rotation and jigsaw: the crop is turned, then cut into patches, which are shuffled. Paper section 4.3, table 5.

Letters: S side of the crop, P patches, h w sides of a patch, in pixels.
"""

import dataclasses
from collections.abc import Callable

import jax

from pirl_jax.views.jigsaw import Jigsaw
from pirl_jax.views.rotation import NUM_ANGLES, draw_turns, rotate


@dataclasses.dataclass(frozen=True)
class RotationJigsaw(Jigsaw):
  """The jigsaw f32[P, h, w, 3] of a crop u8[S, S, 3] that is turned by 0, 90, 180 or 270 degrees.

  The paper does not describe the head; the views are patches, so the head of the jigsaw is used. If the orders are
  numbered, the label is `turns * num_permutations + number of the order`.
  """

  @property
  def num_labels(self) -> int:
    """Returns four times the number of orders, or 0 if all orders are used, see `Jigsaw`."""
    return NUM_ANGLES * super().num_labels

  def __call__(self, key: jax.Array, crop: jax.Array, augment: Callable[[jax.Array], jax.Array]) -> tuple[
      jax.Array, jax.Array]:
    """Returns (patches f32[P, h, w, 3], label i32[]), see `Pretext`."""
    turns_key, jigsaw_key = jax.random.split(key)
    turns = draw_turns(turns_key)
    patches, order = super().__call__(jigsaw_key, rotate(crop, turns), augment)
    return patches, turns * super().num_labels + order if self.num_labels else order
