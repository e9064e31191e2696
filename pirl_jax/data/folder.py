"""A source that reads a folder of images, nested or flat.

Record i is the i-th image in the order of the relative paths. Paths are compared byte by byte, so the order does not
depend on the file system or the locale.
"""

import collections
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from pirl_jax.data.crops import FORMATS
from pirl_jax.data.records import Record, Source, printable
from pirl_jax.data.sources import DataSettings
from pirl_jax.errors import UserError

ENDINGS: dict[str, tuple[str, ...]] = {"common": (".jpg", ".jpeg", ".png", ".webp", ".bmp")}
"""The endings of image files, in lower case, for each value of `data.formats`."""
ENDINGS["all"] = (*ENDINGS["common"], ".jfif", ".jpe", ".tif", ".tiff", ".gif", ".avif",
                  *((".heic", ".heif") if "HEIF" in FORMATS else ()))

_NAMES_SHOWN = 3  # names in a message, of the files that were left out for one reason

_BY_ENDING = "not an image by its ending"

MANY = 0.05
"""If more than this share of the files is left out, the description says so as a warning."""


def endings_of(formats: str) -> tuple[str, ...]:
  """Returns the endings of image files, in lower case, that are read with this value of `data.formats`.

  Raises:
    UserError: the value is unknown.
  """
  if formats not in ENDINGS:
    raise UserError(f"data.formats={formats!r} is unknown; choose from {', '.join(ENDINGS)}")
  return ENDINGS[formats]


class FolderSource(Source):
  """Every image below `root` / `split`.

  Args:
    root: the folder. Links to folders are followed; a link that would form a loop is left out.
    split: a sub-folder of `root`, or "" for the whole of `root`.
    labels: "folder" takes the first sub-folder of an image's path as its class (an image outside of every sub-folder
      has label -1); "none" gives no labels.
    formats: a key of `ENDINGS`.
    class_names: classes to use instead of the sub-folders found, so that a held-out split has the same classes as the
      training split.

  Raises:
    UserError: there is no such folder, it holds no images, a sub-folder cannot be listed, labels are asked for but
      there are no sub-folders, or a class is not among `class_names`.
  """

  @classmethod
  def open(cls, settings: DataSettings, class_names: tuple[str, ...] | None) -> Self:
    """Returns the source of the folder that the settings name; this lists all of its files."""
    return cls(settings.root, split=settings.split, labels=settings.labels, class_names=class_names,
               formats=settings.formats)

  def __init__(self, root: str, *, split: str, labels: str, class_names: tuple[str, ...] | None = None,
               formats: str = "common") -> None:
    endings = endings_of(formats)
    self._root = _split_folder(root, split)
    shown = printable(self._root)
    left_out = collections.defaultdict(list)
    found = sorted(_walk(self._root, endings, left_out), key=lambda item: os.fsencode(item[0]))
    if not found:
      shards = any(path.lower().endswith(".tar") for paths in left_out.values() for path in paths)
      raise UserError(
        f"no images in {shown}, but tar files; WebDataset shards are read with --config.data.source=webdataset"
        if shards else
        f"no images in {shown}{_left_out_text(left_out, separator='; ')}: "
        f"files ending in {', '.join(endings)} are read; point data.root (and data.split) at them"
      )
    self._paths, self._sizes = zip(*found, strict=True)
    digest = hashlib.sha256()
    for path, size in found:
      digest.update(os.fsencode(path) + b"\0%d\0" % size)
    self.fingerprint = f"folder:{len(found)}:{digest.hexdigest()[:32]}"

    self._labels, self.class_names = None, ()
    if labels == "folder":
      self._labels, self.class_names = _label(self._paths, shown, class_names)
    classes = f", {len(self.class_names)} classes" if self._labels is not None else ", no labels"
    self.description = (
      f"folder {shown}: {len(found)} images{classes}{_left_out_text(left_out, separator=chr(10) + '  ')}"
    )
    number = sum(len(paths) for reason, paths in left_out.items() if reason != "hidden")
    if number > MANY * (number + len(found)):
      self.description += f"\n  warning: {number / (number + len(found)):.0%} of the files were left out"

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> Record:
    label = -1 if self._labels is None else int(self._labels[index])
    try:
      with open(os.path.join(self._root, self._paths[index]), "rb") as file:
        return Record(file.read(), label)
    except FileNotFoundError as error:
      # If one file is missing, this image counts as broken. If the whole folder is missing (for example because a disk
      # was unmounted), the run must stop instead of counting a million broken images.
      if not os.path.isdir(self._root):
        raise UserError(
          f"{printable(self._root)} has vanished during the run; bring it back and start again"
        ) from error
      raise

  def image_name(self, index: int) -> str:
    """Returns the path below the split's folder."""
    return printable(self._paths[index])

  def listing(self) -> list[str] | None:
    """Returns a line "SIZE PATH" for every image, with the size in bytes."""
    return [f"{size} {printable(path)}" for size, path in zip(self._sizes, self._paths, strict=True)]

  def sizes(self) -> np.ndarray:
    """Returns i64[N], the bytes of each file."""
    return np.array(self._sizes, np.int64)

  def labels(self) -> np.ndarray | None:
    """Returns i32[N], or None if `labels` is "none"."""
    return self._labels


