"""Runs started as users start them, by launch.py in processes of their own, and what they leave on disk."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from orbax.checkpoint import PyTreeCheckpointer, RestoreArgs
from orbax.checkpoint.args import PyTreeRestore

ROOT = Path(__file__).parents[1]
QUICK = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
"""XLA's flag with which programs for the CPU compile in half of the time; XLA refuses flags that it does not know."""

LIMIT = 400  # seconds, for processes that share two cores with other tests
CLOCKS = {"images_per_second", "data_wait"}  # of the fields of metrics.jsonl
STEPS = 20  # of the run that `TRAINING` asks for
TRAINING = (
  "--config=configs/pirl.py", "--config.data.image_size=16", "--config.jigsaw.crop_size=18",
  "--config.jigsaw.patch_size=5", "--config.data.num_images=128", "--config.num_negatives=64", "--config.batch_size=32",
  "--config.num_epochs=5", "--config.log.every_steps=1", "--config.checkpoint.every_steps=10",
  "--config.evaluate.split=", "--config.evaluate.learning=False", "--config.report=False",
  "--config.export=False")
SMALL = (  # of a run over small images, with little to compile and a row for each step
  "--config.data.image_size=16", "--config.jigsaw.crop_size=18", "--config.jigsaw.patch_size=5",
  "--config.data.num_threads=2", "--config.log.every_steps=1", "--config.evaluate.learning=False",
  "--config.report=False", "--config.export=False", "--config.evaluate.batch_size=8", "--config.batch_size=8",
  "--config.num_negatives=16")


def write_images(root, *, train, test):
  """Writes a folder of images of noise: so many of each of two classes, to train and to test."""
  rng = np.random.default_rng(0)
  for split, count in (("train", train), ("test", test)):
    for label in ("cats", "dogs"):
      (root / split / label).mkdir(parents=True)
      for i in range(count):
        cv2.imwrite(str(root / split / label / f"{i:02}.png"), rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))


def over_folder(root):
  """Returns the flags of a small run over a folder that `write_images` has written."""
  return ("--config=configs/pirl.py:folder_small", f"--config.data.root={root}", "--config.data.split=train",
          "--config.data.labels=folder", "--config.evaluate.split=test", *SMALL)


class Launch:
  """launch.py in one or several processes, as started; a context manager that leaves none of them behind."""

  def __init__(self, *arguments, processes=1, devices=1, other=None, slurm=False, double=False, largest_file=None,
               changed=None, quick=True, faults=None, struck=None):
    """Starts them.

    Args:
      arguments: of all.
      processes: how many.
      devices: virtual ones of each.
      other: {process: arguments of this one alone}.
      slurm: they are told of each other as srun tells them, not by flags.
      double: JAX may compute in float64.
      largest_file: in bytes; a longer one meets what it would on a full disk.
      changed: {module: {constant: value}} to set before.
      quick: programs compile with `QUICK`, which changes last bits; never in float64.
      faults: `Faults` that they meet.
      struck: those that meet them; None: all.
    """
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    self._started = []
    compiling = QUICK if quick and not double else ""
    for process in range(processes):
      flags, environment = [], os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {compiling}",
        "JAX_ENABLE_X64": str(int(double)),
        # Without optimisations a program compiles sooner, and in float64 runs a hundred times as long.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(not double))}
      if slurm:
        environment |= {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(processes),
                        "SLURM_PROCID": str(process), "SLURM_LOCALID": str(process), "JAX_COORDINATOR_PORT": str(port)}
      elif processes > 1:
        flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={process}"]
      command = [sys.executable, *_program(changed), *flags, *arguments, *(other or {}).get(process, ())]
      environment |= faults.environment if faults and (struck is None or process in struck) else {}
      if largest_file:
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # nor is it to be damaged
        command = ["prlimit", f"--fsize={largest_file}", *command]
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
    self.signal(process, signal.SIGKILL)

  def signal(self, process, number):
    with contextlib.suppress(ProcessLookupError):  # it may have ended just now
      os.killpg(self._started[process].pid, number)

  def ended(self):
    """Returns whether all have."""
    return all(started.poll() is not None for started in self._started)

  def wait(self):
    """Returns the exit code and the output of each."""
    end, ended = time.monotonic() + LIMIT, []
    for started in self._started:
      output, _ = started.communicate(timeout=max(1, end - time.monotonic()))
      ended.append((started.returncode, output))
    return ended


def _program(changed):
  if not changed:
    return ["launch.py"]
  lines = ["import sys, importlib", "sys.path.insert(0, '')"]
  lines += [f"importlib.import_module({module!r}).{name} = {value!r}"
            for module, constants in changed.items() for name, value in constants.items()]
  return ["-c", "; ".join([*lines, "import launch", "launch.start()"])]


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


def assert_same(folder, expected, step):
  """Two runs have the same rows, but for the clocks, and in the checkpoint of that step the same bits."""
  found, others = ([{name: value for name, value in row.items() if name not in CLOCKS} for row in rows(run)]
                   for run in (folder, expected))
  assert found == others
  arrays, others = stored(folder, step), stored(expected, step)
  assert arrays.keys() == others.keys() and len(arrays) > 50
  for name, value in arrays.items():
    np.testing.assert_array_equal(value, others[name], err_msg=name)


def wait_for(condition):
  end = time.monotonic() + LIMIT
  while time.monotonic() < end:
    try:
      if condition():
        return
    except (FileNotFoundError, json.JSONDecodeError):  # a row that is just being written
      pass
    time.sleep(0.2)
  pytest.fail(f"not within {LIMIT} s")
