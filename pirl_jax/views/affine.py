"""Affine transforms of 8-bit images, bit for bit PIL's transform(size, AFFINE, matrix, BILINEAR, fillcolor=FILL).

A matrix is i32[6] = (a, b, c, d, e, f): the pixel (x, y) of the result shows the place (a X + b Y + c, d X + e Y + f)
of the image, where X = x + 1/2 and Y = y + 1/2. a, b, d, e are in units of 2^-10, and c, f, in pixels, in units of
2^-11. A place then is a multiple of 2^-11, and the sum of four levels with bilinear weights has 8 + 11 + 11 bits: 32
bits hold the sum without an error, as PIL's double does.

Letters: H W height and width.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

_ONE = 1 << 10  # 1 in units of a, b, d, e
_PIXEL = 1 << 11  # a pixel in units of c, f
_LONGER, _SHORTER = 0.16, 0.14  # a little more than 1 / cos - 1 and 1 - cos of 30 degrees
FILL = (124, 116, 104)
"""The colour of what lies outside of the image, as in PyContrast's InfoMin: the mean of ImageNet."""


def rotation(radians: jax.Array, *, height: int, width: int) -> jax.Array:
  """Returns the matrix i32[6] that turns an image counter-clockwise about its centre, as PIL's Image.rotate."""
  cos = jnp.round(_ONE * jnp.cos(radians)).astype(jnp.int32)
  sin = jnp.round(_ONE * jnp.sin(radians)).astype(jnp.int32)
  # c and f keep the centre, (W / 2, H / 2), where it is.
  return jnp.stack([cos, -sin, (_ONE - cos) * width + sin * height,
                    sin, cos, (_ONE - cos) * height - sin * width])


def shear(*, x: jax.Array | float = 0.0, y: jax.Array | float = 0.0) -> jax.Array:
  """Returns the matrix i32[6] of the places (X + x Y, y X + Y)."""
  return _matrix(b=_ONE * x, d=_ONE * y)


def translation(*, x: jax.Array | float = 0.0, y: jax.Array | float = 0.0) -> jax.Array:
  """Returns the matrix i32[6] of the places (X + x, Y + y), in pixels."""
  return _matrix(c=_PIXEL * x, f=_PIXEL * y)


def _matrix(*, b: jax.Array | float = 0, c: jax.Array | float = 0, d: jax.Array | float = 0,
            f: jax.Array | float = 0) -> jax.Array:
  return jnp.stack([jnp.round(value).astype(jnp.int32) for value in (_ONE, b, c, d, _ONE, f)])


def affine(image: jax.Array, matrix: jax.Array) -> jax.Array:
  """Returns `image` ([3, H, W], whole levels 0..255 of any dtype) after the transform with `matrix`, in its dtype.

  `matrix` is one of this file, see there, with a rotation of at most 30 degrees.
  """
  return jax.lax.platform_dependent(image, matrix, tpu=_by_shifts, default=_by_gather)


def _by_gather(image: jax.Array, matrix: jax.Array) -> jax.Array:
  """Returns the transformed image: a gather for each of the four pixels around a place. Any matrix will do."""
  _, height, width = image.shape
  column, row = _places(matrix, jnp.arange(width)[None, :], jnp.arange(height)[:, None])
  (left, to_right), (above, to_below) = _split(column), _split(row)
  # The three levels of a pixel are one number, so that there are four gathers, not twelve.
  red, green, blue = image.astype(jnp.uint32)
  pixels = (red | green << 8 | blue << 16).reshape(-1)
  rows, columns = [jnp.clip(above + i, 0, height - 1) * width for i in (0, 1)], [
    jnp.clip(left + i, 0, width - 1) for i in (0, 1)]
  around = [pixels.at[i + j].get(mode="promise_in_bounds") for i in rows for j in columns]
  levels = [_bilinear([pixel >> shift & 255 for pixel in around], to_right, to_below) for shift in (0, 8, 16)]
  return _filled(levels, column, row, image)


