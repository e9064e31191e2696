"""What a step reports of numbers that are not finite."""

import jax.numpy as jnp
import numpy as np
import pytest

from pirl_jax.method.health import QUANTITIES, not_finite

SOUND = jnp.float32(1), {"w": jnp.ones(3)}, {"w": jnp.ones((2, 2))}, {"mean": jnp.zeros(2)}, (jnp.ones((4, 2)),)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("number", range(5))
def test_each_quantity_is_told_from_the_others(number, bad):
  quantities = list(SOUND)
  quantities[number] = {"fine": jnp.ones(2), "bad": jnp.array([1.0, bad, 3.0])}
  assert not_finite(*quantities).tolist() == [other == number for other in range(len(QUANTITIES))]
  assert not not_finite(*SOUND).any() and not not_finite(*SOUND[:4]).any()
