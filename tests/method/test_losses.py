import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy import special

from pirl_jax.errors import UserError
from pirl_jax.method import losses
from pirl_jax.method.negatives import Scores

N = 5_000


def random_scores(seed, *, batch, num_negatives, temperature):
  rng = np.random.default_rng(seed)
  positive = rng.uniform(-1, 1, batch) / temperature
  negative = rng.uniform(-1, 1, (batch, num_negatives)) / temperature
  weight = (rng.random((batch, num_negatives)) > 0.2).astype(float)
  return positive, negative, weight


def call(name, positive, negative, weight, *, temperature, normaliser, num_images=N):
  fn = losses.make_loss(name, temperature=temperature, num_images=num_images, num_negatives=np.shape(negative)[1])
  positive, negative, weight = (jnp.asarray(x, jnp.float32) for x in (positive, negative, weight))
  return fn(positive, Scores(negative, weight), normaliser=jnp.float32(normaliser))[0]


def estimate_normaliser(positive, negative, weight, *, num_images):
  positive, negative, weight = (jnp.asarray(x, jnp.float32) for x in (positive, negative, weight))
  sums = losses.nce_normaliser_sums(positive, Scores(negative, weight), jnp.ones(len(positive), bool))
  return float(losses.nce_normaliser(*sums, num_images=num_images))


def oracle(name, positive, negative, weight, *, normaliser, num_images=N):
  if name == "nce":
    return oracles.nce(positive, negative, weight, normaliser=normaliser, num_images=num_images,
                       num_negatives=np.shape(negative)[1])
  return getattr(oracles, name)(positive, negative, weight)


