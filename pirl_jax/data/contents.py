"""A list of the images at the start of a run; when the run resumes, the list shows which images have changed."""

import gzip
import hashlib
import zlib
from pathlib import Path

from pirl_jax.data.records import Source
from pirl_jax.storage.files import write_file

FILE = "pictures.txt.gz"  # the name of this file in older runs
NAMED = 3  # images named for each kind of change


def remember(source: Source, folder: Path) -> None:
  """Writes the list of the images into the run's folder, unless it exists or the source has no listing."""
  path = folder / FILE
  if not path.exists() and (lines := source.listing()) is not None:
    write_file(path, gzip.compress("\n".join(lines).encode(), mtime=0))


def remember_grown(source: Source, folder: Path) -> None:
  """Writes the list of the images of a set that has grown, beside the list of the images at the start."""
  lines = source.listing()
  assert lines is not None  # see `remembered`
  write_file(folder / _grown_file(source.fingerprint), gzip.compress("\n".join(lines).encode(), mtime=0))


def remembered(folder: Path, fingerprint: str) -> list[str]:
  """Returns the lines "SIZE PATH" of the images that had this fingerprint, in their order; [] if there is no list."""
  for name in (_grown_file(fingerprint), FILE):
    try:
      lines = gzip.decompress((folder / name).read_bytes()).decode().split("\n")
    except (OSError, EOFError, ValueError, zlib.error):  # missing or damaged
      continue
    if all(" " in line for line in lines):
      return lines
  return []


def _grown_file(fingerprint: str) -> str:
  return f"images-{hashlib.sha256(fingerprint.encode()).hexdigest()[:12]}.txt.gz"


def changes_since(source: Source, folder: Path, fingerprint: str) -> str:
  """Returns in words which images are gone, new or of another size since the set had this fingerprint.

  Returns "" if there is no list of the images of that time.
  """
  before = remembered(folder, fingerprint)
  if not before:
    return ""
  before, now = ({path: size for size, path in (line.split(" ", 1) for line in lines)}
                 for lines in (before, source.listing() or []))
  changes = {
    "gone": sorted(before.keys() - now.keys()), "new": sorted(now.keys() - before.keys()),
    "of another size": sorted(path for path in before.keys() & now.keys() if before[path] != now[path])}
  return "; ".join(f"{what}: {len(paths)} ({', '.join(paths[:NAMED])}{', ...' if len(paths) > NAMED else ''})"
                   for what, paths in changes.items() if paths)
