"""Photometric operations with the semantics of PIL and of torchvision on PIL images, under jit and vmap.

An image here is `f32[3, H, W]` that holds whole grey levels 0..255, and every operation returns whole levels
again, as PIL's 8-bit images do: a sequence of operations then agrees with PIL's sequence, not only each operation
by itself. Channels come first because the operations mix channels or neighbours, never many channels, and a last
axis of 3 would fill 3 of 128 lanes on TPU. Every parameter of an operation may be traced.

`Recipe` says how often and how strongly, `draw_photometric` draws the parameters of one image, and
`apply_photometric` applies them. Letters: H W height and width.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pirl_jax.runtime.platforms import by_platform
from pirl_jax.views.recipe import Recipe

# Factors are drawn on this grid (it moves a level by 1/32 at most): factor * difference + level then has no rounding
# error in float32, so its floor is PIL's floor whether or not the compiler fuses multiply and add, as XLA may.
_FACTOR_STEP = 2.0**-12
# The rows of `places`.
_CONTRAST, _SATURATION, _HUE = 1, 2, 3


class Photometric(NamedTuple):
  """The parameters drawn for one image; None where the recipe leaves the operation out.

  A coin that came up tails is stored as the operation's identity: factor 1, hue 0, 8 bits, threshold 256, radius 0.
  """

  brightness: jax.Array | None  # f32 factor; also contrast, saturation, sharpness
  contrast: jax.Array | None
  saturation: jax.Array | None
  hue: jax.Array | None  # f32 turns
  places: jax.Array  # i32[4], a permutation of 0..3: the turns of brightness, contrast, saturation, hue
  bits: jax.Array | None  # i32 in 4..8
  sharpness: jax.Array | None
  threshold: jax.Array | None  # i32 in 0..256
  autocontrast: jax.Array | None  # bool
  grayscale: jax.Array | None  # bool
  radius: jax.Array | None  # f32 pixels
  flip: jax.Array | None  # bool


def draw_photometric(key: jax.Array, *, recipe: Recipe) -> Photometric:
  """Returns the parameters for one image, drawn as `recipe` says from a single key.

  Each parameter has its own place among the uniform numbers: to switch one operation off leaves the draws of the
  others as they were. Factors are multiples of 2^-12.
  """
  draws = jax.random.uniform(key, (17,))  # one hash for all of them: small patches would feel a call for each
  u_brightness, u_contrast, u_saturation, u_hue, u_jitter = draws[:5]
  u_group, u_bits, u_sharpness, u_threshold, u_gray, u_blur, u_radius, u_flip = draws[5:13]
  jitter = u_jitter < recipe.jitter_probability
  group = u_group < recipe.group_probability

  def jitter_factor(u: jax.Array, strength: float) -> jax.Array | None:
    if not strength or not recipe.jitter_probability:
      return None
    low = max(0.0, 1.0 - strength)
    return jnp.where(jitter, _on_grid(low + (1.0 + strength - low) * u), 1.0)

  def of_group(value: jax.Array, identity: float) -> jax.Array | None:
    return jnp.where(group, value, identity) if recipe.group_probability else None

  def coin(u: jax.Array, probability: float) -> jax.Array | None:
    return u < probability if probability else None

  hue = radius = None
  if recipe.hue and recipe.jitter_probability:
    hue = jnp.where(jitter, recipe.hue * (2.0 * u_hue - 1.0), 0.0)
  if recipe.blur_probability:
    low, high = recipe.blur_radius
    radius = jnp.where(u_blur < recipe.blur_probability, low + (high - low) * u_radius, 0.0)
  return Photometric(
    brightness=jitter_factor(u_brightness, recipe.brightness),
    contrast=jitter_factor(u_contrast, recipe.contrast),
    saturation=jitter_factor(u_saturation, recipe.saturation),
    hue=hue,
    places=ranks(draws[13:]),
    bits=of_group(4 + jnp.floor(5 * u_bits).astype(jnp.int32), 8),
    sharpness=of_group(_on_grid(0.1 + 1.8 * u_sharpness), 1.0),
    threshold=of_group(jnp.floor(257 * u_threshold).astype(jnp.int32), 256),
    autocontrast=coin(u_group, recipe.group_probability),
    grayscale=coin(u_gray, recipe.grayscale_probability),
    radius=radius,
    flip=coin(u_flip, recipe.flip_probability),
  )


def apply_photometric(image: jax.Array, drawn: Photometric) -> jax.Array:
  """Returns `image` (f32[3, H, W], whole levels) after every operation in `drawn`, same shape and range.

  The order is jitter, posterize, sharpness, solarize, autocontrast, grayscale, blur, flip. vissl's blur list flips
  first: a flip changes places with every other operation without a trace, so one order serves both lists.
  """
  def in_bytes(image: jax.Array, drawn: Photometric) -> jax.Array:
    return _in_order(image.astype(jnp.uint8), drawn).astype(image.dtype)

  # A GPU is bound by its memory, and between two operations an image of bytes is a quarter of one in float32. On two
  # CPU cores that would be 12 to 20 % slower, and on a v5e, whose vectors are of four bytes, 25 % (estimated).
  return by_platform(image, drawn, gpu=in_bytes, default=_in_order)


def _in_order(image: jax.Array, drawn: Photometric) -> jax.Array:
  """Returns the image after every operation, in its own dtype."""
  image = color_jitter(
    image,
    brightness=drawn.brightness,
    contrast=drawn.contrast,
    saturation=drawn.saturation,
    hue=drawn.hue,
    places=drawn.places,
  )
  if drawn.bits is not None:
    assert drawn.sharpness is not None and drawn.threshold is not None and drawn.autocontrast is not None
    image = posterize(image, drawn.bits)
    image = adjust_sharpness(image, drawn.sharpness)
    image = solarize(image, drawn.threshold)
    image = jnp.where(drawn.autocontrast, autocontrast(image), image)
  if drawn.grayscale is not None:
    image = jnp.where(drawn.grayscale, grayscale(image), image)
  if drawn.radius is not None:
    image = gaussian_blur(image, drawn.radius)
  if drawn.flip is not None:
    image = jnp.where(drawn.flip, image[:, :, ::-1], image)
  return image


def ranks(values: jax.Array) -> jax.Array:
  """Returns i32[n]: how many of `values` (f32[n]) come before each one. Of independent draws, a random permutation.

  Equal values keep their order. For few values the n x n comparisons are cheaper than a sort, above all under vmap.
  """
  index = jnp.arange(values.shape[0])
  mine, other = values[:, None], values[None, :]
  before = (other < mine) | ((other == mine) & (index[None, :] < index[:, None]))
  return jnp.sum(before, axis=1, dtype=jnp.int32)


def color_jitter(
  image: jax.Array,
  *,
  brightness: jax.Array | None,
  contrast: jax.Array | None,
  saturation: jax.Array | None,
  hue: jax.Array | None,
  places: jax.Array,
) -> jax.Array:
  """Returns `image` (f32[3, H, W]) after those of the four adjustments that are not None, ordered by `places`.

  `places` (i32[4], a permutation) holds the turns of brightness, contrast, saturation and hue, which torchvision's
  ColorJitter draws at random. Equal to the plain sequence in all 24 orders, to the last level.
  """
  factors = {i: f for i, f in enumerate((brightness, contrast, saturation)) if f is not None}
  # Three of the four are blends that differ in their target only, so one slot can be any of them: a pass of three
  # slots goes before hue and one after, and a blend has factor 1, the identity, in the pass that is not its own. Hue
  # is computed once. 64 x (224 px + 9 of 64 px) on 2 cores: 158 ms; the plain operations in one fixed order 226, a
  # choice of four in each of four turns 406, `lax.switch` over the 24 orders 2219 (`benchmarks/views.py`).
  slots = []
  for turn in range(len(factors)):
    # Chosen is the blend that has `turn` other blends before it.
    chosen = {i: sum((places[j] < places[i]).astype(jnp.int32) for j in factors) == turn for i in factors}
    factor = sum(jnp.where(chosen[i], factors[i], 0.0) for i in factors)
    place = sum(jnp.where(chosen[i], places[i], 0) for i in factors)
    never = jnp.zeros((), bool)
    slots.append((factor, place, chosen.get(_CONTRAST, never), chosen.get(_SATURATION, never)))

  def slot(image: jax.Array, drawn: Sequence[jax.Array]) -> tuple[jax.Array, None]:
    factor, is_contrast, is_saturation = drawn
    if contrast is None and saturation is None:
      return adjust_brightness(image, factor), None
    return blend(image, factor, is_contrast, is_saturation), None

  @_on_levels
  def blend(image: jax.Array, factor: jax.Array, is_contrast: jax.Array, is_saturation: jax.Array) -> jax.Array:
    grey = _luma(image)
    target = jnp.where(is_contrast, _mean_level(grey), jnp.where(is_saturation, grey, 0.0))
    return _blend(target, image, factor)

  def blend_pass(image: jax.Array, is_now: Callable[[Any], Any]) -> jax.Array:
    if not slots:
      return image
    drawn = [(jnp.where(is_now(place), factor, 1.0), *kinds) for factor, place, *kinds in slots]
    # A loop, not three slots in a row: XLA fuses a row into an expression that computes a pixel again for each of its
    # readers. 1152 patches of 10 px on 2 cores: 10 ms in a row, 3 to 4 ms in the loop, and half the compile time.
    return jax.lax.scan(slot, image, jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn),
                        unroll=image.dtype == jnp.uint8)[0]

  if hue is None:
    return blend_pass(image, lambda place: True)
  image = blend_pass(image, lambda place: place < places[_HUE])
  image = adjust_hue(image, hue)
  return blend_pass(image, lambda place: place > places[_HUE])


def _on_levels(operation: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Returns the operation on levels of any dtype: it computes in float32 at least, and returns the dtype given."""
  @functools.wraps(operation)
  def on_levels(image: jax.Array, *parameters: jax.Array) -> jax.Array:
    exact = image.astype(jnp.promote_types(image.dtype, jnp.float32))
    return operation(exact, *parameters).astype(image.dtype)
  return on_levels


