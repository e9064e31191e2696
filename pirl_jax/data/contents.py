"""What a set of images held when a run began, so that the run can say what has changed when it goes on."""

import gzip
from pathlib import Path

from pirl_jax.data.records import Source
from pirl_jax.storage.files import write_file

FILE = "pictures.txt.gz"  # the name that it has in the runs of before
NAMED = 3


def remember(source: Source, folder: Path) -> None:
  """Writes the list of the images into the run's folder, if it is not there and there is one to write."""
  path = folder / FILE
  if not path.exists() and (lines := source.listing()) is not None:
    write_file(path, gzip.compress("\n".join(lines).encode(), mtime=0))


def changes_since(source: Source, folder: Path) -> str:
  """Returns what is gone, new and of another size since `remember`, in words; "" where nobody knows."""
  try:
    before = gzip.decompress((folder / FILE).read_bytes()).decode().split("\n")
  except (OSError, EOFError, ValueError):  # not there, or damaged: it is for this message alone
    return ""
  before, now = ({path: size for size, path in (line.split(" ", 1) for line in lines)}
                 for lines in (before, source.listing() or []))
  changes = {
    "gone": sorted(before.keys() - now.keys()), "new": sorted(now.keys() - before.keys()),
    "of another size": sorted(path for path in before.keys() & now.keys() if before[path] != now[path])}
  return "; ".join(f"{what}: {len(paths)} ({', '.join(paths[:NAMED])}{', ...' if len(paths) > NAMED else ''})"
                   for what, paths in changes.items() if paths)
