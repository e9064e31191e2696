"""Whole runs on a few drawn textures."""

import json
import re
import shutil

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pirl_jax.configs import pirl
from pirl_jax.errors import UserError
from pirl_jax.reporting.meanings import METRICS
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.storage.files import locked
from pirl_jax.storage.rows import read_rows
from pirl_jax.training import guards, pretrain, resuming
from pirl_jax.training import parts as parts_lib

CLOCKS = {"images_per_second", "data_wait"}


def tiny(**changes):
  config = pirl.get_config()
  config.update_from_flattened_dict({
    "num_epochs": 3, "batch_size": 16, "num_negatives": 16, "loss": "nce", "data.num_images": 72,
    "data.image_size": 16, "jigsaw.crop_size": 18, "jigsaw.patch_size": 5, "data.num_threads": 2,
    "optimizer.warmup_epochs": 0, "evaluate.num_images": 40, "evaluate.every_epochs": 1, "evaluate.batch_size": 16,
    "checkpoint.every_steps": 3, "checkpoint.keep": 20, "log.every_steps": 1, "evaluate.learning": False,
    "report": False, "export": False, **changes})
  return config


def final_state(workdir, **changes):
  """Returns every array of the newest checkpoint by name, and its meta."""
  parts = parts_lib.build(tiny(**changes), workdir)
  with Checkpoints(workdir / "checkpoints", keep=20) as checkpoints:
    step = checkpoints.steps()[-1]
    state = checkpoints.restore(step, jax.eval_shape(parts.initial_state), parts.mesh)
    return jax.device_get(state), checkpoints.read_meta(step)


