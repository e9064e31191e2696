"""The step of Jigsaw, RotNet and the supervised baseline: loss by hand, and the same on any number of devices."""

import dataclasses
import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pirl_jax.errors import UserError
from pirl_jax.method import memory_bank
from pirl_jax.method.optimizer import create_optimizer
from pirl_jax.method.prediction_step import make_prediction_step
from pirl_jax.method.programs import VOID
from pirl_jax.method.randomness import view_keys
from pirl_jax.method.state import Keeps, create_state
from pirl_jax.models.heads import ClassHead, PatchesClassHead
from pirl_jax.models.network import Network
from pirl_jax.models.resnet import ResNet
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.views.jigsaw import Jigsaw
from pirl_jax.views.recipe import Recipe
from pirl_jax.views.two_views import make_views

N, B, CLASSES, ORDERS = 43, 16, 4, 6
SEED, RATE = 7, 0.1
FLIP_ONLY = Recipe(brightness=0, contrast=0, saturation=0, hue=0, group_probability=0, grayscale_probability=0)
JIGSAW = Jigsaw(crop_size=12, crop_scale=(0.6, 1.0), grid=2, patch_size=5, num_permutations=ORDERS)
SYSTEMS = ("covariant", "supervised")
OPTIMIZER = create_optimizer(optax.constant_schedule(RATE), momentum=0.9, weight_decay=0.0)
LAYOUT = memory_bank.create_layout(N, num_devices=8, num_negatives=0)


def make_batch(system, step, *, broken=()):
  rng = np.random.default_rng(step)
  index = rng.permutation(N)[:B].astype(np.int32)
  crop = "pretext_crop" if system == "covariant" else "image_crop"
  return {crop: rng.integers(0, 256, (B, 12, 12, 3), dtype=np.uint8), "index": index,
          "label": np.where(index % 5 == 0, -1, index % CLASSES).astype(np.int32), "valid": ~np.isin(index, broken),
          "fills": np.arange(B) >= B - 2}


def parts(system):
  """Returns (network, views_fn, inputs for init)."""
  trunk = ResNet(blocks=(1,), bottleneck=False, channels=8, stem="3x3s2")  # little to compile
  if system == "covariant":
    views_fn = make_views(JIGSAW, recipe=FLIP_ONLY, pretext_recipe=FLIP_ONLY)
    return Network(trunk, pretext_head=PatchesClassHead(ORDERS)), views_fn, (None, jnp.zeros((1, 4, 5, 5, 3)))
  views_fn = make_views(None, recipe=FLIP_ONLY, pretext_recipe=FLIP_ONLY)
  return Network(trunk, image_head=ClassHead(CLASSES)), views_fn, (jnp.zeros((1, 12, 12, 3)), None)


def make_state(system, num_devices):
  network, _, inputs = parts(system)
  return create_state(SEED, network, OPTIMIZER, LAYOUT, mesh=mesh_lib.create_mesh(num_devices),
                      create_bank=partial(memory_bank.create, dim=8), inputs=inputs, keeps=Keeps(bank=False))


def broken_of(system):
  """Returns an image of the first batch that has a label."""
  batch = make_batch(system, 0)
  return int(batch["index"][batch["label"] >= 0][3]),


@functools.cache  # compiling costs seconds, and several tests look at the same run
def run(system, num_devices):
  """Returns the states after each of three steps, the start included, and the metrics of each step, on the host.

  The last step is void: two images are not there.
  """
  network, views_fn, _ = parts(system)
  mesh = mesh_lib.create_mesh(num_devices)
  step = make_prediction_step(network.with_batch_norm(axis=mesh_lib.AXIS), OPTIMIZER, views_fn, LAYOUT, mesh)
  state = make_state(system, num_devices)
  states, metrics = [jax.device_get(state)], []
  for i in range(3):
    batch = make_batch(system, i, broken=broken_of(system))
    if i == 2:
      batch["index"][:2], batch["valid"][:2] = -1, False
    state, figures = step(state, jax.device_put(batch, mesh_lib.split(mesh)))
    states.append(jax.device_get(state))
    metrics.append(jax.device_get(figures))
  return states, metrics


