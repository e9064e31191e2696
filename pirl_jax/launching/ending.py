"""Ends the program, although threads of a library may be stuck."""

import concurrent.futures.thread as pools
import os
import sys
import threading
import time
from typing import Any, NoReturn

GRACE_SECONDS = 2
"""How long the threads that are left have to end by themselves."""


def leave(code: Any) -> NoReturn:
  """Ends the program with the exit code of a `SystemExit`.

  Python waits at its end for every thread that is not a daemon. After a checkpoint that could not be written, threads
  of Orbax wait 300 s for a signal that never comes, and a thread that reads a stalled disk waits for ever. All work is
  done when this is called, so such threads are left behind.

  Raises:
    SystemExit: no thread is left.
  """
  end = time.monotonic() + GRACE_SECONDS
  for thread in threading.enumerate():
    # Python waits for the threads of every pool, too, although those of grain's are daemons.
    if thread is not threading.current_thread() and (not thread.daemon or thread in pools._threads_queues):
      threading.Thread.join(thread, max(0, end - time.monotonic()))  # Orbax's own threads raise an error in `join`
      if thread.is_alive():
        break
  else:
    sys.exit(code)
  jax = sys.modules.get("jax")
  if jax and jax.distributed.is_initialized():
    jax.distributed.shutdown()
  if isinstance(code, str):
    print(code, file=sys.stderr)
  for stream in (sys.stdout, sys.stderr):
    stream.flush()
  os._exit(code if isinstance(code, int) else int(code is not None))
