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


# Takes 64 MB and prints how many kB of this process lie on huge pages. A bytearray is not NumPy's, which asks for them.
HUGE = """
import sys
from pirl_jax.runtime import memory
if sys.argv[1] == "kept":
  assert memory.keep_freed()
taken = bytearray(b"1") * 2**26
print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(),
                    reason="a system that gives huge pages to who asks")
def test_kept_memory_lies_on_huge_pages():
  fresh, kept = (int(subprocess.run([sys.executable, "-c", HUGE, name], capture_output=True, text=True,
                                    check=True).stdout) for name in ("fresh", "kept"))
  assert fresh < 2**12 < 2**15 < kept


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_with_few_addresses_there_are_no_huge_pages_and_freed_memory_is_kept():
  limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\n" + PROGRAM
  kept = subprocess.run([sys.executable, "-c", limited, "kept"], capture_output=True, text=True, check=True)
  assert int(kept.stdout) < 100


def test_where_the_c_library_is_another_nothing_happens(monkeypatch):
  from pirl_jax.runtime import memory
  monkeypatch.setattr(memory.sys, "platform", "darwin")
  assert not memory.keep_freed()
