"""TensorBoard's events, whatever the disk does."""

import contextlib
import math
import os
import threading
from collections.abc import Callable, Mapping
from time import perf_counter

from tensorboardX import SummaryWriter

TENSORBOARD_FLUSH_SECONDS = 10

TENSORBOARD_REOPEN_SECONDS = 60.0
"""Least seconds between two writers, so that a disk that stays full does not fill with their empty files."""


class TensorBoard:
  """TensorBoard's events. Its writer is a thread that a full disk kills, and whoever hands it more waits for ever: it
  is watched, and after a while another takes its place."""

  def __init__(self, workdir: str | os.PathLike, start_step: int, say: Callable[[str], None]) -> None:
    self._workdir, self._opened, self._say = workdir, 0, say
    self._excepthook, threading.excepthook = threading.excepthook, self._ended
    self._open(start_step)

  def add(self, step: int, figures: Mapping[str, float]) -> None:
    """Adds the figures of a step, but those that are not finite."""
    if not self._thread.is_alive():
      if perf_counter() - self._opened_at < TENSORBOARD_REOPEN_SECONDS:
        return
      try:
        self._open(step - 1)
      except OSError:
        return
    for name, value in figures.items():
      if math.isfinite(value):  # tensorboardX prints a warning for each of the others
        self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    """Closes the file of events, if its writer is still there."""
    if self._thread.is_alive():
      with contextlib.suppress(OSError):
        self._writer.close()
    threading.excepthook = self._excepthook

  def _ended(self, args: threading.ExceptHookArgs) -> None:
    """Says in a line what Python would show as a traceback, when it is the writer that a disk has ended."""
    if _is_writer(args.thread) and issubclass(args.exc_type, OSError):
      reason = getattr(args.exc_value, "strerror", None)
      self._say(f"WARNING: TensorBoard's events could not be written ({reason}); some will be missing there, none in "
                "metrics.jsonl")
    else:
      self._excepthook(args)

  def _open(self, start_step: int) -> None:
    running = threading.enumerate()
    self._opened += 1
    self._opened_at = perf_counter()
    # TensorBoard hides what is at or after the purge step, and the row of start_step is kept. Process, step and number
    # in the name: two starts in the same second would otherwise write over each other's file. The queue is as long as
    # it takes to find the thread dead before it is full.
    self._writer = SummaryWriter(
      os.fspath(self._workdir), purge_step=start_step + 1, flush_secs=TENSORBOARD_FLUSH_SECONDS, max_queue=10_000,
      filename_suffix=f".{os.getpid()}.{start_step}.{self._opened}")
    self._thread, = (thread for thread in threading.enumerate()
                     if thread not in running and _is_writer(thread))  # its queue has one, too


def _is_writer(thread: threading.Thread | None) -> bool:
  return "EventLogger" in type(thread).__name__
