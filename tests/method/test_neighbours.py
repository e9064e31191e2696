"""The nearest row and scores of a rank, against sorting everything in one place."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pirl_jax.method import memory_bank, negatives, neighbours
from pirl_jax.runtime.mesh import AXIS, create_mesh

N, B, D = 203, 6, 16
LAYOUT = memory_bank.create_layout(N, num_devices=1, num_negatives=0)  # 32 strata of 7 rows, 21 of them padding


@pytest.fixture(scope="module")
def bank():
  """Returns (bank f32[R, D], usable bool[R], own rows i32[B]); two rows are equal, one is broken."""
  rows, usable = jax.device_get(memory_bank.create(jax.random.key(1), LAYOUT, dim=D))
  own = LAYOUT.row_of(np.array([0, 17, 202, 50, 99, 31])).astype(np.int32)
  near = rows[own[0]] + 0.1 * rows[3]
  rows = rows.copy()
  rows[[40, 170]] = near / np.linalg.norm(near)  # on different devices of eight
  rows[41] = rows[own[1]]  # the nearest of all, but broken
  return rows, usable & (np.arange(len(rows)) != 41), own


@pytest.mark.parametrize("num_devices, chunk_rows", [(1, 10_000), (1, 50), (8, 5), (8, 28)])
def test_the_nearest_row_of_the_whole_bank(monkeypatch, bank, num_devices, chunk_rows):
  monkeypatch.setattr(neighbours, "CHUNK_ROWS", chunk_rows)
  rows, usable, own = bank
  find = jax.jit(jax.shard_map(partial(neighbours.nearest, axis=AXIS), mesh=create_mesh(num_devices),
                               in_specs=(P(AXIS), P(AXIS), P(), P()), out_specs=P()))
  found, vectors = find(rows, usable, own, rows[own])
  scores = rows[own].astype(float) @ rows.T.astype(float)
  scores[:, ~usable] = scores[np.arange(B), own] = -np.inf
  np.testing.assert_array_equal(found, scores.argmax(axis=1))  # of equal ones the first
  assert found[0] == 40
  np.testing.assert_array_equal(vectors, rows[found])
  none, same = find(rows, np.isin(np.arange(len(rows)), own[:1]), own[:1], rows[own[:1]])
  assert none == own[0] and (np.asarray(same) == rows[own[:1]]).all()  # there is no other


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("every", [False, True])
def test_the_score_of_a_rank(monkeypatch, bank, num_devices, every):
  monkeypatch.setattr(negatives, "CHUNK_ROWS", 10)
  rows, usable, own = bank
  rank = np.array([1, 2, 3, 40, 100, 201], np.int32)

  def device_fn(rows, usable, own, emb):
    local, _ = memory_bank.local_rows(rows, own, axis=AXIS)
    if every:
      of_all = negatives.EveryRow(rows, usable, local, emb, 0.2, AXIS)
    else:
      weight = (usable[None] & (jnp.arange(len(rows))[None] != local[:, None])).astype(jnp.float32)
      of_all = negatives.Scores(memory_bank.negative_scores(rows, emb, temperature=0.2), weight, AXIS)
    return neighbours.score_of_rank(of_all, rank, B)

  found = jax.jit(jax.shard_map(device_fn, mesh=create_mesh(num_devices), in_specs=(P(AXIS), P(AXIS), P(), P()),
                                out_specs=P()))(rows, usable, own, rows[own])
  scores = rows[own].astype(float) @ rows.T.astype(float) / 0.2
  scores[:, ~usable] = scores[np.arange(B), own] = -np.inf
  expected = -np.sort(-scores, axis=1)[np.arange(B), rank - 1]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_score_of_a_rank_is_exact_with_ties_zeros_and_both_signs():
  score = np.array([[0.0, -0.0, 3.5, -3.5, 1e-38, -1e-38, 3.5, 1.0, -14.0, 2.0]], np.float32)
  weight = np.ones_like(score)
  weight[0, 7] = 0
  kept = np.sort(score[weight > 0])[::-1]
  for rank in range(1, 10):
    found = neighbours.score_of_rank(negatives.Scores(score, weight), jnp.array([rank]), 1)
    assert found[0] == kept[rank - 1]


@pytest.mark.parametrize("shares, expected", [
  ((0, 1), [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]), ((0, 0.25), [9, 8, 7]), ((0.1, 0.5), [8, 7, 6, 5]), ((0.9, 1), [0])])
def test_negatives_between_two_shares_of_the_ranks(shares, expected):
  score = np.random.default_rng(0).permutation(10).astype(np.float32)[None]
  of_all = negatives.Scores(score, np.ones_like(score))
  chosen = neighbours.ranked(of_all, of_all, shares, 1)
  total, number = chosen.sum(lambda score, weight: (score * weight, weight))
  assert (total[0], number[0]) == (sum(expected), len(expected))
  none = negatives.Scores(score, np.zeros_like(score))
  total, number = neighbours.ranked(none, none, shares, 1).sum(lambda score, weight: (score * weight, weight))
  assert (total[0], number[0]) == (0, 0)


@pytest.mark.parametrize("what", ["nearest", "ranked"])
def test_memory_is_that_of_a_chunk(full_compile, what):
  """A bank of 262,144 rows: 67 MB for the scores alone, if they stood in memory at once."""
  num_rows, batch, chunk = 262_144, 64, negatives.CHUNK_ROWS

  def device_fn(rows, usable, own, emb):
    if what == "nearest":
      return neighbours.nearest(rows, usable, own, emb, axis=AXIS)
    every = negatives.EveryRow(rows, usable, own, emb, 0.1, AXIS)
    return neighbours.score_of_rank(every, jnp.full(batch, 1_000, jnp.int32), batch)

  mapped = jax.jit(jax.shard_map(device_fn, mesh=create_mesh(1), in_specs=(P(AXIS), P(AXIS), P(), P()), out_specs=P()))
  shapes = [((num_rows, 128), jnp.float32), ((num_rows,), bool), ((batch,), jnp.int32), ((batch, 128), jnp.float32)]
  compiled = mapped.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * (4 * batch * chunk + 2 * chunk * 128)
