"""Fine-tuning: the step against plain gradients and float64, one device and eight, interrupted and not."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pirl_jax.data.embedded import TextureSource
from pirl_jax.data.records import Record
from pirl_jax.data.subsets import draw_subset
from pirl_jax.errors import UserError
from pirl_jax.evaluation import training
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.outcome import Outcome
from pirl_jax.evaluation.protocols import semi_supervised
from pirl_jax.evaluation.protocols.semi_supervised import SemiSupervisedSettings, fine_tuning_step
from pirl_jax.method.optimizer import create_optimizer
from pirl_jax.models.classifier import Classifier, on_trunk
from pirl_jax.models.heads import ImageHead, PatchesHead
from pirl_jax.models.network import Model, Network, create_variables
from pirl_jax.models.resnet import create_resnet
from pirl_jax.runtime.mesh import AXIS, create_mesh, split, whole
from pirl_jax.views.normalisation import normalise_image

SIZE, CLASSES = 16, 10
SEED = 5
SETTINGS = SemiSupervisedSettings(
  fractions=(0.5, 0.1), balanced=False, num_epochs=3, batch_size=16, learning_rate=0.8, milestones=(1 / 3, 2 / 3),
  decay_factor=0.1, momentum=0.9, nesterov=False, weight_decay=1e-3, image_scale=(0.3, 1.0))
TRAIN = TextureSource(80, size=SIZE, split="train")
TEST = TextureSource(50, size=SIZE, split="test")


@functools.cache
def pretrained():
  """A network with batch statistics that are not those of its start."""
  network = Network(create_resnet("resnet8", stem="3x3s2"), ImageHead(8), PatchesHead(8))
  variables = jax.device_get(create_variables(
    network, jax.random.key(1), jnp.zeros((1, SIZE, SIZE, 3)), jnp.zeros((1, 4, 8, 8, 3))))
  rng = np.random.default_rng(0)
  stats = jax.tree.map(lambda x: x + 0.1 * rng.random(x.shape, np.float32), variables["batch_stats"])
  return Model(network, {"params": variables["params"], "batch_stats": stats})


@functools.cache
def classifier_variables(seed=0):
  model = pretrained()
  classifier = Classifier(model.network.trunk, CLASSES)
  return jax.device_get(jax.jit(lambda variables: on_trunk(classifier, jax.random.key(seed), variables))(
    model.variables))


def make_batch(step=0, *, broken=(3, 12)):
  rng = np.random.default_rng(step)
  valid = ~np.isin(np.arange(16), broken)
  image = rng.integers(0, 256, (16, SIZE, SIZE, 3), dtype=np.uint8) * valid[:, None, None, None]
  # A broken image keeps its label where the source knows it: both kinds.
  label = np.where(np.arange(16) == 3, -1, rng.integers(0, CLASSES, 16)).astype(np.int32)
  return {"image": image.astype(np.uint8), "label": label, "valid": valid}


def optimizer_of(settings):
  return create_optimizer(training.falling_rate(settings, 1), momentum=settings.momentum,
                          weight_decay=settings.weight_decay, nesterov=settings.nesterov)


def step_fn(optimizer, mesh):
  classifier = Classifier(pretrained().network.trunk.clone(batch_norm_axis=AXIS), CLASSES)
  return training.make_classifier_step(fine_tuning_step(classifier, optimizer), mesh, steps_per_epoch=1)


def start(optimizer):
  variables = classifier_variables()
  return training.begin_training({**variables, "opt_state": optimizer.init(variables["params"])}, ("",))


@functools.cache
def steps(num_devices, num_steps, rate=0.0):
  """The states after each step with the settings, or with plain SGD of that rate, and the losses."""
  mesh = create_mesh(num_devices)
  optimizer = optax.sgd(rate) if rate else optimizer_of(SETTINGS)
  train_step = step_fn(optimizer, mesh)
  state = jax.tree.map(jnp.copy, jax.device_put(start(optimizer), whole(mesh)))
  states, losses = [], []
  for step in range(num_steps):
    state, loss = train_step(state, {}, jax.device_put(make_batch(step), split(mesh)))
    states.append(jax.device_get(state))
    losses.append(jax.device_get(loss)[""])
  assert train_step._cache_size() == 1
  return states, losses


def forward(variables, batch):
  """Pooled features and logits in training mode and the statistics it leaves, on one device without any mapping."""
  trunk = pretrained().network.trunk
  params, stats = ({"params": variables["params"]["trunk"]}, {"batch_stats": variables["batch_stats"]["trunk"]})
  pooled, updated = trunk.apply(params | stats, normalise_image(batch["image"]), train=True, mutable=["batch_stats"])
  linear = variables["params"]["linear"]
  return pooled["pooled"], pooled["pooled"] @ linear["kernel"] + linear["bias"][None], updated["batch_stats"]


@pytest.mark.parametrize("num_devices", [1, 8])
def test_gradients_are_those_of_the_mean_over_the_images_that_can_be_read(num_devices):
  batch, variables = make_batch(), classifier_variables()
  kept = np.flatnonzero(batch["valid"])

  def objective(params):
    _, logits, stats = forward({**variables, "params": params}, batch)
    log_probabilities = jax.nn.log_softmax(logits)[kept, batch["label"][kept]]
    return -jnp.mean(log_probabilities), stats

  (loss, stats), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(variables["params"])
  (state,), (found,) = steps(num_devices, 1, rate=1.0)
  np.testing.assert_allclose(found, loss, rtol=1e-5)
  assert state["epoch"]["num_read"] == 14
  found = jax.tree.map(lambda old, new: old - new, variables["params"], state["params"])
  largest = max(np.abs(x).max() for x in jax.tree.leaves(grads))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5 * largest), found, grads)
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(found))  # the whole network learns
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), state["batch_stats"],
               {"trunk": stats})


def test_linear_layer_learns_by_the_formula():
  batch, variables = make_batch(), classifier_variables()
  pooled, logits, _ = jax.device_get(jax.jit(forward)(variables, batch))
  kernel, bias, losses = np.zeros((pooled.shape[1], CLASSES)), np.zeros(CLASSES), []
  for i in np.flatnonzero(batch["valid"]):
    probabilities = np.exp(logits[i].astype(np.float64))
    probabilities /= probabilities.sum()
    losses.append(-math.log(probabilities[batch["label"][i]]))
    error = probabilities - np.eye(CLASSES)[batch["label"][i]]
    kernel += np.outer(pooled[i], error) / 14
    bias += error / 14
  (state,), (loss,) = steps(8, 1, rate=1.0)
  linear, moved = variables["params"]["linear"], state["params"]["linear"]
  np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
  np.testing.assert_allclose(linear["kernel"] - moved["kernel"], kernel, rtol=1e-3, atol=1e-5 * np.abs(kernel).max())
  np.testing.assert_allclose(linear["bias"] - moved["bias"], bias, rtol=1e-3, atol=1e-6)


def test_steps_are_the_same_on_one_device_and_on_eight():
  one, eight = (steps(num_devices, 3) for num_devices in (1, 8))
  # Only the order of the sums differs; a wrong mean or statistics of a device alone show up far above this.
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), one, eight)


def test_a_batch_without_a_readable_image_changes_no_parameter():
  mesh, optimizer = create_mesh(8), optax.sgd(1.0)
  state, losses = step_fn(optimizer, mesh)(jax.device_put(start(optimizer), whole(mesh)), {},
                                           jax.device_put(make_batch(broken=range(16)), split(mesh)))
  assert losses == {"": 0} and training.epoch_means(state) == ({"": 0}, 0)
  jax.tree.map(np.testing.assert_array_equal, state["params"], classifier_variables()["params"])


def test_classifier_has_the_trunk_and_a_new_layer():
  model, variables = pretrained(), classifier_variables()
  for name in ("params", "batch_stats"):
    jax.tree.map(np.testing.assert_array_equal, variables[name]["trunk"], model.variables[name]["trunk"])
  linear, other = (classifier_variables(seed)["params"]["linear"] for seed in (0, 1))
  assert linear["kernel"].shape == (64, CLASSES) and linear["bias"].shape == (CLASSES,)
  for x in jax.tree.leaves(linear):  # PyTorch's default: uniform in +-1/sqrt(64)
    assert 0.08 < np.abs(x).max() <= 0.125
  assert np.abs(linear["kernel"] - other["kernel"]).max() > 0.05


def test_a_bfloat16_trunk_keeps_float32_parameters():
  trunk = pretrained().network.trunk.clone(dtype=jnp.bfloat16)
  variables = jax.eval_shape(lambda v: on_trunk(Classifier(trunk, 3), jax.random.key(0), v), pretrained().variables)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  image = jnp.zeros((2, SIZE, SIZE, 3))
  logits = jax.eval_shape(lambda v: Classifier(trunk, 3).apply(v, image, train=False), variables)
  assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)


def test_learning_rate_is_scaled_with_the_batch_and_falls_at_the_milestones():
  settings = dataclasses.replace(SETTINGS, num_epochs=12, batch_size=64, learning_rate=0.4,
                                 milestones=(28 / 36, 1 / 3), decay_factor=0.1)
  schedule = training.falling_rate(settings, steps_per_epoch=3)
  rates = [float(schedule(step)) for step in range(36)]
  np.testing.assert_allclose(rates, [0.1] * 12 + [0.01] * 16 + [0.001] * 8, rtol=1e-6)
  # Two milestones within one step are two falls.
  schedule = training.falling_rate(dataclasses.replace(settings, milestones=(1 / 12, 1.1 / 12)), steps_per_epoch=2)
  np.testing.assert_allclose([float(schedule(step)) for step in (0, 1, 2)], [0.1, 0.1, 0.001], rtol=1e-6)
  assert float(training.falling_rate(dataclasses.replace(settings, milestones=()), 3)(1000)) == np.float32(0.1)


@pytest.mark.parametrize("nesterov", [False, True])
def test_optimizer_is_pytorchs_rule(nesterov):
  optimizer = optimizer_of(dataclasses.replace(SETTINGS, batch_size=256, learning_rate=0.5, milestones=(2 / 3,),
                                               nesterov=nesterov, weight_decay=0.1))
  rng = np.random.default_rng(0)
  params = {"kernel": rng.normal(size=(2, 3)).astype(np.float32), "bias": rng.normal(size=3).astype(np.float32)}
  state, expected = optimizer.init(params), {name: x.astype(np.float64) for name, x in params.items()}
  velocity = {name: 0.0 for name in params}
  for step in range(4):
    grads = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in params.items()}
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    for name, grad in grads.items():
      grad = grad + (0.1 * expected[name] if name == "kernel" else 0)
      velocity[name] = 0.9 * velocity[name] + grad
      direction = grad + 0.9 * velocity[name] if nesterov else velocity[name]
      expected[name] = expected[name] - (0.5 if step < 2 else 0.05) * direction
  for name, x in params.items():
    np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-6)


def measure(folder, *, num_devices=8, train=TRAIN, test=TEST, num_threads=1, model=None, keep=lambda *_: None,
            **changes):
  images = [Images(source, SIZE, 1.0, 16, num_threads) for source in (train, test)]
  return semi_supervised.measure_semi_supervised(
    model or pretrained(), *images, dataclasses.replace(SETTINGS, **changes), mesh=create_mesh(num_devices),
    seed=SEED, snapshot_folder=folder, keep=keep)


KEPT = []


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """What an uninterrupted evaluation of two shares found, and its folder."""
  folder = tmp_path_factory.mktemp("uninterrupted")
  return measure(folder, keep=lambda *given: KEPT.append(given)), folder


def test_the_network_of_the_largest_share_is_kept(measured):
  (variables, about), = KEPT
  assert about == {"fraction": 0.5, "top1": measured[0].figures["fractions"]["0.5"]["top1"]}
  assert set(variables) == {"params", "batch_stats"} and set(variables["params"]) == {"trunk", "linear"}


def test_outcome(measured):
  outcome, _ = measured
  assert json.loads(json.dumps(outcome.to_json())) == outcome.to_json()  # JSON values throughout
  assert Outcome.from_json(outcome.to_json()) == outcome
  figures = outcome.figures
  assert list(figures["fractions"]) == ["0.1", "0.5"]
  small, large = figures["fractions"].values()
  assert (figures["num_test"], figures["num_broken_test"], figures["num_labelled"], figures["num_classes"]) == (
    50, 0, 80, 10)
  assert figures["settings"] == {
    "balanced": False, "num_epochs": 3, "batch_size": 16, "learning_rate": 0.8, "milestones": [1.0, 2.0],
    "decay_factor": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-3, "image_scale": [0.3, 1.0], "seed": 5}
  labels = TRAIN.labels()
  for fraction, found, batch_size, num_steps in ((0.1, small, 8, 3), (0.5, large, 16, 6)):
    indices = draw_subset(labels, fraction, seed=5, balanced=False)
    assert found["indices"] == indices.tolist() and found["num_images"] == len(indices) == fraction * 80
    assert found["files"] == [TRAIN.image_name(i) for i in indices]
    assert found["num_classes_seen"] == len(set(labels[indices]))
    assert (found["batch_size"], found["steps"], found["num_broken"]) == (batch_size, num_steps, 0)
    assert found["learning_rate"] == 0.8 * batch_size / 256
    assert 0 <= found["top1"] <= found["top5"] <= 1 and 0 < found["train_loss"] < 5
  assert set(small["indices"]) < set(large["indices"])
  assert outcome.table == {
    "10 % of the labels, top-1": small["top1"], "10 % of the labels, top-5": small["top5"],
    "50 % of the labels, top-1": large["top1"], "50 % of the labels, top-5": large["top5"]}
  assert outcome.curve.log_x and outcome.curve.x == [0.1, 0.5] and outcome.curve.y == [small["top1"], large["top1"]]


def test_one_device_finds_what_eight_find(tmp_path, measured):
  one, eight = measure(tmp_path, num_devices=1, fractions=(0.5,)).figures, measured[0].figures
  found, expected = one["fractions"]["0.5"], eight["fractions"]["0.5"]
  assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
  assert abs(found["top1"] - expected["top1"]) <= 0.04  # two images on the border between two classes
  same = [name for name in found if name not in ("train_loss", "top1", "top5")]
  assert {name: found[name] for name in same} == {name: expected[name] for name in same}


class Stops(TextureSource):
  """Images until so many were read, then an error that is no image's."""

  def __init__(self, left, source=TRAIN):
    self.__dict__.update(source.__dict__, left=left)

  def __getitem__(self, index):
    self.left -= 1
    if self.left < 0:
      raise RuntimeError("the machine is gone")
    return super().__getitem__(index)


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path, monkeypatch, capsys, measured):
  monkeypatch.setattr(training, "SNAPSHOT_SECONDS", 0)
  expected, _ = measured
  # 24 images make the three epochs of the first share, then 32 an epoch: stopped in the third.
  with pytest.raises(RuntimeError, match="the machine is gone"):
    measure(tmp_path, train=Stops(24 + 2 * 32 + 20), num_threads=0)
  assert (tmp_path / "fraction-0.1.json").exists() and not (tmp_path / "fraction-0.5.json").exists()
  capsys.readouterr()
  assert measure(tmp_path, num_threads=0) == expected  # bit for bit
  said = capsys.readouterr().out
  assert "resumes from step 4 of 6" in said and "10 % of the labels" not in said


