"""What a step reports of numbers that are not finite, and of similarities."""

import jax.numpy as jnp
import numpy as np
import pytest

from pirl_jax.method.health import QUANTITIES, Similarities, not_finite, similarities, spread, watch

SOUND = jnp.float32(1), {"w": jnp.ones(3)}, {"w": jnp.ones((2, 2))}, {"mean": jnp.zeros(2)}, (jnp.ones((4, 2)),)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("number", range(5))
def test_each_quantity_is_told_from_the_others(number, bad):
  quantities = list(SOUND)
  quantities[number] = {"fine": jnp.ones(2), "bad": jnp.array([1.0, bad, 3.0])}
  assert not_finite(*quantities).tolist() == [other == number for other in range(len(QUANTITIES))]
  assert not not_finite(*SOUND).any() and not not_finite(*SOUND[:4]).any()


@pytest.mark.parametrize("views", [("pretext", "image"), ("image",)])
def test_figures_of_similarity_by_hand(views):
  """Three images, the last of which is broken; one has no negatives at all. The temperature is 0.5."""
  own = {"pretext": [1.0, -0.5, 9.0], "image": [0.4, 0.2, 9.0]}
  negatives = {"pretext": [[0.0, 2.0], [0.0, 0.0], [9.0, 9.0]], "image": [[0.3, 0.5], [0.0, 0.0], [9.0, 9.0]]}
  weight = jnp.array([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
  seen = {}
  for view in views:
    positive, score = jnp.array(own[view]), jnp.array(negatives[view])
    seen[view] = Similarities(positive, *(jnp.sum(term, axis=1) for term in watch(score, weight, positive[:, None])))
  figures = similarities(seen, mean=lambda x: jnp.sum(x * jnp.array([0.5, 0.5, 0.0])), temperature=0.5)
  expected = {"similarity_own": 0.5 * (0.4 + 0.2) / 2, "similarity_negatives": 0.5 * ((0.3 + 0.5) / 2 + 0) / 2,
              "negatives_beaten": (1 / 2 + 0) / 2}
  if "pretext" in views:
    expected["similarity_own_pretext"] = 0.5 * (1.0 - 0.5) / 2
  assert figures.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(figures[name], value, rtol=1e-6, err_msg=name)


def test_a_single_negative_is_one():
  seen = {"image": Similarities(*(jnp.array([value]) for value in (2.0, 1.0, 1.5, 1.0)))}
  figures = similarities(seen, mean=jnp.sum, temperature=0.5)
  assert [float(figures[name]) for name in ("similarity_negatives", "negatives_beaten")] == [0.75, 1.0]


def test_spread_by_hand():
  """Of the images that count: the standard deviation over both parts, averaged over 4 dimensions, times sqrt(4)."""
  rng = np.random.default_rng(0)
  emb = rng.normal(size=(2, 3, 4)).astype(np.float32)
  share = np.array([[0.25, 0.25, 0.0], [0.25, 0.25, 0.0]], np.float32)
  expected = 2 * np.mean(np.std(emb[:, :2].reshape(4, 4).astype(np.float64), axis=0))
  np.testing.assert_allclose(spread(emb, share), expected, rtol=1e-6)
