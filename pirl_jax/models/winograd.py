"""Convolutions with 3 x 3 points by a quarter to a half of the multiplications, and their gradients.

Winograd's algorithms (Lavin and Gray, 2016, "Fast algorithms for convolutional neural networks"): the image is cut into
tiles of m x m results. Along each axis the m + 2 points that a tile looks at become n sums B^T x, the 3 points of the
kernel n sums G w; one product for each of the n x n pairs, and the m results are sums A^T of the products. The products
are matrix products over channels, [tiles, C] x [C, O], so that 3 x 3 m m multiplications become n n.

The n sums along one axis are the iterations of a loop, with the coefficients as data. Written out, a convolution is
3 n n small programs, no faster and five times as long to compile (1.2 s instead of 0.24). The loop also keeps XLA from
computing the sums of the other axis, outside of it, again for each of these.

Letters: N images, H W height and width, C channels, O channels of the result; T tiles of all images; m results of a
tile along an axis, n products, t tiles along an axis.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CHANNELS, WHOLE_CHANNELS = 32, 128
"""Least channels, in and out, and that for images of 2 x 2 points. With fewer the matrix products are thin:
16 channels at 16 x 16 points take 2.6 ms instead of 2.0, 64 at 2 x 2 1.9 instead of 1.6; 32 at 8 x 8 1.2, not 1.7."""

TILES = 32
"""Least tiles of all images. A kernel of 512 x 512 channels grows fourfold: for 8 tiles 11.0 ms instead of 7.6, for 32
16 instead of 25."""

PRODUCTS = 2**23
"""Least points times channels in times channels out. Each such convolution takes 0.2 s longer to compile."""


class Algorithm(NamedTuple):
  """One way to compute m results along an axis: `results @ ((kernel @ w) * (points @ x))`.

  Attributes:
    results: A^T, f[m, n].
    kernel: G, f[n, 3].
    points: B^T, f[n, m + 2].
  """

  results: np.ndarray
  kernel: np.ndarray
  points: np.ndarray


def _interpolating(at: Sequence[float]) -> Algorithm:
  """Returns the algorithm that evaluates polynomials at these n - 1 numbers and at infinity (Toom, Cook)."""
  numbers = np.array(at)
  num, others = len(at) + 1, [np.delete(numbers, i) for i in range(len(at))]
  points = np.zeros((num, num))
  points[:-1, :-1] = [np.poly(rest)[::-1] for rest in others]
  points[-1] = np.poly(numbers)[::-1]
  scale = np.array([np.prod(number - rest) for number, rest in zip(numbers, others, strict=True)])
  kernel = np.vstack([numbers[:, None] ** np.arange(3) / scale[:, None], [[0, 0, 1]]])
  results = np.hstack([(numbers[:, None] ** np.arange(num - 2)).T, np.eye(num - 2)[:, -1:]])
  return Algorithm(results, kernel, points)


# Of the multiples of 1/8 that were tried these have the smallest error in float32: 8e-7 and 1.7e-6 of the largest
# result, where the plain convolution has 2e-7 (0, 1, -1, 2, -2: 7e-6).
_THREE = _interpolating([0.5, -0.5, 1.25, -1.25])
_FOUR = _interpolating([0, 0.75, -0.75, 1.5, -1.5])

_WHOLE_TWO = Algorithm(  # two points, nothing beside them: w1 (x0 + x1) serves both results (Karatsuba)
  results=np.array([[1, 1, 0], [1, 0, 1]]), kernel=np.array([[0, 1, 0], [0, -1, 1], [1, -1, 0]]),
  points=np.array([[0, 1, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0]]))


def choose(height: int, width: int) -> Algorithm:
  """Returns the algorithm with the fewest products for images of that size; both sides are at least 2."""
  if max(height, width) <= 2:
    return _WHOLE_TWO
  return min((_THREE, _FOUR), key=lambda how: num_tiles(how, height, width) * len(how.kernel) ** 2)


def num_tiles(how: Algorithm, height: int, width: int) -> int:
  """Returns how many tiles an image has."""
  m = len(how.results)
  return -(-height // m) * -(-width // m)


def is_worthwhile(num: int, height: int, width: int, channels: int, features: int) -> bool:
  """Returns whether a convolution of that shape, `num` images, is faster so than as XLA's own on a CPU."""
  if min(height, width) < 2:
    return False
  how = choose(height, width)
  return (min(channels, features) >= (WHOLE_CHANNELS if how is _WHOLE_TWO else CHANNELS)
          and num * num_tiles(how, height, width) >= TILES
          and num * height * width * channels * features >= PRODUCTS)


def convolve(images: jax.Array, kernel: jax.Array, *, precision: Any) -> jax.Array:
  """Returns the convolution f[N, H, W, O] of images f[N, H, W, C] with a kernel f[3, 3, C, O]: stride 1, padding 1."""
  how = choose(*images.shape[1:3])
  return _convolved(images, kernel, how, how.kernel, 0, precision)


