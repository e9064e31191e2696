"""The same run on any number of devices and processes, started as users start it: launch.py, and gloo between them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import PyTreeCheckpointer, RestoreArgs
from orbax.checkpoint.args import PyTreeRestore

from pirl_jax import mesh as mesh_lib
from pirl_jax.errors import UserError

ROOT = Path(__file__).parents[1]
LIMIT = 400  # seconds, for processes that share two cores with other tests
BOUND = 150  # seconds in which a process ends that has lost another
STEPS = 20
TRAINING = (
  "--config=configs/pirl.py", "--config.data.image_size=16", "--config.jigsaw.crop_size=18",
  "--config.jigsaw.patch_size=5", "--config.data.num_images=128", "--config.num_negatives=64", "--config.batch_size=32",
  "--config.num_epochs=5", "--config.log.every_steps=1", "--config.checkpoint.every_steps=10",
  "--config.evaluate.split=", "--config.evaluate.learning=False")
DOUBLE = ("--config.model.dtype=float64", "--config.bank.dtype=float64")


class Launch:
  """launch.py in one or several processes, as started; a context manager that leaves none of them behind."""

  def __init__(self, *arguments, processes=1, devices=1, other=None, slurm=False, double=False):
    """Starts them.

    Args:
      arguments: of all.
      processes: how many.
      devices: virtual ones of each.
      other: {process: arguments of this one alone}.
      slurm: they are told of each other as srun tells them, not by flags.
      double: JAX may compute in float64.
    """
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    self._started = []
    for process in range(processes):
      flags, environment = [], os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_ENABLE_X64": str(int(double)),
        # Without optimisations a program compiles sooner, and in float64 runs a hundred times as long.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(not double))}
      if slurm:
        environment |= {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(processes),
                        "SLURM_PROCID": str(process), "SLURM_LOCALID": str(process), "JAX_COORDINATOR_PORT": str(port)}
      elif processes > 1:
        flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={process}"]
      command = [sys.executable, "launch.py", *flags, *arguments, *(other or {}).get(process, ())]
      self._started.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                                            stderr=subprocess.STDOUT, start_new_session=True))

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    for started in self._started:
      if started.poll() is None:
        os.killpg(started.pid, signal.SIGKILL)
      started.communicate()

  def kill(self, process):
    os.killpg(self._started[process].pid, signal.SIGKILL)

  def wait(self):
    """Returns the exit code and the output of each."""
    end, ended = time.monotonic() + LIMIT, []
    for started in self._started:
      output, _ = started.communicate(timeout=max(1, end - time.monotonic()))
      ended.append((started.returncode, output))
    return ended


def launch(*arguments, **options):
  """Returns the outputs of processes that all end well."""
  with Launch(*arguments, **options) as started:
    ended = started.wait()
  for code, output in ended:
    assert code == 0, output[-3000:]
  return [output for _, output in ended]


def rows(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stored(folder, step):
  """Returns {name: array} of everything in a checkpoint, as it was written."""
  found = {}
  for item in ("model", "train", "bank"):
    path = folder / "checkpoints" / str(step) / item
    reader = PyTreeCheckpointer()
    as_written = jax.tree.map(lambda _: RestoreArgs(restore_type=np.ndarray), reader.metadata(path).item_metadata.tree)
    for name, value in jax.tree_util.tree_leaves_with_path(
        reader.restore(path, args=PyTreeRestore(restore_args=as_written))):
      found[item + jax.tree_util.keystr(name)] = np.asarray(value)
  return found


def assert_same_run(found, expected, *, step=STEPS, tolerance=1e-9):
  assert [row["step"] for row in rows(found)] == list(range(1, step + 1))
  for row, other in zip(rows(found), rows(expected), strict=True):
    np.testing.assert_allclose(row["loss"], other["loss"], rtol=tolerance)
  arrays, others = stored(found, step), stored(expected, step)
  assert arrays.keys() == others.keys() and any("bank" in name for name in arrays)
  for name, value in arrays.items():
    assert value.dtype == others[name].dtype, name
    np.testing.assert_allclose(np.float64(value), np.float64(others[name]), rtol=tolerance, atol=tolerance,
                               err_msg=name)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  """Returns the folder of the run in float64 in one process, on one device."""
  folder = tmp_path_factory.mktemp("one")
  launch(*TRAINING, *DOUBLE, f"--workdir={folder}", double=True)
  assert stored(folder, STEPS)["bank['bank']"].dtype == np.float64
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("processes, devices", [(1, 2), (1, 4), (1, 8), (2, 2), (2, 4)])
def test_the_same_run_in_float64(tmp_path, one, processes, devices):
  """Twenty steps: what is left of a difference is the rounding of float64, so the rest of it in float32 is, too."""
  outputs = launch(*TRAINING, *DOUBLE, f"--workdir={tmp_path}", processes=processes, devices=devices, double=True)
  assert_same_run(tmp_path, one)
  assert "written:" in outputs[0]
  for silent in outputs[1:]:  # but for what gloo itself says
    assert "step" not in silent and "written:" not in silent
  assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("processes, devices", [(1, 8), (2, 1)])
def test_the_loss_in_float32(tmp_path, processes, devices):
  folders = tmp_path / "one", tmp_path / "many"
  # At the config's own rate, four times this one, what float32 rounds has grown to 1.3e-3 after twenty steps.
  training = *TRAINING, "--config.optimizer.learning_rate=0.1"
  launch(*training, f"--workdir={folders[0]}")
  launch(*training, f"--workdir={folders[1]}", processes=processes, devices=devices)
  for row, other in zip(*map(rows, folders), strict=True):
    np.testing.assert_allclose(row["loss"], other["loss"], rtol=1e-3)


@pytest.mark.slow
def test_a_run_moves_to_other_hosts_and_back(tmp_path, one):
  """From 2 x 2 to 1 x 1 devices, then to 1 x 4: as one that never moved; and judged on one."""
  command = *TRAINING, *DOUBLE, f"--workdir={tmp_path}"
  launch(*command, processes=2, devices=2, double=True)
  for step, devices in ((20, 1), (20, 4)):
    lost = tmp_path / "checkpoints" / str(step)
    lost.rename(tmp_path / f"lost-{devices}")  # as if it had been stopped after step 10
    (output,) = launch(*command, devices=devices, double=True)
    assert "goes on from step 10 of 20" in output
    assert_same_run(tmp_path, one)
  judged, = launch("--config=configs/evaluate.py:knn", f"--config.checkpoint={tmp_path}",
                   "--config.data.test_split=test", "--config.data.test_num_images=64", double=True)
  assert "top-1" in judged


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_other_and_the_same_command_goes_on(tmp_path, lost):
  endless = *TRAINING, "--config.num_epochs=2_000", f"--workdir={tmp_path}"
  with Launch(*endless, processes=2) as started:
    wait_for(lambda: (tmp_path / "checkpoints" / "10").is_dir() and len(rows(tmp_path)) > 12)
    started.kill(lost)
    killed = time.monotonic()
    codes, outputs = zip(*started.wait(), strict=True)
  assert time.monotonic() - killed < BOUND
  assert codes[1 - lost] not in (0, 2)
  assert "lost" in outputs[1 - lost] or "another task died" in outputs[1 - lost]
  reached = len(rows(tmp_path))
  with Launch(*endless, processes=2) as started:
    wait_for(lambda: len(rows(tmp_path)) > reached + 5)
  assert [row["step"] for row in rows(tmp_path)] == list(range(1, len(rows(tmp_path)) + 1))


def wait_for(condition):
  end = time.monotonic() + LIMIT
  while time.monotonic() < end:
    try:
      if condition():
        return
    except FileNotFoundError:
      pass
    time.sleep(0.2)
  pytest.fail(f"not within {LIMIT} s")


@pytest.mark.parametrize("other, said", [
  ("--config.seed=1", "seed is 0 in process 0 and 1 in process 1"),
  ("--config.data.num_images=160", "data.num_images is 128 in process 0 and 160 in process 1"),
  ("--config.temperature=0.01", "in process 1: temperature=0.01"),
])
def test_processes_that_do_not_agree_all_end_before_anything_is_written(tmp_path, other, said):
  with Launch(*TRAINING, f"--workdir={tmp_path}", processes=2, other={1: [other]}, slurm=True) as started:
    ended = started.wait()
  for code, output in ended:
    assert code == 2 and said in output, output[-2000:]
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given, said", [
  (dict(coordinator="localhost:1"), "belong together"),
  (dict(process_id=0), "belong together"),
  (dict(num_processes=2), "belong together"),
  (dict(coordinator="localhost", num_processes=2, process_id=0), "is not HOST:PORT"),
  (dict(coordinator="localhost:1", num_processes=2, process_id=2), "process_id=2 of --num_processes=2"),
])
def test_flags_that_do_not_fit_together(given, said):
  with pytest.raises(UserError, match=said), mesh_lib.processes(**given):
    pass


def test_a_process_can_be_kept_by_itself():
  with mesh_lib.processes(num_processes=1):
    assert jax.process_count() == 1
