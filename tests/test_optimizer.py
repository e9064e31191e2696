import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pirl_jax.errors import UserError
from pirl_jax.optimizer import cosine_schedule, create_optimizer


def test_cosine_of_the_paper_from_012_to_a_thousandth():
  schedule = cosine_schedule(base_rate=0.12, end_factor=0.001, num_steps=1000)
  for step in (0, 1, 250, 500, 999, 1000):
    expected = 0.00012 + (0.12 - 0.00012) * (1 + math.cos(math.pi * step / 1000)) / 2
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-4)


def test_rate_that_changes_every_epoch_is_constant_inside_it():
  held = cosine_schedule(base_rate=0.12, end_factor=0.001, num_steps=100, hold_steps=10)
  free = cosine_schedule(base_rate=0.12, end_factor=0.001, num_steps=100)
  for step in range(100):
    assert held(step) == free(step // 10 * 10)


def test_warm_up_is_linear_and_the_cosine_fills_the_rest():
  schedule = cosine_schedule(base_rate=0.4, end_factor=0.0, num_steps=110, warmup_steps=10)
  np.testing.assert_allclose([schedule(s) for s in (0, 5, 10, 60, 110)], [0, 0.2, 0.4, 0.2, 0], atol=1e-6)
  with pytest.raises(UserError, match="warm-up takes 110 steps"):
    cosine_schedule(base_rate=0.4, end_factor=0.0, num_steps=110, warmup_steps=110)


def test_sgd_is_pytorchs_rule_and_spares_biases_and_batch_norm():
  rng = np.random.default_rng(0)
  params = {"conv": {"kernel": rng.normal(size=(3, 3, 2, 4))}, "bn": {"scale": np.ones(4), "bias": np.ones(4)}}
  rates = [0.5, 0.3, 0.1]
  optimizer = create_optimizer(lambda step: jnp.asarray(rates)[step], momentum=0.9, weight_decay=0.01)
  state = optimizer.init(params)
  got = params
  expected = {a: {b: x.copy() for b, x in part.items()} for a, part in params.items()}
  velocity = {(a, b): 0.0 for a in params for b in params[a]}
  for rate in rates:
    grads = {a: {b: rng.normal(size=np.shape(x)) for b, x in part.items()} for a, part in params.items()}
    updates, state = optimizer.update(grads, state, got)
    got = optax.apply_updates(got, updates)
    for a, b in velocity:  # torch.optim.SGD, spelled out
      grad = grads[a][b] + (0.01 * expected[a][b] if b == "kernel" else 0)
      velocity[a, b] = 0.9 * velocity[a, b] + grad
      expected[a][b] = expected[a][b] - rate * velocity[a, b]
  for a, b in velocity:
    np.testing.assert_allclose(got[a][b], expected[a][b], rtol=1e-5, atol=1e-6)
