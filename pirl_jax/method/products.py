"""Products of embeddings with rows of the memory bank, as exact as the embeddings themselves.

Letters: B batch, K rows, D embedding.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pirl_jax.runtime.mesh import varying_alike


def exact(embeddings: jax.Array, rows: jax.Array) -> jax.Array:
  """Returns the products f32[B, K] of embeddings f32[B, D] and rows f32[K, D], in full float32 (float64 stays).

  By default a GPU or TPU rounds the factors to fewer bits, and the division by the temperature magnifies the error.
  """
  return jnp.matmul(embeddings, rows.T, precision=lax.Precision.HIGHEST)


def in_halves(embeddings: jax.Array, rows: jax.Array) -> jax.Array:
  """Returns the products f32[B, K] of embeddings f32[B, D] and rows f32[K, D], to 1e-5 of the lengths.

  For embeddings of a trunk in bfloat16, which carry an error of 4e-3. An H100 multiplies bfloat16 at 15 times the rate
  of float32, and a TPU multiplies nothing else. So each factor is split into two numbers of bfloat16, high + low. The
  products high high, low high and high low are taken as one product of three times the depth, which writes nothing but
  its result. On a CPU the product is `exact`.

  Args:
    embeddings: the gradient is taken by them, likewise to 1e-5.
    rows: constants.
  """
  return _in_halves(*varying_alike(embeddings, lax.stop_gradient(rows)))


@jax.custom_vjp
def _in_halves(embeddings: jax.Array, rows: jax.Array) -> jax.Array:
  return lax.platform_dependent(embeddings, rows, cpu=exact, default=_forward)


def _in_halves_fwd(embeddings: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
  return _in_halves(embeddings, rows), rows


def _in_halves_bwd(rows: jax.Array, slope: jax.Array) -> tuple[jax.Array, jax.Array]:
  return lax.platform_dependent(slope, rows, cpu=_exact_slope, default=_embeddings_slope), jnp.zeros_like(rows)


_in_halves.defvjp(_in_halves_fwd, _in_halves_bwd)


def _forward(embeddings: jax.Array, rows: jax.Array) -> jax.Array:
  (high, low), (rows_high, rows_low) = _halves(embeddings), _halves(rows)
  left, right = jnp.concatenate([high, low, high], axis=1), jnp.concatenate([rows_high, rows_high, rows_low], axis=1)
  return jnp.matmul(left, right.T, preferred_element_type=embeddings.dtype)


def _embeddings_slope(slope: jax.Array, rows: jax.Array) -> jax.Array:
  """Returns the gradient by the embeddings, f32[B, D], of that by the products, f32[B, K]."""
  count, dim = len(slope), rows.shape[1]
  # All four products at once: to leave low low out, the slope's high half would be read or written twice.
  all_four = jnp.matmul(jnp.concatenate(_halves(slope)), jnp.concatenate(_halves(rows), axis=1),
                        preferred_element_type=slope.dtype)
  return all_four[:count, :dim] + all_four[count:, :dim] + all_four[:count, dim:]


def _exact_slope(slope: jax.Array, rows: jax.Array) -> jax.Array:
  return jnp.matmul(slope, rows, precision=lax.Precision.HIGHEST)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (high, low), bf16 each, whose sum is x f32 to 2**-17 of it."""
  # `reduce_precision`, because XLA may drop a conversion to bfloat16 and back, and low would be 0.
  high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
  return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)
