"""Disks that are full or cannot be written: the run goes on where it can, says so, and leaves nothing half-written."""

import errno
import io
import json
import os
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from launching import LIMIT, QUICK, ROOT, STEPS, TRAINING, Launch, assert_same, launch, rows, wait_for
from test_checkpoints import make_state

from pirl_jax.configs import pirl
from pirl_jax.errors import UserError
from pirl_jax.figures import plots
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage import checkpoints as checkpoints_lib
from pirl_jax.storage import tensorboard
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.storage.logbook import Logbook
from pirl_jax.training import pretrain, resuming


class FullDisk:
  """In the place of a file: takes nothing."""

  def write(self, _):
    raise OSError(errno.ENOSPC, "No space left on device")

  def fileno(self):
    return 1  # of a file that is there

  def __getattr__(self, _):
    return lambda *_: None


def open_book(folder, said):
  return Logbook(folder, start_step=0, total_steps=9, steps_per_epoch=3, batch_size=1, stream=said)


def test_rows_that_the_disk_did_not_take_are_written_later(tmp_path):
  said = io.StringIO()
  with open_book(tmp_path, said) as book:
    book.log(1, {"loss": 1.0}, data_wait_seconds=0)
    book._file.close()
    book._file = FullDisk()
    book.log(2, {"loss": 2.0}, data_wait_seconds=0)
    assert [row["step"] for row in rows(tmp_path)] == [1]
    book.log(3, {"loss": 3.0}, data_wait_seconds=0)
    book.record(3, {"knn_top1": 0.5})
    assert [row["loss"] for row in rows(tmp_path)] == [1, 2, 3] and rows(tmp_path)[-1]["knn_top1"] == 0.5
  assert said.getvalue().count("WARNING") == 1 and "No space left on device" in said.getvalue()
  assert "no row is missing" in said.getvalue()


def test_curves_are_drawn_of_the_rows_that_the_disk_did_not_take_too(tmp_path):
  with open_book(tmp_path, io.StringIO()) as book:
    book.log(1, {"loss": 1.0}, data_wait_seconds=0)
    book._file.write(b'{"step": 2, "los')  # as far as the disk took it
    book._file.close()
    book._file = FullDisk()
    book.log(2, {"loss": 2.0}, data_wait_seconds=0)
    assert [row["loss"] for row in book.rows] == [1, 2]
    plots.save_curves(tmp_path / "curves.png", book.rows)


@pytest.mark.parametrize("seconds, writers", [(0, 2), (60, 1)])
def test_a_writer_of_tensorboard_that_a_full_disk_ends_never_blocks_the_run(tmp_path, monkeypatch, seconds, writers):
  monkeypatch.setattr(tensorboard, "TENSORBOARD_REOPEN_SECONDS", seconds)
  said, hook = io.StringIO(), threading.excepthook
  with open_book(tmp_path, said) as book:
    first = book._tensorboard._thread
    monkeypatch.setattr(first._record_writer._py_recordio_writer, "_writer", FullDisk())
    book.log(1, {"loss": 1.0}, data_wait_seconds=0)
    first.join(LIMIT)
    for step in range(2, 9):
      book.log(step, {f"figure{i}": 0.0 for i in range(10)}, data_wait_seconds=0)
  assert len(list(tmp_path.glob("events.out.tfevents.*"))) == writers
  assert said.getvalue().count("WARNING: TensorBoard's events could not be written (No space left on device)") == 1
  assert threading.excepthook is hook


@pytest.mark.parametrize("failures", [1, 2])
def test_a_checkpoint_that_the_disk_did_not_take_is_tried_again_and_no_reason_to_stop(tmp_path, monkeypatch, failures):
  tried, said, state = [], [], make_state(1)
  real = Checkpoints._start_save

  def start_save(self, step, *rest):
    tried.append(step)
    if len(tried) <= failures:
      raise OSError(errno.ENOSPC, "No space left on device")
    real(self, step, *rest)

  monkeypatch.setattr(Checkpoints, "_start_save", start_save)
  with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state.replace(step=jnp.int32(step)), {}, knn_top1=None, say=said.append)
  with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
    assert checkpoints.steps() == ([1, 2] if failures == 1 else [2])
  assert len(said) == failures and all("WARNING" in line and "No space left" in line for line in said)


