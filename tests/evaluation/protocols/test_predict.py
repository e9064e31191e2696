"""Kept classifiers: the file says what the protocol itself has predicted, and a wrong classifier is refused."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))
from test_evaluate import config_of, result_of, small_run

from pirl_jax.data.sources import DataSettings, open_source
from pirl_jax.errors import UserError
from pirl_jax.evaluation import evaluate
from pirl_jax.evaluation.protocols import linear, predict, semi_supervised
from pirl_jax.runtime import mesh as mesh_lib

TRAINED = {
  "linear": {"linear__num_epochs": 2, "linear__batch_size": 32, "linear__layers": "res4,pooled"},
  "semi_supervised": {"semi_supervised__fractions": (0.5,), "semi_supervised__num_epochs": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The held-out textures as PNG files, in a folder for each class, and one that cannot be read."""
  root = tmp_path_factory.mktemp("images")
  source = open_source(DataSettings("embedded", split="test", num_images=48, image_size=16))
  for index in range(48):
    path = root / source.class_names[source.labels()[index]] / f"{index:02}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(source[index].image).save(path)
  (root / source.class_names[0] / "99.png").write_bytes(b"no image")
  return root


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
  """A run with both classifiers, and for each the held-out images' logits as the protocol itself had them."""
  run, logits = small_run(tmp_path_factory.mktemp("runs") / "run"), {}
  with pytest.MonkeyPatch.context() as patch:
    for name, module in (("linear", linear), ("semi_supervised", semi_supervised)):
      true_ranks, found = module.classification.true_ranks, []
      patch.setattr(module.classification, "true_ranks", lambda given, labels, found=found, real=true_ranks: (
        found.append(given), real(given, labels))[1])
      evaluate.run(config_of(name, run, **TRAINED[name]), "")
      logits[name] = found
      patch.undo()
  best = result_of(run, "linear")["figures"]["best_layer"]
  by_batch = logits["linear"]  # for each batch of the layers in the order of their names
  return run, {"linear": np.concatenate(by_batch[("pooled", "res4").index(best)::2]),
               "semi_supervised": logits["semi_supervised"][-1]}


@pytest.fixture
def run(judged, tmp_path):
  return shutil.copytree(judged[0], tmp_path / "run")


def lines_of(run, name):
  path, = (run / "results").glob(f"{name}-*-classes.csv")
  with open(path, newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


@pytest.mark.parametrize("name, num_devices", [("linear", 8), ("linear", 1), ("semi_supervised", 8)])
def test_the_file_says_what_the_protocol_has_predicted(judged, run, folder, monkeypatch, capsys, name, num_devices):
  monkeypatch.setattr(mesh_lib, "create_mesh", lambda create=mesh_lib.create_mesh: create(num_devices))
  evaluate.run(config_of("predict", run, predict__classifier=name, data__root=str(folder), data__labels="folder"), "")
  lines = lines_of(run, "predict")
  classes = open_source(DataSettings("embedded", num_images=1)).class_names
  logits = np.float64(judged[1][name])
  share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  assert len(lines) == 48 and [line["name"] for line in lines] == sorted(line["name"] for line in lines)
  for line in lines:
    label, file = line["name"].split("/")
    own = share[int(file[:2])]
    order = np.argsort(-own, kind="stable")[:5]
    assert [line["class"], *(line[f"class_{rank}"] for rank in range(2, 6))] == [classes[one] for one in order]
    told = [line["probability"], *(line[f"probability_{rank}"] for rank in range(2, 6))]
    np.testing.assert_allclose(np.float64(told), own[order], rtol=2e-3)
    np.testing.assert_allclose([float(line[f"p({one})"]) for one in classes], own, rtol=2e-3, atol=1e-6)
    assert line["label"] == label
  found = json.loads(next((run / "results").glob("predict-*.json")).read_text())["figures"]
  trained = result_of(run, name)["figures"]
  top1 = trained["fractions"]["0.5"]["top1"] if name == "semi_supervised" else trained["top1"]
  assert found["top1"] == top1 == np.mean([line["class"] == line["label"] for line in lines])
  assert (found["num_images"], found["num_broken"], found["num_labelled"], found["num_classes"]) == (48, 1, 48, 10)
  assert found["broken"] == [f"{classes[0]}/99.png"] and sum(found["counts"].values()) == 48
  said = capsys.readouterr().out
  assert f"classifier: {run}/results/{name}-classifier.npz, 10 classes, right for {top1:.1%} of its" in said
  assert f"left out, cannot be read: {classes[0]}/99.png (none of the formats" in said


def test_a_flat_folder_needs_nothing_but_its_name_and_the_newest_classifier_is_taken(run, folder, tmp_path):
  (tmp_path / "flat").mkdir()
  for path in sorted(folder.rglob("*.png"))[:3]:
    shutil.copy(path, tmp_path / "flat")
  evaluate.run(config_of("predict", run, data__root=str(tmp_path / "flat")), "")
  lines = lines_of(run, "predict")
  assert all("/" not in line["name"] for line in lines) and "label" not in lines[0]
  result, = (run / "results").glob("predict-*.json")
  assert json.loads(result.read_text())["figures"]["classifier"].endswith("semi_supervised-classifier.npz")


def test_more_classes_than_columns(judged, run, folder, monkeypatch):
  monkeypatch.setattr(predict, "MOST_COLUMNS", 9)
  evaluate.run(config_of("predict", run, data__root=str(folder)), "")
  assert list(lines_of(run, "predict")[0]) == [
    "name", "class", "probability", *(f"{what}_{rank}" for rank in (2, 3, 4, 5) for what in ("class", "probability"))]


def without(run):
  for path in (run / "results").glob("*.npz"):
    path.unlink()


def damage(run):
  for path in (run / "results").glob("*.npz"):
    path.write_bytes(path.read_bytes()[:-30])


def of_another_network(run):
  for path in (run / "results").glob("*.npz"):
    with np.load(path) as stored:
      arrays = {name: value if name == "about" else value[..., :-1] for name, value in stored.items()}
    np.savez(path, **arrays)


@pytest.mark.parametrize("harm, changes, words", [
  (without, {}, "there is no classifier in .*results; train one, with labelled images: python launch.py"),
  (damage, {}, "is no classifier of this program, or damaged"),
  (of_another_network, {}, "does not fit the network of run; train"),
  (None, {"step": 4}, r"trained on step 8, and the run is opened at step 4; choose --config.step=8"),
  (None, {"data__image_size": 24}, "images of 16 pixels, and here they have 24; add --config.data.image_size=16"),
  (None, {"predict__classifier": "svm"}, "predict.classifier='svm' is unknown; choose one of: linear, semi_supervised"),
  (None, {"data__root": None}, "data.root is empty")])
def test_what_does_not_fit_is_refused(run, folder, harm, changes, words):
  if harm:
    harm(run)
  with pytest.raises(UserError, match=words):
    evaluate.run(config_of("predict", run, **{"data__root": str(folder), **changes}), "")
  assert not list((run / "results").glob("predict*"))


def test_labels_of_other_classes_are_refused(run, folder, tmp_path):
  shutil.copytree(folder, tmp_path / "images")
  next((tmp_path / "images").iterdir()).rename(tmp_path / "images" / "zebra")
  with pytest.raises(UserError, match=r"1 classes that .* does not know \(zebra\); --config.data.labels=none leaves"):
    evaluate.run(config_of("predict", run, data__root=str(tmp_path / "images"), data__labels="folder"), "")
