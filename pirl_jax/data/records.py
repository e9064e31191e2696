"""What every source of images offers: records by index, for ever the same.

The index of a record is its row in the memory bank, so whatever could change it belongs into the source's
fingerprint.
"""

import abc
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import numpy as np

if TYPE_CHECKING:
  from pirl_jax.data.sources import DataSettings


class Record(NamedTuple):
  """One image as it is stored: decoding is left to the loader's threads."""

  image: bytes | np.ndarray  # an encoded file, or u8[H, W, 3]
  label: int  # index into the source's class names; -1 = unlabelled


class Source(abc.ABC):
  """Random access to the records of one split. Safe to read from several threads, and picklable.

  Attributes:
    description: a few lines for the user: what was found, what was left out and why.
    fingerprint: differs from another source's if record i could be another image there.
    class_names: one name a class, in the order of the labels; () when there are no labels.
    multi_label: an image may show any number of the classes; then there are `targets`, but no `labels`.
    slow_labels: the labels are read image by image the first time, which takes as long as an epoch without crops.
    draws: class attribute: the images are made, as many as `num_images` asks for; else it takes so many of them.
    defaults: class attribute: what an evaluation takes that names this source and says no more: `split`, `labels` and
      `num_images`, and for the held-out images `test_split` and `test_num_images`.
  """

  description: str
  fingerprint: str
  class_names: tuple[str, ...]
  multi_label: bool = False
  slow_labels: bool = False
  draws: ClassVar[bool] = False
  defaults: ClassVar[dict[str, str | int]] = {
    "split": "train", "test_split": "test", "labels": "folder", "num_images": 0, "test_num_images": 0}

  @classmethod
  def open(cls, settings: "DataSettings", class_names: tuple[str, ...] | None) -> Self:
    """Returns the images of `settings`, see `sources.open_source`; whatever stands in `sources.SOURCES` has it."""
    raise NotImplementedError(f"{cls.__name__} is not opened from settings")

  @abc.abstractmethod
  def __len__(self) -> int:
    """Returns the number of records."""

  @abc.abstractmethod
  def __getitem__(self, index: int) -> Record:
    """Returns record `index`, 0 <= index < len(self)."""

  @abc.abstractmethod
  def image_name(self, index: int) -> str:
    """Returns a printable name by which a person finds the image again."""

  @abc.abstractmethod
  def labels(self) -> np.ndarray | None:
    """Returns i32[N], -1 where a single record has none, or None when the set has no labels.

    May read every record the first time.
    """

  def listing(self) -> list[str] | None:
    """Returns a line for each record, by which two states of a set can be compared; None where there is none."""
    return None

  def targets(self) -> np.ndarray | None:
    """Returns i8[N, C], by image and class, or None when the set has no labels.

    1: the class is there. 0: it is not. -1: only as an object that is marked as difficult (VOC), which is neither. Of a
    set with one label an image these are rows with a single 1; an image without its label has a row of 0, and
    `labels() < 0` tells it from one that shows no class.

    May read every record the first time.
    """
    labels = self.labels()
    if labels is None:
      return None
    return (np.asarray(labels)[:, None] == np.arange(len(self.class_names))[None, :]).astype(np.int8)


def printable(name: str) -> str:
  """Returns `name` with every character that could upset a terminal or a log file written as an escape."""
  return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)