def forward(system, params, batch_stats, batch):
  """Returns the logits f32[B, L] of the first step, the labels and the moved batch statistics."""
  network, views_fn, _ = parts(system)
  image, pretext, transform = views_fn(view_keys(SEED, 0, jnp.asarray(batch["index"])), batch.get("image_crop"),
                                       batch.get("pretext_crop"))
  outputs, updated = network.apply({"params": params, "batch_stats": batch_stats}, image, pretext, train=True,
                                   mutable=["batch_stats"])
  (logits,) = (output for output in outputs if output is not None)
  return logits, batch["label"] if transform is None else transform, updated["batch_stats"]


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("num_devices", [1, 8])
def test_a_step_without_the_images_of_one_process_changes_nothing(system, num_devices):
  states, metrics = run(system, num_devices)
  assert [bool(figures[VOID]) for figures in metrics] == [False, False, True]
  jax.tree.map(np.testing.assert_array_equal, states[2], states[3])
  assert states[2].step == 2


@pytest.mark.parametrize("system", SYSTEMS)
def test_loss_top1_and_gradient_of_the_first_step_by_hand(system):
  broken = broken_of(system)
  states, metrics = run(system, 1)
  start, batch = states[0], make_batch(system, 0, broken=broken)
  logits, labels, batch_stats = jax.device_get(jax.jit(partial(forward, system))(
    start.params, start.batch_stats, batch))
  assert (batch["label"] == -1).any() and not batch["valid"].all()
  losses, hits = [], []
  weighed = batch["valid"] & ~batch["fills"]
  for row, label, valid, given in zip(logits.astype(np.float64), labels, weighed, batch["label"], strict=True):
    if valid and (system == "covariant" or given >= 0):  # a transform has a label for every image
      losses.append(math.log(sum(math.exp(x) for x in row)) - row[label])
      hits.append(max(range(len(row)), key=lambda i: row[i]) == label)  # noqa: B023, used at once
  assert len(losses) == np.sum(weighed if system == "covariant" else weighed & (batch["label"] >= 0)) < B - 1
  assert set(metrics[0]) == {"loss", "top1", "learning_rate", "not_finite", "num_usable", VOID}
  assert not metrics[0]["not_finite"].any()
  assert metrics[0]["num_usable"] == N - 1 and metrics[0]["learning_rate"] == np.float32(RATE)
  np.testing.assert_allclose(metrics[0]["loss"], np.mean(losses), rtol=1e-5)
  np.testing.assert_allclose(metrics[0]["top1"], np.mean(hits), rtol=1e-6)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), states[1].batch_stats, batch_stats)

  counts = weighed & (labels >= 0)
  def dense(params):
    log_p = jax.nn.log_softmax(forward(system, params, start.batch_stats, batch)[0])
    return -jnp.mean(log_p[jnp.arange(B), np.maximum(labels, 0)], where=counts)
  gradient = jax.device_get(jax.jit(jax.grad(dense))(start.params))
  found = jax.tree.map(lambda a, b: (a - b) / RATE, start.params, states[1].params)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(gradient))
  jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5 * largest), found, gradient)


@pytest.mark.parametrize("system", SYSTEMS)
def test_step_is_the_same_on_one_device_and_on_eight(system):
  one, eight = (run(system, n) for n in (1, 8))
  # Only the order of the sums differs.
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), one, eight)
  last = one[0][-1]
  assert last.step == 2 and not last.usable[LAYOUT.row_of(broken_of(system)[0])] and last.usable.sum() == N - 1
  # The statistics of the head's batch norm move, too.
  names = {jax.tree_util.keystr(path, simple=True, separator="/")
           for path, x in jax.tree_util.tree_leaves_with_path(jax.tree.map(np.subtract, last.batch_stats,
                                                                           one[0][0].batch_stats)) if np.abs(x).max()}
  assert len(names) == len(jax.tree.leaves(last.batch_stats))
  assert ("pretext_head/bn/mean" in names) == (system == "covariant")


