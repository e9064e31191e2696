"""Images that stay in memory once they are decoded, for small sets on machines with few cores.

Decoding a photograph costs a core more time than a small network does. Letters: H W height and width of an image.
"""

import os

import numpy as np

from pirl_jax.data.crops import open_image, shrink
from pirl_jax.data.records import Record, Source


def keep(source: Source, kept_side: int) -> Source:
  """Returns the images of a source, kept in memory with a shorter side of `kept_side` pixels; 0 does not keep them."""
  return InMemory(source, kept_side) if kept_side else source


class InMemory(Source):
  """The images of a source. The first access decodes an image; later ones find its pixels u8[H, W, 3] in memory.

  Args:
    source: the images.
    shorter_side: pixels, >= 1; a larger image is kept with a shorter side of this size.
  """

  def __init__(self, source: Source, shorter_side: int) -> None:
    self.source, self.shorter_side = source, shorter_side
    self._kept: dict[int, Record] = {}
    self.description, self.fingerprint = source.description, source.fingerprint
    self.class_names, self.multi_label = source.class_names, source.multi_label
    self.slow_labels, self.decoding = source.slow_labels, source.decoding

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> Record:
    """Returns record `index` with pixels u8[H, W, 3]; raises BrokenImage if the image is damaged."""
    record = self._kept.get(index)
    if record is None:  # two threads may decode the same image; they find the same pixels
      read = self.source[index]
      record = Record(shrink(open_image(read.image, self.decoding), self.shorter_side), read.label)
      self._kept[index] = record
    return record

  def __getstate__(self) -> dict:
    return {**vars(self), "_kept": {}}

  def image_name(self, index: int) -> str:
    """Returns the name that the image has in the source."""
    return self.source.image_name(index)

  def listing(self) -> list[str] | None:
    """Returns the listing of the source."""
    return self.source.listing()

  def sizes(self) -> np.ndarray | None:
    """Returns i64[N], see `Source.sizes`."""
    return self.source.sizes()

  def holds(self, path: str | os.PathLike[str]) -> bool:
    """Returns whether an image that is written below `path` would be an image of the source."""
    return self.source.holds(path)

  def labels(self) -> np.ndarray | None:
    """Returns i32[N], see `Source.labels`."""
    return self.source.labels()

  def targets(self) -> np.ndarray | None:
    """Returns i8[N, C], see `Source.targets`."""
    return self.source.targets()
