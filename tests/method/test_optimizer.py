import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pirl_jax.configs import jigsaw, rotnet, supervised
from pirl_jax.errors import UserError
from pirl_jax.method.optimizer import cosine_schedule, create_optimizer, step_schedule
from pirl_jax.models.heads import PatchesClassHead
from pirl_jax.models.network import Network
from pirl_jax.models.resnet import create_resnet
from pirl_jax.training import parts as parts_lib


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


def test_warm_up_is_linear_from_its_factor_on_and_the_cosine_fills_the_rest():
  schedule = cosine_schedule(base_rate=0.4, end_factor=0.0, num_steps=110, warmup_steps=10)
  np.testing.assert_allclose([schedule(s) for s in (0, 5, 10, 60, 110)], [0, 0.2, 0.4, 0.2, 0], atol=1e-6)
  schedule = cosine_schedule(base_rate=0.4, end_factor=0.0, num_steps=110, warmup_steps=10, warmup_factor=0.25)
  np.testing.assert_allclose([schedule(s) for s in (0, 5, 10)], [0.1, 0.25, 0.4], atol=1e-6)
  with pytest.raises(UserError, match="warm-up takes 110 steps"):
    cosine_schedule(base_rate=0.4, end_factor=0.0, num_steps=110, warmup_steps=110)


def test_steps_are_vissls_of_the_jigsaw():
  """0.1 for a batch of 256, a tenth of it after each of 30, 60, 90, 100 of 105 epochs, and a warm-up of five epochs."""
  steps_per_epoch = 1_281_167 // 256
  config = jigsaw.get_config("imagenet")
  for schedule in (
      step_schedule(base_rate=0.1, milestones=(30 / 105, 60 / 105, 90 / 105, 100 / 105), decay_factor=0.1,
                    num_steps=105 * steps_per_epoch, warmup_steps=5 * steps_per_epoch, warmup_factor=0.25,
                    hold_steps=steps_per_epoch),
      parts_lib.make_schedule(config, steps_per_epoch)):
    for epoch, rate in ((0, 0.025), (0.9, 0.025), (1, 0.04), (2, 0.055), (3, 0.07), (4, 0.085), (4.9, 0.085),
                        (5, 0.1), (29, 0.1), (30, 0.01), (59, 0.01), (60, 1e-3),
                        (89, 1e-3), (90, 1e-4), (99, 1e-4), (100, 1e-5), (104, 1e-5)):
      np.testing.assert_allclose(schedule(round(epoch * steps_per_epoch)), rate, rtol=1e-5, err_msg=str(epoch))
    for epoch, before in ((30, 0.1), (60, 0.01), (90, 1e-3), (100, 1e-4)):  # the last step of the epoch before
      np.testing.assert_allclose(schedule(epoch * steps_per_epoch - 1), before, rtol=1e-5)


@pytest.mark.parametrize("config", [rotnet.get_config("imagenet"), supervised.get_config("imagenet")])
def test_no_other_baseline_of_vissl_has_a_warm_up(config):
  schedule = parts_lib.make_schedule(config, 10)
  np.testing.assert_allclose([schedule(10 * epoch) for epoch in (0, 29, 30, 60, 90, 100)],
                             [0.1, 0.1, 0.01, 1e-3, 1e-4, 1e-5], rtol=1e-5)


def test_a_warm_up_of_steps_rises_at_each_step_unless_it_is_held():
  schedule = step_schedule(base_rate=0.4, milestones=(0.6,), decay_factor=0.1, num_steps=100, warmup_steps=10)
  np.testing.assert_allclose([schedule(step) for step in (0, 5, 9, 10, 59, 60)], [0, 0.2, 0.36, 0.4, 0.4, 0.04],
                             rtol=1e-5)


def test_steps_without_a_warm_up_start_at_the_top():
  schedule = step_schedule(base_rate=0.03, milestones=(0.6, 0.8), decay_factor=0.1, num_steps=200)
  np.testing.assert_allclose([schedule(step) for step in (0, 119, 120, 159, 160, 199)],
                             [0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003], rtol=1e-6)


