"""Files that are there whole or not at all: a temporary one takes the place of the old one once it is on disk."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """Yields a file, open for writing bytes, that takes the name `path` if all goes well and is gone otherwise.

  Its folder is created. One writer at a time: the temporary file always has the same name, so that what a killed
  program left is written over and does not pile up.

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


def strict(obj):
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
