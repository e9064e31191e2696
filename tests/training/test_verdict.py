"""The verdict on a run, and the figures without labels that it looks at."""

import functools
import json
import math
import shutil

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pirl_jax.configs import jigsaw, pirl, rotnet, supervised
from pirl_jax.models import resnet
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.rows import read_rows
from pirl_jax.training import guards, measuring, pretrain, verdict, view_figures
from pirl_jax.training import parts as parts_lib

FIGURES = ("feature_rank", "nearest_view", "embedding_rank", "lidar", "alignment", "uniformity")


@pytest.fixture(scope="module", autouse=True)
def small():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(resnet.ARCHITECTURES, "resnet4", (False, (1,), 8))
    yield


def tiny(system=pirl, **changes):
  config = system.get_config()
  config.update_from_flattened_dict({
    "num_epochs": 2, "batch_size": 16, "num_negatives": 16, "data.num_images": 72, "data.image_size": 16,
    "jigsaw.crop_size": 18, "jigsaw.patch_size": 5, "model.arch": "resnet4", "model.dim": 8,
    "optimizer.warmup_epochs": 0, "evaluate.split": "", "evaluate.every_epochs": 1, "evaluate.batch_size": 16,
    "evaluate.learning": False, "report": False, "export": False, "evaluate.views": 40, "log.every_steps": 1,
    **{f"photometric.{field}": 0.0 for field in ("saturation", "hue", "group_probability", "grayscale_probability")},
    **changes})
  return config


class Unasked:
  """A run that is never asked to stop."""

  def requested(self):
    return False


def figures_of(parts, state=None):
  return view_figures.ViewFigures(parts, Unasked())(state or parts.initial_state())


SOUND = {"nearest_view": 0.7, "embedding_rank": 30.0, "feature_rank": 1.0}
UNTRAINED = {"nearest_view": 0.2, "embedding_rank": 20.0, "feature_rank": 9.0}


@pytest.mark.parametrize("changes, loss, expected", [
  ({}, 4.0, verdict.LEARNT), ({"nearest_view": 0.401}, 4.0, verdict.LEARNT), ({}, None, verdict.LEARNT),
  ({"nearest_view": 0.399}, 4.0, verdict.NOT_LEARNT),
  ({"nearest_view": 0.2, "embedding_rank": 5.0}, 4.0, verdict.NOT_LEARNT),
  ({"nearest_view": 0.2, "embedding_rank": 4.9}, 4.0, verdict.COLLAPSED),
  ({"embedding_rank": 1.0}, 4.0, verdict.LEARNT), ({}, 18.1, verdict.DIVERGED), ({}, 17.9, verdict.LEARNT)])
def test_each_case_is_called_what_it_is(changes, loss, expected):
  word, sentence = verdict.judge(SOUND | changes, UNTRAINED, loss=loss, chance=6.0)
  assert word == expected and word.split()[-1] in sentence and "\n" not in sentence


def test_without_embeddings_the_features_tell_of_collapse():
  figures = {"nearest_view": 0.2, "feature_rank": 2.0}
  assert verdict.judge(figures, UNTRAINED, loss=1.0, chance=1.0)[0] == verdict.COLLAPSED
  assert verdict.judge(figures, {**UNTRAINED, "feature_rank": 7.0}, loss=1.0, chance=1.0)[0] == verdict.NOT_LEARNT


def test_the_last_loss_is_that_of_the_last_steps():
  rows = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 3.0}, {"step": 3, "loss": None}, {"step": 4, "loss": 1.0}]
  assert verdict.last_loss(rows, num_steps=3) == 2 and verdict.last_loss(rows, num_steps=1) == 1
  assert verdict.last_loss(rows[:1] + rows[2:3], num_steps=1) is None


@pytest.mark.parametrize("system, changes, expected", [
  (pirl, {"loss": "infonce"}, math.log(17)), (pirl, {"loss": "infonce", "num_negatives": 0}, math.log(72)),
  (pirl, {"loss": "infonce", "negative_ranks": (0.1, 0.5), "angle_weight": 0.4}, math.log(8) + 0.4 * math.log(4)),
  (pirl, {"loss": "infonce", "num_negatives": 0, "bank.max_age": 2}, math.log(33)),
  (pirl, {"loss": "eq4"}, math.log(17) + 16 * math.log(17 / 16)),
  (pirl, {"loss": "nce"}, math.log(17) + 16 * math.log(17 / 16)), (rotnet, {}, math.log(4)),
  (jigsaw, {"jigsaw.num_permutations": 7}, math.log(7)), (supervised, {}, None)])
def test_chance_is_the_loss_of_equal_scores(tmp_path, system, changes, expected):
  parts = parts_lib.build(tiny(system, **changes), tmp_path)
  expected = math.log(len(parts.train.class_names)) if expected is None else expected
  assert verdict.chance_loss(parts) == pytest.approx(expected, rel=1e-4)


def test_a_run_gives_its_verdict_and_a_resumed_one_the_same(tmp_path, capsys):
  pretrain.run(tiny(), str(tmp_path / "run"))
  rows = read_rows(tmp_path / "run" / "metrics.jsonl")
  assert [row["step"] for row in rows if "nearest_view" in row] == [4, 8]
  assert all(1 <= row["bank_rank"] <= 8 for row in rows) and all(np.isfinite(rows[-1][name]) for name in FIGURES)
  found = json.loads((tmp_path / "run" / "results" / "verdict.json").read_text())
  assert found["verdict"] in (verdict.NOT_LEARNT, verdict.COLLAPSED)
  assert found["images"] == "training images" and found["num_gallery"] == 72 and found["num_images"] == 40
  assert found["figures"].keys() - {"loss", "bank_rank"} == found["untrained"].keys() == set(FIGURES)
  assert {name: found["figures"][name] for name in FIGURES} == {name: rows[-1][name] for name in FIGURES}
  said = capsys.readouterr().out
  assert f"WARNING: {found['sentence']}" in said and "; chance 2.833" in said and "bank rank" in said

  for lost in (tmp_path / "run" / "checkpoints" / "8", tmp_path / "run" / "results"):
    shutil.rmtree(lost)
  pretrain.run(tiny(), str(tmp_path / "run"))
  assert json.loads((tmp_path / "run" / "results" / "verdict.json").read_text()) == found


