"""Figures without labels: against formulas with plain loops in float64, and published values."""

import numpy as np
import oracles
import pytest

from pirl_jax.evaluation import representation


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def test_values_of_the_reference():
  """Check values of random vectors; another draw changes the fourth digit."""
  sphere = unit(normal(4096, 128))
  assert representation.rank_me(sphere) == pytest.approx(127.513, abs=0.02)
  assert representation.uniformity(sphere) == pytest.approx(-3.938, abs=1e-3)
  low = unit(normal(4096, 16, seed=1) @ normal(16, 128, seed=2))
  # A float32 Gram matrix gives 0.6 % more.
  assert representation.rank_me(low) == pytest.approx(oracles.rank_me(low), rel=1e-5)
  assert representation.rank_me(np.eye(4)[[0] * 4 + [1] * 4 + [2] * 2 + [3] * 2]) == pytest.approx(3.941269, abs=1e-6)
  point = np.ones((4096, 128)) + 1e-3 * normal(4096, 128)
  assert representation.rank_me(point) == pytest.approx(1.121, abs=1e-3)
  assert representation.rank_me(point - point.mean(axis=0)) > 126  # what centring would say


@pytest.mark.parametrize("noise", [0.1, 1, 10])
def test_lidar_is_blind_to_the_strength_of_noise(noise):
  views = normal(1000, 1, 128) + noise * normal(1000, 10, 128, seed=1)
  assert representation.lidar(views) == pytest.approx(119.2, abs=1)


@pytest.mark.parametrize("num, dim", [(40, 6), (5, 30)])
def test_figures_are_the_formulas(num, dim):
  views = unit(normal(num, 1, dim) + 0.4 * normal(num, 3, dim, seed=1)).astype(np.float32)
  flat, others = views[:, 0], unit(normal(7, dim, seed=2))
  assert representation.rank_me(flat) == pytest.approx(oracles.rank_me(flat), rel=1e-6)
  floor = representation.NOISE_FLOOR
  assert representation.lidar(views) == pytest.approx(oracles.lidar(views, floor=floor), rel=1e-6)
  assert representation.alignment(views) == pytest.approx(oracles.alignment(views), rel=1e-6)
  assert representation.uniformity(flat) == pytest.approx(oracles.uniformity(flat), rel=1e-6)
  gallery = np.concatenate([3 * views[:, 1], others])  # the cosine does not see lengths
  found = representation.nearest_is_own(2 * flat, gallery)
  assert found == oracles.nearest_is_own(flat, gallery) and 0 < found <= 1


def test_parts_give_what_all_pairs_give(monkeypatch):
  x = unit(normal(50, 8))
  whole = representation.uniformity(x), representation.nearest_is_own(x[:20] + 0.3 * normal(20, 8, seed=1), x)
  monkeypatch.setattr(representation, "PAIRS_AT_A_TIME", 150)
  parts = representation.uniformity(x), representation.nearest_is_own(x[:20] + 0.3 * normal(20, 8, seed=1), x)
  assert parts == pytest.approx(whole, rel=1e-12) and 0 < whole[1] < 1


def test_equal_vectors_are_nobodys_nearest():
  assert representation.nearest_is_own(np.ones((5, 3)), np.ones((6, 3))) == 0
  assert representation.nearest_is_own(np.zeros((2, 3)), np.zeros((2, 3))) == 0
  assert representation.rank_me(np.zeros((5, 3))) == 0
  assert np.isnan(representation.rank_me(np.array([[1.0, np.inf], [0.0, 1.0]])))
  assert representation.uniformity(np.ones((5, 3)) / 3**0.5) == 0
