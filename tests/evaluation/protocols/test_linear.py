"""Linear classifiers: the step against float64, the result against scikit-learn, one device and eight, interrupted."""

import dataclasses
import functools
import itertools
import json
import math

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.linear_model import LogisticRegression

from pirl_jax.data.embedded import TextureSource
from pirl_jax.data.records import Record
from pirl_jax.errors import UserError
from pirl_jax.evaluation import training
from pirl_jax.evaluation.features import stream_features
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.kept import read_classifier
from pirl_jax.evaluation.layers import layer_features
from pirl_jax.evaluation.outcome import Outcome
from pirl_jax.evaluation.protocol import Evaluation
from pirl_jax.evaluation.protocols import linear
from pirl_jax.evaluation.protocols.linear import (
  LinearSettings,
  create_classifiers,
  linear_optimizer,
  linear_rate,
  linear_step,
)
from pirl_jax.evaluation.subjects import Subject
from pirl_jax.models.heads import ImageHead, PatchesHead
from pirl_jax.models.network import Model, Network, create_variables
from pirl_jax.models.resnet import create_resnet
from pirl_jax.runs import Run
from pirl_jax.runtime.mesh import create_mesh, split, whole
from pirl_jax.views.normalisation import normalise_image

SIZE = 16
LAYERS = ("conv1", "res2", "res3", "res4", "pooled")
SEED = 5
SETTINGS = LinearSettings(
  layers="", num_epochs=3, batch_size=32, learning_rate=0.4, schedule="steps", milestones=(1 / 3, 2 / 3),
  decay_factor=0.1, momentum=0.9, nesterov=False, weight_decay=1e-3, head="bn", image_scale=(0.3, 1.0), cached=False)
TRAIN = TextureSource(112, size=SIZE, split="train")
TEST = TextureSource(60, size=SIZE, split="test")


@functools.cache
def pretrained():
  """A network with the batch statistics of the training images: with those of its start its deep layers are dead."""
  network = Network(create_resnet("resnet8", stem="3x3s2"), ImageHead(8), PatchesHead(8))

  @jax.jit
  def create(image):
    variables = create_variables(network, jax.random.key(1), image[:1], jnp.zeros((1, 4, 8, 8, 3)))
    zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    _, updated = network.apply({"params": variables["params"], "batch_stats": zeros}, image, train=True,
                               mutable=["batch_stats"], method="features")
    return {**variables, "batch_stats": jax.tree.map(lambda x: 10 * x, updated["batch_stats"])}  # a tenth was taken on

  return Model(network, jax.device_get(create(normalise_image(jnp.asarray(TRAIN._images)))))


class Changed(TextureSource):
  """Textures of which some are broken, some unlabelled, some left out."""

  def __init__(self, source, *, damaged=(), unlabelled=(), kept=None, class_names=None):
    kept = np.arange(len(source)) if kept is None else kept
    self._images, self._labels = source._images[kept], source._labels[kept].copy()
    self._labels[list(unlabelled)] = -1
    self._damaged = damaged
    self.class_names = source.class_names if class_names is None else class_names

  def __getitem__(self, index):
    return Record(b"broken" if index in self._damaged else self._images[index], int(self._labels[index]))


# The step against the formula.

SHAPES = {"map": (2, 3, 5), "vector": (7,)}
CLASSES = 4


def make_batch(step, *, broken=(3, 12), size=16):
  rng = np.random.default_rng(step)
  index = np.arange(size)
  # Of a broken image anything may come, also a label that is none.
  maps = {name: rng.normal(1.5, 2, (size, *shape)).astype(np.float32) for name, shape in SHAPES.items()}
  for x in maps.values():
    x[np.isin(index, broken)] = 1e3
  label = np.where(index == 3, -1, rng.integers(0, CLASSES, size)).astype(np.int32)
  return {**maps, "index": index.astype(np.int32), "label": label, "valid": ~np.isin(index, broken)}


def maps_of(frozen, batch):
  assert set(frozen) == {"trunk"}
  return {name: batch[name] for name in SHAPES}


def start(settings, mesh, steps_per_epoch):
  optimizer = linear_optimizer(settings, steps_per_epoch)
  state = create_classifiers(SEED, SHAPES, optimizer, settings, num_classes=CLASSES)
  return jax.device_put(state, whole(mesh)), training.make_classifier_step(
    linear_step(maps_of, optimizer), mesh, steps_per_epoch=steps_per_epoch)


def run_steps(settings, num_devices, num_steps, *, steps_per_epoch=2):
  mesh = create_mesh(num_devices)
  state, train_step = start(settings, mesh, steps_per_epoch)
  states, losses = [jax.device_get(state)], []
  frozen = jax.device_put({"trunk": np.ones(3, np.float32)}, whole(mesh))
  for step in range(num_steps):
    state, loss = train_step(state, frozen, jax.device_put(make_batch(step), split(mesh)))
    states.append(jax.device_get(state))
    losses.append(jax.device_get(loss))
  assert train_step._cache_size() == 1
  return states, losses


