"""Old checkpoints: which are removed, and that one that cannot be removed costs nothing."""

import json
import os
import time

import jax.numpy as jnp
import pytest
from test_checkpoints import make_state

from pirl_jax.errors import UserError
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage import retention
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.storage.retention import Retention, steps_in


def folders(folder, *steps):
  for step in steps:
    (folder / str(step) / "item").mkdir(parents=True)
    (folder / str(step) / "item" / "data").write_bytes(b"x")


def test_only_folders_that_are_named_as_a_step_count(tmp_path):
  folders(tmp_path, 3, 20, "04", "5.tmp", "unreadable-6", "-7")
  (tmp_path / "8").write_bytes(b"")
  assert steps_in(tmp_path) == [3, 20] and steps_in(tmp_path / "none") == []
  with pytest.raises(UserError, match="cannot be listed"):
    steps_in(tmp_path / "8")


def test_the_newest_the_best_and_what_cannot_be_judged_are_kept(tmp_path):
  folders(tmp_path, *range(1, 8))
  metrics, noted = {1: 0.2, 2: 0.9, 3: None, 4: 0.9, 6: 0.1, 7: None}, []

  def metric_of(step):
    if step == 5:
      raise ValueError("damaged")
    return metrics[step]

  kept = Retention(tmp_path, keep=2, metric_of=metric_of, note=noted.append)
  kept.settle()
  assert len(steps_in(tmp_path)) == 7  # nothing new is on disk
  kept.expect(7)
  end = time.monotonic() + 30
  while len(steps_in(tmp_path)) > 4 and time.monotonic() < end:
    time.sleep(0.01)
  kept.settle()
  assert steps_in(tmp_path) == [4, 5, 6, 7] and noted == [7] and kept.words() == []


@pytest.mark.parametrize("obstacle", ["link", "rename", "rmtree"])
def test_a_checkpoint_is_saved_although_an_old_one_cannot_be_removed(tmp_path, monkeypatch, obstacle):
  said, state, elsewhere = [], make_state(1), tmp_path / "elsewhere"
  folder = tmp_path / "checkpoints"
  with Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(1, state, {}, knn_top1=None, surely=True, say=said.append)
    if obstacle == "link":
      (folder / "1").rename(elsewhere)
      (folder / "1").symlink_to(elsewhere)
    elif obstacle == "rename":
      monkeypatch.setattr(retention.Path, "rename", lambda *_: os.rmdir(folder))  # not empty
    else:
      monkeypatch.setattr(retention, "remove", lambda path: "Device or resource busy")
    began = time.monotonic()
    for step in (2, 3):
      checkpoints.save(step, state.replace(step=jnp.int32(step)), {}, knn_top1=None, surely=True, say=said.append)
    assert time.monotonic() - began < 15
    assert not checkpoints.check(3, mesh_lib.create_mesh(1))
  assert checkpoints.steps() == ([1, 2, 3] if obstacle == "rename" else [3])
  assert len(said) == (0 if obstacle == "link" else 2), said
  assert all("WARNING: the old checkpoint" in line and "cannot be removed" in line for line in said)
  assert obstacle != "link" or json.loads((elsewhere / "meta" / "metadata").read_text())["step"] == 1


def test_a_save_that_is_on_disk_in_spite_of_an_error_is_saved(tmp_path, monkeypatch):
  said, real = [], Checkpoints._start_save

  def start_save(self, *args):
    real(self, *args)
    self._open(writing=True).wait_until_finished()
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(Checkpoints, "_start_save", start_save)
  with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
    checkpoints.save(1, make_state(1), {}, knn_top1=None, surely=True, say=said.append)
  assert said == [] and checkpoints.steps() == [1]
