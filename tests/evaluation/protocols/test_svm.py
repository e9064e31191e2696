"""SVMs against a plain scikit-learn pipeline, average precision against the curve by hand."""

import json
import warnings

import jax
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from pirl_jax.data.crops import BrokenImage
from pirl_jax.data.embedded import TextureSource
from pirl_jax.data.records import Record
from pirl_jax.errors import UserError
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.protocols import svm
from pirl_jax.evaluation.protocols.svm import average_precision
from pirl_jax.figures.curves import Curve
from pirl_jax.models.heads import ImageHead, PatchesHead
from pirl_jax.models.network import Model, Network, create_variables
from pirl_jax.models.resnet import create_resnet
from pirl_jax.runtime.mesh import create_mesh
from pirl_jax.views.normalisation import normalise_image

COSTS = (1.0, 0.01, 10.0, 0.1)


@pytest.fixture(autouse=True)
def few_costs(monkeypatch):
  monkeypatch.setitem(svm.GRIDS, "few", COSTS)

"""Not in order: of equals the first of the grid is taken, not the lowest."""


def curve_area(present, scores):
  """vissl's calculate_ap on scikit-learn's curve, with plain loops."""
  precision, recall, _ = precision_recall_curve(present, scores)
  points = sorted(zip(recall.tolist(), precision.tolist(), strict=True))
  area, before = 0.0, 0.0
  for recall, _ in points:
    if recall > before:
      area += (recall - before) * max(p for r, p in points if r >= recall)
      before = recall
  return area


def test_average_precision_by_hand():
  # Ranked: present, absent, (difficult), present, present, absent. Precision at the three hits: 1, 2/3, 3/4; made
  # monotone from the right: 1, 3/4, 3/4.
  targets, scores = np.array([0, 1, -1, 1, 0, 1]), np.array([0.8, 0.5, 0.7, 0.9, -1.0, 0.6])
  assert average_precision(targets, scores) == pytest.approx((1 + 3 / 4 + 3 / 4) / 3)
  kept = targets >= 0
  assert average_precision_score(targets[kept], scores[kept]) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)


@pytest.mark.parametrize("num_values", [5, 10**6])  # many ties, and none
def test_average_precision_equals_the_envelope_of_scikit_learns_curve(num_values):
  rng = np.random.default_rng(num_values)
  for size in (1, 2, 7, 60, 200):
    targets = rng.integers(-1, 2, size)
    targets[rng.integers(size)] = 1
    scores = rng.integers(0, num_values, size) / 7 - 1
    kept = targets >= 0
    found = average_precision(targets, scores)
    assert found == pytest.approx(curve_area(targets[kept] == 1, scores[kept]), abs=1e-12)
    assert found >= average_precision_score(targets[kept], scores[kept]) - 1e-12
    order = rng.permutation(size)
    assert average_precision(targets[order], scores[order]) == found


def test_average_precision_where_precision_only_falls_is_that_of_scikit_learn():
  present = np.array([1, 1, 0, 1, 0, 0, 1])  # 1, 1, 3/4, 4/7
  scores = np.arange(7, 0, -1.0)
  assert average_precision(present, scores) == pytest.approx(average_precision_score(present, scores), abs=1e-12)
  assert average_precision(np.array([0, 0, 1]), np.array([1.0, 1.0, 1.0])) == pytest.approx(1 / 3)  # all equal
  assert average_precision(np.array([1, 0, 1]), np.array([3.0, -1.0, 2.0])) == 1.0


def test_grids():
  assert svm.PAPER_COSTS[:10] == (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1, 10, 100)
  assert [cost * 2**19 for cost in svm.PAPER_COSTS[10:]] == [2**power for power in range(15, -1, -1)]
  assert svm.MAX_ITER == 2_000  # vissl's svm_trainer.py
  assert svm.VISSL_COSTS == (0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000)


NETWORK = Network(create_resnet("resnet8", width=1, stem="3x3s2"), ImageHead(16), PatchesHead(16))


@pytest.fixture(scope="module")
def model():
  variables = create_variables(
    NETWORK, jax.random.key(1), jax.numpy.zeros((1, 16, 16, 3)), jax.numpy.zeros((1, 9, 5, 5, 3)))
  return Model(NETWORK, variables)


