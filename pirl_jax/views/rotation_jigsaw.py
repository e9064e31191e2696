"""Rotation and jigsaw: the crop is turned, and then cut and shuffled. Paper section 4.3, table 5.

Letters: S side of the crop, P patches, h w their sides.
"""

import dataclasses
from collections.abc import Callable

import jax

from pirl_jax.views.jigsaw import Jigsaw
from pirl_jax.views.rotation import NUM_ANGLES, draw_turns, rotate


@dataclasses.dataclass(frozen=True)
class RotationJigsaw(Jigsaw):
  """The jigsaw of a crop turned by 0, 90, 180 or 270 degrees.

  The paper does not tell the head; what comes out are patches, so it is the jigsaw's. The label of a numbered set of
  orders is `turns * num_permutations + number of the order`.
  """

  @property
  def num_labels(self) -> int:
    """Returns four times the number of orders; 0 where that is all of them, see `Jigsaw`."""
    return NUM_ANGLES * super().num_labels

  def __call__(self, key: jax.Array, crop: jax.Array, augment: Callable[[jax.Array], jax.Array]) -> tuple[
      jax.Array, jax.Array]:
    """Returns (patches f32[P, h, w, 3], label i32[]), see `Pretext`."""
    turns_key, jigsaw_key = jax.random.split(key)
    turns = draw_turns(turns_key)
    patches, order = super().__call__(jigsaw_key, rotate(crop, turns), augment)
    return patches, turns * super().num_labels + order if self.num_labels else order
