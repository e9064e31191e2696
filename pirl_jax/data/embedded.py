"""The embedded textures as a source: no file, no download."""

from typing import ClassVar, Self

import numpy as np

from pirl_jax.data import textures
from pirl_jax.data.records import Record, Source
from pirl_jax.data.sources import DataSettings
from pirl_jax.errors import UserError

# Counted up whenever a change of `textures.py` changes a pixel: it is part of the fingerprint.
_VERSION = 1


MAX_BYTES = 4 * 2**30
"""Of all images of a split; to draw as many takes a minute."""


class TextureSource(Source):
  """`num_images` textures of a split, drawn once and held in memory (3 kB each at 32 x 32)."""

  draws = True
  defaults: ClassVar = Source.defaults | {"num_images": 4_096, "test_num_images": 1_024}

  @classmethod
  def open(cls, settings: DataSettings, class_names: tuple[str, ...] | None) -> Self:
    """Draws the images; their classes are always the same."""
    del class_names
    return cls(settings.num_images, size=settings.image_size, split=settings.split)

  def __init__(self, num_images: int, *, size: int, split: str) -> None:
    if num_images < 1:
      raise UserError(f"data.num_images is {num_images}; the embedded data set needs at least 1 image")
    if size < 8:
      raise UserError(f"the embedded textures are {size} px wide; below 8 px nothing can be seen of them")
    if 3 * num_images * size**2 > MAX_BYTES:
      raise UserError(f"{num_images:,} embedded textures of {size} x {size} px would take "
                      f"{3 * num_images * size**2 / 2**30:,.0f} GiB, and they are held in memory: take fewer "
                      "(data.num_images, evaluate.num_images) or smaller ones (data.image_size)")
    self._images, self._labels = textures.create_textures(num_images, size=size, split=split)
    self.class_names = textures.FAMILIES
    self.fingerprint = f"textures:{_VERSION}:{split}:size={size}:{num_images}"
    self.description = (
      f"embedded textures, split {split}: {num_images} images of {size} x {size} px, "
      f"{len(self.class_names)} classes"
    )

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> Record:
    return Record(self._images[index], int(self._labels[index]))

  def image_name(self, index: int) -> str:
    """Returns e.g. "texture 12 (dots)"."""
    return f"texture {index} ({self.class_names[self._labels[index]]})"

  def labels(self) -> np.ndarray:
    """Returns i32[N], the families."""
    return self._labels