@_on_levels
def adjust_brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) times `factor` >= 0: PIL's ImageEnhance.Brightness."""
  return _blend(0.0, image, factor)


@_on_levels
def adjust_contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) blended with its mean grey: PIL's ImageEnhance.Contrast. 1 is the identity."""
  return _blend(_mean_level(_luma(image)), image, factor)


@_on_levels
def adjust_saturation(image: jax.Array, factor: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) blended with its grey version: PIL's ImageEnhance.Color. 1 is the identity."""
  return _blend(_luma(image), image, factor)


@_on_levels
def adjust_sharpness(image: jax.Array, factor: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) blended with a smoothed version: PIL's ImageEnhance.Sharpness. 1 is the identity.

  Smoothed is PIL's ImageFilter.SMOOTH: 3 x 3 weights of 1, 5 in the middle, over 13; the outermost pixels stay.
  """
  height, width = image.shape[1:]
  padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1)))
  rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
  box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
  smooth = jnp.floor((box + 4.0 * image) * (1.0 / 13.0) + 0.5)  # n / 13 is at least 1/26 away from any half
  y, x = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
  inside = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
  return _blend(jnp.where(inside[None], smooth, image), image, factor)


@_on_levels
def adjust_hue(image: jax.Array, turns: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) with its hue moved by `turns` of the colour circle, in [-0.5, 0.5].

  torchvision's formula for tensors: float HSV, and its way back to whole levels, floor(255.999 / 255 * level). PIL
  keeps hue and saturation in 8 bits, which is up to 14 levels off; that coarseness is not repeated here. One level off
  exact arithmetic where that falls within float32's error of a whole level, about one value in 10,000.
  """
  red, green, blue = image
  value = jnp.maximum(jnp.maximum(red, green), blue)
  chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
  scale = 1.0 / jnp.where(chroma > 0, chroma, 1.0)
  sixths = jnp.where(
    value == red,
    (green - blue) * scale,
    jnp.where(value == green, 2.0 + (blue - red) * scale, 4.0 + (red - green) * scale),
  )
  sixths = sixths + 6.0 * turns  # in [-4, 8]

  # HSV to RGB without its six cases: a channel is `value` less chroma times a trapezoid over the circle. All three are
  # one expression: a GPU would write channels that are stacked, transpose them and read them again.
  place = sixths[None] + jnp.asarray([5, 3, 1], image.dtype)[:, None, None]
  place = place - 6.0 * jnp.floor(place * (1.0 / 6.0))
  moved = value[None] - chroma[None] * jnp.clip(jnp.minimum(place, 4.0 - place), 0.0, 1.0)
  return jnp.floor(moved * (255.999 / 255.0))


