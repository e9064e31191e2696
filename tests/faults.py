"""A file system that fails by schedule, for processes started with `Launch(faults=...)` or any other of their own.

System calls on chosen paths fail with an errno, stall, take half of a write or kill the process, at a chosen call; the
clock can jump. faults.c stands between the process and libc, so that TensorStore, ArrayRecord and OpenCV, which are
written in C++, meet the faults, too.
"""

import errno
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".c")
OPERATIONS = "open", "create", "list", "read", "write", "sync", "rename", "remove", "stat", "lock"


@functools.cache
def library():
  """Returns the path of the compiled faults.c; tests are skipped on a machine that has no C compiler."""
  compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
  if not compiler:
    pytest.skip("there is no C compiler")
  digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
  path = Path(tempfile.gettempdir()) / f"pirl_jax_faults_{os.getuid()}_{digest}.so"
  if not path.exists():
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
      made = Path(folder) / path.name
      subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", made, SOURCE, "-ldl", "-lpthread"], check=True)
      made.rename(path)
  return path


class Faults:
  """A schedule of faults that can be changed while the processes run."""

  def __init__(self, folder, **places):
    """Starts without faults.

    Args:
      folder: keeps the schedule.
      places: {"RUN": path}: in the patterns of rules such a name in capitals stands for the path.
    """
    self._path, self._places = Path(folder) / "faults", places
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self.end()

  @property
  def environment(self):
    """Returns the environment variables with which a process meets the faults."""
    return {"LD_PRELOAD": str(library()), "FAULTS": str(self._path)}

  def begin(self, *rules):
    """Sets the faults from now on; the counts of calls start from 0.

    Args:
      rules: (operation, fault, pattern) or (operation, fault, pattern, after, count). The fault is the name of an
        errno, "kill", "stall" or "short"; or the operation is "clock" and the fault is the number of seconds by which
        it is fast. Absolute paths that match the pattern fail, `after` calls later, `count` times (-1: always).
    """
    lines = []
    for operation, fault, pattern, *numbers in rules:
      after, count = numbers or (0, -1)
      assert operation in (*OPERATIONS, "clock"), operation
      pattern = re.sub("[A-Z]+", lambda match: str(self._places.get(match[0], match[0])), pattern)
      lines.append(f"{operation} {getattr(errno, str(fault), fault)} {after} {count} {pattern}\n")
    following = self._path.with_name("faults-next")
    following.write_text("".join(lines))
    following.replace(self._path)

  def end(self):
    """Ends all faults; calls that stall go on."""
    self.begin()