def test_an_evaluation_interrupted_while_judging_goes_on(tmp_path, monkeypatch, measured):
  monkeypatch.setattr(training, "SNAPSHOT_SECONDS", 0)
  with monkeypatch.context() as patch, pytest.raises(TypeError):
    patch.setattr(semi_supervised, "_judge", None)
    measure(tmp_path, fractions=(0.1,))
  found = measure(tmp_path, fractions=(0.1,)).figures
  assert found["fractions"]["0.1"] == measured[0].figures["fractions"]["0.1"]


def test_a_finished_share_is_not_trained_again(monkeypatch, measured):
  expected, folder = measured
  monkeypatch.setattr(semi_supervised, "_fine_tune", None)
  assert measure(folder) == expected


def test_the_model_stays_as_it_was(tmp_path, measured):
  mesh, model = create_mesh(8), pretrained()
  # Already where the step wants it: a state that shared these arrays would give them away with its own.
  placed = Model(model.network, jax.device_put(model.variables, whole(mesh)))
  found = measure(tmp_path, fractions=(0.1,), model=placed).figures
  assert found["fractions"]["0.1"] == measured[0].figures["fractions"]["0.1"]
  jax.tree.map(np.testing.assert_array_equal, placed.variables, model.variables)


class Broken(TextureSource):
  """Images of which some cannot be read."""

  def __init__(self, broken, source):
    self.__dict__.update(source.__dict__, broken=frozenset(broken))

  def __getitem__(self, index):
    record = super().__getitem__(index)
    return Record(b"no image", record.label) if index in self.broken else record