class Damaged(TextureSource):
  """Every seventh image cannot be read, every eleventh has no label."""

  def __getitem__(self, index):
    if index % 7 == 3:
      raise BrokenImage(index)
    return super().__getitem__(index)._replace(label=int(self.labels()[index]))

  def labels(self):
    return np.where(np.arange(len(self)) % 11 == 2, -1, super().labels())


class Objects(TextureSource):
  """Three classes, any number of them in an image; some difficult."""

  multi_label = True

  def __init__(self, num_images, *, size, split):
    super().__init__(num_images, size=size, split=split)
    self.class_names = ("even", "few", "last")
    self._families = np.asarray(super().labels())

  def __getitem__(self, index):
    return Record(self._images[index], -1)

  def labels(self):
    return None

  def targets(self):
    present = np.stack([self._families % 2 == 0, self._families < 3, self._families > 5], axis=1).astype(np.int8)
    difficult = np.random.default_rng(len(self)).random(present.shape) < 0.2
    return np.where(difficult, -1, present).astype(np.int8)


def images(source_type, num, split, **changes):
  return Images(**{"source": source_type(num, size=16, split=split), "image_size": 16, "crop_fraction": 1.0,
                   "batch_size": 32, "num_threads": 0, **changes})


def features_by_hand(model, source, layer):
  """f64[N, D] of all images, also those that a subclass refuses to hand out."""
  maps = NETWORK.apply(model.variables, normalise_image(np.stack(source._images)), method="features")[layer]
  rows = np.asarray(maps, np.float64).reshape(len(source), -1)
  return np.stack([row / (np.sqrt(sum(row * row)) + 1e-5) for row in rows])


def pipeline(model, train, test, layer, costs, *, keep=lambda source: np.arange(len(source))):
  """The protocol as a user of scikit-learn would write it; returns ({name: cost}, {name: AP}, [label -> scores])."""
  (x, y), (test_x, test_y) = ((features_by_hand(model, source, layer)[keep(source)], source.targets()[keep(source)])
                              for source in (train, test))
  chosen, precision, decisions = {}, {}, []
  for label, name in enumerate(train.class_names):
    # vissl's own words: the dual, given the time that it needs.
    machines = [LinearSVC(C=cost, dual=True, tol=1e-8, max_iter=10**6, random_state=0, class_weight={1: 2, -1: 1})
                for cost in costs]
    target = np.where(y[:, label] == 1, 1, -1)
    means = [cross_val_score(machine, x, target, cv=3, scoring="average_precision").mean() for machine in machines]
    best = means.index(max(means))
    chosen[name] = costs[best]
    scores = machines[best].fit(x, target).decision_function(test_x)
    judged = test_y[:, label] != -1
    precision[name] = curve_area(test_y[judged, label] == 1, scores[judged])
    decisions.append(scores)
  return chosen, precision, np.array(decisions)


def measure(model, train, test, *, num_devices=1, **changes):
  settings = svm.SvmSettings(**{"layers": "pooled", "costs": "few", "num_folds": 3, **changes})
  return svm.measure_svm(model, train, test, settings, mesh=create_mesh(num_devices), seed=0)


def test_equals_scikit_learn_on_labels(model):
  train, test = images(TextureSource, 120, "train"), images(TextureSource, 60, "test")
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # none may reach the user
    outcome = measure(model, train, test, layers="res3,pooled")
  for layer in ("res3", "pooled"):
    found = outcome.figures["layers"][layer]
    chosen, precision, decisions = pipeline(model, train.source, test.source, layer, COSTS)
    assert found["costs"] == chosen
    assert len(set(chosen.values())) > 1  # the choice is one
    assert found["average_precision"] == pytest.approx(precision, abs=1e-3)
    assert found["mean_average_precision"] == pytest.approx(np.mean(list(precision.values())), abs=1e-3)
    assert found["top1"] == pytest.approx(np.mean(decisions.argmax(axis=0) == test.source.labels()), abs=1e-9)
    assert found["num_not_converged"] == 0
  assert outcome.figures["layers"]["pooled"]["dim"] == 64
  best = max(outcome.table, key=outcome.table.get)
  assert best == f"mean average precision, {outcome.figures['best_layer']}"
  assert outcome.figures["mean_average_precision"] == outcome.table[best]
  assert outcome.curve.x == ["res3", "pooled"] and outcome.curve.y == list(outcome.table.values())
  assert json.loads(json.dumps(outcome.to_json())) == outcome.to_json()


