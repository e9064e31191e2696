"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719) as PyContrast's InfoMin has it (`datasets/RandAugment.py`).

Each of n times one of 15 operations is chosen, and applied with probability 1/2. Its magnitude, in 0..10, is drawn from
a normal distribution. The operations are PIL's, on 8-bit images; what differs from PyContrast: where an image is
turned, sheared or moved, pixels are always interpolated linearly (PyContrast: half of the time by cubics), and the
matrix is rounded, see `affine`. Images are those of `operations`, [3, H, W].
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pirl_jax.runtime.platforms import by_platform
from pirl_jax.views import affine, operations, tables
from pirl_jax.views.operations import on_levels

PROBABILITY = 0.5
"""That a chosen operation is applied."""

MAX_MAGNITUDE = 10

# Operations that give a level what they give it whatever the other pixels are, by the magnitude's share of the largest.
_OF_LEVELS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "invert": lambda image, share: 255 - image,
  "posterize": lambda image, share: operations.posterize(image, _whole(4 * share)),
  "solarize": lambda image, share: operations.solarize(image, _whole(256 * share)),
  "solarize_add": lambda image, share: operations.solarize_add(image, _whole(110 * share)),
  "brightness": lambda image, share: operations.adjust_brightness(image, _factor(share)),
}
# The matrices of those that move pixels, by the share, with a random sign, and the image's height and width.
_OF_PLACES: dict[str, Callable[[jax.Array, int, int], jax.Array]] = {
  "rotate": lambda share, height, width: affine.rotation(share * math.pi / 6, height=height, width=width),
  "shear_x": lambda share, height, width: affine.shear(x=0.3 * share),
  "shear_y": lambda share, height, width: affine.shear(y=0.3 * share),
  "translate_x": lambda share, height, width: affine.translation(x=0.45 * share * width),
  "translate_y": lambda share, height, width: affine.translation(y=0.45 * share * height),
}
_OF_IMAGES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "autocontrast": lambda image, share: operations.autocontrast(image),
  "equalize": lambda image, share: tables.equalize(image),
  "color": lambda image, share: operations.adjust_saturation(image, _factor(share)),
  "contrast": lambda image, share: operations.adjust_contrast(image, _factor(share)),
  "sharpness": lambda image, share: operations.adjust_sharpness(image, _factor(share)),
}
NUMBERS = {name: number for number, name in enumerate((*_OF_LEVELS, *_OF_IMAGES, *_OF_PLACES), 1)}
"""The numbers of the operations; 0 is none."""


class Drawn(NamedTuple):
  """What was drawn for one image, in the order of the operations."""

  number: jax.Array  # i32[n], of `NUMBERS`
  share: jax.Array  # f32[n] in [0, 1]: the magnitude's share of the largest
  sign: jax.Array  # f32[n], -1 or 1, for the operations that move pixels


def draw_randaugment(key: jax.Array, *, count: int, magnitude: float, deviation: float) -> Drawn:
  """Returns what is done with one image.

  Args:
    key: for this alone.
    count: n, the operations that are chosen, with replacement, and applied with `PROBABILITY`.
    magnitude: mean of the magnitude, in 0..10, before magnitudes outside of this range are moved to its ends.
    deviation: standard deviation of the magnitude.
  """
  choice_key, magnitude_key = jax.random.split(key)
  u_number, u_applied, u_sign = jax.random.uniform(choice_key, (3, count))
  number = 1 + jnp.floor(len(NUMBERS) * u_number).astype(jnp.int32)
  drawn = magnitude + deviation * jax.random.normal(magnitude_key, (count,))
  return Drawn(number=jnp.where(u_applied < PROBABILITY, number, 0), share=jnp.clip(drawn / MAX_MAGNITUDE, 0.0, 1.0),
               sign=jnp.where(u_sign < 0.5, -1.0, 1.0))