def _by_shifts(image: jax.Array, matrix: jax.Array) -> jax.Array:
  """Returns the transformed image: levels move within their columns, then within their rows, without a gather.

  For a TPU, which gathers pixels one after the other. Along a row of the result the places advance by more than half a
  column, and at most one (a in (1/2, 1]): a column of the image lies left of one or two of them. Their rows are known
  without knowing which pixels of the result they are; so a pass along the columns finds their levels, and a pass along
  the rows takes the levels to their pixels. An image of 224 pixels takes 0.27 ms of a v5e by its compiler's estimate;
  with comparisons of each place with every row, and then with every column, it would take 0.63.
  """
  _, height, width = image.shape
  a, b, c = matrix[:3]
  x, y, left = jnp.arange(width)[None, :], jnp.arange(height)[:, None], jnp.arange(-1, width)[None, :]
  first = -((b * (2 * y + 1) + c + a - _PIXEL // 2 - _PIXEL * left) // (2 * a))  # the first such pixel, i32[H, W + 1]
  column, row = (jnp.stack(two) for two in zip(*(_places(matrix, first + i, y) for i in (0, 1)), strict=True))
  above, to_below = _split(row)  # [2, H, W + 1]
  levels = jnp.pad(image.astype(jnp.uint32), ((0, 0), (1, 1), (1, 1)), mode="edge")
  # The four levels around a place are the bytes of one number.
  upper, lower = (rows[:, :, :-1] | rows[:, :, 1:] << 8 for rows in (levels[:, :-1], levels[:, 1:]))
  # Down a column the places advance by 1 / cos of the angle instead of 1. That the first pixel is a whole one moves a
  # place by less than sin, and to the second pixel it is sin: one row more in all.
  around = _moved(upper | lower << 16, above + 1, span=math.ceil(_LONGER * height) + 2)  # [2, 3, H, W + 1]
  red, green, blue = jnp.moveaxis(_bilinear([around >> shift & 255 for shift in (0, 8, 16, 24)],
                                            _split(column)[1][:, None], to_below[:, None]), 1, 0)
  column, row = _places(matrix, x, y)
  own = _split(column)[0]
  pixels = _moved((red | green << 8 | blue << 16).swapaxes(1, 2), (own + 1).T[None],
                  span=math.ceil(_SHORTER * width) + 1)[0].swapaxes(1, 2)  # [2, H, W]
  pixel = jnp.where(_split(column - 2 * a)[0] == own, pixels[1], pixels[0])
  return _filled([pixel >> shift & 255 for shift in (0, 8, 16)], column, row, image)


def _moved(planes: jax.Array, index: jax.Array, *, span: int) -> jax.Array:
  """Returns planes[:, index] within each column, u32[N, P, K, W], for planes u32[P, H, W] and index i32[N, K, W].

  In each column index - arange(K) has at most `span` + 1 values. Rows outside of the planes are their outermost ones.
  """
  size, length = planes.shape[1], index.shape[1]
  steps = index - jnp.arange(length)[None, :, None]
  base = jnp.min(steps, axis=(0, 1), keepdims=True)  # of each column; bit by bit the columns move that far as wholes
  shift = jnp.clip(base, -size, size) + size
  bits = (2 * size).bit_length()
  planes = jnp.pad(planes, ((0, 0), (size, length + span + (1 << bits) - 1 - 2 * size), (0, 0)), mode="edge")
  for bit in reversed(range(bits)):
    planes = jnp.where(shift >> bit & 1 == 1, planes[:, 1 << bit:], planes[:, :-(1 << bit)])
  rest = (steps - base)[:, None]
  found = jnp.zeros_like(planes[None, :, :length])
  for i in range(span + 1):
    found = jnp.where(rest == i, planes[None, :, i:i + length], found)
  return found


def _places(matrix: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the places (column, row) that the pixels (x, y) show, in units of 2^-11."""
  a, b, c, d, e, f = matrix
  x, y = 2 * x + 1, 2 * y + 1
  return a * x + b * y + c, d * x + e * y + f


def _split(place: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the last pixel whose centre is not beyond the place, and how far the place is from this centre."""
  place = place - _PIXEL // 2
  return place >> 11, place & _PIXEL - 1


def _bilinear(around: Sequence[jax.Array], to_right: jax.Array, to_below: jax.Array) -> jax.Array:
  """Returns the levels (u32, cut to whole ones) at places among four levels (u32), rows first."""
  right, below = to_right.astype(jnp.uint32), to_below.astype(jnp.uint32)
  upper, lower = ((_PIXEL - right) * one + right * other for one, other in (around[:2], around[2:]))
  return (_PIXEL - below) * upper + below * lower >> 22


def _filled(levels: Sequence[jax.Array], column: jax.Array, row: jax.Array, image: jax.Array) -> jax.Array:
  """Returns the three `levels` (u32[H, W]) like `image`, with `FILL` where the place is outside of the image."""
  _, height, width = image.shape
  inside = (column >= 0) & (column < _PIXEL * width) & (row >= 0) & (row < _PIXEL * height)
  filled = [jnp.where(inside, level, fill) for level, fill in zip(levels, FILL, strict=True)]
  return jnp.stack([level.astype(image.dtype) for level in filled])