@_on_levels
def posterize(image: jax.Array, bits: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) with only the upper `bits` (i32, 1..8) of each level: PIL's ImageOps.posterize."""
  step = (1 << (8 - bits)).astype(image.dtype)  # a power of two: dividing by it is exact
  return jnp.floor(image * (1.0 / step)) * step


@_on_levels
def solarize(image: jax.Array, threshold: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) with levels >= `threshold` inverted: PIL's ImageOps.solarize. 256: identity."""
  return jnp.where(image < threshold, image, 255.0 - image)


@_on_levels
def autocontrast(image: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) with each channel stretched to 0..255: PIL's autocontrast without cutoff.

  A channel of one level stays. The level is floor(255 * (x - low) / (high - low)) in exact arithmetic; where that
  quotient is whole, the rounding error of PIL's own formula can make it one less.
  """
  low = jnp.min(image, axis=(1, 2), keepdims=True)
  extent = jnp.max(image, axis=(1, 2), keepdims=True) - low
  scale = 255.0 / jnp.where(extent > 0, extent, 1.0)
  # Quotients are at least 1 / 255 apart: half of that lifts whole ones over their floor and reaches no other.
  return jnp.where(extent > 0, jnp.floor((image - low + 0.5 / 255.0) * scale), image)


@_on_levels
def grayscale(image: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) with three equal channels: PIL's convert("L")."""
  return jnp.broadcast_to(_luma(image), image.shape)