def apply_randaugment(image: jax.Array, drawn: Drawn) -> jax.Array:
  """Returns `image` ([3, H, W], whole levels of any dtype) after the operations in `drawn`, in its dtype."""
  return by_platform(image, drawn, gpu=_in_groups, default=_alone)


@jax.custom_batching.sequential_vmap
def _alone(image: jax.Array, drawn: Drawn) -> jax.Array:
  """Returns the result, with the images of a batch one after the other, so that only what was drawn is computed.

  Under vmap a switch computes all the operations for each image, and half of the draws are none. On one core, 64 images
  of 224 pixels take 129 ms, and 2.7 s with `_in_groups`; 128 of 32 pixels 2 ms and 60 (one run on a busy machine). 128
  images of 224 pixels take about 14 ms of a v5e, if its compiler's estimates are weighted with what is drawn.
  """
  def step(image: jax.Array, one: Drawn) -> tuple[jax.Array, None]:
    branches = [lambda image: image]
    for of in (_OF_LEVELS, _OF_IMAGES):
      branches += [lambda image, operation=operation: operation(image, one.share) for operation in of.values()]
    branches.append(lambda image: affine.affine(image, _matrix(one, *image.shape[1:])))
    return jax.lax.switch(one.number, branches, image), None  # the last branch has all numbers of `_OF_PLACES`

  return jax.lax.scan(step, image, drawn)[0]


def _in_groups(image: jax.Array, drawn: Drawn) -> jax.Array:
  """Returns the result, computed at once for the images of a batch, for a GPU.

  Eight of the operations are tables of levels, two blend the image with another, five are affine transforms. So each
  image goes through one table, one blend and one transform, and those that are not its own leave it as it is. 1,024
  images of 224 pixels: 21 GB, 4.4 ms of an H200 by its bandwidth, where the views take 2.0 ms without RandAugment.
  """
  def step(image: jax.Array, one: Drawn) -> tuple[jax.Array, None]:
    share, factor = one.share, _factor(one.share)
    levels, counts = jnp.broadcast_to(jnp.arange(256.0), (3, 256))[:, None], tables.histogram(image)  # [3, 1, 256]
    made = {name: operation(levels, share) for name, operation in _OF_LEVELS.items()}
    low, high = tables.extent(counts)
    made["autocontrast"] = operations.autocontrast(jnp.clip(levels, low[:, None], high[:, None]))
    made["equalize"] = tables.equalize_table(counts)[:, None]
    grey = operations.luma(image.astype(levels.dtype))
    made["contrast"] = operations.blend(operations.mean_level(grey), levels, factor)
    image = tables.lookup(image, _chosen(one.number, made, levels)[:, 0])

    @on_levels
    def blended(image: jax.Array) -> jax.Array:
      is_color, is_sharpness = (one.number == NUMBERS[name] for name in ("color", "sharpness"))
      target = jnp.where(is_sharpness, operations.smooth(image), operations.luma(image))
      return operations.blend(target, image, jnp.where(is_color | is_sharpness, factor, 1.0))

    return affine.affine(blended(image), _matrix(one, *image.shape[1:])), None

  # Not a loop: the copies of its carry would be costly, see `photometric.color_jitter`.
  return jax.lax.scan(step, image, drawn, unroll=True)[0]


def _matrix(drawn: Drawn, height: int, width: int) -> jax.Array:
  share = drawn.share * drawn.sign
  matrices = {name: matrix(share, height, width) for name, matrix in _OF_PLACES.items()}
  return _chosen(drawn.number, matrices, affine.translation())


def _chosen(number: jax.Array, values: dict[str, jax.Array], otherwise: jax.Array) -> jax.Array:
  for name, value in values.items():
    otherwise = jnp.where(number == NUMBERS[name], value, otherwise)
  return otherwise


def _whole(value: jax.Array) -> jax.Array:
  return jnp.floor(value).astype(jnp.int32)


def _factor(share: jax.Array) -> jax.Array:
  return operations.on_grid(0.1 + 1.8 * share)
