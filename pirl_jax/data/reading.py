"""Reads one image of a source: what counts as a broken image, what is tried again, and what ends the run.

- The image itself is damaged or gone: the source or the decoder raises `BrokenImage`, and the image has no weight.
- The storage fails, or memory is short: an OSError or a MemoryError. The image may be sound. It is read again, with
  growing pauses; if the failure lasts, an error that names the image ends the run.
"""

import time
from collections.abc import Callable
from typing import TypeVar

import cv2

from pirl_jax.data.crops import BrokenImage, OpenedImage, open_image
from pirl_jax.data.records import Record, Source
from pirl_jax.errors import Unreadable

_T = TypeVar("_T")

PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 3.2)
"""Seconds between two tries; after the last one the failure counts as lasting."""


def retried(read: Callable[[], _T], name: Callable[[], str]) -> _T:
  """Returns read(), which is called again as long as the storage fails or memory is short, see `PAUSES`.

  Args:
    read: is called without arguments.
    name: returns what is read, for the message.

  Raises:
    Unreadable: the storage has failed, or memory was short, in every try.
  """
  for pause in (*PAUSES, None):
    try:
      return read()
    except (OSError, MemoryError, cv2.error) as error:
      if isinstance(error, cv2.error) and error.code != cv2.Error.StsNoMem:
        raise
      if pause is None:
        raise Unreadable(_text(error, name())) from error
    time.sleep(pause)
  raise AssertionError("the last try returns or raises")


def _text(error: Exception, name: str) -> str:
  if isinstance(error, MemoryError | cv2.error):
    return (f"{name} cannot be read because memory is short ({' '.join(str(error).split()) or 'out of memory'}); with "
            "more memory, or with fewer threads (data.num_threads), the same command resumes the run")
  reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
  return (f"{name} cannot be read because the disk or the network fails ({reason}); when it works again, or when the "
          "file has been copied back, the same command resumes the run")


def read_record(source: Source, index: int) -> Record:
  """Returns record `index` of the source, not decoded.

  Raises:
    BrokenImage: the image is damaged or gone.
    Unreadable: see `retried`.
  """
  return retried(lambda: source[index], lambda: source.image_name(index))


def read_image(source: Source, index: int, crop_fn: Callable[[OpenedImage], _T]) -> tuple[_T | None, int]:
  """Returns (crop_fn(image), label); None in place of the first if the image is broken, see `why_broken`.

  Raises:
    Unreadable: see `retried`; the image itself may be sound.
  """
  label = -1

  def read() -> _T:
    nonlocal label
    record = source[index]
    label = record.label
    return crop_fn(open_image(record.image, source.decoding))

  try:
    return retried(read, lambda: source.image_name(index)), label
  except BrokenImage:
    return None, label


def why_broken(source: Source, index: int) -> str:
  """Returns the reason why an image is broken, "" if it can be read now.

  Raises:
    Unreadable: see `retried`.
  """
  try:
    retried(lambda: open_image(source[index].image, source.decoding).pixels(), lambda: source.image_name(index))
  except BrokenImage as error:
    return str(error)
  return ""
