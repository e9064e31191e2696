"""The memory of this machine, and settings of the C library's allocator that make XLA's CPU backend faster.

Without JAX: the settings come before JAX is imported.
"""

import contextlib
import ctypes
import mmap
import os
import sys
from pathlib import Path

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8

_HUGE_SHARE = 4
"""A quarter of the machine's memory may lie on huge pages: addresses, which cost nothing until they are used."""

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files with the memory that a container may use, of both versions of Linux's control groups."""


def host_bytes() -> int:
  """Returns the memory of this machine in bytes, or of the container in which the program runs if that is less."""
  found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
  for path in LIMITS:
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
      found.append(int(path.read_bytes()))
  return min(found)


def keep_freed() -> bool:
  """Makes the process keep memory that it has freed, instead of returning it to the system. Returns whether it worked.

  On a CPU, XLA frees its temporary arrays after every step and allocates them again for the next step. By default glibc
  returns large arrays to the system, and in each step the system has to clear new pages: 15 % of the time of a small
  step. The memory lies on huge pages where Linux has them, which spares a step another 2 to 4 %. The drawback: the
  process keeps its peak memory until it ends. The setting changes this process alone and needs glibc as the C library.
  Call this before threads are started, so before JAX is imported.
  """
  if not sys.platform.startswith("linux"):
    return False
  library = ctypes.CDLL(None)
  try:
    mallopt = library.mallopt
  except AttributeError:  # musl has no mallopt
    return False
  # All threads share one pool, every array is allocated in the pool, and the pool's free end is never returned.
  if not all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)]):
    return False
  _ask_for_huge_pages(library)
  return True


def _ask_for_huge_pages(library: ctypes.CDLL) -> None:
  """Grows the pool by untouched memory and asks the system to back that memory with huge pages, if there are any."""
  library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
  library.free.argtypes = [ctypes.c_void_p]
  library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  size = host_bytes() // _HUGE_SHARE
  if start := library.malloc(size):  # none where addresses are limited (`ulimit -v`)
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    library.madvise(first, (start + size - first) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    library.free(start)
