"""A source made of images that are given in Python: paths, PIL images and arrays.

Letters: H W height and width of an image in pixels; they may differ from image to image.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pirl_jax.data.crops import BrokenImage, Decoding, open_image
from pirl_jax.data.folder import read_file
from pirl_jax.data.records import Record, Source, printable
from pirl_jax.errors import UserError

KINDS = "a path, a PIL image, or an array u8[H, W, 3], u8[H, W] or float in [0, 1]"


class GivenSource(Source):
  """The images of a list, without labels. An image that cannot be read raises a UserError; it is not skipped."""

  class_names = ()
  fingerprint = "given"

  def __init__(self, images: Sequence[Any], *, names: Sequence[str], decoding: Decoding, shorter_side: int) -> None:
    """Stores the list; no image is read yet.

    Args:
      images: each one of the kinds that `pixels_of` takes.
      names: a name for each image, for messages.
      decoding, shorter_side: see `pixels_of`.
    """
    self._images, self._names, self._decode = images, names, {"decoding": decoding, "shorter_side": shorter_side}
    self.description = f"{len(images)} given images"

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> Record:
    return Record(pixels_of(self._images[index], self._names[index], **self._decode), -1)

  def image_name(self, index: int) -> str:
    """Returns the name that was given."""
    return self._names[index]

  def labels(self) -> None:
    """Returns None: given images have no labels."""


def is_one(images: Any) -> bool:
  """Returns whether `images` is a single image: a path, a PIL image, or an array of up to three axes.

  An array of text or of objects holds several images, for example paths, and is not a single image.
  """
  if isinstance(images, (str, os.PathLike, Image.Image)):
    return True
  return hasattr(images, "__array__") and np.ndim(images) <= 3 and np.asarray(images).dtype.kind not in "OUS"


def pixels_of(image: Any, name: str, *, decoding: Decoding, shorter_side: int) -> np.ndarray:
  """Returns u8[H, W, 3], RGB, of one image.

  - A path of a file of one of `crops.FORMATS`: `crops.open_image` opens the file, as every other image of the program.
  - A PIL image: the image is converted by convert("RGB"); modes without 8-bit levels (I, I;16, F) are refused.
  - An array, of numpy or of a library whose arrays numpy can read: u8[H, W, 3] RGB, or u8[H, W] grey, or floating
    point of one of these shapes in [0, 1], rounded to the nearest of 256 levels.

  Args:
    image: one of these.
    name: the name of the image in error messages.
    decoding: of files, and whether PIL images are turned by their EXIF orientation.
    shorter_side: number of pixels that the shorter side of a JPEG keeps, if `decoding` reduces the image.

  Raises:
    UserError: the image is none of these, or cannot be read.
  """
  if isinstance(image, (str, os.PathLike)):
    return _read_file(image, f"{name}, {printable(os.fsdecode(image))},", decoding, shorter_side)
  if isinstance(image, Image.Image):
    return _convert(image, name, decoding)
  if hasattr(image, "__array__"):
    return _levels(np.asarray(image), name)
  raise UserError(f"{name} is of type {type(image).__name__}; give {KINDS}")


def _read_file(path: str | os.PathLike[str], name: str, decoding: Decoding, shorter_side: int) -> np.ndarray:
  try:
    opened = open_image(read_file(os.fspath(path)), decoding)
    shrunk = min(opened.height, opened.width) / shorter_side
    return opened.pixels(opened.reduction(shrunk))
  except IsADirectoryError as error:
    raise UserError(f"{name} is a folder; give its files one by one, for example sorted(folder.glob('*.jpg'))"
                    ) from error
  except FileNotFoundError as error:
    raise UserError(f"{name} is not there; give the path of an image") from error
  except OSError as error:
    raise UserError(f"{name} cannot be read ({error.strerror or error})") from error
  except ValueError as error:  # a path with a zero byte in it
    raise UserError(f"{name} is no path ({error})") from error
  except BrokenImage as error:
    raise UserError(f"{name} cannot be decoded: {error}; leave it out, or repair it") from error


def _convert(image: Image.Image, name: str, decoding: Decoding) -> np.ndarray:
  if image.mode[0] in "IF":
    raise UserError(f"{name} is a PIL image of mode {image.mode}, which has no 8-bit levels; give it as an array of "
                    "floats in [0, 1]")
  try:
    return np.asarray((ImageOps.exif_transpose(image) if decoding.upright else image).convert("RGB"))
  except Exception as error:  # Pillow decodes the file only now, and its plug-ins raise errors of many types
    raise UserError(f"{name}, a PIL image of mode {image.mode}, cannot be made RGB: {error}") from error


def _levels(array: np.ndarray, name: str) -> np.ndarray:
  seen = f"{name} is an array {array.dtype}[{', '.join(map(str, array.shape))}]"
  if array.ndim not in (2, 3) or array.ndim == 3 and array.shape[2] != 3 or not array.size:
    raise UserError(f"{seen}; an image is [H, W, 3], RGB with the channels last, or [H, W], grey")
  if array.dtype.kind == "f":
    if not (array.min() >= 0 and array.max() <= 1):  # with `not (...)` a NaN is refused, too
      raise UserError(f"{seen} with values from {array.min():g} to {array.max():g}; floats lie in [0, 1], and levels "
                      "from 0 to 255 are u8")
    array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
  elif array.dtype != np.uint8:
    raise UserError(f"{seen}; the levels are u8 in [0, 255] or floats in [0, 1]")
  return np.ascontiguousarray(array if array.ndim == 3 else np.repeat(array[:, :, None], 3, axis=2))