def test_difficult_objects_are_negative_in_training_and_left_out_in_testing(model):
  train, test = images(Objects, 96, "train"), images(Objects, 64, "test")
  assert (train.source.targets() == -1).any(axis=0).all() and (test.source.targets() == -1).any(axis=0).all()
  outcome = measure(model, train, test)
  chosen, precision, _ = pipeline(model, train.source, test.source, "pooled", COSTS)
  figures = outcome.figures
  assert figures["layers"]["pooled"]["costs"] == chosen
  assert figures["layers"]["pooled"]["average_precision"] == pytest.approx(precision, abs=1e-3)
  assert "top1" not in figures and "top1" not in figures["layers"]["pooled"]
  assert outcome.table == {"mean average precision": figures["mean_average_precision"]}
  assert outcome.curve.x == ["even", "few", "last"]
  assert outcome.curve.y == list(figures["layers"]["pooled"]["average_precision"].values())


def test_broken_and_unlabelled_images_never_count(model):
  train, test = images(Damaged, 150, "train"), images(Damaged, 80, "test")
  figures = measure(model, train, test).figures

  def keep(source):
    return np.flatnonzero((np.arange(len(source)) % 7 != 3) & (source.labels() >= 0))

  chosen, precision, _ = pipeline(model, train.source, test.source, "pooled", COSTS, keep=keep)
  assert figures["layers"]["pooled"]["costs"] == chosen
  assert figures["layers"]["pooled"]["average_precision"] == pytest.approx(precision, abs=1e-3)
  assert (figures["num_train"], figures["num_broken_train"]) == (len(keep(train.source)), 21)
  assert (figures["num_test"], figures["num_broken_test"]) == (len(keep(test.source)), 11)


def test_devices_batches_and_threads_change_nothing(model, monkeypatch):
  train, test = images(TextureSource, 90, "train"), images(TextureSource, 40, "test")
  one = measure(model, train, test)
  monkeypatch.setattr(svm.joblib, "cpu_count", lambda: 1)
  assert measure(model, train, test).to_json() == one.to_json()  # to the last bit
  monkeypatch.setattr(svm.joblib, "cpu_count", lambda: 3)
  eight = measure(model, *(images(TextureSource, len(part), split, batch_size=16)
                           for part, split in ((train, "train"), (test, "test"))), num_devices=8)
  assert eight.figures["layers"]["pooled"]["costs"] == one.figures["layers"]["pooled"]["costs"]
  assert eight.table == pytest.approx(one.table, abs=1e-3)


def test_threads_are_fewer_where_memory_is_scarce(monkeypatch):
  asked = []
  monkeypatch.setattr(svm.joblib, "cpu_count", lambda: 16)
  real = svm.joblib.Parallel
  monkeypatch.setattr(svm.joblib, "Parallel", lambda num, **options: asked.append(num) or real(1, **options))
  for num_numbers in (5_011 * 64, 5_011 * 9_216, 10**12):
    assert list(svm.run_fits(lambda x: 2 * x, [(1,), (2,)], num_numbers=num_numbers)) == [2, 4]
  assert asked == [16, 15, 1]


def test_fits_that_do_not_converge_are_counted(model, monkeypatch):
  monkeypatch.setattr(svm, "MAX_ITER", 2)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    figures = measure(model, images(TextureSource, 90, "train"), images(TextureSource, 40, "test")).figures
  assert 40 < figures["layers"]["pooled"]["num_not_converged"] <= 10 * (3 * len(COSTS) + 1)


def test_a_fit_is_the_optimum_of_the_problem():
  # Squared hinge, weights 2 and 1, bias penalised as one more weight: the gradient there is 0.
  rng = np.random.default_rng(0)
  features, present = svm.unit_rows(rng.normal(size=(50, 7))), rng.random(50) < 0.3
  machines = svm.fit(features, present, (0.3, 40.0), seed=-1)
  assert machines.num_unfinished == 0
  x, y = np.c_[features, np.ones(50)], np.where(present, 1.0, -1.0)
  decisions = machines.decide(features)
  for place, cost in enumerate((0.3, 40.0)):
    w = np.append(machines.weight[:, place], machines.bias[place])
    np.testing.assert_allclose(decisions[place], x @ w, atol=1e-12)
    gradient, at_zero = (
      w - 2 * cost * ((np.where(present, 2, 1) * np.maximum(0, 1 - y * (x @ w)) * y)[:, None] * x).sum(axis=0)
      for w in (w, np.zeros_like(w)))
    # liblinear ends where the gradient has shrunk to tol, times the share of the rarer kind.
    assert np.linalg.norm(gradient) < 1e-4 * min(present.mean(), 1 - present.mean()) * np.linalg.norm(at_zero)


