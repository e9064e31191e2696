"""The convolution of the trunk, in the forms that XLA's CPU backend is quick with.

On a CPU, XLA hands a convolution to a library only if it is written in one order: images NHWC, kernel HWIO, result
NHWC. Every other order is a naive loop, up to a hundred times as slow. XLA brings most convolutions into that order by
itself, but not an image smaller than the kernel (XLA swaps the two), nor, inside a `lax.scan`, the two gradients that
JAX derives. This module writes all of these in that order, or as matrix products. On every other platform the
convolution is XLA's own.

Letters: N images, H W height and width, C channels, h w O those of the result, k l height and width of the kernel.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pirl_jax.models import winograd
from pirl_jax.runtime.mesh import varying_alike

_ORDER = ("NHWC", "HWIO", "NHWC")

CHUNK_SIZE = 2**17
"""Numbers of the images in a chunk of the weight gradient. A longer chunk, transposed, does not fit a core's cache."""

WHOLE_SIZE = 3 * 2**18
"""Numbers of the images and of the slope for which the weight gradient needs no chunks."""

CHUNK_IMAGES = (8, 64)
"""Least and most images in a chunk: fewer make thin products, more are no faster however small the images are."""

FEW_CHANNELS = 16
"""With at most so many channels in and out, a convolution is bound by gathering its windows, not by arithmetic."""

def conv(images: jax.Array, kernel: jax.Array, window_strides: Sequence[int], padding: Sequence[tuple[int, int]], *,
         lhs_dilation: Sequence[int] | None = None, rhs_dilation: Sequence[int] | None = None,
         dimension_numbers: Any = None, feature_group_count: int = 1, precision: Any = None) -> jax.Array:
  """Returns the convolution f[N, h, w, O] of images f[N, H, W, C] with a kernel f[k, l, C, O].

  It takes the arguments of `jax.lax.conv_general_dilated`, for `flax.linen.Conv(conv_general_dilated=conv)`, and gives
  its values and gradients to rounding.

  Args:
    images: in the order NHWC.
    kernel: in the order HWIO, of the same dtype.
    window_strides: the same along both axes.
    padding: symmetric, and the same along both axes.
    lhs_dilation: ones; there is no dilation.
    rhs_dilation: ones.
    dimension_numbers: those of NHWC, HWIO, NHWC.
    feature_group_count: 1; there are no groups.
    precision: see `jax.lax.conv_general_dilated`.
  """
  stride, (pad, _) = window_strides[0], padding[0]
  assert tuple(window_strides) == (stride, stride), window_strides
  assert all(tuple(sides) == (pad, pad) for sides in padding), padding
  assert feature_group_count == 1
  assert all(set(dilation or (1,)) == {1} for dilation in (lhs_dilation, rhs_dilation)), (lhs_dilation, rhs_dilation)
  order = jax.lax.conv_dimension_numbers(images.shape, kernel.shape, _ORDER)
  assert dimension_numbers in (order, None), dimension_numbers
  return _conv(*varying_alike(images, kernel), stride, pad, precision)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(images, kernel, stride, pad, precision):
  return jax.lax.platform_dependent(
    images, kernel, cpu=_widened(partial(_forward, stride=stride, pad=pad, precision=precision)),
    default=partial(_plain, stride=stride, pad=pad, precision=precision))


def _conv_fwd(images, kernel, stride, pad, precision):
  return _conv(images, kernel, stride, pad, precision), (images, kernel)


def _conv_bwd(stride, pad, precision, given, slope):
  how = {"stride": stride, "pad": pad, "precision": precision}

  def images_slope(images, kernel, slope):
    return jax.linear_transpose(partial(_plain, kernel=kernel, **how), images)(slope)[0]

  def kernel_slope(images, kernel, slope):
    return jax.linear_transpose(partial(_plain, images, **how), kernel)(slope)[0]

  return (
    jax.lax.platform_dependent(*given, slope, cpu=_widened(partial(_images_slope, **how)), default=images_slope),
    jax.lax.platform_dependent(*given, slope, cpu=_widened(partial(_kernel_slope, **how)), default=kernel_slope))


_conv.defvjp(_conv_fwd, _conv_bwd)


def _plain(images, kernel, *, stride, pad, precision):
  return jax.lax.conv_general_dilated(images, kernel, (stride, stride), ((pad, pad), (pad, pad)),
                                      dimension_numbers=_ORDER, precision=precision)


def _widened(function):
  """Returns the function computing in float32 at least, as XLA's CPU backend does, rounded once at the end."""
  def widened(*arrays):
    dtype = arrays[0].dtype
    return function(*(x.astype(jnp.promote_types(dtype, jnp.float32)) for x in arrays)).astype(dtype)
  return widened