def test_figures_are_the_same_on_one_device_and_read_again(tmp_path, monkeypatch):
  parts = parts_lib.build(tiny(), tmp_path)
  many = figures_of(parts)
  monkeypatch.setattr(view_figures, "KEPT_BYTES", 0)
  figures = view_figures.ViewFigures(parts, Unasked())
  assert figures(parts.initial_state()) == figures(parts.initial_state()) == many
  monkeypatch.setattr(mesh_lib, "create_mesh", functools.partial(mesh_lib.create_mesh, 1))
  # A batch holds fewer images than an image has views.
  one = figures_of(parts_lib.build(tiny(**{"evaluate.batch_size": 3}), tmp_path))
  assert one == pytest.approx(many, rel=1e-4)


def test_held_out_images_are_asked_if_there_are_enough(tmp_path):
  config = tiny(**{"evaluate.split": "test", "evaluate.num_images": 33, "evaluate.views": 30})
  sample = view_figures.sample_of(parts := parts_lib.build(config, tmp_path))
  assert sample.source is parts.test and len(sample.index) == 30 and len(sample.others) == 72
  config.evaluate.num_images = 31
  sample = view_figures.sample_of(parts := parts_lib.build(config, tmp_path))
  assert sample.source is parts.train and sorted([*sample.index, *sample.others]) == list(range(72))


@pytest.mark.parametrize("num, count, expected", [(3, 5, [0, 1, 2]), (10, 4, [0, 2, 5, 7]), (4, 0, []), (0, 3, [])])
def test_the_choice_is_spread_over_all_images(num, count, expected):
  assert view_figures.spaced(num, count).tolist() == expected


def test_broken_images_are_left_out(tmp_path):
  root, rng = tmp_path / "images", np.random.default_rng(0)
  root.mkdir()
  for i in range(72):
    cv2.imwrite(str(root / f"{i:02}.png"), rng.integers(0, 256, (18, 20, 3), dtype=np.uint8))
  given = {"data.source": "folder", "data.root": str(root), "data.split": "", "data.num_images": 0}
  for i in (0, 41, 71):
    (root / f"{i:02}.png").write_bytes(b"no image")
  parts = parts_lib.build(tiny(**given), tmp_path)
  seen = list(view_figures.ViewFigures(parts, Unasked()).batches())
  assert sum(batch["valid"].sum() for batch in seen) == sum(
    1 if other else 4 for i, other in enumerate(np.isin(np.arange(72), view_figures.spaced(72, 40), invert=True))
    if i not in (0, 41, 71))
  assert figures_of(parts).keys() == set(FIGURES)
  for i in range(72):
    (root / f"{i:02}.png").write_bytes(b"no image")
  assert figures_of(parts_lib.build(tiny(**given), tmp_path)) == {}


def test_embeddings_that_are_one_point_are_called_collapsed(tmp_path):
  parts = parts_lib.build(tiny(), tmp_path)
  state = measuring.calibrate(parts, parts.initial_state(), view_figures.ViewFigures(parts, Unasked()).batches())
  untrained = figures_of(parts, state)
  head = jax.tree.map(lambda x: jnp.zeros_like(x) if x.ndim > 1 else jnp.ones_like(x), state.params["image_head"])
  figures = figures_of(parts, state.replace(params={**state.params, "image_head": head}))
  assert figures["embedding_rank"] == pytest.approx(1, abs=1e-3) and figures["uniformity"] == pytest.approx(0, abs=1e-6)
  assert figures["nearest_view"] == untrained["nearest_view"]  # the features are as they were
  assert verdict.judge(figures, untrained, loss=6.0, chance=6.0)[0] == verdict.COLLAPSED


@pytest.mark.parametrize("changes, expected", [
  ({"num_epochs": 250, "seed": 1, "photometric.brightness": 0.0, "photometric.contrast": 0.0}, verdict.LEARNT),
  ({"num_epochs": 40, "loss": "nce"}, verdict.DIVERGED)])
def test_a_run_is_called_what_it_is(tmp_path, monkeypatch, changes, expected):
  monkeypatch.setattr(mesh_lib, "create_mesh", functools.partial(mesh_lib.create_mesh, 1))
  config = tiny(**{"batch_size": 32, "num_negatives": 64, "model.dim": 16, "evaluate.views": 72, "log.every_steps": 100,
                   "evaluate.every_epochs": 0, "evaluate.batch_size": 288, **changes})
  pretrain.run(config, str(tmp_path / "run"))
  found = json.loads((tmp_path / "run" / "results" / "verdict.json").read_text())
  assert found["verdict"] == expected, found["sentence"]


def test_a_step_that_is_not_finite_is_a_verdict(tmp_path):
  watch = guards.Guard(tmp_path, image_name=str, say=print)
  watch.note(3, np.array([1]), jnp.array([True, False, False, False, False]))
  with pytest.raises(Exception, match="in step 3, the loss"):
    watch.check()
  found = json.loads((tmp_path / "results" / "verdict.json").read_text())
  assert found["verdict"] == verdict.DIVERGED and "in step 3, the loss" in found["sentence"]
