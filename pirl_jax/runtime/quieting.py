"""Suppresses log messages of the libraries; the program prints its own messages."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from absl import logging as absl_logging

LOGGERS = ("absl", "asyncio")
"""Loggers of the libraries that are suppressed; Orbax writes to that of absl. Warnings of JAX stay visible."""


def quiet() -> None:
  """Suppresses log messages of the libraries for the rest of the program.

  If a disk is full, Orbax logs a thousand lines of tracebacks for each checkpoint, and so does TensorStore. The error
  that is raised gives the same information.
  """
  absl_logging.set_verbosity(absl_logging.WARNING)
  for name in LOGGERS:
    logging.getLogger(name).setLevel(logging.CRITICAL)
  warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
  shown = sys.unraisablehook

  def unraisablehook(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      shown(unraisable)

  sys.unraisablehook = unraisablehook


@contextlib.contextmanager
def hushed() -> Iterator[None]:
  """Suppresses log messages of Orbax and others within the context only, for use in somebody else's program."""
  before = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.FATAL)
  try:
    yield
  finally:
    absl_logging.set_verbosity(before)
