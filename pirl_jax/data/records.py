"""The interface of every source of images: records by index; an index always gives the same record.

The index of a record is also its row in the memory bank. Therefore everything that could change the index of a record
must be part of the source's fingerprint.

Letters: N records of a source, C classes.
"""

import abc
import os
import re
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import numpy as np

from pirl_jax.data.crops import Decoding
from pirl_jax.errors import UserError

if TYPE_CHECKING:
  from pirl_jax.data.sources import DataSettings


DAMAGED = "damaged"
"""Stands in a fingerprint in place of its hash if an image that is hashed cannot be read."""


class Record(NamedTuple):
  """One image as it is stored. The loader's threads decode the image."""

  image: bytes | np.ndarray  # the bytes of an encoded file, or pixels u8[H, W, 3]
  label: int  # index into the source's class names; -1 = unlabelled


class Source(abc.ABC):
  """Random access to the records of one split. Safe to read from several threads, and picklable.

  Attributes:
    description: a few lines for the user: which images were found, and which files were left out and why.
    fingerprint: text; if record i of another source could be another image, the fingerprints of the two differ.
    class_names: the name of each class, in the order of the labels; () if there are no labels.
    multi_label: True if an image may show any number of the classes; then there are `targets`, but no `labels`.
    slow_labels: True if the first call of `labels` reads every image, which takes as long as an epoch without crops.
    decoding: how the images of the records are decoded.
    draws: class attribute: True if the source generates exactly `num_images` images; False if the images exist already
      and `num_images` selects some of them.
    defaults: class attribute: the settings of an evaluation that names this source and gives no others: `split`,
      `labels` and `num_images` for the training images, `test_split` and `test_num_images` for the held-out images.
  """

  description: str
  fingerprint: str
  class_names: tuple[str, ...]
  multi_label: bool = False
  slow_labels: bool = False
  decoding: Decoding = Decoding()
  draws: ClassVar[bool] = False
  defaults: ClassVar[dict[str, str | int]] = {
    "split": "train", "test_split": "test", "labels": "folder", "num_images": 0, "test_num_images": 0}

  @classmethod
  def open(cls, settings: "DataSettings", class_names: tuple[str, ...] | None) -> Self:
    """Returns the images of `settings`, see `sources.open_source`; every class in `sources.SOURCES` implements this."""
    raise NotImplementedError(f"{cls.__name__} is not opened from settings")

  @property
  def num_labels(self) -> int:
    """Returns the number of classes if an image shows exactly one of them; 0 without labels or with several each."""
    return 0 if self.multi_label else len(self.class_names)

  @abc.abstractmethod
  def __len__(self) -> int:
    """Returns the number of records."""

  @abc.abstractmethod
  def __getitem__(self, index: int) -> Record:
    """Returns record `index`, 0 <= index < len(self)."""

  @abc.abstractmethod
  def image_name(self, index: int) -> str:
    """Returns a printable name by which a person can find the image."""

  @abc.abstractmethod
  def labels(self) -> np.ndarray | None:
    """Returns i32[N], with -1 for a record without a label, or None if the set has no labels.

    The first call may read every record.
    """

  def listing(self) -> list[str] | None:
    """Returns one line for each record, to compare two states of the set, or None if the source has no such lines."""
    return None

  def sizes(self) -> np.ndarray | None:
    """Returns i64[N], the bytes of each stored image, or None if the source does not know them without reading."""
    return None

  def holds(self, path: str | os.PathLike[str]) -> bool:
    """Returns whether an image that is written below `path` would be an image of this source."""
    del path
    return False

  def targets(self) -> np.ndarray | None:
    """Returns i8[N, C], by image and class, or None if the set has no labels.

    1 means that the image shows the class, and 0 that it does not. -1 means that all objects of the class in this image
    are marked as difficult (VOC); such an image counts neither as 1 nor as 0. If the set has one label per image, each
    row holds a single 1. An image without a label has a row of zeros; `labels() < 0` tells such an image from one that
    shows no class.

    The first call may read every record.
    """
    labels = self.labels()
    if labels is None:
      return None
    return (np.asarray(labels)[:, None] == np.arange(len(self.class_names))[None, :]).astype(np.int8)


def same_images(one: str, other: str) -> bool:
  """Returns whether two fingerprints can be those of the same images: a hash that is `DAMAGED` equals every hash."""
  damaged, known = (re.compile(rf":({hashes})(?=\[|$)") for hashes in (DAMAGED, rf"{DAMAGED}|[0-9a-f]{{32}}"))
  return one == other or any(map(damaged.search, (one, other))) and known.sub("", one) == known.sub("", other)


def check_text(field: str, value: str) -> None:
  """Raises UserError if a path in the config is no UTF-8 text: it could not be stored with the run."""
  if any("\ud800" <= letter <= "\udfff" for letter in value):
    raise UserError(f"{field}={printable(value)} is no UTF-8 text; rename it, or give a link to it with another name")


def printable(name: str) -> str:
  """Returns `name` with every character that is not printable written as an escape, safe for terminals and logs."""
  return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)