def _forward(images, kernel, *, stride, pad, precision):
  if _is_product(kernel, pad):
    return _product(images[:, ::stride, ::stride], kernel[0, 0], precision=precision)
  if _is_winograd(images, kernel, stride, pad):
    return winograd.convolve(images, kernel, precision=precision)
  if _num_points(images) <= _num_taps(kernel):
    shape = _result_shape(images, kernel, stride, pad)
    return _product(images.reshape(len(images), -1), _dense(kernel, images, shape, stride, pad),
                    precision=precision).reshape(shape)
  return _in_groups(images, kernel, stride=stride, pad=pad, precision=precision)


def _images_slope(images, kernel, slope, *, stride, pad, precision):
  """Returns the gradient by the images, f[N, H, W, C], of that by the result f[N, h, w, O]."""
  _, height, width, _ = images.shape
  if _is_product(kernel, pad):
    out = _product(slope, kernel[0, 0].T, precision=precision)
    return jax.lax.pad(out, jnp.zeros((), out.dtype), (
      (0, 0, 0), *((0, side - 1 - stride * (n - 1), stride - 1) for side, n in
                   ((height, slope.shape[1]), (width, slope.shape[2]))), (0, 0, 0)))
  if _is_winograd(images, kernel, stride, pad):
    return winograd.images_slope(kernel, slope, precision=precision)
  if _num_points(images) <= _num_taps(kernel) or _num_points(slope) < _num_taps(kernel):
    dense = _dense(kernel, images, slope.shape, stride, pad)
    return _product(slope.reshape(len(slope), -1), dense.T, precision=precision).reshape(images.shape)
  turned = kernel[::-1, ::-1].swapaxes(2, 3)
  if stride == 1 and kernel.shape[0] == kernel.shape[1] > pad:
    return _in_groups(slope, turned, stride=1, pad=len(kernel) - 1 - pad, precision=precision)
  padding = [(k - 1 - pad, side - 1 + pad - stride * (n - 1)) for k, side, n in
             zip(kernel.shape[:2], (height, width), slope.shape[1:3], strict=True)]
  return jax.lax.conv_general_dilated(slope, turned, (1, 1), padding, lhs_dilation=(stride, stride),
                                      dimension_numbers=_ORDER, precision=precision)


def _kernel_slope(images, kernel, slope, *, stride, pad, precision):
  """Returns the gradient by the kernel, f[k, l, C, O], of that by the result f[N, h, w, O]."""
  if _is_product(kernel, pad):
    rows = images[:, ::stride, ::stride].reshape(-1, images.shape[-1])
    return _product(rows.T, slope.reshape(-1, slope.shape[-1]), precision=precision)[None, None]
  if _is_winograd(images, kernel, stride, pad):
    return winograd.kernel_slope(images, slope, precision=precision)
  if _num_points(images) < _num_taps(kernel):
    dense = _product(images.reshape(len(images), -1).T, slope.reshape(len(slope), -1), precision=precision)
    return _undense(dense, kernel, images, slope.shape, stride, pad)
  padding = [(pad, k - 1 - pad - side + 1 + stride * (n - 1)) for k, side, n in
             zip(kernel.shape[:2], images.shape[1:3], slope.shape[1:3], strict=True)]

  def of_chunk(start, size):  # channels take the place of images, and images that of channels
    # Fused with the slice, a transpose becomes a loop that is five times as slow.
    chunk = jax.lax.optimization_barrier(
      [jax.lax.dynamic_slice_in_dim(x, start, size) for x in (images, slope)] if size < len(images)
      else [images, slope])
    out = jax.lax.conv_general_dilated(
      chunk[0].transpose(3, 1, 2, 0), chunk[1].transpose(1, 2, 0, 3), (1, 1), padding, rhs_dilation=(stride, stride),
      dimension_numbers=_ORDER, precision=precision)
    return out.transpose(1, 2, 0, 3)

  size = _chunk_images(images, slope)
  num_chunks, rest = divmod(len(images), size)
  # The first chunk is what the total starts from: inside `shard_map` zeros would not vary over the mesh as it does.
  total = of_chunk(0, size)
  if num_chunks > 1:
    total, _ = jax.lax.scan(lambda total, number: (total + of_chunk(number * size, size), None), total,
                            jnp.arange(1, num_chunks))
  return total + of_chunk(len(images) - rest, rest) if rest else total