def _split_folder(root: str, split: str) -> str:
  if not root:
    raise UserError(
      "data.root is empty; give the folder of images, e.g. --config.data.root=/path/to/images"
    )
  root = os.path.abspath(os.path.expanduser(root))
  if not os.path.isdir(root):
    raise UserError(f"data.root={printable(root)} is not a folder; give the folder of images")
  folder = os.path.join(root, split) if split else root
  if not os.path.isdir(folder):
    names = sorted(
      name for name in _listed(root) if os.path.isdir(os.path.join(root, name)) and name[0] != "."
    )
    there = f"there are: {', '.join(map(printable, names[:20]))}" if names else "there is none at all"
    raise UserError(
      f"split {printable(split)!r} is not a sub-folder of {printable(root)}; {there}; "
      "an empty split takes the whole folder"
    )
  return folder


def _listed(folder: str) -> list[str]:
  try:
    return os.listdir(folder)
  except OSError as error:
    raise UserError(
      f"the files of {printable(folder)} cannot be listed ({error.strerror}); "
      "make the folder readable or move it away"
    ) from error


def _walk(root: str, endings: Sequence[str], left_out: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
  """Yields (relative path, size in bytes) of every image; the other files are added to `left_out`, by reason.

  Files with one of the `endings`, in lower case, are images.

  A stack replaces recursion, because Python limits the depth of recursion. A link is a loop if it leads to one of the
  folders above the link. Two links side by side may lead to the same folder; then the images count twice.
  """
  stack: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", (_identity(root),))]
  while stack:
    folder, above = stack.pop()
    for name in _listed(os.path.join(root, folder)):
      path = f"{folder}/{name}" if folder else name
      if name.startswith("."):
        left_out["hidden"].append(path)
        continue
      try:
        status = os.stat(os.path.join(root, path))
      except OSError:
        left_out["broken link"].append(path)
        continue
      if stat.S_ISDIR(status.st_mode):
        if (status.st_dev, status.st_ino) in above:
          left_out["link to a folder above it"].append(path)
        else:
          stack.append((path, (*above, (status.st_dev, status.st_ino))))
      elif os.path.splitext(name)[1].lower() not in endings:
        left_out[_BY_ENDING].append(path)
      elif not stat.S_ISREG(status.st_mode):
        left_out["not a regular file"].append(path)
      elif status.st_size == 0:
        left_out["empty file"].append(path)
      elif not os.access(os.path.join(root, path), os.R_OK):
        left_out["not readable"].append(path)
      else:
        yield path, status.st_size


def _identity(folder: str) -> tuple[int, int]:
  status = os.stat(folder)
  return status.st_dev, status.st_ino


def _left_out_text(left_out: dict[str, list[str]], *, separator: str) -> str:
  lines = []
  for reason, paths in sorted(left_out.items()):
    names = ", ".join(printable(path) for path in sorted(paths)[:_NAMES_SHOWN])
    if reason == _BY_ENDING and len(paths) > _NAMES_SHOWN:
      counts = collections.Counter(os.path.splitext(path)[1].lower() or "without" for path in paths)
      names = ", ".join(f"{printable(ending)} {count}" for ending, count in counts.most_common(8))
      names += ", ..." * (len(counts) > 8)
    else:
      names += ", ..." * (len(paths) > _NAMES_SHOWN)
    lines.append(f"{separator}left out, {reason}: {len(paths)} ({names})")
  return "".join(lines)


def _label(paths: Sequence[str], shown: str, class_names: tuple[str, ...] | None) -> tuple[np.ndarray, tuple[str, ...]]:
  """Returns (labels i32[N], class names).

  The class of an image is the first part of its path; an image that lies in no sub-folder has label -1.
  """
  classes = [path.split("/", 1)[0] if "/" in path else None for path in paths]
  found = sorted({name for name in classes if name is not None}, key=lambda name: os.fsencode(name))
  if not found:
    raise UserError(
      f"data.labels=folder, but the images of {shown} lie in no sub-folders; "
      "sort them into one sub-folder a class, or set data.labels=none"
    )
  if class_names is None:
    class_names = tuple(printable(name) for name in found)
  number = {name: label for label, name in enumerate(class_names)}
  for name in found:
    if printable(name) not in number:
      raise UserError(
        f"class {printable(name)!r} of {shown} is not among the {len(class_names)} classes of the training "
        f"images ({', '.join(class_names[:10])}{', ...' if len(class_names) > 10 else ''}); "
        "both splits need the same sub-folders, or no labels, --config.data.labels=none"
      )
  number = {name: number[printable(name)] for name in found} | {None: -1}
  return np.array([number[name] for name in classes], np.int32), tuple(class_names)
