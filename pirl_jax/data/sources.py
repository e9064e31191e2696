"""`open_source`: the one door to every kind of images."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, Self

from pirl_jax.data.records import Record, Source
from pirl_jax.data.subsets import Subset, shuffled
from pirl_jax.errors import UserError

__all__ = ["DataSettings", "Record", "Source", "kind_of", "open_source"]

SOURCES = {"embedded": "pirl_jax.data.embedded:TextureSource", "folder": "pirl_jax.data.folder:FolderSource",
           "tfds": "pirl_jax.data.tfds_source:TfdsSource"}
"""MODULE:CLASS by `data.source`. By name: TFDS takes half a second to import, for which the others need not wait."""

LABELS = ("none", "folder")


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """Which images and how they are read: `config.data` of a run, field by field, with the values of configs/base.py.

  Attributes:
    source: a name of `SOURCES`.
    name: tfds: name of the data set, with its config and version if wanted ("imagenet2012", "cifar10:3.0.2").
    root: folder: the folder of images; tfds: its data directory, "" for its default.
    split: embedded: any name; folder: a sub-folder, "" for all; tfds: a split ("train", "train[:10%]").
    labels: folder: "folder" (the first sub-folder is the class) or "none". The other two bring their own labels.
    num_images: embedded: how many to draw; else so many at random, the same ones in every run, or all (0).
    image_size: side in pixels of the image view, and of the embedded images.
    image_scale: share of the image's area that the image crop covers.
    num_threads: that decode and crop.
    max_bad_fraction: of the images that may turn out broken.
  """

  source: str = "tfds"
  name: str = ""
  root: str = ""
  split: str = "train"
  labels: str = "none"
  num_images: int = 0
  image_size: int = 224
  image_scale: tuple[float, float] = (0.08, 1.0)
  num_threads: int = 16
  max_bad_fraction: float = 0.05

  @classmethod
  def of(cls, data: Mapping[str, Any]) -> Self:
    """Returns the settings in a `config.data`, also one that was stored as JSON."""
    values: dict[str, Any] = {
      name: tuple(value) if isinstance(value, list) else value for name, value in dict(**data).items()}
    return cls(**values)


READING = ("image_size", "image_scale", "num_threads", "max_bad_fraction")
"""The fields that say how images are read; all others say which."""


def kind_of(source: str) -> type[Source]:
  """Returns the class of that name in `SOURCES`.

  Raises:
    UserError: there is none.
  """
  if source not in SOURCES:
    raise UserError(f"data.source={source!r} is unknown; choose one of: {', '.join(SOURCES)}")
  module, _, name = SOURCES[source].partition(":")
  return getattr(importlib.import_module(module), name)


def open_source(settings: DataSettings, *, class_names: tuple[str, ...] | None = None) -> Source:
  """Opens the images of one split; a TFDS set that is not there yet is prepared first.

  Args:
    settings: which images.
    class_names: of the training images, when a held-out split is opened.

  Raises:
    UserError: for whatever a user can mend.
  """
  kind = kind_of(settings.source)
  if settings.labels not in LABELS:
    raise UserError(f"data.labels={settings.labels!r} is unknown; choose one of: {', '.join(LABELS)}")
  images, number = kind.open(settings, class_names), settings.num_images
  if not number or kind.draws:
    return images
  if number > len(images):
    raise UserError(f"num_images={number}, but there are only {len(images)} images; 0 takes all of them")
  return Subset(images, sorted(shuffled(range(len(images)), seed=0)[:number]))