def images_slope(kernel: jax.Array, slope: jax.Array, *, precision: Any) -> jax.Array:
  """Returns the gradient by the images, f[N, H, W, C], of that by the result f[N, H, W, O] of `convolve`."""
  how = choose(*slope.shape[1:3])
  # The kernel is turned by turning G, and its channels are swapped by the product: XLA's transpose costs 50 ms for 512.
  return _convolved(slope, kernel, how, how.kernel[:, ::-1], 1, precision)


def _convolved(images: jax.Array, kernel: jax.Array, how: Algorithm, taps: np.ndarray, contracted: int,
               precision: Any) -> jax.Array:
  """Returns `convolve`; `taps` is G, and `contracted` the channels of the kernel, 0 or 1, that join the images'."""
  num, height, width, channels = images.shape
  m, n = how.results.shape
  columns, rows = _sums(how.points, _windows(_padded(images, how, 1), how, axis=1)), _sums(taps, kernel)
  tiles = columns.shape[2], -(-width // m)

  def products(_: None, coefficients: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
    points, taps = coefficients
    points = _sum(points, _windows(columns, how, axis=3)).reshape(n, -1, channels)
    out = jax.lax.dot_general(points, _sum(taps, rows.swapaxes(0, 1)), (((2,), (1 + contracted,)), ((0,), (0,))),
                              precision=precision)
    return None, _sums(how.results, out)

  _, out = jax.lax.scan(products, None, (_as(how.points, images), _as(taps, kernel)))
  out = _sums(how.results, out)  # [m of a row, m of a column, T, O]
  out = out.reshape(m, m, num, *tiles, -1).transpose(2, 3, 1, 4, 0, 5)
  return out.reshape(num, m * tiles[0], m * tiles[1], -1)[:, :height, :width]


def kernel_slope(images: jax.Array, slope: jax.Array, *, precision: Any) -> jax.Array:
  """Returns the gradient by the kernel, f[3, 3, C, O], of that by the result f[N, H, W, O] of `convolve`."""
  how = choose(*images.shape[1:3])
  n = len(how.kernel)
  columns = _sums(how.points, _windows(_padded(images, how, 1), how, axis=1))
  slopes = _sums(how.results.T, _tiled(_padded(slope, how, 0), how, axis=1))

  def products(_: None, coefficients: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
    points, results = coefficients
    points = _sum(points, _windows(columns, how, axis=3)).reshape(n, -1, images.shape[-1])
    results = _sum(results, _tiled(slopes, how, axis=3)).reshape(n, -1, slope.shape[-1])
    out = jax.lax.dot_general(points, results, (((1,), (1,)), ((0,), (0,))), precision=precision)
    return None, _sums(how.kernel.T, out)

  _, out = jax.lax.scan(products, None, (_as(how.points, images), _as(how.results.T, slope)))
  return _sums(how.kernel.T, out).swapaxes(0, 1)


def _windows(images: jax.Array, how: Algorithm, axis: int) -> list[jax.Array]:
  """Returns, for each of the m + 2 points that a tile looks at, that point of every tile along the axis."""
  m, side = len(how.results), images.shape[axis]
  return [jax.lax.slice_in_dim(images, i, i + side - m - 1, m, axis) for i in range(m + 2)]


def _tiled(slope: jax.Array, how: Algorithm, axis: int) -> list[jax.Array]:
  """Returns, for each of the m results of a tile, that result of every tile along the axis."""
  return [jax.lax.slice_in_dim(slope, i, None, len(how.results), axis) for i in range(len(how.results))]


def _padded(x: jax.Array, how: Algorithm, edge: int) -> jax.Array:
  """Returns images with so many zeros around that both sides are those of whole tiles, with an edge of zeros."""
  m = len(how.results)
  return jnp.pad(x, ((0, 0), *((edge, -side % m + edge) for side in x.shape[1:3]), (0, 0)))


def _as(matrix: np.ndarray, like: jax.Array) -> jax.Array:
  return jnp.asarray(matrix, like.dtype)


def _sum(coefficients: jax.Array, terms: Sequence[jax.Array] | jax.Array) -> jax.Array:
  return functools.reduce(jnp.add, (coefficients[i] * terms[i] for i in range(len(terms))))


def _sums(matrix: np.ndarray, terms: Sequence[jax.Array] | jax.Array) -> jax.Array:
  """Returns matrix f[a, b] times b terms, f[a, ...]."""
  weights = _as(matrix, terms[0]).reshape(*matrix.shape, *[1] * terms[0].ndim)
  return functools.reduce(jnp.add, (weights[:, i] * terms[i][None] for i in range(len(terms))))