def _chunk_images(images, slope):
  """Returns how many images the weight gradient takes at once."""
  if images.size + slope.size <= WHOLE_SIZE:
    return len(images)
  fitting = CHUNK_SIZE // max(1, images[0].size)
  return min(len(images), int(np.clip(1 << max(0, fitting.bit_length() - 1), *CHUNK_IMAGES)))


def _in_groups(images, kernel, *, stride, pad, precision):
  """Returns the convolution, neighbouring points of a row computed at once where there are few channels.

  The points of a group are channels of a wider kernel, which holds the kernel once for each of them, beside zeros: one
  window is gathered for several points. It is the same sum with zeros added.
  """
  size, (_, _, width, features) = kernel.shape[1], _result_shape(images, kernel, stride, pad)
  group = _group_size(kernel, width)
  if group == 1:
    return _plain(images, kernel, stride=stride, pad=pad, precision=precision)
  span = size + stride * (group - 1)  # columns that a group looks at
  wide = jnp.stack([jnp.pad(kernel, ((0, 0), (stride * i, span - size - stride * i), (0, 0), (0, 0)))
                    for i in range(group)], axis=3)
  num_groups = -(-width // group)
  right = span + stride * group * (num_groups - 1) - pad - images.shape[2]
  out = jax.lax.conv_general_dilated(
    images, wide.reshape(*wide.shape[:3], -1), (stride, stride * group), ((pad, pad), (pad, right)),
    dimension_numbers=_ORDER, precision=precision)
  return out.reshape(*out.shape[:2], num_groups * group, features)[:, :, :width]


def _group_size(kernel, width):
  """Returns how many points of a row, `width` long, are best computed at once."""
  channels, features = kernel.shape[2:]
  if max(channels, features) > FEW_CHANNELS:
    return 1
  if channels <= 4:  # the stem: its windows are short, so that more of them are worth their zeros
    return min(4, width)
  return 2 if width % 2 == 0 else 1


def _is_product(kernel, pad):
  """Returns whether a convolution is a matrix product of every point on its own."""
  return kernel.shape[:2] == (1, 1) and not pad


def _is_winograd(images, kernel, stride, pad):
  return kernel.shape[:2] == (3, 3) and stride == pad == 1 and winograd.is_worthwhile(
    *images.shape[:3], *kernel.shape[2:])


def _num_points(images):
  return images.shape[1] * images.shape[2]


def _num_taps(kernel):
  return kernel.shape[0] * kernel.shape[1]


def _product(rows, matrix, *, precision):
  return jnp.matmul(rows, matrix, precision=precision)


def _result_shape(images, kernel, stride, pad):
  height, width = ((side + 2 * pad - k) // stride + 1
                   for side, k in zip(images.shape[1:3], kernel.shape[:2], strict=True))
  return len(images), height, width, kernel.shape[-1]


def _taps(side, num_results, size, stride, pad):
  """Returns which point of a kernel's side joins a point of the image and one of the result, i[side, num_results].

  Where there is none it is `size`, one past the last.
  """
  tap = np.arange(side)[:, None] + pad - stride * np.arange(num_results)
  return np.where((tap >= 0) & (tap < size), tap, size)


def _pairs(kernel, images, result_shape, stride, pad):
  """Returns (row, column) of the kernel's point between two points, i[H, 1, h, 1] and i[1, W, 1, w], see `_taps`."""
  rows, columns = (_taps(images.shape[i + 1], result_shape[i + 1], kernel.shape[i], stride, pad) for i in (0, 1))
  return rows[:, None, :, None], columns[None, :, None, :]


def _dense(kernel, images, result_shape, stride, pad):
  """Returns the matrix f[H W C, h w O] of the convolution: every point of an image to every point of a result."""
  taps = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))[_pairs(kernel, images, result_shape, stride, pad)]
  height, width, h, w, channels, features = taps.shape
  return taps.transpose(0, 1, 4, 2, 3, 5).reshape(height * width * channels, h * w * features)


def _undense(matrix, kernel, images, result_shape, stride, pad):
  """Returns the sums f[k, l, C, O] of what in a matrix f[H W C, h w O] belongs to the same point of the kernel."""
  channels, features = kernel.shape[2:]
  blocks = matrix.reshape(*images.shape[1:3], channels, *result_shape[1:3], features)
  rows, columns = _pairs(kernel, images, result_shape, stride, pad)
  sums = []
  for row, column in np.ndindex(*kernel.shape[:2]):
    pairs = np.argwhere((rows == row) & (columns == column))
    sums.append(sum((blocks[i, j, :, a, b] for i, j, a, b in pairs), jnp.zeros_like(kernel[0, 0])))
  return jnp.stack(sums).reshape(kernel.shape)
