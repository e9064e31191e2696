"""Sums over every row of a split bank, chunk by chunk, against the dense formula in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import PartitionSpec as P

from pirl_jax.method import losses, memory_bank, negatives, products
from pirl_jax.runtime.mesh import AXIS, create_mesh

N, B, D, TAU, Z = 203, 6, 16, 0.2, 900.0
LAYOUT = memory_bank.create_layout(N, num_devices=1, num_negatives=0)  # 32 strata of 7 rows, 21 of them padding
BROKEN = 11
NAMES = ["nce", "infonce", "eq4"]


@pytest.fixture(scope="module")
def case():
  """Returns (bank f32[R, D], usable bool[R], own rows i32[B], embeddings f32[B, D], weight of each image f32[B])."""
  rng = np.random.default_rng(0)
  bank, usable = jax.device_get(memory_bank.create(jax.random.key(1), LAYOUT, dim=D))
  usable = usable & (np.arange(len(bank)) != LAYOUT.row_of(BROKEN))
  rows = LAYOUT.row_of(np.array([0, 17, 202, 50, 99, 31]))
  emb = bank[rows] + rng.normal(size=(B, D)) * 0.3  # two of them near their own row: h above 1/2 in eq4
  emb[1] = bank[5] + 0.01 * rng.normal(size=D)  # and one nearer to a stranger
  emb /= np.linalg.norm(emb, axis=1, keepdims=True)
  return bank, usable, rows.astype(np.int32), emb.astype(np.float32), rng.uniform(0.5, 2, B).astype(np.float32)


def streamed(name, num_devices, case, *, dtype=jnp.float32):
  """Returns the losses f32[B], and the gradient by the embeddings of their weighted sum, over all rows of the bank."""
  bank, *others = case
  return program(name, num_devices)(jnp.asarray(bank, dtype), *others)


def program(name, num_devices, product=products.exact):
  """Returns the program of `streamed`, a function of the arrays of a case."""
  loss_fn = losses.make_loss(name, temperature=TAU, num_images=N, num_negatives=N)

  def device_losses(bank, usable, rows, emb, image_weight):
    own, = memory_bank.read(bank, rows, axis=AXIS)

    def objective(emb):
      local, _ = memory_bank.local_rows(bank, rows, axis=AXIS)
      every = negatives.EveryRow(bank, usable, local, emb, TAU, AXIS, product)
      each, watched = loss_fn(memory_bank.positive_scores(own, emb, temperature=TAU), every, normaliser=jnp.float32(Z),
                              watch=lambda score, weight, positive: (score * weight, weight))
      return jnp.sum(each * image_weight), (each, watched)

    (_, aux), grad = jax.value_and_grad(objective, has_aux=True)(emb)
    return aux, grad

  mapped = jax.shard_map(device_losses, mesh=create_mesh(num_devices), in_specs=(P(AXIS), P(AXIS), P(), P(), P()),
                         out_specs=P())
  return jax.jit(mapped)


def dense(name, case, emb):
  """Returns (losses, mean similarity, number of negatives), each f64[B], by loops over all images but the own."""
  bank, usable, rows, _, _ = case
  scores = np.asarray(emb, np.float64) @ np.asarray(bank, np.float64).T / TAU
  weight = usable[None] & (np.arange(len(bank)) != rows[:, None])
  positive = scores[np.arange(B), rows]
  if name == "nce":
    each = oracles.nce(positive, scores, weight, normaliser=Z, num_images=N, num_negatives=N)
  else:
    each = getattr(oracles, name)(positive, scores, weight)
  return each, np.sum(scores * weight, axis=1), np.sum(weight, axis=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_devices, chunk_rows", [(1, 10_000), (1, 50), (8, 5)])
def test_losses_and_gradients_over_every_row(monkeypatch, case, name, num_devices, chunk_rows):
  """On one device 224 rows in one chunk or in 5, on eight 28 rows in 6: neither divides."""
  monkeypatch.setattr(negatives, "CHUNK_ROWS", chunk_rows)
  (each, (similarity, count)), grad = streamed(name, num_devices, case)
  emb, image_weight = case[3].astype(np.float64), case[4]
  expected, expected_similarity, expected_count = dense(name, case, emb)
  np.testing.assert_allclose(each, expected, rtol=2e-5)
  np.testing.assert_allclose(similarity, expected_similarity, rtol=1e-4, atol=1e-3)
  np.testing.assert_array_equal(count, expected_count)
  assert (expected_count == N - 2).all()  # not the own, not the broken one, no padding
  step, slopes = 1e-6, np.zeros((B, D))
  for d in range(D):
    by = step * np.eye(D)[d]
    slopes[:, d] = (dense(name, case, emb + by)[0] - dense(name, case, emb - by)[0]) / (2 * step) * image_weight
  np.testing.assert_allclose(grad, slopes, rtol=1e-4, atol=1e-4 * np.abs(slopes).max())


def test_a_bank_of_bfloat16_is_computed_with_in_float32(case):
  (each, _), _ = streamed("infonce", 8, case, dtype=jnp.bfloat16)
  rounded = case[0].astype(jnp.bfloat16).astype(np.float32), *case[1:]
  np.testing.assert_allclose(each, dense("infonce", rounded, case[3])[0], rtol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_memory_is_that_of_a_chunk(full_compile, dtype):
  """A bank of 262,144 rows: 67 MB for the scores alone, if they stood in memory at once."""
  rows, batch, chunk = 262_144, 64, negatives.CHUNK_ROWS
  loss_fn = losses.make_loss("infonce", temperature=TAU, num_images=rows, num_negatives=rows)

  def device_grad(bank, usable, own, emb):
    def objective(emb):
      every = negatives.EveryRow(bank, usable, own, emb, TAU, AXIS)
      return jnp.sum(loss_fn(jnp.zeros(batch), every, normaliser=jnp.float32(0))[0])
    return jax.grad(objective)(emb)

  mapped = jax.jit(jax.shard_map(device_grad, mesh=create_mesh(1), in_specs=(P(AXIS), P(AXIS), P(), P()),
                                 out_specs=P()))
  shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  bank = jax.eval_shape(lambda: memory_bank.stored(jnp.zeros((rows, 128)), dtype))
  compiled = mapped.lower(bank, jax.ShapeDtypeStruct((rows,), bool), jax.ShapeDtypeStruct((batch,), int),
                          shape((batch, 128))).compile()
  # A few arrays of scores of a chunk, and the chunk itself: 17 MB. The bank is 134 MB.
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * (4 * batch * chunk + 2 * chunk * 128)


@pytest.mark.parametrize(("platform", "product"), [
  ("cpu", products.exact), ("cuda", products.in_halves), ("tpu", products.in_halves)])
@pytest.mark.parametrize(("name", "num_sloped"), [("nce", 1), ("infonce", 1), ("eq4", 3)])
def test_sums_that_are_only_watched_cost_no_product(case, name, num_sloped, platform, product):
  """A pass over the bank has a product for the scores and one for each sum with a slope. eq4 has two passes."""
  text = program(name, 1, product).trace(*case).lower(lowering_platforms=(platform,)).as_text()
  assert text.count("stablehlo.dot_general") == num_sloped + (2 if name == "eq4" else 1)