def oracle_step(params, velocity, stats, x, batch, *, rate, settings):
  """One classifier's step in float64: batch norm, linear layer, cross-entropy, PyTorch's SGD. Changes its arguments."""
  kept = np.flatnonzero(batch["valid"])
  x = x[kept].astype(np.float64).reshape(len(kept), -1, x.shape[-1])  # [n, points, C]
  normal, centred = x, None
  if stats:
    mean, var = np.zeros(x.shape[2]), np.zeros(x.shape[2])
    for channel in range(x.shape[2]):
      values = [x[i, point, channel] for i in range(x.shape[0]) for point in range(x.shape[1])]
      mean[channel] = sum(values) / len(values)
      var[channel] = sum((value - mean[channel]) ** 2 for value in values) / len(values)
    centred = (x - mean) / np.sqrt(var + 1e-5)
    normal = centred * params["scale"] + params["shift"] if "scale" in params else centred
    unbiased = var * len(values) / (len(values) - 1)
    stats["mean"] = 0.9 * stats["mean"] + 0.1 * mean
    stats["var"] = 0.9 * stats["var"] + 0.1 * unbiased
  flat = normal.reshape(len(kept), -1)
  loss, grads = 0.0, {name: np.zeros_like(value) for name, value in params.items()}
  for row, label, deviation in zip(flat, batch["label"][kept], itertools.repeat(None) if centred is None else centred,
                                   strict=False):
    logits = row @ params["kernel"] + params["bias"]
    probabilities = np.exp(logits) / sum(math.exp(value) for value in logits)
    loss -= math.log(probabilities[label]) / len(kept)
    error = (probabilities - np.eye(CLASSES)[label]) / len(kept)
    grads["kernel"] += np.outer(row, error)
    grads["bias"] += error
    if "scale" in params:
      back = (params["kernel"] @ error).reshape(deviation.shape)  # [points, C]
      grads["scale"] += (back * deviation).sum(axis=0)
      grads["shift"] += back.sum(axis=0)
  for name, grad in grads.items():
    if name in ("kernel", "bias"):
      grad = grad + settings.weight_decay * params[name]
    velocity[name] = settings.momentum * velocity.get(name, 0) + grad
    params[name] = params[name] - rate * (grad + settings.momentum * velocity[name] if settings.nesterov
                                          else velocity[name])
  return loss


def in_float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize(("head", "nesterov"), [("bn", False), ("bn_affine", True), ("plain", True)])
def test_steps_are_those_of_the_formula(head, nesterov, num_devices):
  # A batch of 16 at 1.6 for 256 is 0.1, and a hundredth from the third step on.
  settings = dataclasses.replace(SETTINGS, batch_size=16, head=head, nesterov=nesterov, learning_rate=1.6,
                                 milestones=(1 / 3,), decay_factor=0.01, weight_decay=0.05)
  states, losses = run_steps(settings, num_devices, 4)
  assert {name: set(head_params) for name, head_params in states[0]["params"].items()} == dict.fromkeys(
    SHAPES, {"kernel", "bias", "scale", "shift"} if head == "bn_affine" else {"kernel", "bias"})
  # On one device 14 images are read; on eight, devices 1 and 6 have half of the others' count.
  for name in SHAPES:
    params, stats = (in_float64(states[0][part][name]) for part in ("params", "stats"))
    assert bool(stats) == (head != "plain")
    velocity, expected = {}, []
    for step in range(4):
      batch = make_batch(step)
      expected.append(oracle_step(params, velocity, stats, batch[name], batch, rate=0.1 if step < 2 else 0.001,
                                  settings=settings))
      np.testing.assert_allclose(losses[step][name], expected[-1], rtol=1e-4)
      close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
      jax.tree.map(close, states[step + 1]["params"][name], params)
      jax.tree.map(close, states[step + 1]["stats"][name], stats)
    # The sums of an epoch of two steps, and that they begin anew.
    for step, sums in enumerate(([0], [0, 1], [2], [2, 3]), start=1):
      epoch = states[step]["epoch"]
      assert epoch["num_read"] == 14 * len(sums) and states[step]["step"] == step
      np.testing.assert_allclose(epoch["loss"][name], 14 * sum(expected[i] for i in sums), rtol=1e-4)


