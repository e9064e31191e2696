"""A folder of anybody's images, start to finish: chosen settings, resuming, growing, first weights, evaluation."""

import json
import os
import shutil

import cv2
import jax
import numpy as np
import pytest

from pirl_jax.configs import evaluate as evaluate_config
from pirl_jax.configs import pirl
from pirl_jax.data import contents
from pirl_jax.data.folder import FolderSource
from pirl_jax.errors import UserError
from pirl_jax.evaluation import evaluate
from pirl_jax.runs import open_run
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.training import describing, growing, pretrain
from pirl_jax.training import parts as parts_lib

SMALL = {"data.image_size": 16, "jigsaw.crop_size": 18, "jigsaw.patch_size": 5, "batch_size": 16, "log.every_steps": 1,
         "evaluate.batch_size": 16, "checkpoint.every_steps": 2, "model.dim": 16, "evaluate.every_epochs": 0,
         "evaluate.learning": False, "evaluate.views": 0, "report": False, "export": False}


def write(folder, names, seed=0):
  for number, name in enumerate(names):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, number])
    cv2.imwrite(str(folder / name), rng.integers(0, 256, (20, 26, 3), dtype=np.uint8))


def own(root, **changes):
  config = pirl.get_config("folder")
  config.update_from_flattened_dict({"data.root": str(root), "num_epochs": 1, **SMALL, **changes})
  return config


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  folder = tmp_path_factory.mktemp("images")
  write(folder, [f"{label}/{i:02}.png" for label in ("cats", "dogs") for i in range(26)])
  return folder


@pytest.fixture(scope="module")
def first(images, tmp_path_factory):
  """A run of one epoch of the folder."""
  workdir = tmp_path_factory.mktemp("first") / "run"
  pretrain.run(own(images), str(workdir))
  return workdir


def bank_of(workdir):
  """Returns {name of the image: row of the bank f32[D]} of the newest checkpoint, and its meta."""
  with Checkpoints(workdir / "checkpoints", keep=5) as checkpoints:
    step = checkpoints.steps()[-1]
    meta = checkpoints.read_meta(step)
    layout = parts_lib.memory_bank.Layout(meta["num_images"], meta["num_strata"])
    bank = checkpoints.restore_bank(step, layout)
  lines = contents.remembered(workdir, meta["data"])
  return {line.split(" ", 1)[1]: bank[i] for i, line in enumerate(lines)}, meta


def test_what_is_chosen_is_stored_and_a_resumed_run_does_not_choose_again(images, first, capsys):
  stored = json.loads((first / "config.json").read_text())
  chosen = {each["field"]: each for each in json.loads((first / "chosen.json").read_text())}
  assert stored["data"]["labels"] == chosen["data.labels"]["value"] == "folder" and stored["data"]["holdout"] == 0.1
  assert chosen["loss"]["value"] == stored["loss"] == "infonce" and "batch_size" not in chosen
  assert all(each["why"] for each in chosen.values())
  pretrain.run(own(images, num_epochs=2), str(first))
  out = capsys.readouterr().out
  assert "\nchosen " not in out and "devices: " in out
  assert "num_epochs is 2, and was 1: the schedule" in out and "instead of" in out
  assert json.loads((first / "config.json").read_text()) == {**stored, "num_epochs": 2}
  with pytest.raises(UserError, match="holds a run with loss='infonce', and now it is 'nce'"):
    pretrain.run(own(images, loss="nce"), str(first))


def test_another_folder_in_the_place_of_a_run_is_told_so(first, tmp_path):
  write(tmp_path / "other", ["train/x/1.png", "train/y/2.png"])
  with pytest.raises(UserError, match=r"holds a run on the images in .*images\d+; give those in .*--workdir=runs/NAME"):
    pretrain.run(own(tmp_path / "other"), str(first))


