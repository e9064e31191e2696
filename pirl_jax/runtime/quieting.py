"""Keeps the libraries quiet: a run speaks for itself."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from absl import logging as absl_logging


def quiet() -> None:
  """Keeps the libraries' own notes from being printed; a run speaks for itself.

  Where a disk is full, Orbax logs a thousand lines of tracebacks for each checkpoint, and TensorStore as many: all of
  them say what the error says that is raised.
  """
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
  shown = sys.unraisablehook

  def unraisablehook(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      shown(unraisable)

  sys.unraisablehook = unraisablehook


@contextlib.contextmanager
def hushed() -> Iterator[None]:
  """Keeps the notes of Orbax and others from being printed while it lasts, in a program that is not ours to silence."""
  before = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.FATAL)
  try:
    yield
  finally:
    absl_logging.set_verbosity(before)
