"""Files that are there whole or not at all, and folders that one process has to itself."""

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


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """Yields a file, open for writing bytes, that takes the name `path` if all goes well and is gone otherwise.

  Until it is on disk, an old one stays. Its folder is created. One writer at a time: the temporary file always has the
  same name, so that what a killed program left is written over and does not pile up.

  Raises:
    OSError: the disk does not take it.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.unfinished")
  try:
    with open(temporary, "wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())  # else a power cut may leave the new name with half of it
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_file(path: str | os.PathLike, content: bytes) -> None:
  """Writes `content` as `replacing` does."""
  with replacing(path) as file:
    file.write(content)


def write_json(path: str | os.PathLike, obj: Any) -> None:
  """Writes `obj` as JSON, as `replacing` does.

  Args:
    path: the file.
    obj: dicts, sequences, strings, numbers (numpy's too), None. Numbers that are not finite become null,
      because JSON knows no NaN.
  """
  write_file(path, (json.dumps(strict(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def strict(obj: Any) -> Any:
  """Returns `obj` in JSON's own types, numbers that are not finite as None."""
  if isinstance(obj, Mapping):
    return {str(key): strict(value) for key, value in obj.items()}
  if isinstance(obj, list | tuple):
    return [strict(value) for value in obj]
  if isinstance(obj, np.ndarray | np.generic):
    return strict(obj.tolist())
  if isinstance(obj, float) and not math.isfinite(obj):
    return None
  return obj


def read_json(path: str | os.PathLike) -> dict[str, Any] | None:
  """Returns the object in a file of JSON; None where there is none, or none that can be read: it is made anew then."""
  try:
    stored = json.loads(Path(path).read_text())
  except (OSError, ValueError):
    return None
  return stored if isinstance(stored, dict) else None


@contextlib.contextmanager
def locked(folder: str | os.PathLike, *, patience: float = math.inf) -> Iterator[None]:
  """Holds a folder, which is created, against every other process that asks for it; one that dies lets go of it.

  Where a disk knows no locks there is none.

  Args:
    folder: to hold.
    patience: seconds to wait for a process that holds it.

  Raises:
    TimeoutError: it is still held.
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
  except OSError:  # a disk that knows no locks
    pass
  return False
