"""Tells what cannot be read at the moment from what is damaged, and reads again before anything is called damaged."""

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pirl_jax.errors import UserError
from pirl_jax.runtime.out_of_memory import exhausted

PAUSES = 0.5, 2.0, 8.0
"""Seconds to wait before reading is tried again, if the disk or the memory does not allow it at the moment."""

OF_THE_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO}
"""Errors that mean that a file is missing or is of another kind. All others say nothing about the content of a file."""


def reason_of(error: BaseException | str) -> str:
  """Returns the message of an error in one line; the disk's own words come before TensorStore's long text."""
  text = " ".join(str(error).split()) or type(error).__name__
  if of_the_disk := re.search(r"([^:]+) \[os_error_code=", text):
    text = f"{of_the_disk[1].strip()}: {text}"
  return text if len(text) < 200 else f"{text[:200]} ..."


def may_pass(error: BaseException) -> bool:
  """Returns whether an error says that something cannot be read now; False if it says that the content is wrong."""
  return any(code not in OF_THE_FILE for code in _codes(error)) or any(bool(exhausted(one)) for one in _chain(error))


def _codes(error: BaseException) -> Iterator[int]:
  """Yields the system's error codes; TensorStore and Orbax have them in their texts."""
  for one in _chain(error):
    if isinstance(one, OSError) and one.errno is not None:
      yield one.errno
    yield from map(int, re.findall(r"os_error_code='?(\d+)", str(one)))


def _chain(error: BaseException) -> Iterator[BaseException]:
  """Yields an error and the errors behind it."""
  waiting, seen = [error], []
  while waiting:
    one = waiting.pop()
    if any(one is other for other in seen):
      continue
    seen.append(one)
    yield one
    waiting += [other for other in (one.__cause__, one.__context__, *getattr(one, "exceptions", ())) if other]


def unreadable_file(folder: Path) -> OSError | None:
  """Reads all files in a folder. Returns the first error that says nothing about the content of a file, or None.

  A library may have hidden such an error: Python's `os.path.exists` returns False for every error.
  """
  try:
    for place, _, names in os.walk(folder, onerror=_raise):
      for path in (Path(place, name) for name in names):
        if path.is_file():
          with open(path, "rb") as file:
            while file.read(2**24):
              pass
  except OSError as error:
    if may_pass(error):
      return error
  return None


def _raise(error: OSError) -> None:
  raise error


def try_reading(what: str, read: Callable[[], Any], *, folder: Path, agree: Callable[[str], str] = str,
              say: Callable[[str], None] = print) -> tuple[Any, str]:
  """Returns (read(), ""), or (None, why not) if the content is damaged in two attempts.

  If the disk or the memory does not allow reading at the moment, it is tried again after each of `PAUSES`.

  Args:
    what: is read, for the messages.
    read: reads.
    folder: holds what is read; if it is gone, nothing is tried again.
    agree: `processes.first_failure` if all processes call this together, so that all try equally often.
    say: prints a line.

  Raises:
    UserError: from `read`, or because reading was not possible after the last pause.
    Exception: memory ran out again after the last pause.
  """
  pauses, seen = list(PAUSES), False
  while True:
    found, error = None, None
    try:
      found = read()
    except UserError:
      raise
    except Exception as raised:  # Orbax raises errors of many types, Exception itself for a damaged data file
      error = raised
    hidden = None if error is None or may_pass(error) else unreadable_file(folder)
    passing = agree(reason_of(hidden or error) if error and (hidden or may_pass(error)) else "")
    if passing and pauses:
      say(f"{what} cannot be read at the moment ({passing}); trying again in {pauses[0]:g} s")
      time.sleep(pauses.pop(0))
      continue
    if passing:
      if error and exhausted(error):
        raise error
      raise UserError(f"{what} cannot be read ({passing}); nothing has been changed: when the disk can be read again, "
                      "the same command goes on") from error
    damage = agree("" if error is None else reason_of(error))
    if not damage or seen or not folder.is_dir():
      return (None, damage) if damage else (found, "")
    seen = True