@pytest.mark.parametrize("system", SYSTEMS)
def test_state_without_a_bank_comes_back_on_another_number_of_devices(system, tmp_path):
  last = run(system, 8)[0][2]
  assert last.bank is None and last.normaliser is None
  heads = {"trunk", "pretext_head" if system == "covariant" else "image_head"}
  assert set(last.params) == heads
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(2, last, {}, knn_top1=None)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    like = jax.eval_shape(lambda: make_state(system, 1))
    restored = checkpoints.restore(2, like, mesh_lib.create_mesh(2))
    with pytest.raises(UserError, match="without a memory bank"):
      checkpoints.restore_bank(2, LAYOUT)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), last)


def test_head_of_the_covariant_jigsaw_by_hand():
  """Linear, batch norm over batch and patches, ReLU, patches side by side, linear; in float64."""
  rng = np.random.default_rng(0)
  features = rng.normal(size=(6, 4, 3)).astype(np.float32)
  head = PatchesClassHead(5)
  variables = jax.device_get(head.init(jax.random.key(0), features))
  variables = jax.tree.map(lambda x: x + 0.2 * np.abs(rng.normal(size=x.shape)).astype(np.float32), variables)
  params, stats = variables["params"], variables["batch_stats"]["bn"]
  logits, updated = head.apply(variables, features, train=True, mutable=["batch_stats"])

  def by_hand(mean, variance):
    joined = relu((hidden - mean) / np.sqrt(variance + 1e-5) * params["bn"]["scale"] + params["bn"]["bias"])
    return joined.reshape(6, 4_000) @ params["logits"]["kernel"].astype(np.float64) + params["logits"]["bias"]

  def relu(x):
    return np.maximum(x, 0)

  hidden = features.astype(np.float64) @ params["patch"]["kernel"] + params["patch"]["bias"]  # [6, 4, 1000]
  mean, variance = hidden.reshape(24, 1000).mean(axis=0), hidden.reshape(24, 1000).var(axis=0)
  np.testing.assert_allclose(logits, by_hand(mean, variance), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(updated["batch_stats"]["bn"]["mean"], 0.9 * stats["mean"] + 0.1 * mean, atol=1e-5)
  np.testing.assert_allclose(head.apply(variables, features), by_hand(stats["mean"], stats["var"]), rtol=1e-4,
                             atol=1e-4)


def test_orders_that_the_pixels_tell_are_learnt():
  """Ramps, brighter to the right and downwards: 24 orders of four patches, told at sight by their brightness."""
  ramp = np.add.outer(2.0 * np.arange(12), np.arange(12))[None, :, :, None] * 7
  rng = np.random.default_rng(0)
  crops = np.clip(ramp + rng.normal(0, 3, (B, 12, 12, 3)), 0, 255).astype(np.uint8)
  jigsaw = Jigsaw(crop_size=12, crop_scale=(0.6, 1.0), grid=2, patch_size=5, num_permutations=24)
  nothing = dataclasses.replace(FLIP_ONLY, flip_probability=0)
  network = Network(parts("covariant")[0].trunk, pretext_head=PatchesClassHead(24))
  mesh = mesh_lib.create_mesh(1)
  state = create_state(SEED, network, OPTIMIZER, LAYOUT, mesh=mesh, create_bank=partial(memory_bank.create, dim=8),
                       inputs=(None, jnp.zeros((1, 4, 5, 5, 3))), keeps=Keeps(bank=False))
  step = make_prediction_step(network, OPTIMIZER, make_views(jigsaw, recipe=nothing, pretext_recipe=nothing), LAYOUT,
                              mesh)
  batch = jax.device_put({"pretext_crop": crops, "index": np.arange(B, dtype=np.int32),
                          "label": np.full(B, -1, np.int32), "valid": np.ones(B, bool)}, mesh_lib.split(mesh))
  top1 = []
  for _ in range(120):
    state, metrics = step(state, batch)
    top1.append(float(metrics["top1"]))
  assert np.mean(top1[:3]) < 0.4 and np.mean(top1[-10:]) > 0.9
