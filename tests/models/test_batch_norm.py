"""Batch norm in groups of images: by hand in float64, beside Flax's, and in the whole network."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from pirl_jax.models.batch_norm import create_batch_norm, in_groups
from pirl_jax.models.heads import ClassHead, ImageHead, PatchesClassHead, PatchesHead
from pirl_jax.models.network import Network, create_variables
from pirl_jax.models.resnet import ResNet


def layer(group, *, dtype=jnp.float32):
  return create_batch_norm(train=True, dtype=dtype, param_dtype=jnp.float32, axis=None, group=group)(name="bn")


def random_variables(rng, channels):
  return {"params": {name: rng.normal(size=channels).astype(np.float32) for name in ("scale", "bias")},
          "batch_stats": {name: rng.random(channels).astype(np.float32) for name in ("mean", "var")}}


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-7)])
@pytest.mark.parametrize("shape", [(6, 3, 2, 5), (4, 9, 7), (2, 4)])
def test_groups_by_hand(shape, dtype, tolerance):
  rng = np.random.default_rng(0)
  x, slope = (jnp.asarray(rng.normal(1, 2, size=shape), dtype) for _ in range(2))
  variables = random_variables(rng, shape[-1])
  params, stats = variables["params"], variables["batch_stats"]

  def run(params, x):
    given = {**variables, "params": params}
    out, updated = layer(2, dtype=dtype).apply(given, in_groups(x, 2), mutable=["batch_stats"])
    return out.reshape(shape), updated

  out, pullback, updated = jax.vjp(run, params, x, has_aux=True)
  grads, x_slope = pullback(slope)
  assert out.dtype == x_slope.dtype == dtype
  expected, mean, var, *slopes = oracles.grouped_batch_norm(x, params["scale"], params["bias"], slope, group=2)
  close = partial(np.testing.assert_allclose, rtol=tolerance, atol=20 * tolerance)
  close(np.float64(out), expected)
  for found, by_hand in zip((np.float64(x_slope), grads["scale"], grads["bias"]), slopes, strict=True):
    close(found, by_hand)
  for name, by_hand in (("mean", mean), ("var", var)):
    found = updated["batch_stats"][name]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 0.9 * stats[name] + 0.1 * by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_group_is_flax_and_has_its_variables(dtype):
  rng = np.random.default_rng(0)
  x, variables = jnp.asarray(rng.normal(1, 2, size=(6, 3, 3, 8)), dtype), random_variables(rng, 8)
  (grouped, moved), (plain, expected) = (
    layer(group, dtype=dtype).apply(variables, in_groups(x, group), mutable=["batch_stats"]) for group in (6, None))
  assert grouped.dtype == plain.dtype
  np.testing.assert_allclose(np.float64(grouped[0]), np.float64(plain), rtol=1e-6 if dtype == jnp.float32 else 2**-7,
                             atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, moved, expected)
  made = [jax.eval_shape(layer(group, dtype=dtype).init, jax.random.key(0), in_groups(x, group)) for group in (2, None)]
  assert made[0] == made[1]


def network(name):
  trunk = ResNet(blocks=(1,), bottleneck=False, channels=8, stem="3x3s2", remat=name == "jigsaw")
  heads = {"pirl": (ImageHead(4), PatchesHead(4)), "rotation": (ImageHead(4), ImageHead(4)),
           "jigsaw": (None, PatchesClassHead(3)), "supervised": (ClassHead(3), None)}
  return Network(trunk, *heads[name])


@pytest.mark.parametrize(("name", "patches"), [("pirl", 4), ("rotation", 1), ("jigsaw", 4), ("supervised", 0)])
def test_a_group_of_a_network_is_images_with_all_their_patches(name, patches):
  """A network with groups does what it does with each group alone."""
  rng, size, plain = np.random.default_rng(0), 3, network(name)
  image = rng.normal(size=(2 * size, 8, 8, 3)).astype(np.float32) if plain.image_head else None
  pretext = rng.normal(size=(2 * size, patches, 6, 6, 3)).astype(np.float32) if patches else None
  variables = create_variables(plain, jax.random.key(0), image, pretext)

  def run(network, views):
    return network.apply(variables, *views, train=True, mutable=["batch_stats"])

  outputs, updated = run(plain.with_batch_norm(group=size), (image, pretext))
  halves = [jax.tree.map(lambda x, rows=rows: x[rows], (image, pretext)) for rows in (slice(size), slice(size, None))]
  (first, first_stats), (second, second_stats) = (run(plain, half) for half in halves)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), outputs,
               jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second))
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), updated,
               jax.tree.map(lambda a, b: (a + b) / 2, first_stats, second_stats))
