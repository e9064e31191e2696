"""Settings of the C library's memory allocator that make XLA's CPU backend faster."""

import ctypes
import sys

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed() -> bool:
  """Makes the process keep memory that it has freed, instead of returning it to the system. Returns whether it worked.

  On a CPU, XLA frees its temporary arrays after every step and allocates them again for the next step. By default glibc
  returns large arrays to the system, and in each step the system has to clear new pages: 15 % of the time of a small
  step. The drawback: the process keeps its peak memory until it ends. The setting changes this process alone and needs
  glibc as the C library. Call this before threads are started, so before JAX is imported.
  """
  if not sys.platform.startswith("linux"):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except AttributeError:  # musl has no mallopt
    return False
  # All threads share one pool, every array is allocated in the pool, and the pool's free end is never returned.
  return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])
