"""A run that is killed at any moment, again and again, ends as one that never was."""

import time

import cv2
import numpy as np
import pytest
from launching import CLOCKS, LIMIT, Launch, launch, rows, stored

from pirl_jax.logbook import read_rows

STEPS = 120


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """Returns the flags of a run of 120 steps over 40 pictures, three of them broken, and few checkpoints apart."""
  root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
  for split, count in (("train", 20), ("test", 8)):
    for label in ("cats", "dogs"):
      (root / split / label).mkdir(parents=True)
      for i in range(count):
        cv2.imwrite(str(root / split / label / f"{i:02}.png"), rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
  (root / "train" / "cats" / "03.png").write_bytes(b"no picture at all")
  for name in ("cats/11.png", "dogs/19.png"):
    path = root / "train" / name
    path.write_bytes(path.read_bytes()[:300])
  return (
    "--config=configs/pirl.py:folder_small", f"--config.data.root={root}", "--config.data.split=train",
    "--config.data.labels=folder", "--config.evaluate.split=test", "--config.evaluate.every_epochs=4",
    "--config.evaluate.batch_size=8", "--config.batch_size=8", "--config.num_negatives=16",
    "--config.data.image_size=16", "--config.jigsaw.crop_size=18", "--config.jigsaw.patch_size=5",
    "--config.data.num_threads=2", "--config.log.every_steps=1", "--config.checkpoint.every_steps=7",
    "--config.num_epochs=24", "--config.evaluate.learning=False", "--config.data.max_bad_fraction=0.1")


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


def assert_same(folder, expected):
  assert [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows(folder)] == [
    {name: value for name, value in row.items() if name not in CLOCKS} for row in rows(expected)]
  arrays, others = stored(folder, STEPS), stored(expected, STEPS)
  assert arrays.keys() == others.keys() and len(arrays) > 50
  for name, value in arrays.items():
    np.testing.assert_array_equal(value, others[name], err_msg=name)


def check_kills(command, folder, expected, moments, rng):
  kills = [moment for moment in moments if kill_once(command, folder, moment, rng)]
  launch(*command, f"--workdir={folder}")
  assert_same(folder, expected)
  return kills


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
