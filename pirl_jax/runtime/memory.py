"""Memory of the process that XLA's CPU backend takes again at every step."""

import ctypes
import sys

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed() -> bool:
  """Keeps memory that is freed for whoever asks next, instead of handing it back to the system; returns whether it can.

  On a CPU, XLA frees its temporary arrays after every step and takes them again for the next. By default glibc hands
  large ones back, and at each step the system clears fresh pages: 15 % of the time of a small step. The process then
  keeps its peak memory until it ends. Only this process is changed, and only where its C library is glibc; it is to be
  called before threads are started, so before JAX is imported.
  """
  if not sys.platform.startswith("linux"):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except AttributeError:  # musl has none
    return False
  # One pool for all threads, no array outside of it, and its free end is never given back.
  return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])