def test_broken_images_are_counted_and_not_judged(tmp_path):
  subset = draw_subset(TRAIN.labels(), 0.1, seed=5, balanced=False)
  found = measure(tmp_path, fractions=(0.1,), train=Broken(subset[:2], TRAIN), test=Broken((0, 49), TEST)).figures
  assert found["fractions"]["0.1"]["num_broken"] == 2
  assert (found["num_test"], found["num_broken_test"]) == (48, 2)
  with pytest.raises(UserError, match="none of the 8 images can be read"):
    measure(tmp_path / "other", fractions=(0.1,), train=Broken(range(80), TRAIN))


def test_balanced_and_the_whole_set(tmp_path, monkeypatch):
  given = []
  def fine_tune(model, train, indices, settings, **_):
    given.append(indices)
    return None, {"batch_size": settings.batch_size}
  monkeypatch.setattr(semi_supervised, "_fine_tune", fine_tune)
  monkeypatch.setattr(semi_supervised, "_judge", lambda *_: {
    "top1": 0.5, "top5": 1.0, "num_test": 50, "num_broken_test": 0})
  found = measure(tmp_path, fractions=(0.25, 1.0), balanced=True).figures["fractions"]
  assert np.bincount(TRAIN.labels()[given[0]]).tolist() == [2] * 10
  assert found["0.25"]["indices"] == given[0].tolist()
  assert (found["1.0"]["num_images"], found["1.0"]["indices"], found["1.0"]["files"]) == (80, None, None)