def test_a_batch_that_cannot_be_read_leaves_statistics_and_parameters():
  settings = dataclasses.replace(SETTINGS, weight_decay=0.0, head="bn_affine")
  mesh = create_mesh(8)
  state, train_step = start(settings, mesh, 4)
  before = jax.device_get(state)
  state, losses = train_step(state, {"trunk": jnp.ones(3)}, jax.device_put(make_batch(0, broken=range(16)),
                                                                          split(mesh)))
  assert jax.device_get(losses) == {"map": 0, "vector": 0} and state["epoch"]["num_read"] == 0
  for part in ("params", "stats"):
    jax.tree.map(np.testing.assert_array_equal, before[part], state[part])


def test_a_classifier_starts_small_and_alike_whichever_others_there_are():
  optimizer = linear_optimizer(SETTINGS, 1)
  settings = dataclasses.replace(SETTINGS, head="bn_affine")
  create = functools.partial(create_classifiers, optimizer=optimizer, settings=settings, num_classes=50)
  both, alone, other = create(3, SHAPES), create(3, {"vector": (7,)}), create(4, SHAPES)
  jax.tree.map(np.testing.assert_array_equal, both["params"]["vector"], alone["params"]["vector"])
  kernel, bias, scale, shift = (both["params"]["map"][name] for name in ("kernel", "bias", "scale", "shift"))
  assert kernel.shape == (30, 50) and 0.0095 < np.std(kernel) < 0.0105  # fssb, MoCo: N(0, 0.01^2)
  assert not bias.any() and (scale == 1).all() and not shift.any() and scale.shape == shift.shape == (5,)
  assert not np.array_equal(kernel, other["params"]["map"]["kernel"])
  assert not np.array_equal(kernel[:7], both["params"]["vector"]["kernel"])


def test_a_classifier_of_vissl_starts_as_pytorchs_layers_do():
  settings = dataclasses.replace(SETTINGS, init="pytorch")
  state = create_classifiers(3, {"vector": (100,)}, linear_optimizer(settings, 1), settings, num_classes=400)
  layer, bound = state["params"]["vector"], 100**-0.5
  for values in layer.values():  # uniform in +-1/sqrt(D), kernel and bias
    assert 0.98 * bound < np.abs(values).max() <= bound
    np.testing.assert_allclose(np.std(values), bound / 3**0.5, rtol=0.1)
  assert not np.array_equal(layer["kernel"][0], layer["bias"])


