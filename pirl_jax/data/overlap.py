"""Notices held-out images that are training images, too: the same file, or a copy of it under any name."""

import numpy as np

from pirl_jax.data.crops import BrokenImage
from pirl_jax.data.in_memory import InMemory
from pirl_jax.data.reading import read_record
from pirl_jax.data.records import Source
from pirl_jax.data.subsets import shuffled

SAMPLED = 500
"""Held-out images that are looked at."""

READ = 4_000
"""Largest number of training images that are read."""

NAMED = 3


def warning(train: Source, test: Source) -> str:
  """Returns a warning that names held-out images which are among the training images, "" if none was found.

  Only images of equal size are read and compared, at most `SAMPLED` held-out and `READ` training images.
  """
  same, seen = shared_images(train, test)
  if not same:
    return ""
  pairs = ", ".join(f"{test.image_name(index)} = {train.image_name(other)}" for index, other in same[:NAMED])
  return (f"WARNING: of {seen:,} held-out images that were compared, {len(same)} are training images, too "
          f"({pairs}{', ...' if len(same) > NAMED else ''}); figures on them say nothing about new images. Name the "
          "sub-folder of the training images with --config.data.split=..., or move the copies away")


def shared_images(train: Source, test: Source) -> tuple[list[tuple[int, int]], int]:
  """Returns the pairs (held-out image, training image) of equal content, and how many held-out images were compared."""
  sizes, wanted = train.sizes(), test.sizes()
  if sizes is None or wanted is None:
    return [], 0
  order = np.argsort(sizes, kind="stable")
  in_order, same, num_read, seen = sizes[order], [], 0, 0
  for index in shuffled(range(len(test)), seed=0)[:SAMPLED]:
    first, end = (int(np.searchsorted(in_order, wanted[index], side)) for side in ("left", "right"))
    num_read += end - first
    if num_read > READ:
      break
    seen += 1
    if first < end and (content := _content(test, index)) is not None:
      same += [(index, int(other)) for other in order[first:end] if _content(train, int(other)) == content][:1]
  return same, seen


def _content(source: Source, index: int) -> bytes | None:
  try:
    image = read_record(source.source if isinstance(source, InMemory) else source, index).image
  except BrokenImage:  # the training says so when it reads the image
    return None
  return image if isinstance(image, bytes) else None
