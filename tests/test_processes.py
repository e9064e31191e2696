"""The same run on any number of devices and processes, started as users start it: launch.py, and gloo between them."""

import time

import jax
import numpy as np
import pytest
from launching import STEPS, TRAINING, Launch, launch, rows, stored, wait_for

from pirl_jax.errors import UserError
from pirl_jax.runtime import processes

BOUND = 150  # seconds in which a process ends that has lost another
DOUBLE = ("--config.model.dtype=float64", "--config.bank.dtype=float64")


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
    assert "resumes from step 10 of 20" in output
    assert_same_run(tmp_path, one)
  judged, = launch("--config=configs/evaluate.py:knn", f"--config.checkpoint={tmp_path}",
                   "--config.data.test_split=test", "--config.data.test_num_images=64", double=True)
  assert "top-1" in judged


@pytest.mark.slow
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
  (dict(coordinator="localhost:99999", num_processes=2, process_id=0), "is not HOST:PORT"),
  (dict(coordinator="localhost:1", num_processes=2, process_id=2), "process_id=2 of --num_processes=2"),
])
def test_flags_that_do_not_fit_together(given, said):
  with pytest.raises(UserError, match=said), processes.processes(**given):
    pass


def test_a_process_can_be_kept_by_itself():
  with processes.processes(num_processes=1):
    assert jax.process_count() == 1
