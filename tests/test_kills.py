"""What is killed at any moment, again and again, ends as if it never was: runs, evaluations, preparations of data."""

import json
import shutil
import time
from glob import glob

import numpy as np
import pytest
from archives import cifar_archive
from launching import LIMIT, TRAINING, Launch, assert_same, launch, over_folder, rows, write_images

from pirl_jax.storage.rows import read_rows

STEPS = 120


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """Returns the flags of a run of 120 steps over 40 images, three of them broken, and few checkpoints apart."""
  root = tmp_path_factory.mktemp("images")
  write_images(root, train=20, test=8)
  (root / "train" / "cats" / "03.png").write_bytes(b"no image at all")
  for name in ("cats/11.png", "dogs/19.png"):
    path = root / "train" / name
    path.write_bytes(path.read_bytes()[:300])
  return (*over_folder(root), "--config.evaluate.every_epochs=4", "--config.checkpoint.every_steps=7",
          "--config.num_epochs=24", "--config.data.max_bad_fraction=0.1")


@pytest.fixture(scope="module")
def expected(command, tmp_path_factory):
  """Returns the folder of the run that never stopped."""
  folder = tmp_path_factory.mktemp("expected")
  launch(*command, f"--workdir={folder}")
  return folder


def kill_once(command, folder, moment, rng):
  """Starts the run and kills it at such a moment; returns whether it was still running."""
  reached = len(read_rows(folder / "metrics.jsonl"))

  def at_the_moment():
    if moment == "start":
      return time.monotonic() - started > delay
    if moment == "save":
      return list((folder / "checkpoints").glob("*tmp*"))
    now = read_rows(folder / "metrics.jsonl")
    if moment == "evaluation":
      return len(now) > reached and now[-1]["step"] % 20 == 0 and "knn_top1" not in now[-1]
    return len(now) > reached + progress

  delay, progress, started = rng.uniform(0, 12), rng.integers(6), time.monotonic()
  with Launch(*command, f"--workdir={folder}") as running:
    while not at_the_moment():
      if running.ended() or time.monotonic() - started > LIMIT:
        return False
      time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05))
    running.kill(0)
  return True


def check_kills(command, folder, expected, moments, rng):
  kills = [moment for moment in moments if kill_once(command, folder, moment, rng)]
  launch(*command, f"--workdir={folder}")
  assert_same(folder, expected, STEPS)
  return kills


@pytest.mark.slow
def test_killed_in_a_step_while_saving_and_while_evaluating(tmp_path, command, expected):
  kills = check_kills(command, tmp_path / "run", expected, ["steps", "save", "evaluation"], np.random.default_rng(0))
  assert len(kills) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_twenty_kills(tmp_path, command, expected, seed):
  rng = np.random.default_rng(seed)
  moments = rng.permutation(["start"] * 4 + ["steps"] * 6 + ["save"] * 6 + ["evaluation"] * 4)
  kills = check_kills(command, tmp_path / "run", expected, moments, rng)
  print(f"{len(kills)} kills: {', '.join(kills)}")
  assert len(kills) >= 15


def kill_after(pattern, arguments, rng, **options):
  """Starts a command and kills it within two seconds of a new file of that pattern; returns whether it was running."""
  started, before = time.monotonic(), set(glob(pattern, recursive=True))
  with Launch(*arguments, **options) as running:
    while set(glob(pattern, recursive=True)) <= before:
      if running.ended() or time.monotonic() - started > LIMIT:
        return False
      time.sleep(0.002)
    time.sleep(rng.uniform(0, 2))
    if running.ended():
      return False
    running.kill(0)
  return True


def without_clocks(tree):
  if isinstance(tree, dict):
    return {name: without_clocks(value) for name, value in tree.items()
            if "second" not in name and name != "checkpoint"}
  return tree


@pytest.mark.slow
@pytest.mark.parametrize("protocol, settings", [
  ("linear", ("--config.linear.num_epochs=600", "--config.linear.batch_size=8")),
  ("semi_supervised", ("--config.semi_supervised.num_epochs=60", "--config.semi_supervised.fractions=(0.5,1.0)",
                       "--config.semi_supervised.batch_size=8"))])
def test_an_evaluation_that_is_killed_gives_the_same_figures(tmp_path, expected, protocol, settings):
  """A snapshot is saved whenever it may be, and it is killed after another one, or two, of them."""
  rng = np.random.default_rng(0)
  figures = []
  for kills in (0, 5):
    run = tmp_path / f"{kills}" / "run"
    shutil.copytree(expected, run)
    command = (f"--config=configs/evaluate.py:{protocol}", f"--config.checkpoint={run}", *settings)
    options = dict(changed={"pirl_jax.evaluation.training": {"SNAPSHOT_SECONDS": 0.5}})
    unfinished = run / "results" / "unfinished"
    killed = sum(kill_after(f"{unfinished}/**/_CHECKPOINT_METADATA", command, rng, **options) for _ in range(kills))
    output, = launch(*command, **options)
    print(f"{protocol}: {killed} kills")
    assert killed >= min(kills, 3) and ("resumes from step" in output) == bool(kills), (killed, output[-2000:])
    assert not unfinished.exists()
    result, = (run / "results").glob("*.json")
    figures.append(without_clocks(json.loads(result.read_text())))
  assert figures[0] == figures[1]


@pytest.mark.slow
def test_a_preparation_of_data_that_is_killed_begins_anew(tmp_path):
  rng = np.random.default_rng(0)
  found = []
  for kills in (0, 4):
    root = tmp_path / f"{kills}"
    cifar_archive(root, per_file=1_000)
    command = (*TRAINING, "--config.data.source=tfds", "--config.data.name=cifar10", f"--config.data.root={root}",
               "--config.data.split=train[:128]", "--config.data.num_images=0", f"--workdir={root / 'run'}")
    killed = sum(kill_after(f"{root}/cifar10/*", command, rng) for _ in range(kills))
    print(f"preparation: {killed} kills")
    assert killed >= min(kills, 3) and (not kills or not (root / "run").exists())
    output, = launch(*command)
    assert ("unfinished preparations, which can be deleted" in output) == bool(kills)
    found.append([row["loss"] for row in rows(root / "run")])
  assert found[0] == found[1] and len(found[0]) == 20
