"""The state before the first step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pirl_jax.method import memory_bank
from pirl_jax.method.optimizer import create_optimizer
from pirl_jax.method.state import Keeps, create_state
from pirl_jax.models.heads import ImageHead
from pirl_jax.models.network import Network
from pirl_jax.models.resnet import ResNet
from pirl_jax.runtime.mesh import create_mesh


def make_state(seed, *, with_bank=True, bank_dtype=jnp.float32):
  network = Network(ResNet(blocks=(1,), bottleneck=False, channels=4, stem="3x3s2"), ImageHead(4))
  optimizer = create_optimizer(optax.constant_schedule(0.1), momentum=0.9, weight_decay=0)
  layout = memory_bank.create_layout(16, num_devices=2, num_negatives=4)
  return create_state(seed, network, optimizer, layout, mesh=create_mesh(2),
                      create_bank=partial(memory_bank.create, dim=4, dtype=bank_dtype),
                      inputs=(jnp.zeros((1, 8, 8, 3)), None), keeps=Keeps(bank=with_bank))


@pytest.mark.parametrize(("seed", "as_"), [(2**32 + 70, 70), (-1, 2**32 - 1)])
def test_a_seed_is_taken_modulo_two_to_the_32(seed, as_):
  state, same, other = (jax.device_get(make_state(one)) for one in (seed, as_, as_ % 64))
  assert state.seed == as_
  jax.tree.map(np.testing.assert_array_equal, state, same)
  assert not np.array_equal(state.bank, other.bank)
  assert not np.array_equal(state.params["trunk"]["conv1"]["kernel"], other.params["trunk"]["conv1"]["kernel"])


def test_without_a_bank_its_fields_are_none():
  state = make_state(0, with_bank=False)
  assert state.bank is None and state.normaliser is None and state.step == 0


def test_the_bank_alone_has_the_type_asked_for():
  state, exact = make_state(0, bank_dtype=jnp.bfloat16), make_state(0)
  assert state.bank.dtype == jnp.uint16 and exact.bank.dtype == jnp.float32  # the bits of bfloat16
  np.testing.assert_allclose(memory_bank.vectors(state.bank), exact.bank, atol=2**-8)
  assert {x.dtype for x in jax.tree.leaves((state.params, state.batch_stats))} == {jnp.dtype("float32")}
