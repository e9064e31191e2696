"""Winograd's algorithms: each axis alone in float64, whole convolutions in every type, and where they are chosen."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pirl_jax.models import convolution, winograd


def plain(images, kernel):
  return jax.lax.conv_general_dilated(images, kernel, (1, 1), ((1, 1), (1, 1)),
                                      dimension_numbers=("NHWC", "HWIO", "NHWC"))


def ours(images, kernel):
  return convolution.conv(images, kernel, (1, 1), ((1, 1), (1, 1)))


def value_and_gradients(conv, images, kernel, slope):
  result, pull = jax.vjp(conv, images, kernel)
  return result, *pull(slope)


def draw(shape, features, dtype):
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.standard_normal(size), dtype) for size in (
    shape, (3, 3, shape[-1], features), (*shape[:3], features)))


@pytest.fixture
def everywhere(monkeypatch):
  """Every 3x3 convolution of stride 1 is computed so, however small."""
  for name in ("CHANNELS", "WHOLE_CHANNELS", "TILES", "PRODUCTS"):
    monkeypatch.setattr(winograd, name, 1)


@pytest.mark.parametrize("side", [2, 3, 4])
def test_an_axis_is_the_correlation_with_the_kernel(side):
  how = winograd.choose(side, side)
  rng = np.random.default_rng(side)
  kernel, points = rng.standard_normal(3), np.pad(rng.standard_normal(side), 1)
  assert how.results.shape[0] == side
  np.testing.assert_allclose(how.results @ ((how.kernel @ kernel) * (how.points @ points)),
                             np.correlate(points, kernel, "valid"), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size, products", [((2, 2), 9), ((3, 3), 25), ((4, 4), 36), ((6, 6), 100), ((8, 8), 144),
                                            ((7, 7), 144), ((12, 12), 324), ((2, 3), 25)])
def test_the_fewest_products_are_chosen(size, products):
  how = winograd.choose(*size)
  assert winograd.num_tiles(how, *size) * len(how.kernel) ** 2 == products


SHAPES = st.tuples(st.sampled_from([1, 3, 16]), st.integers(2, 13), st.integers(2, 13), st.sampled_from([1, 5, 32]))


@given(SHAPES, st.sampled_from([1, 7, 32]))
@settings(max_examples=12, deadline=None)
def test_random_shapes(shape, features):
  compare(shape, features)


@pytest.mark.slow
@given(SHAPES, st.sampled_from([1, 7, 32]))
@settings(max_examples=200, deadline=None)
def test_many_random_shapes(shape, features):
  compare(shape, features)


def compare(shape, features):
  def winograds(images, kernel, slope):
    return (winograd.convolve(images, kernel, precision=None), winograd.images_slope(kernel, slope, precision=None),
            winograd.kernel_slope(images, slope, precision=None))

  with jax.enable_x64(True):
    exact = jax.jit(partial(value_and_gradients, plain))(*draw(shape, features, jnp.float64))
    for dtype, tolerance in ((jnp.float64, 1e-12), (jnp.float32, 5e-6)):
      for found, expected in zip(jax.jit(winograds)(*draw(shape, features, dtype)), exact, strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1e-3, jnp.abs(expected).max()))


@pytest.mark.parametrize("shape", [(64, 8, 8, 32), (64, 6, 5, 32), (160, 2, 2, 128)])
def test_bfloat16_is_rounded_once(everywhere, shape):
  given = draw(shape, shape[-1], jnp.bfloat16)
  found, expected = (jax.jit(partial(value_and_gradients, conv))(*given) for conv in (ours, plain))
  for a, b in zip(found, expected, strict=True):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=2**-8 * np.abs(b).max())


def test_in_a_loop_and_on_eight_devices_the_gradients_are_the_same(everywhere):
  """Each device has its own images; the kernel is the same on all, so that its gradient is summed."""
  images, kernel, _ = draw((48, 6, 7, 4), 5, jnp.float32)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

  def gradients(conv):
    def loss(images, kernel):
      def add(total, part):
        return total + jnp.sum(jnp.sin(conv(part, kernel))), None
      total, _ = jax.lax.scan(add, jnp.sum(images) * 0, images.reshape(2, -1, *images.shape[1:]))
      return jax.lax.psum(total, "data")
    specs = P("data"), P()
    return jax.jit(jax.shard_map(jax.grad(loss, argnums=(0, 1)), mesh=mesh, in_specs=specs, out_specs=specs))

  found, expected = (gradients(conv)(images, kernel) for conv in (ours, plain))
  # The sums are up to 32 and lose a few of their last bits.
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=5e-4), found, expected)


@pytest.mark.parametrize("shape, features, stride, chosen", [
  ((32, 32, 32, 64), 64, 1, True), ((1152, 3, 3, 32), 32, 1, True), ((288, 2, 2, 512), 512, 1, True),
  ((32, 32, 32, 64), 128, 2, False),  # it has no strides
  ((128, 16, 16, 16), 16, 1, False), ((1152, 2, 2, 64), 64, 1, False),  # thin products
  ((8, 4, 4, 512), 512, 1, False),  # few tiles
  ((32, 8, 8, 32), 32, 1, False),  # too little to be worth compiling
])
def test_where_it_is_chosen(shape, features, stride, chosen):
  def run(images, kernel):
    return convolution.conv(images, kernel, (stride, stride), ((1, 1), (1, 1)))

  text = jax.jit(jax.grad(lambda *given: run(*given).sum(), argnums=(0, 1))).lower(
    *(jax.ShapeDtypeStruct(size, jnp.float32) for size in (shape, (3, 3, shape[-1], features)))).as_text()
  products = re.findall(r"stablehlo.dot_general.*batching_dims = \[0\] x \[0\]", text)
  assert bool(products) == chosen


def test_the_program_has_no_conditional_and_other_platforms_have_xlas_own():
  given = [jax.ShapeDtypeStruct(size, jnp.float32) for size in ((128, 8, 8, 32), (3, 3, 32, 32))]
  def gradients(conv):
    return jax.jit(jax.grad(lambda *given: conv(*given).sum(), argnums=(0, 1)))

  compiled = gradients(ours).lower(*given).compile().as_text()
  assert "conditional(" not in compiled and "convolution(" not in compiled
  for platform in ("cuda", "tpu"):
    text = gradients(ours).trace(*given).lower(lowering_platforms=(platform,)).as_text()
    assert not re.search(r"stablehlo\.(while|dot_general)", text) and "stablehlo.convolution" in text
