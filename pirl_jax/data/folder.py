"""A folder of images, nested or flat, as a source.

Record i is the i-th image in the order of the relative paths, compared byte by byte, so that neither the
file system's order nor the locale has a say.
"""

import collections
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from pirl_jax.data.records import Record, Source, printable
from pirl_jax.data.sources import DataSettings
from pirl_jax.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

_NAMES_SHOWN = 3  # of the files left out, for each reason


class FolderSource(Source):
  """Every image below `root` / `split`.

  Args:
    root: the folder; links to folders are followed, loops are not.
    split: a sub-folder of it, or "" for the whole of it.
    labels: "folder" takes the first sub-folder as the class (an image outside any has label -1), "none" has
      no labels.
    class_names: classes to use instead of the sub-folders found, so that a held-out split agrees with the
      training split.

  Raises:
    UserError: no such folder, no images in it, a sub-folder that cannot be listed, labels asked for where
      there are no sub-folders, or a class that is not among `class_names`.
  """

  @classmethod
  def open(cls, settings: DataSettings, class_names: tuple[str, ...] | None) -> Self:
    """Lists the folder."""
    return cls(settings.root, split=settings.split, labels=settings.labels, class_names=class_names)

  def __init__(self, root: str, *, split: str, labels: str, class_names: tuple[str, ...] | None = None) -> None:
    self._root = _split_folder(root, split)
    shown = printable(self._root)
    left_out = collections.defaultdict(list)
    found = sorted(_walk(self._root, left_out), key=lambda item: os.fsencode(item[0]))
    if not found:
      raise UserError(
        f"no images in {shown}{_left_out_text(left_out, separator='; ')}: "
        f"files ending in {', '.join(ENDINGS)} are read; point data.root (and data.split) at them"
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

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> Record:
    label = -1 if self._labels is None else int(self._labels[index])
    try:
      with open(os.path.join(self._root, self._paths[index]), "rb") as file:
        return Record(file.read(), label)
    except FileNotFoundError as error:
      # One file gone is a broken image; the whole folder gone (a disk unmounted, say) must not pass for a
      # million of them.
      if not os.path.isdir(self._root):
        raise UserError(
          f"{printable(self._root)} has vanished during the run; bring it back and start again"
        ) from error
      raise

  def image_name(self, index: int) -> str:
    """Returns the path below the split's folder."""
    return printable(self._paths[index])

  def listing(self) -> list[str] | None:
    """Returns "SIZE PATH" of every image, the size in bytes."""
    return [f"{size} {printable(path)}" for size, path in zip(self._sizes, self._paths, strict=True)]

  def labels(self) -> np.ndarray | None:
    """Returns i32[N] or, without class folders, None."""
    return self._labels


def _split_folder(root: str, split: str) -> str:
  if not root:
    raise UserError(
      "data.root is empty; give the folder of images, e.g. --config.data.root=/path/to/images"
    )
  root = os.path.abspath(os.path.expanduser(root))
  if not os.path.isdir(root):
    raise UserError(f"data.root={printable(root)} is not a folder; give the folder of images")
  folder = os.path.join(root, split)
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


def _walk(root: str, left_out: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
  """Yields (relative path, size in bytes) of every image; what is left out is noted by its reason.

  A deep tree must not meet Python's limit of recursion, hence the stack. A link is a loop when it leads to
  one of the folders above it; the same folder met twice side by side is meant so.
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
      elif os.path.splitext(name)[1].lower() not in ENDINGS:
        left_out["not an image by its ending"].append(path)
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
    lines.append(
      f"{separator}left out, {reason}: {len(paths)} ({names}{', ...' if len(paths) > _NAMES_SHOWN else ''})"
    )
  return "".join(lines)


def _label(paths: Sequence[str], shown: str, class_names: tuple[str, ...] | None) -> tuple[np.ndarray, tuple[str, ...]]:
  """Returns (labels i32[N], class names): the first part of each path, -1 for an image that lies in no
  sub-folder."""
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
        "both splits need the same sub-folders"
      )
  number = {name: number[printable(name)] for name in found} | {None: -1}
  return np.array([number[name] for name in classes], np.int32), tuple(class_names)