def rows(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [{name: value for name, value in json.loads(line).items() if name not in CLOCKS} for line in lines]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
  """A run of 12 steps that never stopped."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  pretrain.run(tiny(), str(workdir))
  return workdir


def test_every_column_of_the_metrics_is_in_the_glossary(whole_run):
  columns = {name for row in read_rows(whole_run / "metrics.jsonl") for name in row}
  assert {"loss", "knn_top1", "data_wait"} <= columns and columns - METRICS.keys() == set()


class Killed(BaseException):
  pass


def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(whole_run, tmp_path, monkeypatch):
  """Killed between two checkpoints and in the middle of an epoch, twice."""
  for step_of_death in (5, 11):
    class Deadly(guards.Broken):
      def note(self, step, batch, step_of_death=step_of_death):
        if step == step_of_death:
          raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
      patch.setattr(pretrain, "Broken", Deadly)
      pretrain.run(tiny(), str(tmp_path / "run"))
  pretrain.run(tiny(), str(tmp_path / "run"))
  (state, meta), (expected, expected_meta) = final_state(tmp_path / "run"), final_state(whole_run)
  assert state.step == 12 and len(jax.tree.leaves(state.opt_state)) > 10
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  assert meta == expected_meta
  assert rows(tmp_path / "run") == rows(whole_run)


OFFICIAL = {"negative_sampling": "per_image", "own_row_is_negative": True, "bank.averaged": 32, "partial_batch": True}


@pytest.mark.slow
@pytest.mark.parametrize("options, num_steps", [
  (OFFICIAL, 10),  # 72 images: four batches of 16, and one with 8 images that count
  ({"bank.encoder_momentum": 0.9}, 8)], ids=["official", "momentum encoder"])
def test_a_run_with_other_options_goes_on_bit_for_bit(tmp_path, options, num_steps):
  options = options | {"optimizer.schedule": "steps", "optimizer.milestones": ()}
  for name, lengths in (("whole", (2,)), ("cut", (1, 2))):
    for num_epochs in lengths:
      pretrain.run(tiny(num_epochs=num_epochs, **options), str(tmp_path / name))
  (state, _), (expected, _) = (final_state(tmp_path / name, **options) for name in ("cut", "whole"))
  assert state.step == num_steps and (state.momentum_encoder is not None) == ("bank.encoder_momentum" in options)
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_run_writes_what_the_design_names(whole_run):
  names = {path.name for path in whole_run.iterdir()}
  assert {"config.json", "metrics.jsonl", "checkpoints", "views.png", "curves.png"} <= names
  assert any(name.startswith("events.out.tfevents.") for name in names)
  found = rows(whole_run)
  assert [row["step"] for row in found] == list(range(1, 13))
  for name in ("loss", "loss_image", "loss_pretext", "learning_rate", "embedding_spread", "negatives_beaten"):
    assert all(np.isfinite(row[name]) for row in found)
  assert [row["step"] for row in found if "knn_top1" in row] == [4, 8, 12]
  rate_of = parts_lib.build(tiny(), whole_run).optimizer.learning_rate
  np.testing.assert_allclose([row["learning_rate"] for row in found], [rate_of(step) for step in range(12)], rtol=1e-6)
  assert json.loads((whole_run / "config.json").read_text())["batch_size"] == 16


def test_first_loss_is_that_of_a_random_network(whole_run):
  # nce with Z from this very batch: ln(mean e / Z * N) + ln(K + N eps) + ..., see the table in test_losses.py; here the
  # scores of an untrained network are far from independent, so the bounds are wide.
  assert 1.0 < rows(whole_run)[0]["loss_pretext"] < 12


@pytest.mark.parametrize("field, value", [
  ("seed", 3), ("batch_size", 8), ("num_negatives", 32), ("data.num_images", 80), ("model.dim", 64),
  ("optimizer.learning_rate", 0.2)])
def test_another_config_in_the_same_folder_is_refused_and_nothing_changes(whole_run, field, value):
  before = {path: path.stat().st_mtime_ns for path in whole_run.rglob("*")}
  with pytest.raises(UserError, match=field) as error:
    pretrain.run(tiny(**{field: value}), str(whole_run))
  assert str(value) in str(error.value) and "--workdir" in str(error.value)
  assert {path: path.stat().st_mtime_ns for path in whole_run.rglob("*")} == before


@pytest.mark.parametrize("field, value", [("data.num_images", 80), ("model.width", 2), ("data.split", "test")])
def test_checkpoint_of_other_data_or_network_is_refused_without_its_config_too(whole_run, tmp_path, field, value):
  shutil.copytree(whole_run, tmp_path / "run")
  (tmp_path / "run" / "config.json").unlink()
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
  with pytest.raises(UserError, match=f"holds a run with {field}=.* and now it is"):
    pretrain.run(tiny(**{field: value}), str(tmp_path / "run"))
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_more_epochs_go_on_and_fewer_than_done_are_refused(whole_run, tmp_path):
  shutil.copytree(whole_run, tmp_path / "run")
  with pytest.raises(UserError, match="already done 12 steps, and num_epochs=2"):
    pretrain.run(tiny(num_epochs=2), str(tmp_path / "run"))
  pretrain.run(tiny(num_epochs=4), str(tmp_path / "run"))
  assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 17))


def test_learning_table_of_a_run(whole_run, tmp_path, capsys):
  shutil.copytree(whole_run, tmp_path / "run")
  pretrain.run(tiny(**{"evaluate.learning": True, "evaluate.k": 500}), str(tmp_path / "run"))
  table = json.loads((tmp_path / "run" / "results" / "learning.json").read_text())
  assert table["num_test"] == 40 and table["num_train"] == table["k_used"] == 72 and table["step"] == 12
  assert all(0 <= table[name] <= 1 for name in ("raw_pixels", "untrained", "trained"))
  said = capsys.readouterr().out
  assert "trained network" in said and "compiled" not in said  # who calls it from Python has a JAX of his own


def test_numbers_that_are_not_finite_stop_the_run_and_are_never_saved(tmp_path):
  changes = {"optimizer.learning_rate": 1e30, "log.every_steps": 100, "checkpoint.every_steps": 1}
  with pytest.raises(UserError, match=r"in step [23], the \w+ held numbers that are not finite") as error:
    pretrain.run(tiny(**changes), str(tmp_path / "run"))
  with Checkpoints(tmp_path / "run" / "checkpoints", keep=20) as checkpoints:
    assert checkpoints.steps()[0] == 1 and len(checkpoints.steps()) < 3
    assert not any(checkpoints.check(step, mesh_lib.create_mesh()) for step in checkpoints.steps())
  dump = json.loads((tmp_path / "run" / "not_finite.json").read_text())
  assert f"in step {dump['step']}, {dump['not_finite'][0]} held" in str(error.value)
  assert len(dump["images"]) == 16 and dump["images"][0].keys() == {"index", "name"}


@pytest.mark.parametrize("log, checkpoint, logged, saved", [(4, 5, [4, 8], 5), (100, 3, [], 3)])
def test_the_first_bad_step_and_quantity_are_named_within_one_interval(
    tmp_path, monkeypatch, log, checkpoint, logged, saved):
  """Step 6 gets an infinite gradient; the loss is still finite. A row or a checkpoint comes next."""
  real = parts_lib.create_optimizer
  monkeypatch.setattr(parts_lib, "create_optimizer", lambda schedule, **options: real(
    lambda count: jnp.where(count == 5, jnp.inf, schedule(count)), **options))
  with pytest.raises(UserError, match="in step 6, the parameters held numbers"):
    pretrain.run(tiny(**{"log.every_steps": log, "checkpoint.every_steps": checkpoint, "evaluate.every_epochs": 0}),
                 str(tmp_path / "run"))
  assert [row["step"] for row in rows(tmp_path / "run")] == logged
  with Checkpoints(tmp_path / "run" / "checkpoints", keep=20) as checkpoints:
    assert checkpoints.steps()[-1] == saved


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(whole_run, tmp_path):
  shutil.copytree(whole_run, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints")
  before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
  with pytest.raises(UserError, match=r"checkpoint of step 12 was saved, but .*checkpoints holds no checkpoint; bring"):
    pretrain.run(tiny(**{"checkpoint.every_steps": 1_000}), str(tmp_path / "run"))
  assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_two_runs_at_once_in_a_folder_are_refused(whole_run, monkeypatch):
  monkeypatch.setattr(resuming, "HANDOVER_SECONDS", 0.1)
  with locked(whole_run), pytest.raises(UserError, match=f"another process is training in {whole_run}; let it end"):
    pretrain.run(tiny(), str(whole_run))
  with locked(whole_run, patience=0):  # refused, it has let go of it
    pass


def test_too_many_broken_images_stop_the_run_and_are_listed(tmp_path):
  root = tmp_path / "images"
  root.mkdir()
  for i in range(72):
    image = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    content = cv2.imencode(".png", image)[1].tobytes()
    (root / f"{i:02}.png").write_bytes(content if i > 4 else content[:200])
  changes = {"data.source": "folder", "data.root": str(root), "data.split": "", "evaluate.split": "",
             "data.num_images": 0, "num_epochs": 6}
  with pytest.raises(UserError, match=r"[45] of 72 training images cannot be read, more than .*=0.05"):
    pretrain.run(tiny(**changes), str(tmp_path / "run"))
  broken = json.loads((tmp_path / "run" / "broken_images.json").read_text())
  assert broken["count"] in (4, 5)
  assert {image["name"] for image in broken["images"]} <= {f"{i:02}.png" for i in range(5)}


def test_bad_images_of_every_kind_are_left_out_and_named_also_those_that_go_bad_in_the_middle(
    tmp_path, monkeypatch, capsys):
  root, rng = tmp_path / "images", np.random.default_rng(0)
  root.mkdir()

  def encoded(ending, shape=(20, 20, 3), dtype=np.uint8):
    return cv2.imencode(ending, rng.integers(0, 256, shape).astype(dtype))[1].tobytes()

  bomb = encoded(".png")
  bomb = bomb[:16] + (70_000).to_bytes(4, "big") * 2 + bomb[24:]
  at_first = {"a.png": b"no image", "b.jpg": b"GIF89a" + bytes(100), "c.png": bomb, "d.webp": encoded(".webp")[:100],
              "e.jpeg": encoded(".jpg")[:-40], "f.bmp": b"\0" * 500}
  later = {"g.png": None, "h.png": b"", "i.png": encoded(".png")[:80], "j.jpg": b"<html>404</html>", "k.png": bomb}
  odd_but_whole = {"l.jpg": encoded(".png"), "m.png": encoded(".png", dtype=np.uint16),
                   "n.bmp": encoded(".bmp", (20, 20)), "o.png": encoded(".png", (1, 1, 3)),
                   "p.png": encoded(".png", (3, 400, 3))}
  whole = {f"{name[0]}.{name[2:]}": encoded(f".{name[2:]}") for name in later} | {"q.png": encoded(".png")}
  for name, content in {**at_first, **odd_but_whole, **whole}.items():
    (root / name).write_bytes(content)
  for i in range(32):
    (root / f"z{i}.png").write_bytes(encoded(".png"))
  real = pretrain.begin

  def begin(*arguments):
    real(*arguments)
    for name, content in later.items():
      (root / name).unlink() if content is None else (root / name).write_bytes(content)
    (root / "q.png").unlink()
    (root / "q.png").mkdir()

  monkeypatch.setattr(pretrain, "begin", begin)
  config = tiny(**{"data.source": "folder", "data.root": str(root), "data.split": "", "evaluate.split": "",
                   "data.num_images": 0, "num_epochs": 6, "data.max_bad_fraction": 0.4})
  pretrain.run(config, str(tmp_path / "run"))
  broken = json.loads((tmp_path / "run" / "broken_images.json").read_text())
  expected = sorted([*at_first, *later, "q.png"])
  assert [image["name"] for image in broken["images"]] == expected and broken["count"] == 12
  output = capsys.readouterr().out
  assert all(f"{name} cannot be read (" in output for name in expected)
  assert "(JPEG is cut short)" in output and "q.png cannot be read (Is a directory)" in output

  monkeypatch.setattr(pretrain, "begin", real)
  (root / "new.png").write_bytes(b"123")
  with pytest.raises(UserError, match=r"gone: 3 \(g.png, h.png, q.png\); new: 1 \(new.png\); of another size: "
                     r"2 \(i.png, j.jpg\)"):  # the bomb is as long as what it replaced
    pretrain.run(config, str(tmp_path / "run"))


@pytest.mark.parametrize("field, value, said", [
  ("objective", "contrastive", "invariant, covariant, supervised"), ("negative_sampling", "each", "shared, per_image"),
  ("num_negatives", -16, "every row"), ("num_epochs", -1, "untrained network"), ("pretext_weight", 1.5, "[0, 1]"),
  ("optimizer.schedule", "linear", "cosine, steps"), ("optimizer.decay_factor", 0.0, "(0, 1]"),
  ("optimizer.milestones", (0.8, 0.6), "rising"), ("optimizer.warmup_epochs", 3, "warm-up"),
  ("jigsaw.num_permutations", -1, "all"), ("jigsaw.num_permutations", 400_000, "1..362880"),
  ("jigsaw.augment", "all", "patches, crop"), ("jigsaw.permutation_subset", "max", "max_avg, max_min"),
  ("jigsaw.crop_scale", (0.0, 1.0), "(smallest, largest)"), ("pretext", "puzzle", "jigsaw, rotation"),
  ("objective", "covariant", "--config.jigsaw.num_permutations=2000"), ("micro_batches", 0, "from 1"),
  ("micro_batches", 3, "choose a divisor of 2"), ("model.dtype", "float64", "JAX_ENABLE_X64=1"),
  ("bank.dtype", "float64", "JAX_ENABLE_X64=1"), ("model.batch_norm", "local", "global, groups, device"),
  ("model.batch_norm_group", 1, "2 images or more"), ("nearest_positive", -0.1, "[0, 1]"),
  ("angle_weight", -1.0, "from 0"), ("negative_ranks", (0.5, 0.5), "two shares"),
  ("negative_ranks", (0.0, 0.1), "--config.loss=infonce"),
  ("model.batch_norm", "groups", "_group=32 does not divide the 2 images")])
def test_impossible_value_is_named_with_what_is_possible_before_anything_is_written(tmp_path, field, value, said):
  config = tiny(**{field: value})
  if field.startswith("optimizer.milestones"):
    config.optimizer.schedule = "steps"
  with pytest.raises(UserError) as error:
    pretrain.run(config, str(tmp_path / "run"))
  assert field.split(".")[-1] in str(error.value) and said in str(error.value)
  assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_draw_for_each_image_is_refused_where_every_row_is_taken(tmp_path):
  with pytest.raises(UserError, match="negative_sampling='per_image' is not possible: num_negatives=0"):
    pretrain.run(tiny(negative_sampling="per_image", num_negatives=0), str(tmp_path / "run"))


def test_an_own_row_is_no_negative_where_every_row_is_taken(tmp_path):
  with pytest.raises(UserError, match="own_row_is_negative=True is not possible: num_negatives=0"):
    pretrain.run(tiny(own_row_is_negative=True, num_negatives=0), str(tmp_path / "run"))


@pytest.mark.parametrize("objective", ["covariant", "supervised"])
@pytest.mark.parametrize("field, value", [
  ("angle_weight", 0.4), ("nearest_positive", 0.5), ("negative_ranks", (0.0, 0.08)), ("bank.encoder_momentum", 0.9),
  ("bank.max_age", 8)])
def test_an_option_of_the_bank_is_refused_where_there_is_none(tmp_path, objective, field, value):
  with pytest.raises(UserError, match=rf"{re.escape(f'{field}={value}')} is not possible with objective='{objective}'"):
    pretrain.run(tiny(objective=objective, **{field: value}), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_covariant_task_of_one_label_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"1 label\(s\)"):
    pretrain.run(tiny(objective="covariant", **{"jigsaw.num_permutations": 1}), str(tmp_path / "run"))


def test_a_bank_that_cannot_fit_is_refused_before_anything_is_made(tmp_path, monkeypatch):
  monkeypatch.setattr(parts_lib.mesh_lib, "device_bytes", lambda: 5_000)  # 80 rows of 128 numbers, on eight devices
  with pytest.raises(UserError, match="the bank of 72 images takes .* on each of 8 device.*; use 16 such devices"):
    pretrain.run(tiny(), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_parts_of_a_batch_and_all_rows_in_a_run(tmp_path):
  """Two parts of 8 images, one on each device, every row as a negative, stages computed again: it goes on, too."""
  config = tiny(micro_batches=2, num_negatives=0, num_epochs=1, **{"model.remat": True})
  pretrain.run(config, str(tmp_path / "run"))
  config.num_epochs = 2
  pretrain.run(config, str(tmp_path / "run"))
  assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 9))


@pytest.mark.parametrize("name, value", [("jax_default_prng_impl", "rbg"), ("jax_random_seed_offset", 1)])
def test_a_run_does_not_go_on_where_other_numbers_are_drawn(whole_run, name, value):
  before = getattr(jax.config, name)
  try:
    jax.config.update(name, value)
    with pytest.raises(UserError, match=f"{name}={before!r}, and now it is {value!r}.*{name.upper()}"):
      pretrain.run(tiny(num_epochs=4), str(whole_run))
  finally:
    jax.config.update(name, before)


def test_other_rounding_is_told(whole_run, capsys):
  meta = final_state(whole_run)[1]
  capsys.readouterr()
  resuming.compare_environment(meta, whole_run)
  assert not capsys.readouterr().out
  meta["environment"]["rounding"]["XLA_FLAGS"] = "--xla_cpu_enable_fast_math=true"
  resuming.compare_environment(meta, whole_run)
  assert "WARNING: XLA_FLAGS was '--xla_cpu_enable_fast_math=true'" in capsys.readouterr().out