@pytest.mark.parametrize("changes, said", [
  ({"milestones": (0.8, 0.6)}, r"milestones=\(0.8, 0.6\).*rising"),
  ({"milestones": (0.6, 0.6)}, "rising"),
  ({"milestones": (60.0, 80.0)}, "between 0 and 1"),
  ({"milestones": (0.0, 0.5)}, "between 0 and 1"),
  ({"milestones": (0.5, 1.0)}, "between 0 and 1"),
  ({"warmup_steps": 60}, "warm-up takes 60 steps.* after 60; lower optimizer.warmup_epochs")])
def test_impossible_steps_are_refused(changes, said):
  given = {"base_rate": 0.1, "milestones": (0.6, 0.8), "decay_factor": 0.1, "num_steps": 100, **changes}
  with pytest.raises(UserError, match=said):
    step_schedule(**given)


KERNELS = {("conv", "kernel"), ("linear", "kernel")}


@pytest.mark.parametrize("options, decayed", [
  ({}, KERNELS),
  ({"decay_biases": True}, KERNELS | {("linear", "bias")}),
  ({"decay_batch_norm": True}, KERNELS | {("bn", "scale"), ("bn", "bias")}),
  ({"nesterov": True, "decay_biases": True, "decay_batch_norm": True},
   KERNELS | {("linear", "bias"), ("bn", "scale"), ("bn", "bias")})])
def test_sgd_is_pytorchs_rule_and_decays_what_it_is_told_to(options, decayed):
  rng = np.random.default_rng(0)
  params = {"conv": {"kernel": rng.normal(size=(3, 3, 2, 4))}, "bn": {"scale": np.ones(4), "bias": np.ones(4)},
            "linear": {"kernel": rng.normal(size=(4, 2)), "bias": rng.normal(size=2)}}
  rates = [0.5, 0.3, 0.1]
  optimizer = create_optimizer(lambda step: jnp.asarray(rates)[step], momentum=0.9, weight_decay=0.01, **options)
  state = optimizer.init(params)
  got = params
  expected = {a: {b: x.copy() for b, x in part.items()} for a, part in params.items()}
  velocity = {(a, b): 0.0 for a in params for b in params[a]}
  for rate in rates:
    grads = {a: {b: rng.normal(size=np.shape(x)) for b, x in part.items()} for a, part in params.items()}
    updates, state = optimizer.update(grads, state, got)
    got = optax.apply_updates(got, updates)
    for a, b in velocity:  # torch.optim.SGD, spelled out
      grad = grads[a][b] + (0.01 * expected[a][b] if (a, b) in decayed else 0)
      velocity[a, b] = 0.9 * velocity[a, b] + grad
      step = grad + 0.9 * velocity[a, b] if "nesterov" in options else velocity[a, b]
      expected[a][b] = expected[a][b] - rate * step
  for a, b in velocity:
    np.testing.assert_allclose(got[a][b], expected[a][b], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay_biases, decay_batch_norm", [(False, False), (True, False), (True, True)])
def test_what_decays_in_a_whole_network_with_batch_norm_in_its_head(decay_biases, decay_batch_norm):
  network = Network(create_resnet("resnet8"), pretext_head=PatchesClassHead(5))
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), None, jnp.zeros((1, 4, 8, 8, 3)), train=False))
  params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes["params"])
  optimizer = create_optimizer(lambda step: 1.0, momentum=0.0, weight_decay=0.5, decay_biases=decay_biases,
                               decay_batch_norm=decay_batch_norm)
  updates, _ = optimizer.update(jax.tree.map(np.zeros_like, params), optimizer.init(params), params)
  decayed = {jax.tree_util.keystr(path, simple=True, separator="/")
             for path, x in jax.tree_util.tree_leaves_with_path(updates) if (np.asarray(x) == -0.5).all()}
  still = {jax.tree_util.keystr(path, simple=True, separator="/")
           for path, x in jax.tree_util.tree_leaves_with_path(updates) if (np.asarray(x) == 0).all()}
  biases = {"pretext_head/patch/bias", "pretext_head/logits/bias"}
  norms = {name for name in decayed | still if name.split("/")[-2].split("_")[-1].startswith("bn")}
  assert {"trunk/bn1/scale", "trunk/bn1/bias", "trunk/res3_0/downsample_bn/bias", "pretext_head/bn/bias"} <= norms
  assert {name.rsplit("/", 1)[1] for name in decayed - biases - norms} == {"kernel"}
  assert decayed & biases == (biases if decay_biases else set())
  assert decayed & norms == (norms if decay_batch_norm else set())
  assert len(decayed) + len(still) == len(jax.tree.leaves(params))
