"""The max pool of every platform against that of Flax: value, gradient, ties, and which program a platform gets."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pirl_jax.models import pooling

SHAPES = [(2, 112, 112, 4), (3, 7, 9, 5), (1, 1, 1, 2), (2, 2, 3, 1), (2, 16, 15, 8)]


def plain(x):
  return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def inputs(shape, dtype, *, ties):
  """Points and the slope by what is pooled; with ties half of the points are zero, as after ReLU."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal(shape), dtype)
  x = jnp.maximum(jnp.round(x), 0) if ties else x
  return x, jnp.asarray(rng.standard_normal(jax.eval_shape(plain, x).shape), dtype)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-7)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_form_of_a_gpu_is_the_plain_one(shape, dtype, tolerance, ties):
  x, slope = inputs(shape, dtype, ties=ties)
  expected, pullback = jax.vjp(plain, x)
  found, choice = jax.jit(pooling._choose)(x)
  gradient = jax.jit(pooling._gather)(x, choice, slope)
  assert found.dtype == gradient.dtype == dtype
  np.testing.assert_array_equal(found, expected)
  # Up to four windows choose a point. In bfloat16 the plain form rounds after each of them.
  np.testing.assert_allclose(np.float64(gradient), np.float64(pullback(slope)[0]), rtol=tolerance, atol=4 * tolerance)


def test_a_nan_is_passed_on():
  x = jnp.zeros((1, 5, 5, 1)).at[0, 2, 2, 0].set(jnp.nan)
  np.testing.assert_array_equal(pooling._choose(x)[0], plain(x))
  assert np.isnan(pooling._choose(x)[0]).any()


def test_elsewhere_the_gradient_is_the_plain_one():
  x, slope = inputs(SHAPES[0], jnp.float32, ties=True)
  (found, pullback), (expected, plain_pullback) = jax.vjp(pooling.max_pool, x), jax.vjp(plain, x)
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(pullback(slope)[0], plain_pullback(slope)[0])


@pytest.mark.parametrize(("platform", "scatters"), [("cuda", False), ("rocm", False), ("tpu", True), ("cpu", True)])
def test_a_gpu_has_no_scatter(platform, scatters):
  def gradient(x, slope):
    return jax.vjp(pooling.max_pool, x)[1](slope)[0]

  text = jax.jit(gradient).trace(*inputs((2, 16, 16, 8), jnp.bfloat16, ties=False)).lower(
    lowering_platforms=(platform,)).as_text()
  assert ("select_and_scatter" in text) == scatters


def test_on_several_devices_each_pools_its_own_images():
  x, _ = inputs((8, 7, 7, 2), jnp.float32, ties=True)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

  def gradient(pool, x):
    return jax.grad(lambda x: jax.lax.psum(jnp.sum(jnp.sin(pool(x))), "data"))(x)

  found, expected = (jax.jit(jax.shard_map(lambda x, pool=pool: gradient(pool, x), mesh=mesh, in_specs=P("data"),
                                           out_specs=P("data")))(x) for pool in (pooling.max_pool, plain))
  np.testing.assert_array_equal(found, expected)
