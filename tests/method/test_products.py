"""Products of embeddings and rows in halves of bfloat16, against float64; and what a platform compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pirl_jax.method import products


def unit_rows(rng, count, dim):
  x = rng.standard_normal((count, dim))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("count", "num_rows", "dim"), [(1, 1, 1), (7, 300, 128), (64, 33, 16)])
def test_halves_are_exact_to_a_hundred_thousandth(count, num_rows, dim):
  rng = np.random.default_rng(0)
  embeddings, rows = unit_rows(rng, count, dim), unit_rows(rng, num_rows, dim)
  slope = (rng.standard_normal((count, num_rows)) * 10.0 ** rng.uniform(-20, 3, (count, 1))).astype(np.float32)
  found = jax.jit(products._forward)(embeddings, rows)
  gradient = jax.jit(products._embeddings_slope)(slope, rows)
  assert found.dtype == gradient.dtype == jnp.float32
  np.testing.assert_allclose(found, embeddings.astype(float) @ rows.astype(float).T, rtol=0, atol=1e-5)
  lengths = np.linalg.norm(slope.astype(float), axis=1, keepdims=True) * num_rows**0.5
  np.testing.assert_allclose(gradient / lengths, slope.astype(float) @ rows.astype(float) / lengths, rtol=0, atol=1e-5)
  high, high_rows = (np.asarray(products._halves(x)[0], float) for x in (embeddings, rows))
  assert dim == 1 or np.abs(high @ high_rows.T - embeddings.astype(float) @ rows.astype(float).T).max() > 1e-4


def test_value_and_gradient_on_this_platform_are_exact():
  rng = np.random.default_rng(1)
  embeddings, rows = unit_rows(rng, 5, 8), unit_rows(rng, 11, 8)

  def value(product, embeddings, rows):
    return jnp.sum(jnp.sin(product(embeddings, rows)))

  for product in (products.exact, products.in_halves):
    of_embeddings = jax.grad(value, argnums=1)(product, embeddings, rows)
    np.testing.assert_allclose(of_embeddings, np.cos(embeddings @ rows.T) @ rows, rtol=1e-5, atol=1e-6)
  assert not jax.grad(value, argnums=2)(products.in_halves, embeddings, rows).any()  # rows are constants


def dots(product, platform):
  """Returns the lines of the products in the program of a value and its gradient."""
  def gradient(embeddings, rows):
    return jax.grad(lambda x: jnp.sum(product(x, rows) ** 2))(embeddings)

  shapes = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((16, 8), jnp.float32)
  text = jax.jit(gradient).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
  found = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
  assert len(found) == 2
  return found


@pytest.mark.parametrize(("platform", "types"), [("cuda", "bf16"), ("tpu", "bf16"), ("cpu", "f32")])
def test_a_chip_multiplies_bfloat16(platform, types):
  assert all(f"x{types}>, " in dot.rpartition(" : ")[2] for dot in dots(products.in_halves, platform))


@pytest.mark.parametrize(("product", "platform"), [
  (products.exact, "cuda"), (products.exact, "tpu"), (products.exact, "cpu"), (products.in_halves, "cpu")])
def test_exact_products_are_in_full_float32(product, platform):
  assert all("precision = [HIGHEST, HIGHEST]" in dot for dot in dots(product, platform))


@pytest.mark.parametrize("num_devices", [1, 8])
def test_with_rows_split_over_devices_the_gradient_is_that_of_all_rows(num_devices):
  rng = np.random.default_rng(2)
  embeddings, rows = unit_rows(rng, 5, 8), unit_rows(rng, 16, 8)
  mesh = jax.make_mesh((num_devices,), ("data",), devices=jax.devices()[:num_devices],
                       axis_types=(jax.sharding.AxisType.Auto,))

  def gradient(embeddings, rows):
    def value(embeddings):
      return jax.lax.psum(jnp.sum(jnp.sin(products.in_halves(embeddings, rows))), "data")
    return jax.grad(value)(embeddings)

  mapped = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
  np.testing.assert_allclose(mapped(embeddings, rows), np.cos(embeddings @ rows.T) @ rows, rtol=1e-5, atol=1e-6)
  lowered = mapped.trace(embeddings, rows).lower(lowering_platforms=("cuda",)).as_text()
  assert "all_reduce" in lowered and "bf16" in lowered