def test_the_last_checkpoint_is_tried_for_a_while_and_then_the_run_says_that_it_is_not_there(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoints_lib, "PATIENCE_SECONDS", 0.2)
  monkeypatch.setattr(checkpoints_lib, "RETRY_SECONDS", 0.1)
  said, tried = [], []

  def start_save(self, step, *rest):
    tried.append(step)
    raise OSError(errno.EROFS, "Read-only file system")

  with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
    checkpoints.save(1, make_state(1), {}, knn_top1=None, surely=True)
    assert (tmp_path / "checkpoints" / "1").is_dir()
    monkeypatch.setattr(Checkpoints, "_start_save", start_save)
    with pytest.raises(UserError, match=r"step 2 could not be written .*Read-only.* on disk are \[1\]; make room"):
      checkpoints.save(2, make_state(1), {}, knn_top1=None, surely=True, say=said.append)
  assert len(tried) > 2 and "trying again in 0.1 s" in said


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path, monkeypatch):
  def fail(*_):
    raise OSError(errno.EROFS, "Read-only file system")

  config = pirl.get_config()
  config.update_from_flattened_dict({
    "report": False, "export": False, "data.num_images": 256, "evaluate.num_images": 64, "num_negatives": 64})
  monkeypatch.setattr(resuming, "write_json", fail)
  with pytest.raises(UserError, match="nothing can be written to .*Read-only file system.*--workdir"):
    pretrain.run(config, str(tmp_path / "run"))


@pytest.mark.slow
def test_a_run_on_a_full_disk_goes_on_to_its_end_and_is_saved_once_there_is_room(tmp_path, monkeypatch):
  """Files above 100 kB fail for good here, checkpoints among them and metrics.jsonl not: the end has to wait."""
  with Launch(*TRAINING, f"--workdir={tmp_path}", largest_file=100_000) as running:
    wait_for(lambda: len(rows(tmp_path)) == STEPS)
    time.sleep(2 * checkpoints_lib.RETRY_SECONDS)
    running.kill(0)
    (_, output), = running.wait()
  # That of step 10 is written while the run goes on, so its failure is known at the next one.
  assert "a checkpoint could not be written, at step 20 (File too large: " in output
  assert "trying again in 20 s" in output
  assert [row["step"] for row in rows(tmp_path)] == list(range(1, STEPS + 1))
  assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
  launch(*TRAINING, f"--workdir={tmp_path}")
  with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
    assert STEPS in checkpoints.steps() and not checkpoints.check(STEPS, mesh_lib.create_mesh())
  assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == STEPS
  assert np.isfinite(rows(tmp_path)[-1]["loss"])


SMALL_DISK = """
mount -t tmpfs -o size=4m tmpfs "$0/disk" && head -c 4040k /dev/zero > "$0/disk/filler" || exit 99
(until grep -q "trying again" "$0/output"; do sleep 0.2; done; sleep 1; rm "$0/disk/filler") &
"$@" --workdir="$0/disk/run" > "$0/output" 2>&1
code=$?
cp -r "$0/disk/run" "$0/run"
exit $code
"""
"""In a name space of its own mounts a disk and fills it; it has room again once the run waits for that at its end."""


@pytest.mark.slow
@pytest.mark.skipif(subprocess.run(["unshare", "-rm", "true"]).returncode, reason="nothing may be mounted here")
def test_a_disk_that_is_full_until_the_end_changes_nothing(tmp_path):
  launch(*TRAINING, f"--workdir={tmp_path / 'expected'}")
  (tmp_path / "disk").mkdir()
  (tmp_path / "output").touch()
  environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {QUICK}",
                              "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  ended = subprocess.run(["unshare", "-rm", "bash", "-c", SMALL_DISK, tmp_path, sys.executable, "launch.py", *TRAINING],
                         cwd=ROOT, env=environment, timeout=LIMIT)
  output = (tmp_path / "output").read_text()
  assert not ended.returncode, output[-3000:]
  assert "at step 20 (No space left on device" in output and "metrics.jsonl could not be written" in output
  assert len(output.splitlines()) < 150 and "Traceback" not in output
  assert_same(tmp_path / "run", tmp_path / "expected", STEPS)
