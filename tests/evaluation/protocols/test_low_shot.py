"""Low-shot SVMs: the draws, and the figures against plain scikit-learn on the same draws."""

import json

import numpy as np
import pytest
import test_svm
from sklearn.svm import LinearSVC
from test_svm import Damaged, Objects, Scarce, curve_area, features_by_hand, images

from pirl_jax.data import batches
from pirl_jax.data.embedded import TextureSource
from pirl_jax.errors import UserError
from pirl_jax.evaluation.protocols import low_shot
from pirl_jax.evaluation.protocols.low_shot import draw_examples
from pirl_jax.runtime.mesh import create_mesh

COSTS = (1.0, 0.01, 30.0)


@pytest.fixture(autouse=True)
def few_costs(monkeypatch):
  monkeypatch.setitem(low_shot.GRIDS, "few", COSTS)


model = test_svm.model


def measure(model, train, test, *, num_devices=1, **changes):
  given = {"layers": "pooled", "costs": "few", "shots": (1, 2, 4), "num_draws": 3}
  settings = low_shot.LowShotSettings(**{name: changes.pop(name, value) for name, value in given.items()})
  return low_shot.measure_low_shot(model, train, test, settings, mesh=create_mesh(num_devices),
                                   **{"seed": 5, **changes})


def by_hand(model, train, test, layer, *, shots, num_draws, seed):
  """{k: f64[draws, G]}, mean average precisions of scikit-learn's dual on the drawn rows."""
  features, judged_features = (features_by_hand(model, source, layer) for source in (train, test))
  targets, judged = train.targets(), test.targets()
  num_classes = targets.shape[1]
  found = {}
  for k in shots:
    found[k] = np.zeros((num_draws, len(COSTS)))
    for draw in range(num_draws):
      for label in range(num_classes):
        rows = draw_examples(targets[:, label], np.arange(len(train)), len(train), (seed, draw, label, k),
                             num_present=k, num_absent=(num_classes - 1) * k)
        target = [1 if targets[row, label] == 1 else -1 for row in rows]
        for place, cost in enumerate(COSTS):
          machine = LinearSVC(C=cost, dual=True, tol=1e-7, max_iter=10**6, random_state=0, class_weight={1: 2, -1: 1})
          scores = machine.fit(features[rows], target).decision_function(judged_features)
          kept = judged[:, label] != -1
          found[k][draw, place] += curve_area(judged[kept, label] == 1, scores[kept]) / num_classes
  return found


@pytest.mark.parametrize("source_type, num_train", [(TextureSource, 80), (Objects, 80)])
def test_equals_scikit_learn_on_the_same_draws(model, source_type, num_train):
  train, test = images(source_type, num_train, "train"), images(source_type, 50, "test")
  outcome = measure(model, train, test)
  figures = outcome.figures
  expected = by_hand(model, train.source, test.source, "pooled", shots=(1, 2, 4), num_draws=3, seed=5)
  for k, precision in expected.items():
    means = precision.mean(axis=0).tolist()
    best = means.index(max(means))
    found = figures["shots"][str(k)]
    assert found["cost"] == COSTS[best]
    draws = precision[:, best]
    assert found["draws"] == pytest.approx(draws.tolist(), abs=2e-3)
    assert found["mean"] == pytest.approx(sum(draws) / 3, abs=2e-3)
    assert found["std"] == pytest.approx(np.sqrt(sum((draws - sum(draws) / 3) ** 2) / 3), abs=2e-3)
    assert (found["min"], found["max"]) == (min(found["draws"]), max(found["draws"]))
    assert found["min"] < found["max"]  # the draws differ
    assert outcome.table[f"k={k}"] == found["mean"]
  assert list(outcome.table) == ["k=1", "k=2", "k=4"] and outcome.curve.x == [1, 2, 4] and outcome.curve.log_x
  shown = figures["shots"].values()
  assert [outcome.curve.y, outcome.curve.low, outcome.curve.high] == [
    [of_k[name] for of_k in shown] for name in ("mean", "min", "max")]
  assert figures["layers"]["pooled"]["shots"] == figures["shots"] and figures["best_layer"] == "pooled"
  assert figures["layers"]["pooled"]["num_not_converged"] == 0 and not figures["shots_left_out"]
  assert json.loads(json.dumps(outcome.to_json())) == outcome.to_json()


def test_draws_hold_what_they_should_and_depend_on_all_four_numbers():
  rng = np.random.default_rng(0)
  targets = rng.integers(-1, 2, 300).astype(np.int8)
  index = np.sort(rng.choice(400, 300, replace=False))
  drawn = {}
  others = [(1, 0, 0, 5), (0, 1, 0, 5), (0, 0, 1, 5), (0, 0, 0, 6), (-1, 0, 0, 5), (2**63, 0, 0, 5)]
  for entropy in [(0, 0, 0, 5), *others]:
    rows = draw_examples(targets, index, 400, entropy, num_present=5, num_absent=45)
    assert len(set(rows.tolist())) == 50
    assert (targets[rows[:5]] == 1).all() and (targets[rows[5:]] == 0).all()
    np.testing.assert_array_equal(rows, draw_examples(targets, index, 400, entropy, num_present=5, num_absent=45))
    drawn[entropy] = frozenset(rows.tolist())
  assert len(set(drawn.values())) == len(drawn)


