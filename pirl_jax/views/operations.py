"""Operations on 8-bit images with the semantics of PIL and of torchvision on PIL images, under jit and vmap.

An image here is `f32[3, H, W]` that holds whole grey levels 0..255, and every operation returns whole levels
again, as PIL's 8-bit images do: a sequence of operations then agrees with PIL's sequence, not only each operation
by itself. Channels come first because the operations mix channels or neighbours, never many channels, and a last
axis of 3 would fill 3 of 128 lanes on TPU. Every parameter of an operation may be traced. Letters: H W height and
width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Factors are drawn on this grid (it moves a level by 1/32 at most): factor * difference + level then has no rounding
# error in float32, so its floor is PIL's floor whether or not the compiler fuses multiply and add, as XLA may.
_FACTOR_STEP = 2.0**-12


def on_levels(operation: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Returns the operation on levels of any dtype: it computes in float32 at least, and returns the dtype given."""
  @functools.wraps(operation)
  def on_levels(image: jax.Array, *parameters: jax.Array) -> jax.Array:
    exact = image.astype(jnp.promote_types(image.dtype, jnp.float32))
    return operation(exact, *parameters).astype(image.dtype)
  return on_levels


@on_levels
def adjust_brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) times `factor` >= 0: PIL's ImageEnhance.Brightness."""
  return blend(0.0, image, factor)


@on_levels
def adjust_contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) blended with its mean grey: PIL's ImageEnhance.Contrast. 1 is the identity."""
  return blend(mean_level(luma(image)), image, factor)


@on_levels
def adjust_saturation(image: jax.Array, factor: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) blended with its grey version: PIL's ImageEnhance.Color. 1 is the identity."""
  return blend(luma(image), image, factor)


@on_levels
def adjust_sharpness(image: jax.Array, factor: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) blended with `smooth` of it: PIL's ImageEnhance.Sharpness. 1 is the identity."""
  return blend(smooth(image), image, factor)


@on_levels
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


@on_levels
def posterize(image: jax.Array, bits: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) with only the upper `bits` (i32, 0..8) of each level: PIL's ImageOps.posterize."""
  step = (1 << (8 - bits)).astype(image.dtype)  # a power of two: dividing by it is exact
  return jnp.floor(image * (1.0 / step)) * step


@on_levels
def solarize(image: jax.Array, threshold: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) with levels >= `threshold` inverted: PIL's ImageOps.solarize. 256: identity."""
  return jnp.where(image < threshold, image, 255.0 - image)


@on_levels
def solarize_add(image: jax.Array, add: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) with `add` (i32) more in each level below 128, and at most 255. 0: identity."""
  return jnp.where(image < 128, jnp.minimum(image + add, 255.0), image)


@on_levels
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


@on_levels
def grayscale(image: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) with three equal channels: PIL's convert("L")."""
  return jnp.broadcast_to(luma(image), image.shape)


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
    # A loop for the same reason as in `photometric.color_jitter`.
    levels = jax.lax.fori_loop(0, 3, lambda _, x, axis=axis: box(axis, x), levels)
  return levels.astype(image.dtype)


def on_grid(factor: jax.Array) -> jax.Array:
  """Returns the nearest multiple of 2^-12: the factors for which the blends are exact."""
  return jnp.round(factor * (1.0 / _FACTOR_STEP)) * _FACTOR_STEP


def blend(target: jax.Array | float, image: jax.Array, factor: jax.Array) -> jax.Array:
  """Returns target + factor * (image - target), PIL's Image.blend: float32, clipped, cut to whole levels."""
  return jnp.floor(jnp.clip(target + factor * (image - target), 0.0, 255.0))


def luma(image: jax.Array) -> jax.Array:
  """Returns the grey levels [1, H, W] of `image` ([3, H, W]) that PIL's convert("L") gives."""
  # PIL's weights are 16-bit fixed point: every partial sum is below 2^24 and so exact in float32.
  red, green, blue = image[0:1], image[1:2], image[2:3]
  return jnp.floor((19595.0 * red + 38470.0 * green + 7471.0 * blue + 32768.0) * 2.0**-16)


def smooth(image: jax.Array) -> jax.Array:
  """Returns `image` (f32[3, H, W]) after PIL's ImageFilter.SMOOTH.

  3 x 3 weights of 1, 5 in the middle, over 13; the outermost pixels stay.
  """
  height, width = image.shape[1:]
  padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1)))
  rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
  box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
  smoothed = jnp.floor((box + 4.0 * image) * (1.0 / 13.0) + 0.5)  # n / 13 is at least 1/26 away from any half
  y, x = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
  inside = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
  return jnp.where(inside[None], smoothed, image)


def mean_level(grey: jax.Array) -> jax.Array:
  """Returns the scalar int(mean + 0.5) of whole levels of any shape."""
  # In whole numbers: a float32 sum can be inexact from 65,794 pixels on, this from 4.2 million.
  total = jnp.sum(grey.astype(jnp.int32))
  return ((2 * total + grey.size) // (2 * grey.size)).astype(grey.dtype)
