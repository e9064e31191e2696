"""The job `prepare`: writes smaller copies of images as a set that a run reads faster.

A large image is shrunk and stored as JPEG; a JPEG that is small enough is copied byte by byte. The set lies in TFDS's
layout in array_record files, so `data.source=tfds` reads it with `data.name` and `data.root`. Record i of a split is
the i-th readable image of the source.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from pirl_jax.data.crops import BrokenImage, OpenedImage, shrink
from pirl_jax.data.reading import read_image, why_broken
from pirl_jax.data.sources import DataSettings, Source, open_source
from pirl_jax.data.tfds_source import FAILED_CALL
from pirl_jax.errors import UserError
from pirl_jax.runtime.progress import Progress
from pirl_jax.storage.files import locked

VERSION = "1.0.0"

_NAMES_SHOWN = 3  # names of broken images in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copying:
  """How images are copied.

  Attributes:
    shorter_side: pixels of the shorter side of a copy, at most.
    quality: of the JPEG files, 1 to 100.
    num_threads: number of threads that decode and encode.
    max_bad_fraction: largest tolerated share of images that cannot be read.

  Raises:
    UserError: a value is out of range.
  """

  shorter_side: int
  quality: int
  num_threads: int
  max_bad_fraction: float

  def __post_init__(self) -> None:
    if self.shorter_side < 1:
      raise UserError(f"shorter_side={self.shorter_side} is not possible: a whole number of pixels from 1 is needed")
    if not 1 <= self.quality <= 100:
      raise UserError(f"quality={self.quality} is not possible: JPEG has qualities from 1 to 100")
    if self.num_threads < 1:
      raise UserError(f"data.num_threads={self.num_threads} is not possible: a whole number from 1 is needed")
    if not 0 <= self.max_bad_fraction <= 1:
      raise UserError(f"data.max_bad_fraction={self.max_bad_fraction} is not possible: it lies in [0, 1]")


def run(config: ConfigDict, workdir: str) -> None:
  """Writes the set `config.name` into `config.root`. `workdir` is not used.

  Raises:
    UserError: a setting is wrong, the set is there already, or the images cannot be read.
  """
  del workdir
  if not re.fullmatch(r"[a-z][a-z0-9_]*", config.name):
    raise UserError(f"name={config.name!r} is not possible: the name of a set begins with a lower-case letter and has "
                    "lower-case letters, digits and underscores, e.g. --config.name=photographs")
  data = dict(config.data)
  copying = Copying(shorter_side=config.shorter_side, quality=config.quality, num_threads=data["num_threads"],
                    max_bad_fraction=data["max_bad_fraction"])
  sources = open_splits(DataSettings(**data, reduced_decoding=True), tuple(config.splits))
  root = Path(config.root or tfds.core.constants.DATA_DIR).expanduser().absolute()
  with locked(root / config.name):
    builder = _builder(config.name, root, sources, copying)
    if os.path.exists(builder.data_dir):
      raise UserError(f"{builder.data_dir} is there already; choose another name, or delete this folder")
    try:
      builder.download_and_prepare(file_format="array_record")
    except (OSError, RuntimeError) as error:
      call = FAILED_CALL.search(str(error))
      if isinstance(error, RuntimeError) and not call:
        raise
      reason = call[1] if call else getattr(error, "strerror", None) or error
      raise UserError(f"the set cannot be written into {root} ({reason}); when that works again, or with another root, "
                      "start again") from error
  files = sum(path.stat().st_size for path in Path(builder.data_dir).rglob("*") if path.is_file())
  print(f"written: {builder.data_dir}, {files / 1e6:,.1f} MB\nread it with --config.data.source=tfds "
        f"--config.data.name={config.name} --config.data.root={root}")


def open_splits(data: DataSettings, splits: tuple[str, ...]) -> dict[str, Source]:
  """Returns the images of each split, by the name under which the split is stored.

  Raises:
    UserError: no split or a split twice is asked for, a split's name cannot be stored, or its images cannot be read.
  """
  names = [split or "train" for split in splits]
  for name in names:
    if not re.fullmatch(r"\w+", name):
      raise UserError(f"splits={splits}: {name!r} cannot be the name of a split, which has letters, digits and "
                      "underscores only")
  if not names or len(set(names)) < len(names):
    raise UserError(f"splits={splits}: one split or more are needed, and each once")
  opened, class_names = {}, None
  for name, split in zip(names, splits, strict=True):
    opened[name] = source = open_source(dataclasses.replace(data, split=split), class_names=class_names)
    print(f"{name}: {source.description}")
    if source.multi_label:
      raise UserError(f"the images of {data.name} have any number of labels, and this job stores one label for each "
                      "image; use the set as it is")
    class_names = class_names or source.class_names or None
  return opened


def copies(source: Source, split: str, copying: Copying) -> Iterator[tuple[bytes, int]]:
  """Yields (file, label) of each image that can be read, in the order of the source: JPEG, or the small file itself.

  Images that cannot be read are named at the end.

  Raises:
    UserError: more images cannot be read than `copying.max_bad_fraction` allows.
  """
  broken = []
  read = functools.partial(read_image, source, crop_fn=functools.partial(_copy, copying=copying))
  with Progress(f"prepare: {split}", len(source)) as progress, concurrent.futures.ThreadPoolExecutor(
      copying.num_threads) as threads:
    indices, waiting = iter(range(len(source))), collections.deque()
    for index in itertools.islice(indices, 2 * copying.num_threads):
      waiting.append((index, threads.submit(read, index)))
    while waiting:
      index, future = waiting.popleft()
      found = future.result()
      for following in itertools.islice(indices, 1):  # few images are in memory at once
        waiting.append((following, threads.submit(read, following)))
      progress.update()
      if found[0] is None:
        broken.append(f"{source.image_name(index)} ({why_broken(source, index)})")
      else:
        yield found
  if not broken:
    return
  shown = ", ".join(broken[:_NAMES_SHOWN]) + (", ..." if len(broken) > _NAMES_SHOWN else "")
  told = f"{split}: {len(broken)} of {len(source)} images cannot be read: {shown}"
  if len(broken) > copying.max_bad_fraction * len(source):
    raise UserError(f"{told}; repair them, or raise data.max_bad_fraction={copying.max_bad_fraction}")
  print(told)


def _copy(image: OpenedImage, copying: Copying) -> bytes:
  """Returns the file of the copy of an image."""
  pixels = shrink(image, copying.shorter_side)  # a small image is decoded, too: a damaged one must not be copied
  small = min(image.height, image.width) <= copying.shorter_side
  if isinstance(image.content, bytes) and image.reducible and image.orientation == 1 and small:
    return image.content
  if max(pixels.shape) > 65_500:
    raise BrokenImage(f"a JPEG cannot hold {image.width} x {image.height} pixels")
  _, file = cv2.imencode(".jpg", pixels[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, copying.quality))
  return file.tobytes()


def _builder(name: str, root: Path, sources: dict[str, Source], copying: Copying) -> tfds.core.GeneratorBasedBuilder:
  """Returns the builder of the set; TFDS takes the name and the version from the class."""
  class_names = next(iter(sources.values())).class_names
  labels = {"label": tfds.features.ClassLabel(names=class_names)} if class_names else {}

  def _info(builder: Any) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=builder, description=f"Copies with a shorter side of at most {copying.shorter_side} pixels.",
      features=tfds.features.FeaturesDict({"image": tfds.features.Image(encoding_format="jpeg"), **labels}),
      supervised_keys=("image", "label") if labels else None,
      disable_shuffling=True)  # the records keep the order of the source

  def _split_generators(_: Any, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    del dl_manager
    return {split: _examples(source, split) for split, source in sources.items()}

  def _examples(source: Source, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for key, (file, label) in enumerate(copies(source, split, copying)):
      yield key, {"image": file, **({"label": label} if labels else {})}

  kind = type(name, (tfds.core.GeneratorBasedBuilder,), {
    "name": name, "VERSION": tfds.core.Version(VERSION), "_info": _info, "_split_generators": _split_generators,
    "_generate_examples": _examples, "pkg_dir_path": None}, skip_registration=True)
  return kind(data_dir=root)
