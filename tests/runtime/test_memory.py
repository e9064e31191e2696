import subprocess
import sys

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


def test_where_the_c_library_is_another_nothing_happens(monkeypatch):
  from pirl_jax.runtime import memory
  monkeypatch.setattr(memory.sys, "platform", "darwin")
  assert not memory.keep_freed()
