"""Standard output and standard error that can never end the program, whatever happens to the terminal, pipe or file."""

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

WAIT_SECONDS = 0.2
"""How often a stalled reader is looked after."""

_hurried = False


class Voice:
  """Writes to a stream; text that the stream does not take is lost, without an error.

  The reader of a pipe may go away or stall, a terminal may be closed, the disk of a log may be full, the stream may be
  closed. If a reader stalls, writing waits, as always; after `hurry` it does not wait. All else is that of the stream.
  """

  def __init__(self, stream: TextIO) -> None:
    """Takes over a stream; text in its buffers is written first."""
    self._stream = stream
    self._file: int | None = None
    if type(stream) is io.TextIOWrapper:
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
      with contextlib.suppress(OSError, ValueError):
        # A character that the locale does not have is written as its code; without this nothing would be written.
        stream.reconfigure(errors="backslashreplace")
        self._file = stream.fileno()

  def write(self, text: str) -> int:
    """Writes text and returns its length, whatever was written of it."""
    with contextlib.suppress(OSError, ValueError):
      if self._file is None:
        self._stream.write(text)
      else:
        content = text.encode(self._stream.encoding, "backslashreplace")
        while content and self._ready(self._file):
          # A pipe that is ready takes so much at once, without blocking.
          content = content[os.write(self._file, content[:select.PIPE_BUF]):]
    return len(text)

  def flush(self) -> None:
    """Flushes the stream."""
    with contextlib.suppress(OSError, ValueError):
      self._stream.flush()

  def isatty(self) -> bool:
    """Returns whether the stream is a terminal."""
    try:
      return self._stream.isatty()
    except ValueError:  # closed
      return False

  def writelines(self, lines: Iterable[str]) -> None:
    """Writes texts."""
    for line in lines:
      self.write(line)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def _ready(self, file: int) -> bool:
    """Waits until a write does not block; returns False if that is not to be waited for."""
    while not select.select([], [file], [], WAIT_SECONDS)[1]:
      if _hurried:
        return False
    return True


def hurry() -> None:
  """From now on no output waits for its reader: the program is about to be ended from outside."""
  global _hurried
  _hurried = True


def never_fail() -> None:
  """Replaces standard output and standard error by `Voice`s, for the rest of the program.

  If the program was started with one of the descriptors 0 to 2 closed, this one leads to the null device from now on:
  else the next file that is opened, for example of a checkpoint, would get its number, and libraries in C++ would write
  their messages into that file.
  """
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
  sys.stdout, sys.stderr = (
    stream if isinstance(stream, Voice) else cast("TextIO", Voice(stream or open(os.devnull, "w")))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr))


@contextlib.contextmanager
def unfailing() -> Iterator[None]:
  """A context in which what is printed cannot raise an error, for use in somebody else's program."""
  with (contextlib.redirect_stdout(cast("TextIO", Voice(sys.stdout))),
        contextlib.redirect_stderr(cast("TextIO", Voice(sys.stderr)))):
    yield
