import os
import subprocess
import sys
from pathlib import Path

import pytest

# Takes and frees 64 MB ten times, as XLA does, and prints how many pages the system had to clear for the last nine.
PROGRAM = """
import resource, sys
import numpy as np
from pirl_jax.runtime import memory
if sys.argv[1] == "kept":
  assert memory.keep_freed()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for time in range(10):
  if time == 1:
    before = faults()
  np.ones(2**24, np.float32)
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_taken_once():
  fresh, kept = (int(subprocess.run([sys.executable, "-c", PROGRAM, name], capture_output=True, text=True,
                                    check=True).stdout) for name in ("fresh", "kept"))
  assert kept < 100
  assert fresh > 10 * max(kept, 1)


# Prints 1 if the middle of an array that is taken after the setting asks for huge pages, else 0.
HUGE = """
import ctypes, sys
from pirl_jax.runtime import memory
if sys.argv[1] == "kept":
  assert memory.keep_freed()
taken = ctypes.create_string_buffer(2**26)
place, asks, inside = ctypes.addressof(taken) + 2**25, 0, False
for line in open("/proc/self/smaps"):
  first = line.split()[0]
  if not first.endswith(":"):
    start, end = (int(side, 16) for side in first.split("-"))
    inside = start <= place < end
  elif first == "VmFlags:" and inside:
    asks += "hg" in line.split()
print(asks)
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system with huge pages")
def test_huge_pages_are_asked_for():
  fresh, kept = (int(subprocess.run([sys.executable, "-c", HUGE, name], capture_output=True, text=True,
                                    check=True).stdout) for name in ("fresh", "kept"))
  assert (fresh, kept) == (0, 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_with_few_addresses_freed_memory_is_kept_all_the_same():
  limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))\n" + PROGRAM
  kept = subprocess.run([sys.executable, "-c", limited, "kept"], capture_output=True, text=True, check=True,
                        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})  # each of its threads takes addresses, too
  assert int(kept.stdout) < 100


def test_where_the_c_library_is_another_nothing_happens(monkeypatch):
  from pirl_jax.runtime import memory
  monkeypatch.setattr(memory.sys, "platform", "darwin")
  assert not memory.keep_freed()
