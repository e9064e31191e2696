"""Writes files atomically (complete or not at all), and locks folders against other processes."""

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

DEEPEST = 100
"""Groups within groups that a JSON file may have; more of them may exceed Python's recursion limit somewhere."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """Yields a temporary file, open for writing bytes. It becomes `path` at the end; after an error it is deleted.

  An old file at `path` stays until the new file is on disk. The folder is created. Only one process at a time may write
  to a path: the temporary file always has the same name, so that files of killed programs are overwritten and do not
  pile up.

  Raises:
    OSError: the file cannot be written.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.unfinished")
  try:
    with open(temporary, "wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())  # without this a power cut may leave half of the content under the new name
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_file(path: str | os.PathLike, content: bytes) -> None:
  """Writes `content` to `path`, see `replacing`."""
  with replacing(path) as file:
    file.write(content)


def write_json(path: str | os.PathLike, obj: Any) -> None:
  """Writes `obj` as JSON to `path`, see `replacing`.

  Args:
    path: the file.
    obj: dicts, sequences, strings, numbers (also of numpy), None. Numbers that are not finite become null, because JSON
      has no NaN.
  """
  write_file(path, (json.dumps(strict(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def strict(obj: Any) -> Any:
  """Returns `obj` in JSON's own types, with None for numbers that are not finite."""
  if isinstance(obj, Mapping):
    return {str(key): strict(value) for key, value in obj.items()}
  if isinstance(obj, list | tuple):
    return [strict(value) for value in obj]
  if isinstance(obj, np.ndarray | np.generic):
    return strict(obj.tolist())
  if isinstance(obj, float) and not math.isfinite(obj):
    return None
  return obj


def read_object(path: str | os.PathLike) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Raises:
    OSError: the file cannot be read.
    ValueError: the file holds something else, for example NaN, which JSON does not have.
  """
  content = Path(path).read_bytes()
  try:
    stored = json.loads(content.decode(), parse_constant=_no_number, parse_float=_finite)
  except RecursionError:
    raise ValueError("too many brackets") from None
  if not isinstance(stored, dict):
    raise ValueError("not an object")
  groups: list[Any] = [stored]
  for _ in range(DEEPEST):
    groups = [value for group in groups for value in (group.values() if isinstance(group, dict) else group)
              if isinstance(value, dict | list)]
  if groups:
    raise ValueError("too many brackets")
  return stored


def _no_number(name: str) -> Any:
  raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
  return number if math.isfinite(number := float(digits)) else _no_number(digits)


def read_json(path: str | os.PathLike) -> dict[str, Any] | None:
  """Returns the object in a JSON file, or None if there is no such file or it cannot be read; see `read_object`."""
  try:
    return read_object(path)
  except (OSError, ValueError):
    return None


@contextlib.contextmanager
def locked(folder: str | os.PathLike, *, patience: float = math.inf) -> Iterator[None]:
  """Locks a folder against other processes that use this function. The lock ends with the process that holds it.

  On a file system without locks nothing is locked.

  Args:
    folder: the folder, which is created.
    patience: seconds to wait for a process that holds the lock.

  Raises:
    TimeoutError: another process still holds the lock.
    OSError: the folder cannot be created.
  """
  Path(folder).mkdir(parents=True, exist_ok=True)
  handle = os.open(folder, os.O_RDONLY)
  try:
    began = time.monotonic()
    while _is_held(handle):
      if time.monotonic() - began >= patience:
        raise TimeoutError(f"{folder} is held by another process")
      time.sleep(0.2)
    yield
  finally:
    os.close(handle)


def _is_held(handle: int) -> bool:
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except OSError:  # a file system without locks
    pass
  return False
