"""Max pooling of the ImageNet stem, in the form that each platform is quick with.

XLA derives the gradient of a max pool as a `select_and_scatter`. A TPU has hardware for it. A GPU adds with atomics:
20 GB of traffic for a batch of 1,024, an order of additions that differs from run to run, and a quarter of that traffic
is enough for the form of this module: the forward pass notes which point of each window is the largest, and the
gradient of a point is gathered from the windows that chose it.

Letters: N images, H W height and width, C channels, h w those of the result.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from pirl_jax.runtime.platforms import by_platform

SIZE, STRIDE, PAD = 3, 2, 1


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
  """Returns the largest of each 3 x 3 window, stride 2, padding 1: f[N, h, w, C] of f[N, H, W, C].

  The gradient of a window goes to the first of its largest points, rows first.
  """
  return nn.max_pool(x, (SIZE, SIZE), strides=(STRIDE, STRIDE), padding=((PAD, PAD), (PAD, PAD)))


def _max_pool_fwd(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  out, choice = by_platform(x, gpu=_choose, default=_choose_nothing)
  # XLA keeps the one of them that the gradient of the platform reads.
  return out, (x, choice)


def _max_pool_bwd(given: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[jax.Array]:
  return (by_platform(*given, slope, gpu=_gather, default=_scatter),)


max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


def _choose_nothing(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  out = max_pool(x)
  return out, jnp.zeros_like(out, jnp.uint8)


def _choose(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the pooled points f[N, h, w, C], and the place in its window of each, u8[N, h, w, C]: 3 row + column."""
  padded = jnp.pad(x, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), constant_values=-jnp.inf)
  height, width = ((side - 1) // STRIDE + 1 for side in x.shape[1:3])

  def points(row: int, column: int) -> jax.Array:
    return jax.lax.slice(padded, (0, row, column, 0), (
      len(x), row + STRIDE * (height - 1) + 1, column + STRIDE * (width - 1) + 1, x.shape[3]), (1, STRIDE, STRIDE, 1))

  largest = points(0, 0)
  choice = jnp.zeros_like(largest, jnp.uint8)
  for place, (row, column) in enumerate(itertools.product(range(SIZE), repeat=2)):
    other = points(row, column)
    choice = jnp.where(other > largest, jnp.uint8(place), choice)
    largest = jnp.maximum(other, largest)
  return largest, choice


def _gather(x: jax.Array, choice: jax.Array, slope: jax.Array) -> jax.Array:
  """Returns the gradient by the points, f[N, H, W, C], of that by the pooled ones, f[N, h, w, C]."""
  exact = slope.astype(jnp.promote_types(slope.dtype, jnp.float32))
  total = jnp.zeros(x.shape, exact.dtype)
  for place, offsets in enumerate(itertools.product(range(SIZE), repeat=2)):
    chosen = jnp.where(choice == place, exact, 0)
    # Row y of the result begins at row STRIDE y - PAD + offset of x.
    sides = [(offset - PAD, side - (offset - PAD) - STRIDE * (n - 1) - 1, STRIDE - 1)
             for offset, side, n in zip(offsets, x.shape[1:3], slope.shape[1:3], strict=True)]
    total += jax.lax.pad(chosen, jnp.zeros((), exact.dtype), ((0, 0, 0), *sides, (0, 0, 0)))
  return total.astype(slope.dtype)


def _scatter(x: jax.Array, choice: jax.Array, slope: jax.Array) -> jax.Array:
  del choice
  return jax.vjp(max_pool.fun, x)[1](slope)[0]
