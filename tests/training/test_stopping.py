"""SIGTERM and Ctrl-C, as a user or a scheduler sends them."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from launching import ROOT, TRAINING, Launch, launch, rows, wait_for

from pirl_jax.training.stopping import Stopping

BOUND = 60  # seconds in which a run ends that was asked to, with other tests beside it
ENDLESS = *TRAINING, "--config.num_epochs=5_000", "--config.checkpoint.every_steps=1_000_000"


def newest(folder):
  return max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def steps(folder):
  return [row["step"] for row in rows(folder)]


@pytest.mark.parametrize("number, code", [
  (signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
  pytest.param(signal.SIGHUP, 0, marks=pytest.mark.slow)])
def test_a_run_saves_before_it_ends_and_goes_on(tmp_path, number, code):
  with Launch(*ENDLESS, f"--workdir={tmp_path}") as running:
    wait_for(lambda: len(rows(tmp_path)) > 3)
    running.signal(0, number)
    sent = time.monotonic()
    (found, output), = running.wait()
  assert found == code and time.monotonic() - sent < BOUND
  last = newest(tmp_path)
  assert last == rows(tmp_path)[-1]["step"]
  assert f"stopped after step {last}, saved in {tmp_path / 'checkpoints' / str(last)}" in output
  with Launch(*ENDLESS, f"--workdir={tmp_path}") as running:
    wait_for(lambda: len(rows(tmp_path)) > last + 3)
  assert steps(tmp_path) == list(range(1, len(rows(tmp_path)) + 1))


@contextlib.contextmanager
def training():
  """As if the first step was over; before that a signal ends the program at once."""
  with Stopping() as stopping:
    stopping.requested()
    with stopping.held():
      yield stopping


@pytest.mark.parametrize("number, code", [
  (signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGUSR1, 0), (signal.SIGUSR2, 0), (signal.SIGXCPU, 0),
  (signal.SIGALRM, 0), (signal.SIGQUIT, 131), (signal.SIGINT, 130)])
def test_every_signal_that_would_end_a_run_asks_it_to_stop(number, code):
  if signal.getsignal(number) == signal.SIG_IGN:  # as under nohup
    signal.signal(number, signal.SIG_DFL)
  before = signal.getsignal(number)
  with training() as stopping:
    os.kill(os.getpid(), number)
    assert stopping.requested()
    with pytest.raises(SystemExit) as ended:
      stopping.stop()
  assert ended.value.code == code and signal.getsignal(number) is before


def test_a_signal_that_is_ignored_at_the_start_stays_ignored():
  """As nohup does it for SIGHUP."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with training() as stopping:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not stopping.requested()
  finally:
    signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_a_pause_and_one_that_came_before_does_not():
  with training() as stopping:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stopping.requested() and not stopping.pause(0.2)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    assert stopping.pause(60) and time.monotonic() - began < 30


@pytest.mark.parametrize("trains, code", [(True, 0), (False, -signal.SIGTERM)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_while_jax_loads_is_answered_once_the_job_has_said_what_it_is_to_it(trains, code, when):
  lines = ["import os, signal, sys", "from pirl_jax.training.stopping import note_signals", "settle = note_signals()",
           "assert 'jax' not in sys.modules", "ask = lambda: os.kill(os.getpid(), signal.SIGTERM)"]
  lines += ["ask()", "print('noted', flush=True)", f"settle({trains})"] if when == "before" else [
    f"settle({trains})", "print('noted', flush=True)", "ask()"]
  ended = subprocess.run([sys.executable, "-c", "; ".join([*lines, "print('never')"])], cwd=ROOT, text=True,
                         capture_output=True, timeout=60)
  assert (ended.returncode, ended.stdout) == (code, "noted\n"), ended.stderr


def test_while_the_first_step_compiles_there_is_nothing_to_wait_for(tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")  # so that it takes its time
  with Launch(*ENDLESS, f"--workdir={tmp_path}") as running:
    wait_for(lambda: (tmp_path / "views.png").exists())  # of the first batch
    running.signal(0, signal.SIGTERM)
    sent = time.monotonic()
    (code, output), = running.wait()
  assert code == 0 and time.monotonic() - sent < 5 and "the same command resumes" in output
  assert not (tmp_path / "checkpoints").exists() and output.startswith("devices: ")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_measurement_is_broken_off(tmp_path, processes):
  """Of so many images it takes minutes; the checkpoint is that of the step before it."""
  long = ("--config.evaluate.split=test", "--config.evaluate.num_images=400_000", "--config.evaluate.batch_size=64",
          "--config.evaluate.every_epochs=1")
  with Launch(*TRAINING, *long, f"--workdir={tmp_path}", processes=processes) as running:
    wait_for(lambda: len(rows(tmp_path)) == 4)  # the first epoch is over
    time.sleep(10)
    running.signal(0, signal.SIGTERM)
    sent = time.monotonic()
    ended = running.wait()
  assert [code for code, _ in ended] == [0] * processes, ended[0][1][-2000:]
  assert time.monotonic() - sent < BOUND / 2 and "stopped after step 4," in ended[0][1]
  assert newest(tmp_path) == 4 and "knn_top1" not in rows(tmp_path)[-1]


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(tmp_path):
  slow = "--config.num_negatives=0", "--config.batch_size=128", "--config.micro_batches=16"  # a step takes a while
  with Launch(*ENDLESS, *slow, f"--workdir={tmp_path}") as running:
    wait_for(lambda: rows(tmp_path))
    running.signal(0, signal.SIGINT)
    time.sleep(0.02)
    running.signal(0, signal.SIGINT)
    sent = time.monotonic()
    (code, output), = running.wait()
  assert code == 130 and "ended at once" in output and "stopped after step" not in output
  assert time.monotonic() - sent < 5


@pytest.mark.slow
def test_one_of_two_processes_is_asked_and_both_save_the_same_step(tmp_path):
  with Launch(*ENDLESS, f"--workdir={tmp_path}", processes=2) as running:
    wait_for(lambda: len(rows(tmp_path)) > 3)
    running.signal(1, signal.SIGTERM)
    sent = time.monotonic()
    ended = running.wait()
  assert [code for code, _ in ended] == [0, 0], ended[0][1][-2000:] + ended[1][1][-2000:]
  assert time.monotonic() - sent < BOUND
  last = newest(tmp_path)
  assert f"stopped after step {last}," in ended[0][1]
  output = launch(*TRAINING, f"--config.num_epochs={last // 4 + 1}", f"--workdir={tmp_path}")[0]
  assert f"resumes from step {last} of" in output
