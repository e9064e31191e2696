"""Opens any source of images from its settings: `open_source`."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, Self

from pirl_jax.data.crops import Decoding
from pirl_jax.data.records import Record, Source, check_text
from pirl_jax.data.subsets import Subset, held_out_of, shuffled
from pirl_jax.errors import UserError

__all__ = ["DataSettings", "Record", "Source", "kind_of", "open_source"]

SOURCES = {"embedded": "pirl_jax.data.embedded:TextureSource", "folder": "pirl_jax.data.folder:FolderSource",
           "tfds": "pirl_jax.data.tfds_source:TfdsSource",
           "webdataset": "pirl_jax.data.webdataset:WebDatasetSource"}
"""MODULE:CLASS for each value of `data.source`. The classes are named, not imported, because importing TFDS takes half
a second; the other sources do not need it."""

LABELS = ("none", "folder")


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """Which images are read, and how. The fields are those of a run's `config.data`, with the values of configs/base.py.

  Attributes:
    source: a name of `SOURCES`.
    name: tfds: name of the data set, with config and version if wanted ("imagenet2012", "cifar10:3.0.2").
    root: folder: the folder of images; tfds: TFDS's data directory, "" for TFDS's default; webdataset: a folder of
      shards or a pattern of their paths.
    split: embedded: any name; folder: a sub-folder, "" for the whole folder; tfds: a split ("train", "train[:10%]");
      webdataset: a sub-folder, a pattern of shards, or "".
    labels: folder and webdataset: "folder" (the first sub-folder is the class, or the label beside the image) or
      "none". The sources embedded and tfds have their own labels.
    num_images: embedded: number of images to draw; others: number of images to take at random, the same ones in every
      run, or 0 for all.
    holdout: share of the images that is held out; the names of the images decide, see `open_source`.
    kept_side: see `in_memory.keep`.
    grown: folder: whether a run may go on with other images than before.
    formats: folder and webdataset: "common" reads files ending in .jpg, .jpeg, .png, .webp and .bmp; "all" reads every
      ending of a format that can be decoded.
    reduced_decoding, full_range, upright, strict: see `Decoding`.
    image_size: side in pixels of the image view, and of the embedded images.
    image_scale: range of the share of the image's area that the image crop covers.
    num_threads: number of threads that decode and crop.
    max_bad_fraction: largest tolerated share of images that cannot be read.
  """

  source: str = "tfds"
  name: str = ""
  root: str = ""
  split: str = "train"
  labels: str = "none"
  num_images: int = 0
  holdout: float = 0.0
  kept_side: int = 0
  grown: bool = False
  formats: str = "common"
  reduced_decoding: bool = False
  full_range: bool = False
  upright: bool = False
  strict: bool = True
  image_size: int = 224
  image_scale: tuple[float, float] = (0.08, 1.0)
  num_threads: int = 16
  max_bad_fraction: float = 0.05

  @classmethod
  def of(cls, data: Mapping[str, Any]) -> Self:
    """Returns the settings of a `config.data`; a `config.data` that was read from JSON works, too."""
    values: dict[str, Any] = {
      name: tuple(value) if isinstance(value, list) else value for name, value in dict(**data).items()}
    return cls(**values)

  @property
  def decoding(self) -> Decoding:
    """Returns how the images are decoded."""
    return Decoding(reduced=self.reduced_decoding, full_range=self.full_range, upright=self.upright,
                    strict=self.strict)


DECODING = ("reduced_decoding", "full_range", "upright", "strict")
"""The fields that say how an image is decoded, see `Decoding`."""

READING = ("image_size", "image_scale", "kept_side", "grown", *DECODING, "num_threads", "max_bad_fraction")
"""The fields that say how images are read; all other fields say which images are read."""


def kind_of(source: str) -> type[Source]:
  """Returns the class that `SOURCES` has for the name `source`.

  Raises:
    UserError: `SOURCES` has no such name.
  """
  if source not in SOURCES:
    raise UserError(f"data.source={source!r} is unknown; choose one of: {', '.join(SOURCES)}")
  module, _, name = SOURCES[source].partition(":")
  return getattr(importlib.import_module(module), name)


def open_source(settings: DataSettings, *, class_names: tuple[str, ...] | None = None,
                held_out: bool = False) -> Source:
  """Opens the images of one split. A TFDS set that is not on disk yet is prepared first.

  Args:
    settings: which images. With `settings.holdout` the name of an image alone decides whether the image is held out, so
      an image that is added or deleted moves no other image to the other side.
    class_names: the class names of the training images if a held-out split is opened, else None.
    held_out: True opens the images that `settings.holdout` holds out; False opens the others.

  Raises:
    UserError: a setting is wrong, or the images cannot be read; the message says what to do.
  """
  return _part(_whole(settings, class_names), settings, held_out=held_out)


def _whole(settings: DataSettings, class_names: tuple[str, ...] | None) -> Source:
  """Returns all images of the split, after the settings have been checked."""
  kind = kind_of(settings.source)
  for name in ("name", "root", "split"):
    check_text(f"data.{name}", getattr(settings, name))
  if settings.labels not in LABELS:
    raise UserError(f"data.labels={settings.labels!r} is unknown; choose one of: {', '.join(LABELS)}")
  if not 0 <= settings.holdout < 1:
    raise UserError(f"data.holdout={settings.holdout} is not possible: it lies in [0, 1)")
  images = kind.open(settings, class_names)
  images.decoding = settings.decoding
  return images


def _part(images: Source, settings: DataSettings, *, held_out: bool) -> Source:
  """Returns the images that are held out, or those that are not, and as many of them as are asked for."""
  if settings.holdout:
    images = held_out_of(images, settings.holdout, held_out=held_out)
  number = settings.num_images
  if not number or kind_of(settings.source).draws:
    return images
  if number > len(images):
    raise UserError(f"num_images={number}, but there are only {len(images)} images; 0 takes all of them")
  return Subset(images, sorted(shuffled(range(len(images)), seed=0)[:number]))


def open_both(settings: DataSettings, *, split: str, num_images: int) -> tuple[Source, Source | None]:
  """Returns the training images and the held-out images, None if there are none.

  Args:
    settings: of the training images.
    split: of the held-out images; "" for those that `settings.holdout` keeps out of the training.
    num_images: see `DataSettings.num_images`, for the held-out images.

  Raises:
    UserError: see `open_source`.
  """
  whole = _whole(settings, None)  # opened once for both parts, because listing millions of files takes minutes
  train, held_out = _part(whole, settings, held_out=False), dataclasses.replace(settings, num_images=num_images)
  if split:
    return train, open_source(dataclasses.replace(held_out, split=split), class_names=train.class_names)
  return train, _part(whole, held_out, held_out=True) if settings.holdout else None