@pytest.mark.parametrize("name", ["nce", "infonce", "eq4"])
@pytest.mark.parametrize("temperature", [0.03, 0.07, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("num_negatives", [3, 33, 500])
def test_loss_is_the_formula_in_float64(name, temperature, num_negatives):
  scores = random_scores(num_negatives, batch=7, num_negatives=num_negatives, temperature=temperature)
  normaliser = oracles.nce_normaliser(*scores, np.ones(7), num_images=N)
  expected = oracle(name, *scores, normaliser=normaliser)
  got = call(name, *scores, temperature=temperature, normaliser=normaliser)
  np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_worked_numbers_of_the_official_loss():
  # Scores 0.9, 0.1, -0.2, 0.3 at T = 0.5, n = 10, K = 3, Z = 20, run through vissl's NCELossModule.
  positive, negative = np.array([0.9]) / 0.5, np.array([[0.1, -0.2, 0.3]]) / 0.5
  weight, options = np.ones((1, 3)), dict(temperature=0.5, normaliser=20.0, num_images=10)
  np.testing.assert_allclose(call("nce", positive, negative, weight, **options), 1.2454307, rtol=1e-6)
  np.testing.assert_allclose(call("infonce", positive, negative, weight, **options), 0.4786498, rtol=1e-6)
  np.testing.assert_allclose(call("eq4", positive, negative, weight, **options), 0.8899847, rtol=1e-6)
  estimated = estimate_normaliser(positive, negative, weight, num_images=10)
  np.testing.assert_allclose(estimated, 24.4087227, rtol=1e-6)


@pytest.mark.parametrize("num_negatives, num_images, temperature, z, nce, infonce", [
  (32_000, 1_281_167, 0.07, 2.83e6, 12.32, 11.17),
  (4_096, 1_281_167, 0.07, 2.83e6, 10.26, 9.11),
  (32_000, 1_281_167, 0.1, 1.89e6, 11.92, 10.76),
  (4_096, 50_000, 0.07, 1.10e5, 10.12, 9.11),
  (4_096, 50_000, 0.1, 7.38e4, 9.71, 8.71),
])
def test_expected_values_at_initialisation(num_negatives, num_images, temperature, z, nce, infonce):
  # The dot product of random unit vectors in D dimensions: its square is Beta(1/2, (D - 1)/2).
  rng = np.random.default_rng(0)
  def dots(*shape):
    return np.sqrt(rng.beta(0.5, 63.5, shape)) * rng.choice([-1, 1], shape) / temperature
  positive, negative = dots(200), dots(200, num_negatives)
  weight = np.ones_like(negative)
  normaliser = estimate_normaliser(positive, negative, weight, num_images=num_images)
  analytic = special.gamma(64) * (2 * temperature) ** 63 * special.iv(63, 1 / temperature)
  np.testing.assert_allclose(normaliser / num_images, analytic, rtol=5e-3)
  np.testing.assert_allclose(normaliser, z, rtol=1e-2)
  options = dict(temperature=temperature, normaliser=normaliser, num_images=num_images)
  # The mean over 200 positives has a standard error of 1 / (0.07 sqrt(128) sqrt(200)) = 0.09.
  np.testing.assert_allclose(np.mean(call("nce", 0 * positive, negative, weight, **options)), nce, atol=0.03)
  np.testing.assert_allclose(np.mean(call("infonce", 0 * positive, negative, weight, **options)), infonce, atol=0.03)


def test_equal_similarities_give_log_of_one_more_than_the_negatives():
  loss = call("infonce", np.full(3, 2.0), np.full((3, 9), 2.0), np.ones((3, 9)), temperature=0.1, normaliser=1)
  np.testing.assert_allclose(loss, math.log(10), rtol=1e-6)


@pytest.mark.parametrize("name", ["nce", "infonce", "eq4"])
def test_extreme_scores_stay_finite_with_their_gradients(name):
  temperature = losses.MIN_TEMPERATURE
  for sign in (1, -1):
    positive, negative = np.full(2, sign / temperature), np.full((2, 4), -sign / temperature)
    negative[0, 1] = 1 / temperature
    weight = np.array([[1, 0, 1, 1.0], [1, 1, 1, 1]])  # the far larger one is left out
    def total(positive, negative, weight=weight):
      return jnp.sum(call(name, positive, negative, weight, temperature=temperature, normaliser=N))
    value, grads = jax.value_and_grad(total, argnums=(0, 1))(jnp.asarray(positive, jnp.float32),
                                                             jnp.asarray(negative, jnp.float32))
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads)
    assert grads[1][0, 1] == 0


@pytest.mark.parametrize("name", ["nce", "infonce", "eq4"])
def test_gradient_is_the_slope_of_the_oracle(name):
  positive, negative, weight = random_scores(1, batch=3, num_negatives=6, temperature=0.5)
  grad = jax.grad(lambda p, n: jnp.sum(call(name, p, n, weight, temperature=0.5, normaliser=900.0)), argnums=(0, 1))(
    jnp.asarray(positive, jnp.float32), jnp.asarray(negative, jnp.float32))
  step = 1e-5
  def slope(change_positive, change_negative):
    up, down = (np.sum(oracle(name, positive + sign * change_positive, negative + sign * change_negative, weight,
                              normaliser=900.0)) for sign in (step, -step))
    return (up - down) / (2 * step)
  for i in range(3):
    one = np.eye(3)[i]
    np.testing.assert_allclose(grad[0][i], slope(one, 0), rtol=1e-4, atol=1e-6)
    for k in range(6):
      np.testing.assert_allclose(grad[1][i, k], slope(0, np.outer(one, np.eye(6)[k])), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["nce", "infonce", "eq4"])
def test_order_of_negatives_and_left_out_ones_do_not_matter(name):
  positive, negative, weight = random_scores(2, batch=4, num_negatives=20, temperature=0.1)
  order = np.random.default_rng(0).permutation(20)
  changed = np.where(weight > 0, negative, 9.0)[:, order]
  options = dict(temperature=0.1, normaliser=1e4)
  np.testing.assert_allclose(call(name, positive, changed, weight[:, order], **options),
                             call(name, positive, negative, weight, **options), rtol=1e-4)


@pytest.mark.parametrize("name, temperature", [("nec", 0.1), ("nce", 0.02), ("nce", float("nan"))])
def test_unknown_loss_and_low_temperature_are_refused(name, temperature):
  with pytest.raises(UserError, match=r"nec|0\.02|nan"):
    losses.make_loss(name, temperature=temperature, num_images=10, num_negatives=2)


def test_without_a_normaliser_yet_a_loss_is_finite_so_that_no_weight_makes_it_nothing():
  scores = random_scores(0, batch=4, num_negatives=6, temperature=0.5)
  found, at_one = (call("nce", *scores, temperature=0.5, normaliser=z) for z in (0, 1))
  np.testing.assert_array_equal(found, at_one)
  assert np.isfinite(found).all()
