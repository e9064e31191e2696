"""Writes files atomically (complete or not at all), and locks folders against other processes."""

import contextlib
import errno
import fcntl
import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

DEEPEST = 100
"""Groups within groups that a JSON file may have; more of them may exceed Python's recursion limit somewhere."""


UNFINISHED = ".unfinished"
"""End of the name of a file that is being written."""

OLD_SECONDS = 3600
"""If nothing was written to a temporary file for this time, its program was killed."""

LOCK = ".lock"
"""Name of the file by which a folder is locked."""

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
"""Errors of file systems that have no locks, or none of this kind."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """Yields a temporary file, open for writing bytes. It becomes `path` at the end; after an error it is deleted.

  An old file at `path` stays until the new file is on disk. The folder is created. Every writer has a temporary file of
  its own; if several processes write to one path at once, the file is that of the last one. Temporary files of killed
  programs are deleted by the next writer after `OLD_SECONDS`.

  Raises:
    OSError: the file cannot be written.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  start = f".{path.name[:50]}."  # names have a largest length
  _tidy(path.parent, start)
  temporary = path.parent / f"{start}{os.getpid()}-{secrets.token_hex(4)}{UNFINISHED}"
  try:
    with open(temporary, "xb", opener=_new_file) as file:
      yield file
      file.flush()
      os.fsync(file.fileno())  # without this a power cut may leave half of the content under the new name
      os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _new_file(path: str, flags: int) -> int:
  return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _tidy(folder: Path, start: str) -> None:
  """Deletes the temporary files of killed programs whose names begin with `start`."""
  with contextlib.suppress(OSError):
    for name in os.listdir(folder):
      path = folder / name
      if name.startswith(start) and name.endswith(UNFINISHED) and time.time() - path.lstat().st_mtime > OLD_SECONDS:
        path.unlink()


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

  Two locks are taken: that of a file in the folder, because NFS locks only what is open for writing, and that of the
  folder itself, by which older versions of this program are kept out. On a file system without locks a warning is
  printed.

  Args:
    folder: the folder, which is created.
    patience: seconds to wait for a process that holds the lock.

  Raises:
    TimeoutError: another process still holds the lock.
    OSError: the folder or the file cannot be created.
  """
  Path(folder).mkdir(parents=True, exist_ok=True)
  path, began = Path(folder) / LOCK, time.monotonic()
  with contextlib.ExitStack() as opened:
    while not (held := _lock_both(Path(folder), path, opened)):
      if held is not None and time.monotonic() - began >= patience:
        raise TimeoutError(f"{folder} is held by another process")
      time.sleep(0.2 if held is not None else 0)
    yield


def _lock_both(folder: Path, path: Path, opened: contextlib.ExitStack) -> bool | None:
  """Locks the file and the folder until `opened` is closed, which deletes the file.

  Returns True, or False if another process holds a lock, or None if another process has just deleted the file.
  """
  with contextlib.ExitStack() as opening:
    handles = []
    try:
      handles.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666))
    except OSError as error:
      if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):  # where nothing can be written, less is at stake
        raise
    handles.append(os.open(folder, os.O_RDONLY))
    for handle in handles:
      opening.callback(os.close, handle)
    taken = []
    for handle in handles:
      taken.append(_take(handle))
      if taken[-1] is False:
        return False
    if len(handles) == 2:
      if not _is_at(handles[0], path):
        return None
      opening.callback(path.unlink, missing_ok=True)  # is called before the file is closed, so while it is locked
    if not any(taken):
      print(f"WARNING: the file system of {folder} has no locks; only one program at a time may use this folder")
    opened.push(opening.pop_all())
    return True


def _take(handle: int) -> bool | None:
  """Locks an open file or folder. Returns False if another process holds the lock, None if there are no locks."""
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    if error.errno not in NO_LOCKS:
      raise
    return None
  return True


def _is_at(handle: int, path: Path) -> bool:
  """Returns whether the open file is the one that has this path."""
  try:
    return os.path.samestat(os.fstat(handle), os.stat(path))
  except FileNotFoundError:
    return False