def test_images_that_were_moved_are_found_again(images, first, tmp_path):
  shutil.copytree(images, tmp_path / "a")
  shutil.copytree(first, tmp_path / "run")
  stored = json.loads((tmp_path / "run" / "config.json").read_text())
  stored["data"]["root"] = str(tmp_path / "a")
  (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
  before = pretrain.prepare(own(tmp_path / "a"), tmp_path / "run").train.fingerprint
  (tmp_path / "a").rename(tmp_path / "b")
  with pytest.raises(UserError, match="is not a folder.*if the images have been moved, --config.data.root=DIR"):
    pretrain.prepare(own(tmp_path / "a"), tmp_path / "run")
  for root, split in ((tmp_path / "b", None), (tmp_path, "b")):
    moved = pretrain.prepare(own(root, **({"data.split": split} if split else {})), tmp_path / "run")
    assert moved.train.fingerprint == before
  with pytest.raises(UserError, match="name their sub-folder, --config.data.split, to resume the run"):
    pretrain.prepare(own(tmp_path), tmp_path / "run")


def test_a_run_among_its_images_is_refused(images, tmp_path):
  shutil.copytree(images, tmp_path / "images")
  (tmp_path / "beside").mkdir()
  os.symlink(tmp_path / "beside", tmp_path / "images" / "linked")
  os.symlink(tmp_path / "images", tmp_path / "to")
  for workdir in ("images", "images/run", "images/new/er/run", "beside/run", "to/run", "images/../images/run"):
    with pytest.raises(UserError, match="lies among the images.*choose another --workdir"):
      pretrain.prepare(own(tmp_path / "images"), tmp_path / workdir)
    assert not (tmp_path / "images" / "run").exists()
  for workdir in ("images/.runs/run", "run", "images2/run"):
    pretrain.prepare(own(tmp_path / "images"), tmp_path / workdir)


def test_a_dry_run_writes_nothing(images, tmp_path, capsys):
  pretrain.run(own(images, dry_run=True), str(tmp_path / "run"))
  out = capsys.readouterr().out
  for text in ("chosen", "why", "training images: ", "held-out images: ", "memory: a step needs about",
               "steps: 1 epochs of", "  batch_size = 16\n", "dry_run=True: nothing was written"):
    assert text in out
  assert not (tmp_path / "run").exists()


def test_out_of_memory_in_a_step_is_one_line_with_flags_that_are_taken(images, tmp_path, monkeypatch):
  def make_step(parts):
    if parts.config.micro_batches > 1:
      raise KeyError("the flag was taken")
    def step(state, batch):
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3.1GiB.")
    return step
  monkeypatch.setattr(pretrain, "make_step", make_step)
  with pytest.raises(UserError, match=r"out of memory on the .*asked for 3.1GiB.*--config.micro_batches=2.*remat=True"):
    pretrain.run(own(images), str(tmp_path / "run"))
  with pytest.raises(KeyError, match="the flag was taken"):
    pretrain.run(own(images, micro_batches=2), str(tmp_path / "run"))


def test_the_time_that_is_left_is_said_once(monkeypatch):
  said, clock = [], iter(range(1000))
  monkeypatch.setattr(describing.time, "perf_counter", lambda: next(clock))
  expected = describing.ExpectedTime(400, said.append)
  for step in range(41, 401):
    expected.note(step)
  (line,) = said
  assert line.startswith("100 steps took 100.0 s; the 259 left take about 0:04:19, until ")


@pytest.fixture
def grown(images, first, tmp_path):
  """A copy of the folder and of the run; then images are added, one is deleted, and one is replaced."""
  shutil.copytree(images, tmp_path / "images")
  shutil.copytree(first, tmp_path / "run")
  return tmp_path / "images", tmp_path / "run"


def test_a_folder_that_grew_goes_on_with_the_rows_of_its_images(grown, capsys):
  images, workdir = grown
  before, meta = bank_of(workdir)
  step = meta["step"]
  write(images, [f"birds/{i}.png" for i in range(40)], seed=1)
  gone, *known = sorted(name for name in before)
  (images / gone).unlink()
  (images / known[0]).write_bytes((images / "birds/1.png").read_bytes() + b"longer")
  refused = own(images, num_epochs=9)
  with pytest.raises(UserError, match=r"gone: 1 .*new: \d+ .*of another size: 1 .*--config.data.grown=True"):
    pretrain.run(refused, str(workdir))
  parts = pretrain.prepare(own(images, num_epochs=9, **{"data.grown": True}), workdir)
  with Checkpoints(workdir / "checkpoints", keep=5) as checkpoints:
    state = pretrain.restore(parts, checkpoints)
  assert int(state.step) == step
  names = [line.split(" ", 1)[1] for line in parts.train.listing()]
  rows = np.asarray(state.bank)[parts.layout.row_of(np.arange(len(names)))]
  fresh = np.asarray(parts.initial_state().bank)[parts.layout.row_of(np.arange(len(names)))]
  for name, row, new in zip(names, rows, fresh, strict=True):
    np.testing.assert_array_equal(row, before[name] if name in known[1:] else new)
  assert np.asarray(state.usable).sum() == len(names) and parts.config.num_negatives % parts.layout.num_strata == 0
  assert f"{len(known) - 1} keep their rows" in capsys.readouterr().out

  pretrain.run(own(images, num_epochs=2, **{"data.grown": True}), str(workdir))
  after, meta = bank_of(workdir)
  assert set(after) == set(names) and meta["step"] > step
  kept = [each["field"] for each in json.loads((workdir / "chosen.json").read_text())]
  assert {"loss", "num_negatives"} <= set(kept) and len(kept) == len(set(kept))
  pretrain.run(own(images, num_epochs=2), str(workdir))  # from now on it is an ordinary run


def test_a_set_without_names_cannot_grow(first, monkeypatch):
  parts = pretrain.prepare(own(json.loads((first / "config.json").read_text())["data"]["root"], num_epochs=2), first)
  monkeypatch.setattr(FolderSource, "listing", lambda self: None)
  with pytest.raises(UserError, match="data.grown=True is not possible.*only images in a folder"):
    growing.carry_over(parts, parts.initial_state(), {"data": "folder:1:0", "num_images": 1, "num_strata": 1})


def test_a_run_starts_from_the_weights_of_another(images, first, tmp_path, capsys):
  config = own(images, init_from=str(first), **{"model.dim": 8})
  parts = pretrain.prepare(config, tmp_path / "run")
  state = pretrain.first_state(parts)
  theirs = open_run(first, "first", 0, mesh_lib.create_mesh()).model.variables
  for group in ("params", "batch_stats"):
    jax.tree.map(np.testing.assert_array_equal, getattr(state, group)["trunk"], theirs[group]["trunk"])
  said = capsys.readouterr().out
  assert "takes trunk; new, because their shapes differ or they are missing there: image_head, pretext_head" in said
  copied = own(images, init_from=str(first), **{"bank.encoder_momentum": 0.9})
  whole = pretrain.first_state(pretrain.prepare(copied, tmp_path / "run"))
  jax.tree.map(np.testing.assert_array_equal, whole.params, theirs["params"])
  jax.tree.map(np.testing.assert_array_equal, whole.momentum_encoder, theirs["params"])
  assert not int(whole.step)


@pytest.mark.parametrize("value, changes, problem", [
  ("nowhere", {}, "--config.init_from=nowhere: there is no such folder"),
  ("", {"model.arch": "resnet18", "model.stem": "3x3"}, r"its trunk does not fit this network: \d+ missing")])
def test_first_weights_that_do_not_fit_are_refused_by_name(value, changes, problem, images, first, tmp_path):
  parts = pretrain.prepare(own(images, init_from=value or str(first), **changes), tmp_path / "run")
  with pytest.raises(UserError, match=problem):
    pretrain.first_state(parts)


def evaluated(protocol, run, root, **changes):
  config = evaluate_config.get_config(protocol)
  config.update_from_flattened_dict({"checkpoint": str(run), "data.root": str(root), **changes})
  return evaluate.run(config, "")["run"].figures


def test_an_evaluation_needs_the_run_and_a_folder_and_nothing_else(images, first, tmp_path):
  own_images = evaluated("knn", first, images)
  assert own_images["num_train"] + own_images["num_test"] == 52 and own_images["num_test"] < 15
  write(tmp_path / "split", [f"{split}/{label}/{i}.png" for split in ("train", "val") for label in "ab"
                             for i in range(9)])
  assert evaluated("knn", first, tmp_path / "split")["num_test"] == 18
  write(tmp_path / "flat", [f"{i}.png" for i in range(30)])
  written = evaluated("features", first, tmp_path / "flat")["written"]
  assert sum(len(np.load(path)["features"]) for path in written) == 30
  with pytest.raises(UserError, match="label"):
    evaluated("knn", first, tmp_path / "flat")


def test_an_unlabelled_run_is_judged_on_another_set_with_labels(images, tmp_path, monkeypatch):
  (tmp_path / "flat").mkdir()
  write(tmp_path / "flat", [f"{i}.png" for i in range(48)], seed=2)
  changes = {"evaluate.root": str(images), "evaluate.every_epochs": 1, "evaluate.views": 0, "report": False,
             "export": False}
  pretrain.run(own(tmp_path / "flat", **changes), str(tmp_path / "run"))
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert {"other_knn_top1", "other_linear_top1"} <= set(rows[-1]) and "knn_top1" not in rows[-1]
  assert 0 <= rows[-1]["other_linear_top1"] <= 1
  with Checkpoints(tmp_path / "run" / "checkpoints", keep=5) as checkpoints:
    assert checkpoints.best_metric(checkpoints.steps()[-1]) == rows[-1]["other_knn_top1"]
  assert not (tmp_path / "run" / "unfinished-other").exists()
  with pytest.raises(UserError, match="lie in no sub-folders; sort them"):
    pretrain.run(own(images, **{**changes, "evaluate.root": str(tmp_path / "flat")}), str(tmp_path / "run2"))
  assert not (tmp_path / "run2").exists()