def test_learning_rate_falls_at_the_milestones():
  # The paper: 28 epochs, 0.01 for 256 images, divided by ten at two equally spaced points.
  settings = dataclasses.replace(SETTINGS, num_epochs=28, batch_size=256, learning_rate=0.01,
                                 milestones=(2 / 3, 1 / 3))
  rates = [float(linear_rate(settings, 3)(step)) for step in range(84)]
  np.testing.assert_allclose(rates, [0.01] * 28 + [0.001] * 28 + [0.0001] * 28, rtol=1e-6)
  vissl = dataclasses.replace(settings, batch_size=64, milestones=(2 / 7, 4 / 7, 6 / 7))
  rates = [float(linear_rate(vissl, 2)(step)) for step in range(56)]
  np.testing.assert_allclose(rates, [0.0025 * 0.1**(step // 16) for step in range(56)], rtol=1e-6)
  constant = linear_rate(dataclasses.replace(settings, milestones=()), 3)
  assert float(constant(80)) == np.float32(0.01)


def test_cosine_ends_at_zero():
  settings = dataclasses.replace(SETTINGS, num_epochs=4, batch_size=512, learning_rate=0.3, schedule="cosine")
  schedule = linear_rate(settings, 5)
  for step in range(21):
    assert float(schedule(step)) == pytest.approx(0.6 * (1 + math.cos(math.pi * step / 20)) / 2, abs=1e-6)


# Whole measurements.

def measure(folder, *, num_devices=8, train=TRAIN, test=TEST, layers=LAYERS, num_threads=1, model=None, **changes):
  images = [Images(source, SIZE, 1.0, 16, num_threads) for source in (train, test)]
  settings = dataclasses.replace(SETTINGS, layers=",".join(layers), **changes)
  return linear.measure_linear(model or pretrained(), *images, settings, mesh=create_mesh(num_devices), seed=SEED,
                               snapshot_folder=folder)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """What uninterrupted measurements found, without and with the cache."""
  return {cached: measure(tmp_path_factory.mktemp("whole"), cached=cached, head="bn" if cached else "bn_affine",
                          nesterov=not cached) for cached in (False, True)}


@pytest.mark.parametrize("cached", [False, True])
def test_outcome(measured, cached):
  outcome = measured[cached]
  assert json.loads(json.dumps(outcome.to_json())) == outcome.to_json()  # JSON values throughout
  assert Outcome.from_json(outcome.to_json()) == outcome
  figures = outcome.figures
  assert list(figures["layers"]) == list(LAYERS)
  assert {layer: found["dim"] for layer, found in figures["layers"].items()} == {
    "conv1": 8 * 8 * 16, "res2": 8 * 8 * 16, "res3": 4 * 4 * 32, "res4": 2 * 2 * 64, "pooled": 64}
  for found in figures["layers"].values():
    assert 0 <= found["top1"] <= found["top5"] <= 1 and 0 < found["loss"] < 5
    assert found["top1"] * 60 == pytest.approx(round(found["top1"] * 60))
  best = figures["best_layer"]
  assert figures["top1"] == max(found["top1"] for found in figures["layers"].values())
  assert {name: figures[name] for name in ("top1", "top5")} == {
    name: figures["layers"][best][name] for name in ("top1", "top5")}
  assert {name: figures[name] for name in ("num_classes", "num_train", "num_test", "num_broken_train",
                                           "num_broken_test", "steps")} == {
    "num_classes": 10, "num_train": 112, "num_test": 60, "num_broken_train": 0, "num_broken_test": 0, "steps": 9}
  assert figures["settings"] == {
    "num_epochs": 3, "batch_size": 32, "learning_rate": 0.4 * 32 / 256, "schedule": "steps", "milestones": [1.0, 2.0],
    "decay_factor": 0.1, "momentum": 0.9, "nesterov": not cached, "weight_decay": 1e-3,
    "head": "bn" if cached else "bn_affine", "init": "normal", "image_scale": [0.3, 1.0], "cached": cached, "seed": 5}
  assert outcome.table == {**{layer: figures["layers"][layer]["top1"] for layer in LAYERS},
                           "best layer, top-1": figures["top1"], "best layer, top-5": figures["top5"]}
  assert outcome.curve.x == list(LAYERS) and outcome.curve.y == [outcome.table[layer] for layer in LAYERS]


def assert_close(found, expected, *, layers=LAYERS):
  for layer in layers:
    one, other = found.figures["layers"][layer], expected.figures["layers"][layer]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-3), layer
    assert abs(one["top1"] - other["top1"]) <= 1.5 / 60, layer  # an image on the border between two classes


def test_one_device_finds_what_eight_find(tmp_path, measured):
  one, eight = measure(tmp_path, num_devices=1, head="bn_affine", nesterov=True), measured[False]
  assert_close(one, eight)
  same = ("num_train", "num_test", "num_broken_train", "num_broken_test", "steps", "settings")
  assert {name: one.figures[name] for name in same} == {name: eight.figures[name] for name in same}


def test_a_layer_does_not_depend_on_the_others(tmp_path, measured):
  found = measure(tmp_path, layers=("res4", "embedding", "res3"), cached=True)
  assert list(found.figures["layers"]) == ["res3", "res4", "embedding"]
  assert found.figures["layers"]["embedding"]["dim"] == 8
  assert_close(found, measured[True], layers=("res3", "res4"))


def test_the_model_stays_as_it_was(tmp_path):
  mesh, model = create_mesh(8), pretrained()
  # Already where the step wants it: a state that shared these arrays would give them away with its own.
  placed = jax.tree.map(jnp.copy, jax.device_put(model.variables, whole(mesh)))
  measure(tmp_path, model=Model(model.network, placed), num_epochs=1, milestones=())
  jax.tree.map(np.testing.assert_array_equal, placed, model.variables)


def features_of(source, layer, indices):
  """Features of the test transform by a plain forward pass, f64[N, D]."""
  model = pretrained()
  image = np.stack([source[i].image for i in indices])
  found = jax.jit(layer_features(model.network, (layer,)))(model.variables, normalise_image(jnp.asarray(image)))
  return np.asarray(found[layer], np.float64)


def coloured(source, seed):
  """Its labels, with noise about one colour for each class as images: a random network tells most of them apart."""
  rng = np.random.default_rng(seed)
  colours = np.random.default_rng(0).uniform(60, 190, (10, 3))
  easy = Changed(source)
  own = colours[source.labels()] + rng.normal(0, 20, (len(source), 3))
  noise = rng.normal(0, 30, (len(source), SIZE, SIZE, 3))
  easy._images = np.clip(own[:, None, None] + noise, 0, 255).astype(np.uint8)
  return easy


@pytest.mark.parametrize(("head", "layer", "rate"), [
  ("plain", "pooled", 0.5), ("bn", "pooled", 0.3), ("bn", "res4", 0.1)])
def test_trained_to_the_end_it_is_scikit_learns_logistic_regression(tmp_path, monkeypatch, head, layer, rate):
  # The whole set is one batch, so every step has the same objective, and that has a single minimum.
  train_set, test_set = coloured(TRAIN, 1), coloured(TEST, 2)
  decay, channels = 0.02, 64
  saved = []
  train = training.train_classifier
  monkeypatch.setattr(training, "train_classifier", lambda *args, **kw: saved.append(train(*args, **kw)) or saved[-1])
  outcome = measure(tmp_path, num_devices=1, train=train_set, test=test_set, layers=(layer,), batch_size=112,
                    num_epochs=800, schedule="cosine", learning_rate=rate * 256 / 112, nesterov=True,
                    weight_decay=decay, head=head, cached=True)
  x, y = (features_of(source, layer, range(len(source))) for source in (train_set, test_set))
  if head == "bn":
    per_channel = x.reshape(-1, channels)
    mean, var = per_channel.mean(axis=0), per_channel.var(axis=0)
    # Running statistics are unbiased, those of the batch are not.
    unbiased = var * len(per_channel) / (len(per_channel) - 1)
    x, y = (((z.reshape(-1, channels) - mean) / np.sqrt(v + 1e-5)).reshape(z.shape)
            for z, v in ((x, var), (y, unbiased)))
  x, y = (np.concatenate([z, np.ones((len(z), 1))], axis=1) for z in (x, y))  # the bias, which decays here too
  model = LogisticRegression(C=1 / (decay * 112), fit_intercept=False, tol=1e-8, max_iter=10_000)
  model.fit(x, TRAIN.labels())
  assert 0.4 < model.score(y, TEST.labels()) < 1
  probabilities = model.predict_proba(x)[np.arange(112), TRAIN.labels()]
  found = outcome.figures["layers"][layer]
  assert found["loss"] == pytest.approx(-np.log(probabilities).mean(), rel=1e-3)
  params = jax.device_get(saved[0]["params"][layer])
  weights = np.concatenate([params["kernel"], params["bias"][None]])
  # A softmax does not know a number added to all classes, and at the minimum of the decay their mean is 0.
  expected = model.coef_.T - model.coef_.T.mean(axis=1, keepdims=True)
  np.testing.assert_allclose(weights, expected, atol=0.01 * np.abs(expected).max())
  assert found["top1"] == pytest.approx(model.score(y, TEST.labels()), abs=1.5 / 60)
  ranks = (-model.decision_function(y)).argsort(axis=1).argsort(axis=1)[np.arange(60), TEST.labels()]
  assert found["top5"] == pytest.approx(np.mean(ranks < 5), abs=1.5 / 60)


# Images that are broken or have no label.

BROKEN, UNLABELLED = (0, 50, 111), (3, 4, 70)


@pytest.mark.parametrize("cached", [False, True])
def test_unlabelled_images_take_no_part(tmp_path, cached):
  with_them = Changed(TRAIN, unlabelled=UNLABELLED)
  without = Changed(TRAIN, kept=np.setdiff1d(np.arange(112), UNLABELLED))
  found, expected = (measure(tmp_path, train=train, layers=("res4",), cached=cached) for train in (with_them, without))
  assert found == expected
  assert found.figures["num_train"] == 109


def test_broken_images_are_not_in_the_cache(tmp_path):
  found = measure(tmp_path, train=Changed(TRAIN, damaged=BROKEN, unlabelled=UNLABELLED), layers=("res4",), cached=True)
  kept = np.setdiff1d(np.arange(112), (*BROKEN, *UNLABELLED))
  expected = measure(tmp_path, train=Changed(TRAIN, kept=kept), layers=("res4",), cached=True)
  assert found.figures == expected.figures | {"num_train": 109, "num_broken_train": 3}


class Relabelled(Changed):
  """The broken ones have another label."""

  def __getitem__(self, index):
    record = super().__getitem__(index)
    return record._replace(label=3 - record.label % 2) if index in self._damaged else record


def test_broken_images_weigh_nothing_in_training(tmp_path):
  kept, damaged = np.arange(104), (5, 6, 7, 50)  # every image is in the one batch of an epoch
  found, relabelled, readable = (
    measure(tmp_path / str(i), train=train, layers=("res4",), batch_size=104).figures
    for i, train in enumerate((Changed(TRAIN, kept=kept, damaged=damaged),
                               Relabelled(TRAIN, kept=kept, damaged=damaged), Changed(TRAIN, kept=kept))))
  assert found == relabelled
  assert (found["num_train"], found["num_broken_train"], readable["num_broken_train"]) == (104, 4, 0)
  assert found["layers"]["res4"]["loss"] != pytest.approx(readable["layers"]["res4"]["loss"], rel=1e-4)


def test_broken_and_unlabelled_test_images_are_not_judged(tmp_path, monkeypatch):
  saved = []
  train = training.train_classifier
  monkeypatch.setattr(training, "train_classifier", lambda *args, **kw: saved.append(train(*args, **kw)) or saved[-1])
  test = Changed(TEST, damaged=(1, 59), unlabelled=(1, 2, 30))
  found = measure(tmp_path, test=test, layers=("pooled",), cached=True)
  assert (found.figures["num_test"], found.figures["num_broken_test"]) == (56, 2)
  state = jax.device_get(saved[0])
  judged = np.setdiff1d(np.arange(60), (1, 2, 30, 59))
  stats, params = state["stats"]["pooled"], state["params"]["pooled"]
  features = features_of(TEST, "pooled", judged)
  logits = (features - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) @ params["kernel"] + params["bias"]
  labels = TEST.labels()[judged]
  best = np.argsort(-logits, axis=1)
  assert found.figures["top1"] == pytest.approx(np.mean(best[:, 0] == labels))
  assert found.figures["top5"] == pytest.approx(np.mean((best[:, :5] == labels[:, None]).any(axis=1)))


def test_of_equal_layers_the_deeper_one_is_the_best_and_few_classes_are_all_among_the_top_five(tmp_path, monkeypatch):
  ranks = {"conv1": [0, 1, 3], "res2": [0, 0, 3], "res3": [0, 0, 2], "res4": [0, 1, 1]}
  ranked = {layer: np.array(rank) for layer, rank in ranks.items()}, 0
  monkeypatch.setattr(linear, "ranks_by_layer", lambda *_: ranked)
  figures = measure(tmp_path, layers=tuple(ranks)[::-1], num_epochs=1, milestones=(), cached=True).figures
  assert list(figures["layers"]) == ["conv1", "res2", "res3", "res4"]
  assert figures["best_layer"] == "res3"
  assert (figures["top1"], figures["top5"]) == (2 / 3, 1.0)


# Interrupted.

class Stops(Changed):
  """Images until so many were read, then an error that is no image's."""

  def __init__(self, left):
    super().__init__(TRAIN)
    self.left = left

  def __getitem__(self, index):
    self.left -= 1
    if self.left < 0:
      raise RuntimeError("the machine is gone")
    return super().__getitem__(index)


def test_an_interrupted_measurement_goes_on_where_it_was(tmp_path, monkeypatch, capsys, measured):
  monkeypatch.setattr(training, "SNAPSHOT_SECONDS", 0)
  monkeypatch.setattr(training, "CHECK_STEPS", 2)
  arguments = dict(head="bn_affine", nesterov=True, num_threads=0)
  # Three steps an epoch: stopped in the sixth after the snapshot of the fourth, in the middle of the second epoch; then
  # in the ninth after that of the eighth, in the middle of the last one, of which the mean loss is a figure.
  for num_steps in (5, 4):
    with pytest.raises(RuntimeError, match="the machine is gone"):
      measure(tmp_path, train=Stops(num_steps * 32 + 10), **arguments)
  assert "resumes from step 4 of 9" in capsys.readouterr().out
  assert measure(tmp_path, **arguments) == measured[False]  # bit for bit
  assert "resumes from step 8 of 9" in capsys.readouterr().out
  # Trained to the end, and stopped before anything was written.
  assert measure(tmp_path, **arguments) == measured[False]
  assert "resumes from step 9 of 9" in capsys.readouterr().out


def test_an_interrupted_measurement_goes_on_with_the_cache(tmp_path, monkeypatch, capsys, measured):
  monkeypatch.setattr(training, "SNAPSHOT_SECONDS", 0)
  place, placed = linear.batches.place, []

  def stop(batch, mesh):
    placed.append(batch)
    if len(placed) == 6:
      raise RuntimeError("the machine is gone")
    return place(batch, mesh)

  with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the machine is gone"):
    patch.setattr(linear.batches, "place", stop)
    measure(tmp_path, cached=True)
  assert measure(tmp_path, cached=True) == measured[True]  # bit for bit
  assert "resumes from step 3 of 9" in capsys.readouterr().out


def test_no_snapshot_sooner_than_a_minute(tmp_path, measured):
  measure(tmp_path, cached=True, layers=("pooled",))
  assert not list(tmp_path.iterdir())


# The cache.

def take(count, **changes):
  maps = {"a": np.arange(30, dtype=np.float32).reshape(30, 1), "b": np.arange(30, dtype=np.float32).reshape(30, 1) * 2}
  labels = (np.arange(30) % 7).astype(np.int32)
  arguments = dict(batch_size=8, seed=3, start_step=0) | changes
  return list(itertools.islice(linear.cached_batches(maps, labels, **arguments), count))


def test_cached_batches_hold_an_image_at_most_once_an_epoch():
  stream = take(9)
  for batch in stream:
    np.testing.assert_array_equal(batch["a"][:, 0], batch["index"])
    np.testing.assert_array_equal(batch["b"][:, 0], 2 * batch["index"])
    np.testing.assert_array_equal(batch["label"], batch["index"] % 7)
    assert batch["valid"].all() and {x.dtype.name for x in batch.values()} == {"float32", "int32", "bool"}
  epochs = [np.concatenate([batch["index"] for batch in stream[3 * e:3 * e + 3]]).tolist() for e in range(3)]
  assert all(len(set(epoch)) == 24 for epoch in epochs)
  assert len({frozenset(epoch) for epoch in epochs}) == 3
  assert take(3, seed=4)[0]["index"].tolist() != stream[0]["index"].tolist()


@pytest.mark.parametrize("start_step", [1, 2, 3, 4, 8])
def test_cached_batches_from_any_step_and_process(start_step):
  whole_stream = take(12)
  parts = [take(12 - start_step, start_step=start_step, process=(i, 2)) for i in range(2)]
  for batch, first, second in zip(whole_stream[start_step:], *parts, strict=True):
    for name, value in batch.items():
      np.testing.assert_array_equal(np.concatenate([first[name], second[name]]), value)


def test_a_cache_that_is_too_large_is_refused_before_an_image_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(linear, "stream_features", lambda *_, **__: pytest.fail("read images first"))
  dim = 8 * 8 * 16 + 4 * 4 * 32
  monkeypatch.setattr(linear, "CACHE_BYTES", 112 * 4 * dim - 1)
  with pytest.raises(UserError, match="features of 112 training images on res2, res3 take 0.0 GiB.*cached=False"):
    measure(tmp_path, layers=("res2", "res3"), cached=True)
  monkeypatch.setattr(linear, "CACHE_BYTES", 112 * 4 * dim)
  with pytest.raises(pytest.fail.Exception, match="read images first"):
    measure(tmp_path, layers=("res2", "res3"), cached=True)


# What a user can get wrong.

@pytest.mark.parametrize(("changes", "message"), [
  ({"train": Changed(TRAIN, class_names=())}, "the training images have none.*data.labels=folder"),
  ({"test": Changed(TEST, class_names=())}, "the held-out images have none.*data.labels=folder"),
  ({"test": Changed(TEST, unlabelled=range(60))}, "none of the .* held-out images has one"),
  ({"test": Changed(TEST, class_names=("a", *TEST.class_names[1:]))}, "different: a, "),
  ({"test": Changed(TEST, class_names=TEST.class_names[::-1])}, "different: the order"),
  ({"layers": ("res2", "res9")}, "linear.layers names the layer 'res9'; this network has conv1, res2"),
  ({"batch_size": 20}, "batch_size=20 does not divide among 8 devices; try --config.linear.batch_size=16"),
  ({"batch_size": 120}, "only 112 training images with a label.*try --config.linear.batch_size=112"),
  ({"train": Changed(TRAIN, kept=np.arange(5)), "batch_size": 8}, "only 5 training images.*8 devices need 8"),
  ({"batch_size": 0}, "linear.batch_size=0"),
  ({"num_epochs": 0}, "linear.num_epochs=0"),
  ({"learning_rate": 0.0}, "linear.learning_rate=0.0"),
  ({"learning_rate": float("nan")}, "linear.learning_rate=nan"),
  ({"schedule": "linear"}, "linear.schedule='linear' is not possible: choose from steps, cosine"),
  ({"milestones": (0.0,)}, r"linear.milestones=\(0.0,\)"),
  ({"milestones": (1 / 3, 1.0)}, "shares of the 3 epochs, between 0 and 1"),
  ({"decay_factor": 0.0}, "linear.decay_factor=0.0"),
  ({"momentum": 1.0}, "linear.momentum=1.0"),
  ({"weight_decay": -1.0}, "linear.weight_decay=-1.0"),
  ({"head": "mlp"}, "linear.head='mlp' is not possible: choose from bn, bn_affine, plain"),
  ({"init": "zeros"}, "linear.init='zeros' is not possible: choose from normal, pytorch"),
  ({"image_scale": (0.5, 0.2)}, "linear.image_scale="),
])
@pytest.mark.parametrize("cached", [False, True])
def test_what_cannot_be_is_refused_before_anything_is_trained(tmp_path, monkeypatch, cached, changes, message):
  monkeypatch.setattr(training, "train_classifier", None)
  for name in ("stream_features", "layer_features"):
    monkeypatch.setattr(linear, name, None)
  with pytest.raises(UserError, match=message):
    measure(tmp_path, cached=cached, **changes)


def test_milestones_mean_nothing_with_a_cosine(tmp_path):
  outcome = measure(tmp_path, layers=("pooled",), schedule="cosine", milestones=(60.0, 80.0), num_epochs=1, cached=True)
  assert outcome.figures["settings"]["milestones"] == []


@pytest.mark.parametrize("cached", [False, True])
def test_only_broken_images(tmp_path, cached):
  with pytest.raises(UserError, match="none of .* labelled training images can be read"):
    measure(tmp_path, train=Changed(TRAIN, damaged=range(112)), layers=("pooled",), cached=cached)
  with pytest.raises(UserError, match="none of the 60 test images has a label and can be read: 60 are broken"):
    measure(tmp_path, test=Changed(TEST, damaged=range(60)), layers=("pooled",), cached=cached)


def test_broken_images_may_leave_too_few_for_a_batch(tmp_path):
  with pytest.raises(UserError, match="linear.batch_size=112, but there are only 109.*batch_size=104"):
    measure(tmp_path, train=Changed(TRAIN, damaged=BROKEN), batch_size=112, cached=True, layers=("pooled",))


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
  with pytest.raises(UserError, match="the loss on res4 is (nan|inf) in epoch 1 at a learning rate of 1e.30.*lower"):
    measure(tmp_path, learning_rate=1e30, head="plain", cached=True, layers=("res4",), num_epochs=30)


# Further sets.

def write_classes(folder, numbers):
  """Writes images of these classes of the test textures; returns {class: number of images}."""
  counts = {}
  labels = TEST.labels()
  for index in np.flatnonzero(np.isin(labels, numbers)):
    name = TEST.class_names[labels[index]]
    (folder / name).mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / name / f"{index}.png"), TEST._images[index][..., ::-1])
    counts[name] = counts.get(name, 0) + 1
  return counts