def test_draws_are_the_same_for_ever():
  targets = np.arange(20) % 2
  rows = draw_examples(targets, np.arange(20), 20, (0, 1, 2, 4), num_present=3, num_absent=4)
  numbers = np.random.Generator(np.random.PCG64([0, 1, 2, 4])).bit_generator.random_raw(20)
  by_number = sorted(range(20), key=numbers.tolist().__getitem__)
  assert rows.tolist() == [i for i in by_number if i % 2][:3] + [i for i in by_number if i % 2 == 0][:4]
  assert rows.tolist() == [5, 1, 19, 8, 2, 16, 14]  # numpy 2.4


def test_a_broken_image_changes_a_draw_by_itself_alone():
  targets = (np.arange(60) % 3 == 0).astype(np.int8)
  whole = draw_examples(targets, np.arange(60), 60, (0, 0, 0, 4), num_present=4, num_absent=8)
  kept = np.flatnonzero(np.arange(60) != whole[1])
  rows = draw_examples(targets[kept], kept, 60, (0, 0, 0, 4), num_present=4, num_absent=8)
  assert kept[rows][[0, 1, 2, *range(4, 12)]].tolist() == whole[[0, 2, 3, *range(4, 12)]].tolist()


def test_every_image_is_drawn_equally_often():
  targets = (np.arange(40) < 10).astype(np.int8)
  counts = np.zeros(40)
  for draw in range(2_000):
    counts[draw_examples(targets, np.arange(40), 40, (3, draw, 0, 2), num_present=2, num_absent=6)] += 1
  # 2 of 10 and 6 of 30, each 400 times; 4.5 standard deviations.
  assert np.abs(counts - 400).max() < 4.5 * np.sqrt(2_000 * 0.2 * 0.8)


def test_devices_and_threads_change_nothing(model, monkeypatch):
  train, test = images(Damaged, 80, "train"), images(Damaged, 40, "test")
  one = measure(model, train, test)
  monkeypatch.setattr("pirl_jax.evaluation.protocols.svm.joblib.cpu_count", lambda: 1)
  assert measure(model, train, test).to_json() == one.to_json()
  eight = measure(model, images(Damaged, 80, "train", batch_size=16), test, num_devices=8)
  assert eight.table == pytest.approx(one.table, abs=1e-3)
  assert one.figures["num_broken_train"] == 11 and one.figures["num_broken_test"] == 6
  assert one.figures["num_train"] == 80 - 11 - 7  # the others have no label
  assert measure(model, train, test, seed=6).table != one.table


def test_several_layers(model):
  outcome = measure(model, images(TextureSource, 60, "train"), images(TextureSource, 30, "test"),
                    layers="conv1,pooled", shots=(2, 1, 2))
  assert list(outcome.table) == ["conv1, k=1", "conv1, k=2", "pooled, k=1", "pooled, k=2"]
  best = max(("conv1", "pooled"), key=lambda layer: outcome.table[f"{layer}, k=1"] + outcome.table[f"{layer}, k=2"])
  assert outcome.figures["best_layer"] == best and outcome.curve.y == [outcome.table[f"{best}, k={k}"] for k in (1, 2)]


def test_images_go_straight_to_the_square(model, monkeypatch):
  asked, real = [], batches.eval_batches

  def eval_batches(source, **arguments):
    asked.append((arguments["squash"], arguments["crop_fraction"]))
    return real(source, **arguments)

  monkeypatch.setattr(batches, "eval_batches", eval_batches)
  measure(model, *(images(TextureSource, 40, split, crop_fraction=0.875) for split in ("train", "test")), shots=(1,))
  assert asked == [(True, 1.0)] * 2


def test_too_many_shots_are_left_out_with_a_word(model):
  figures = measure(model, images(Scarce, 80, "train"), images(Scarce, 40, "test"), shots=(1, 2, 3, 12)).figures
  names = TextureSource(1, size=16, split="test").class_names
  assert list(figures["shots"]) == ["1", "2"]
  assert figures["shots_left_out"] == {
    "3": f"2 training images show {names[0]}, and 3 are needed",
    "12": f"2 training images show {names[0]}, and 12 are needed"}
  assert figures["classes_left_out"] == {
    names[1]: "0 training images show it, and 1 are needed", names[2]: "no held-out image shows it"}


@pytest.mark.parametrize("changes, said", [
  ({"layers": "res9"}, "low_shot.layers names the layer 'res9'"),
  ({"costs": "many"}, "low_shot.costs='many' is unknown; choose from paper, vissl"),
  ({"shots": ()}, "low_shot.shots"),
  ({"shots": (0, 1)}, "low_shot.shots"),
  ({"num_draws": 0}, "low_shot.num_draws=0"),
  ({"shots": (9, 10)}, r"low_shot.shots=\(9, 10\) are too many.*8 training images show"),
])
def test_impossible_values_are_refused_before_any_image_is_read(model, monkeypatch, changes, said):
  monkeypatch.setattr(low_shot, "read_examples", None)
  with pytest.raises(UserError, match=said):
    measure(model, images(TextureSource, 80, "train"), images(TextureSource, 20, "test"), **changes)


def test_a_single_class_has_no_others(model):
  class One(Objects):
    def targets(self):
      return super().targets()[:, :1]

    class_names = property(lambda self: ("even",), lambda self, names: None)

  with pytest.raises(UserError, match="two classes or more, and only even"):
    measure(model, images(One, 40, "train"), images(One, 20, "test"))
