"""Rotation by a multiple of 90 degrees: paper section 4.3 and appendix A.2; the angles of RotNet.

Letters: S side of the crop in pixels, C channels.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from pirl_jax.models.heads import ClassHead, ImageHead
from pirl_jax.views.pretext import Pretext

NUM_ANGLES = 4


@dataclasses.dataclass(frozen=True)
class Rotation(Pretext):
  """One view f32[1, S, S, 3]: the crop u8[S, S, 3], augmented and then turned by 0, 90, 180 or 270 degrees.

  The label is the number of quarter turns. The rotation comes last: a flip after the rotation would make an image
  turned by 90 degrees look like its mirror image turned by 270 degrees.
  """

  crop_size: int
  crop_scale: tuple[float, float]
  head: ClassVar = ImageHead
  covariant_head: ClassVar = ClassHead

  @property
  def view_shape(self) -> tuple[int, int, int, int]:
    """Returns (1, S, S, 3)."""
    return 1, self.crop_size, self.crop_size, 3

  @property
  def num_labels(self) -> int:
    """Returns the number of angles, 4."""
    return NUM_ANGLES

  def __call__(self, key: jax.Array, crop: jax.Array, augment: Callable[[jax.Array], jax.Array]) -> tuple[
      jax.Array, jax.Array]:
    """Returns (view f32[1, S, S, 3], quarter turns i32[] in 0..3), see `Pretext`."""
    turns = draw_turns(key)
    return jax.vmap(rotate, (0, None))(augment(crop[None]), turns), turns


def draw_turns(key: jax.Array) -> jax.Array:
  """Returns a uniform number of quarter turns, i32[] in 0..3."""
  return jax.random.randint(key, (), 0, NUM_ANGLES)


def rotate(image: jax.Array, turns: jax.Array) -> jax.Array:
  """Returns the square `image` [S, S, C] after `turns` (i32[] in 0..3) quarter turns to the left, as `np.rot90`."""
  # The result is selected from transposed and mirrored copies. `lax.switch` would not save work: under vmap it computes
  # all four cases and selects, too.
  image = jnp.where(turns % 2 == 1, jnp.swapaxes(image, 0, 1), image)
  image = jnp.where((turns == 1) | (turns == 2), image[::-1], image)
  return jnp.where((turns == 2) | (turns == 3), image[:, ::-1], image)