def test_test_images_are_judged_by_the_running_statistics():
  variables, trunk = classifier_variables(), pretrained().network.trunk
  image = jnp.stack([TEST[i].image for i in range(50)])  # of the size of the crop, which is all of it

  def judged(**mode):
    logits = jax.jit(lambda image: Classifier(trunk, CLASSES).apply(variables, normalise_image(image), **mode))(image)
    logits = np.asarray(logits[0] if mode["train"] else logits)
    better = [np.sum(row > row[label]) for row, label in zip(logits, TEST.labels(), strict=True)]
    return {"top1": np.mean(np.array(better) < 1), "top5": np.mean(np.array(better) < 5)}

  found = semi_supervised._judge(trunk, variables, Images(TEST, SIZE, 1.0, 16, 1), CLASSES, create_mesh(8))
  assert found == judged(train=False) | {"num_test": 50, "num_broken_test": 0}
  assert judged(train=True, mutable=["batch_stats"]) != judged(train=False)  # else the above says nothing


@pytest.mark.parametrize(("asked", "num_images", "num_devices", "expected"), [
  (256, 300, 8, 256), (256, 256, 8, 256), (256, 255, 8, 128), (256, 41, 8, 32), (256, 41, 1, 32), (48, 50, 8, 48),
  (48, 40, 8, 32), (256, 1, 1, 1)])