def test_rows_have_almost_unit_length():
  rows = svm.unit_rows(np.float32([[3, 4], [0, 0]]))
  assert rows.dtype == np.float64
  np.testing.assert_allclose(rows, [[3 / 5.00001, 4 / 5.00001], [0, 0]], rtol=1e-12)


class Scarce(TextureSource):
  """Class 0 twice, class 1 never; class 2 never in the split "test"."""

  def __init__(self, num_images, *, size, split):
    super().__init__(num_images, size=size, split=split)
    self._labels = 3 + np.arange(num_images, dtype=np.int32) % 7
    self._labels[:2] = 0
    if split != "test":
      self._labels[2:8] = 2


def test_classes_with_too_few_images_are_left_out_with_a_word(model):
  figures = measure(model, images(Scarce, 80, "train"), images(Scarce, 40, "test")).figures
  names = TextureSource(1, size=16, split="test").class_names
  assert figures["classes_left_out"] == {
    names[0]: "2 training images show it, and 3 are needed",
    names[1]: "0 training images show it, and 3 are needed",
    names[2]: "no held-out image shows it"}
  found = figures["layers"]["pooled"]
  assert set(found["average_precision"]) == set(names[3:]) and set(found["costs"]) == set(names[2:])
  assert found["top1"] <= 38 / 40  # the two images of class 0 cannot be right


@pytest.mark.parametrize("changes, said", [
  ({"layers": "res9"}, "svm.layers names the layer 'res9'"),
  ({"costs": "many"}, "svm.costs='many' is unknown; choose from paper, vissl"),
  ({"num_folds": 1}, "svm.num_folds=1"),
  ({"num_folds": 90}, "none of the 10 classes has enough.*training images show it, and 90 are needed"),
])
def test_impossible_values_are_refused_before_any_image_is_read(model, monkeypatch, changes, said):
  monkeypatch.setattr(svm, "read_examples", None)
  with pytest.raises(UserError, match=said):
    measure(model, images(TextureSource, 80, "train"), images(TextureSource, 20, "test"), **changes)


def test_missing_and_other_labels_are_refused(model):
  class Bare(TextureSource):
    class_names = property(lambda self: (), lambda self, names: None)

  class Renamed(TextureSource):
    class_names = property(lambda self: ("a", "b"), lambda self, names: None)

  whole = images(TextureSource, 40, "train")
  for other, said in ((Bare, "SVMs need labels, and the held-out images"), (Renamed, "others: a, b")):
    with pytest.raises(UserError, match=said):
      measure(model, whole, images(other, 20, "test"))


def test_the_curve_is_over_the_layers_or_over_the_classes_of_a_single_one():
  one = {"mean_average_precision": 0.5, "average_precision": {"cat": 0.4, "dog": 0.6}, "top1": 0.75}
  other = {"mean_average_precision": 0.25, "average_precision": {"cat": 0.25, "dog": 0.25}}
  assert svm._table_and_curve({"res5": one}) == (
    {"mean average precision": 0.5, "top-1": 0.75}, Curve("class", "average precision", ["cat", "dog"], [0.4, 0.6]))
  assert svm._table_and_curve({"res4": other, "res5": one}) == (
    {"mean average precision, res4": 0.25, "mean average precision, res5": 0.5},
    Curve("layer", "mean average precision", ["res4", "res5"], [0.25, 0.5]))


@pytest.mark.parametrize(("image_size", "layers"), [
  (32, ("pooled",)), (96, ("pooled",)), (97, ("conv1", "res2", "res3", "res4"))])
def test_without_names_small_images_have_pooled_features_and_others_all_maps(image_size, layers):
  model = Model(Network(create_resnet("resnet8")), {})
  assert svm.svm_layers(model, "", image_size=image_size, field="svm.layers") == layers
  assert svm.svm_layers(model, "res3, pooled", image_size=image_size, field="svm.layers") == ("res3", "pooled")