def gaussian_blur(image: jax.Array, radius: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) after PIL's GaussianBlur(radius), `radius` (f32) in [0, 2.4] pixels, 0 the identity.

  Three extended box blurs along each axis, each rounded to whole levels, edges repeated (Gwosdek et al. 2011,
  "Theoretical foundations of Gaussian convolution by extended box filtering").
  """
  variance = radius * radius / 3.0
  length = jnp.floor((jnp.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)  # whole part of the box's radius, 0 or 1
  fraction = (2 * length + 1) * (length * (length + 1) - 3 * variance) / (6 * (variance - (length + 1) ** 2))
  # PIL's 24-bit fixed point, because with radii like 0.5, 1 or 2 many sums lie half way between two levels, and the
  # last bit of the weights says where they go. Nothing overflows: the weights of a box add up to 2^24 at most.
  inner = jnp.floor(2.0**24 / (2.0 * (length + fraction) + 1.0)).astype(jnp.uint32)
  outer = (2**24 - (2 * length.astype(jnp.uint32) + 1) * inner) // 2
  near = jnp.where(length > 0, inner, outer)
  far = jnp.where(length > 0, outer, 0)

  def box(axis: int, image: jax.Array) -> jax.Array:
    size = image.shape[axis]
    padded = jnp.pad(image, [(2, 2) if a == axis else (0, 0) for a in range(3)], mode="edge")
    shifted = [jax.lax.slice_in_dim(padded, i, i + size, axis=axis).astype(jnp.uint32) for i in range(5)]
    total = inner * shifted[2] + near * (shifted[1] + shifted[3]) + far * (shifted[0] + shifted[4])
    return ((total + 2**23) >> 24).astype(image.dtype)

  levels = image if image.dtype == jnp.uint8 else image.astype(jnp.uint32)
  for axis in (2, 1):
    # A loop for the same reason as in `color_jitter`.
    levels = jax.lax.fori_loop(0, 3, lambda _, x, axis=axis: box(axis, x), levels)
  return levels.astype(image.dtype)


def _on_grid(factor: jax.Array) -> jax.Array:
  return jnp.round(factor * (1.0 / _FACTOR_STEP)) * _FACTOR_STEP


def _blend(target: jax.Array | float, image: jax.Array, factor: jax.Array) -> jax.Array:
  # PIL's Image.blend(target, image, factor): float32, clipped, cut to whole levels.
  return jnp.floor(jnp.clip(target + factor * (image - target), 0.0, 255.0))


def _luma(image: jax.Array) -> jax.Array:
  # PIL's convert("L") has 16-bit fixed-point weights: every partial sum is below 2^24 and so exact in float32.
  red, green, blue = image[0:1], image[1:2], image[2:3]  # [1, H, W]
  return jnp.floor((19595.0 * red + 38470.0 * green + 7471.0 * blue + 32768.0) * 2.0**-16)


def _mean_level(grey: jax.Array) -> jax.Array:
  # int(mean + 0.5) in whole numbers: a float32 sum can be inexact from 65,794 pixels on, this from 4.2 million.
  total = jnp.sum(grey.astype(jnp.int32))
  return ((2 * total + grey.size) // (2 * grey.size)).astype(grey.dtype)