def test_batch_size_is_as_asked_or_the_largest_power_of_two(asked, num_images, num_devices, expected):
  settings = dataclasses.replace(SETTINGS, batch_size=asked)
  found = semi_supervised._with_batches(settings, num_images, 0.1, create_mesh(num_devices))
  assert found == dataclasses.replace(settings, batch_size=expected)


class Without(TextureSource):
  """Images with other labels or other class names."""

  def __init__(self, source, *, class_names=None, labels="same", multi_label=False):
    self.__dict__.update(source.__dict__, multi_label=multi_label)
    self.class_names = self.class_names if class_names is None else class_names
    if isinstance(labels, int):
      self._labels = np.full(len(source), labels, np.int32)


@pytest.mark.parametrize(("changes", "message"), [
  ({"train": Without(TRAIN, class_names=())}, "the training images have none.*data.labels=folder"),
  ({"test": Without(TEST, class_names=())}, "the held-out images have none.*data.labels=folder"),
  ({"test": Without(TEST, multi_label=True)}, "each of the held-out images may show several classes"),
  ({"test": Without(TEST, labels=-1)}, "none of the .* held-out images has one"),
  ({"test": Without(TEST, class_names=("a", *TEST.class_names[1:]))}, "different: a, "),
  ({"test": Without(TEST, class_names=TEST.class_names[::-1])}, "different: the order"),
  ({"fractions": (0.5, 1.5)}, r"1.5 of the labels is not possible: the fraction lies in \(0, 1\]"),
  ({"fractions": (0.001,)}, "0.001 of 80 labelled images is none; take 0.013 or more"),
  ({"fractions": ()}, "fractions is empty"),
  ({"fractions": (0.05,)}, "4 images, in batches of 4, which do not divide among 8 devices; use a power of two of "
                           "devices up to 4"),
  ({"batch_size": 12}, "batch_size=12 does not divide among 8 devices; try --config.semi_supervised.batch_size=8"),
  ({"batch_size": 0}, "batch_size=0"),
  ({"num_epochs": 0}, "num_epochs=0"),
  ({"learning_rate": 0.0}, "learning_rate=0.0"),
  ({"learning_rate": float("nan")}, "learning_rate=nan"),
  ({"milestones": (0.0,)}, "milestones="),
  ({"milestones": (1.0,)}, "shares of the 3 epochs, between 0 and 1"),
  ({"decay_factor": 0.0}, "decay_factor=0.0"),
  ({"momentum": 1.0}, "momentum=1.0"),
  ({"weight_decay": -1.0}, "weight_decay=-1.0"),
  ({"image_scale": (0.5, 0.2)}, "image_scale="),
])
def test_what_cannot_be_is_refused_before_anything_is_trained(tmp_path, monkeypatch, changes, message):
  monkeypatch.setattr(semi_supervised, "_fine_tune", None)
  with pytest.raises(UserError, match=message):
    measure(tmp_path, **changes)


def test_a_loss_that_is_not_finite_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(training, "epoch_means", lambda _: ({"": math.nan}, 8))
  with pytest.raises(UserError, match="the loss is nan in epoch 1 at a learning rate of 0.8.*choose a lower"):
    measure(tmp_path, fractions=(0.1,))
