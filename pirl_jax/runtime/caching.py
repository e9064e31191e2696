"""Files that are kept for later runs of the same user: above all JAX's compiled programs, so that a start is quick."""

import contextlib
import dataclasses
import importlib.util
import os
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import jax

COMPILED_SECONDS = 0.3
"""Programs that compile in less time are not stored."""

LARGEST_BYTES = 4 * 2**30
"""If the stored programs take more than this, those that were not used for longest are deleted."""

COMPILED, FOUND = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"
"""What JAX calls the events that a program is ready, compiled or read from the disk, and that it was read."""


@dataclasses.dataclass
class _Programs:
  ready: int = 0
  found: int = 0
  seconds: float = 0.0


_programs = _Programs()  # since the last report; JAX has one cache in a process, too


def cache_folder() -> Path:
  """Returns the folder pirl_jax of XDG_CACHE_HOME (~/.cache); by the XDG rules a relative path there is ignored.

  Raises:
    RuntimeError: the user has no home folder.
  """
  folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
  return (folder if folder.is_absolute() else Path.home() / ".cache") / "pirl_jax"


def keep_compiled(folder: str | None) -> None:
  """Lets JAX store compiled programs on disk and read them at the next start; to be called before anything compiles.

  If JAX_COMPILATION_CACHE_DIR has chosen a folder, JAX uses this folder, with JAX's own settings. A folder that cannot
  be used gives a printed warning, and nothing is stored.

  Args:
    folder: None for the folder xla of `cache_folder`, "" for none at all. Machines of several kinds may share it.
  """
  jax.monitoring.register_event_duration_secs_listener(_note_compiled)
  jax.monitoring.register_event_listener(_note_found)
  if folder == "":
    jax.config.update("jax_enable_compilation_cache", False)
  if folder == "" or jax.config.values["jax_compilation_cache_dir"]:
    return
  if not _has_checksums():
    print("WARNING: compiled programs are not kept: JAX would compress them with zstandard, which adds no checksum")
    return
  try:
    path = cache_folder() / "xla" if folder is None else Path(folder).expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()  # raises OSError if the folder cannot be written to
    _tidy(path)
  except (OSError, RuntimeError) as error:
    reason = getattr(error, "strerror", None) or error
    print(f"WARNING: compiled programs are not kept ({reason}); choose another --compilation_cache=DIR")
    return
  jax.config.update("jax_compilation_cache_dir", str(path))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", COMPILED_SECONDS)


def compile_report() -> str:
  """Returns in words what was compiled since the last report; "" if `keep_compiled` was not called."""
  global _programs
  programs, _programs = _programs, _Programs()
  if not programs.ready:
    return ""
  stored = jax.config.values["jax_enable_compilation_cache"] and jax.config.values["jax_compilation_cache_dir"]
  return (f"compiled {programs.ready - programs.found} programs in {programs.seconds:.1f} s"
          + (f"; {programs.found} more came from the cache in {stored}" if stored else ""))


def _note_compiled(event: str, duration_secs: float, **about: Any) -> None:
  if event == COMPILED:
    _programs.ready += 1
    _programs.seconds += duration_secs


def _note_found(event: str, **about: Any) -> None:
  if event == FOUND:
    _programs.found += 1


def _has_checksums() -> bool:
  """Returns whether JAX compresses with zlib, whose checksum tells a damaged program from a whole one."""
  return sys.version_info < (3, 14) and importlib.util.find_spec("zstandard") is None


def _tidy(folder: Path) -> None:
  """Deletes stored programs that are damaged, and the oldest if there are too many.

  JAX compiles anew if a program is damaged, but leaves the file as it is. Files are read once, at the first call after
  they were written, which finds what a crash has cut.
  """
  mark = folder / "tidied"
  before = mark.stat().st_mtime if mark.exists() else 0.0
  mark.touch()
  left = []
  for path in folder.glob("*-cache"):
    with contextlib.suppress(FileNotFoundError):  # another process has deleted the file
      facts = path.stat()
      if facts.st_mtime >= before - 1 and not _is_whole(path):
        path.unlink()
      else:
        left.append((max(facts.st_atime, facts.st_mtime), facts.st_size, path))
  total = sum(size for _, size, _ in left)
  for _, size, path in sorted(left):
    if total <= LARGEST_BYTES:
      break
    path.unlink(missing_ok=True)
    total -= size


def _is_whole(path: Path) -> bool:
  try:
    zlib.decompress(path.read_bytes())
  except zlib.error:
    return False
  return True
