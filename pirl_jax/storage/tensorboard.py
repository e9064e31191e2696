"""TensorBoard's events; a full disk does not stop the run."""

import contextlib
import math
import os
import threading
from collections.abc import Callable, Mapping
from time import perf_counter

from tensorboardX import SummaryWriter

TENSORBOARD_FLUSH_SECONDS = 10

TENSORBOARD_REOPEN_SECONDS = 60.0
"""Shortest time between two writers. Each writer creates a file, so a disk that stays full does not get too many."""


class TensorBoard:
  """Writes TensorBoard's events.

  The library writes events in a thread. An error of the disk ends this thread, and then adding events would block for
  ever. Therefore the thread is watched; if it has ended, it is replaced after `TENSORBOARD_REOPEN_SECONDS`.
  """

  def __init__(self, workdir: str | os.PathLike, start_step: int, say: Callable[[str], None]) -> None:
    self._workdir, self._opened, self._say = workdir, 0, say
    self._excepthook, threading.excepthook = threading.excepthook, self._ended
    self._open(start_step)

  def add(self, step: int, figures: Mapping[str, float]) -> None:
    """Adds the finite figures of a step; others are left out."""
    if not self._thread.is_alive():
      if perf_counter() - self._opened_at < TENSORBOARD_REOPEN_SECONDS:
        return
      try:
        self._open(step - 1)
      except OSError:
        return
    for name, value in figures.items():
      if math.isfinite(value):  # tensorboardX would print a warning for each other value
        self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    """Closes the file of events if its writer is still alive."""
    if self._thread.is_alive():
      with contextlib.suppress(OSError):
        self._writer.close()
    threading.excepthook = self._excepthook

  def _ended(self, args: threading.ExceptHookArgs) -> None:
    """Prints one line instead of Python's traceback if the writer's thread has ended by an error of the disk."""
    if _is_writer(args.thread) and issubclass(args.exc_type, OSError):
      reason = getattr(args.exc_value, "strerror", None)
      self._say(f"WARNING: TensorBoard's events could not be written ({reason}); some will be missing in TensorBoard, "
                "none in metrics.jsonl")
    else:
      self._excepthook(args)

  def _open(self, start_step: int) -> None:
    running = threading.enumerate()
    self._opened += 1
    self._opened_at = perf_counter()
    # TensorBoard hides events at or after the purge step; the row of start_step is kept. The file's name has the
    # process, the step and a number, because two starts in the same second would otherwise overwrite each other's file.
    # The queue is long enough that a dead thread is noticed before the queue is full.
    self._writer = SummaryWriter(
      os.fspath(self._workdir), purge_step=start_step + 1, flush_secs=TENSORBOARD_FLUSH_SECONDS, max_queue=10_000,
      filename_suffix=f".{os.getpid()}.{start_step}.{self._opened}")
    self._thread, = (thread for thread in threading.enumerate()
                     if thread not in running and _is_writer(thread))  # the queue has a thread of its own, too


def _is_writer(thread: threading.Thread | None) -> bool:
  return "EventLogger" in type(thread).__name__