def further_evaluation(tmp_path, folders, layers="res4"):
  settings = dataclasses.replace(SETTINGS, layers=layers, further=folders, num_epochs=1)
  train, test = (Images(source, SIZE, 1.0, 16, 1) for source in (TRAIN, TEST))
  run = Run("run", tmp_path, 1, True, {"config": {}}, pretrained())
  config = ConfigDict({"protocol": "linear", "seed": SEED, "checkpoint": "run"})
  return Evaluation(config, settings, Subject((run,)), {}, train, test, lambda _: test, create_mesh(8),
                    tmp_path / "snapshots", tmp_path / "linear")


def test_further_sets_are_judged_among_their_own_classes(tmp_path):
  counts = write_classes(tmp_path / "few", [1, 4, 6])
  write_classes(tmp_path / "all", range(len(TEST.class_names)))
  evaluation = further_evaluation(tmp_path, f"{tmp_path / 'few'}, {tmp_path / 'all'}")
  linear.PROTOCOL.check(evaluation)
  outcome = linear.PROTOCOL.measure(evaluation)
  few, every = outcome.figures["further"]["few"], outcome.figures["further"]["all"]
  # The whole test set again gives the figures of the test set.
  assert {name: every[name] for name in ("top1", "top5", "num_test")} == {
    name: outcome.figures[name] for name in ("top1", "top5", "num_test")}
  # With the kept classifier, by hand.
  kept = read_classifier(tmp_path / "linear-classifier.npz")
  mesh = create_mesh(8)
  variables = {"frozen": pretrained().variables,
               **{name: {"res4": kept.variables.get(name, {})} for name in ("params", "stats")}}
  part, = stream_features(linear.linear_logits(pretrained().network, ("res4",)), variables,
                          Images(TEST, SIZE, 1.0, 64, 1).test_batches(), mesh)
  chosen = np.isin(part.labels, [1, 4, 6])
  logits = part.features["res4"][chosen][:, [1, 4, 6]]
  right = np.array([1, 4, 6])[logits.argmax(axis=1)] == part.labels[chosen]
  assert few == {"top1": pytest.approx(right.mean()), "top5": 1.0, "num_classes": 3, "num_test": sum(counts.values()),
                 "num_broken_test": 0}
  assert 0 < few["top1"] != every["top1"]
  assert outcome.table["few, top-1 of 3 classes"] == few["top1"]
  assert "further" not in outcome.figures["settings"]


@pytest.mark.parametrize("make, problem", [
  (lambda root: (root / "x" / "zebra").mkdir(parents=True) or cv2.imwrite(str(root / "x" / "zebra" / "1.png"), np.zeros(
    (9, 9, 3), np.uint8)), "linear.further: class 'zebra' of .* is not among the"),
  (lambda root: None, "linear.further: .*x")])
def test_further_sets_of_other_classes_are_refused_before_the_training(make, problem, tmp_path):
  make(tmp_path)
  with pytest.raises(UserError, match=problem):
    linear.PROTOCOL.check(further_evaluation(tmp_path, str(tmp_path / "x")))


@pytest.mark.parametrize(("num_images", "batch_size"), [(64, 64), (65, 64), (63, 56), (9, 8), (8, 8), (7, 64)])
def test_a_batch_is_never_larger_than_the_images_that_8_devices_can_share(num_images, batch_size):
  settings = dataclasses.replace(SETTINGS, batch_size=64)
  found = linear.with_batches_that_fill(settings, num_images, create_mesh(8))
  assert found == dataclasses.replace(settings, batch_size=batch_size)
