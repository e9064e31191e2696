"""A source that reads a folder of images, nested or flat.

Record i is the i-th image in the order of the relative paths. Paths are compared byte by byte, so the order does not
depend on the file system or the locale.
"""

import collections
import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from pirl_jax.data.crops import FORMATS, BrokenImage
from pirl_jax.data.reading import retried
from pirl_jax.data.records import Record, Source, printable
from pirl_jax.data.sources import DataSettings
from pirl_jax.errors import UserError

ENDINGS: dict[str, tuple[str, ...]] = {"common": (".jpg", ".jpeg", ".png", ".webp", ".bmp")}
"""The endings of image files, in lower case, for each value of `data.formats`."""
ENDINGS["all"] = (*ENDINGS["common"], ".jfif", ".jpe", ".tif", ".tiff", ".gif", ".avif",
                  *((".heic", ".heif") if "HEIF" in FORMATS else ()))

_NAMES_SHOWN = 3  # names in a message, of the files that were left out for one reason

_BY_ENDING = "not an image by its ending"

MAX_BYTES = 2**30
"""A larger file is broken and is not read: no image of a possible size fills it."""

_OF_THE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
"""Errors that may concern a single file, and may also mean that its whole folder is gone or cannot be read."""

_NEIGHBOURS = 8  # images of the same folder that are tried if one of them may not be read

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
    root: the folder. Links are followed; a folder or an image to which several paths lead is read once.
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
    self._folders: dict[str, tuple[int, int]] = {}
    found = sorted(_walk(self._root, endings, left_out, self._folders), key=lambda item: os.fsencode(item[0]))
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
    """Returns record `index`, with the bytes of the file.

    Raises:
      BrokenImage: the file alone is gone, or is no file any more, or may not be read.
      OSError: the file cannot be read for another reason, for example because its whole folder is gone.
    """
    try:
      content = read_file(os.path.join(self._root, self._paths[index]))
    except OSError as error:
      if error.errno in _OF_THE_FILE and (reason := self._why_gone(index)):
        raise BrokenImage(reason) from error
      raise
    return Record(content, -1 if self._labels is None else int(self._labels[index]))

  def _why_gone(self, index: int) -> str:
    """Returns why this image alone cannot be opened, "" if its whole folder may be concerned; looks afresh.

    Raises:
      OSError: the folder is gone, is another one than at the start (as after an unmount), or cannot be listed.
    """
    path = os.path.join(self._root, self._paths[index])
    folder, name = os.path.split(path)
    shown = printable(folder)
    try:
      names, now = os.listdir(folder), _identity(folder)
    except OSError as error:
      raise OSError(error.errno, f"{shown} has vanished during the run: {error.strerror}") from error
    if name not in names:
      if now != self._folders[os.path.dirname(self._paths[index])]:
        raise OSError(errno.ENOENT, f"{shown} is another folder than at the start, and the image is not in it")
      return "No such file or directory"
    try:
      status = os.stat(path)
    except OSError as error:  # a link that leads nowhere; if its target's folder is empty, a disk may not be mounted
      if error.errno == errno.ELOOP:
        return os.strerror(errno.ELOOP)
      target = os.path.realpath(path)
      beside = os.listdir(os.path.dirname(target))
      return "No such file or directory" if beside and os.path.basename(target) not in beside else ""
    if not stat.S_ISREG(status.st_mode):
      return "Is a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
    if any(_opens(os.path.join(self._root, other)) for other in self._neighbours(index)):
      return "Permission denied"
    return "" if _may_read(status) else "Permission denied"

  def _neighbours(self, index: int) -> list[str]:
    """Returns the paths of some other images of the same folder."""
    near = self._paths[max(0, index - _NEIGHBOURS):index + _NEIGHBOURS + 1]
    folder = os.path.dirname(self._paths[index])
    return [path for path in near if path != self._paths[index] and os.path.dirname(path) == folder]

  def image_name(self, index: int) -> str:
    """Returns the path below the split's folder."""
    return printable(self._paths[index])

  def listing(self) -> list[str] | None:
    """Returns a line "SIZE PATH" for every image, with the size in bytes."""
    return [f"{size} {printable(path)}" for size, path in zip(self._sizes, self._paths, strict=True)]

  def sizes(self) -> np.ndarray:
    """Returns i64[N], the bytes of each file."""
    return np.array(self._sizes, np.int64)

  def holds(self, path: str | os.PathLike[str]) -> bool:
    """Returns whether an image that is written below `path` would be an image of this folder."""
    folders = {os.path.realpath(os.path.join(self._root, folder)) for folder in self._folders}
    above = os.path.realpath(path)
    while above not in folders:
      above, name = os.path.split(above)
      if not name or name.startswith("."):
        return False
    return True

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
  def listed() -> list[str] | OSError:
    try:
      return os.listdir(folder)
    except OSError as error:
      if error.errno in _OF_THE_FILE:
        return error
      raise

  found = retried(listed, lambda: printable(folder))
  if isinstance(found, OSError):
    raise UserError(
      f"the files of {printable(folder)} cannot be listed ({found.strerror}); "
      "make the folder readable or move it away"
    ) from found
  return found


def read_file(path: str) -> bytes:
  """Returns the bytes of a file.

  Raises:
    BrokenImage: it is no regular file, or has more than `MAX_BYTES` bytes.
    OSError: it cannot be read.
  """
  handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a named pipe would wait for a writer
  try:
    status = os.fstat(handle)
    if stat.S_ISDIR(status.st_mode):
      raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
      raise BrokenImage("not a regular file")
    if status.st_size > MAX_BYTES:
      raise BrokenImage(f"{status.st_size:,} bytes are too many")
    with open(handle, "rb", closefd=False) as file:
      content = file.read()
  finally:
    os.close(handle)
  if len(content) < status.st_size:
    raise OSError(errno.EIO, f"{printable(path)} ended early")
  return content


def _opens(path: str) -> bool:
  try:
    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
  except OSError:
    return False
  return True


def _may_read(status: os.stat_result) -> bool:
  """Returns whether the owner and the mode of a file allow this process to read it."""
  if os.geteuid() == 0:
    return True
  if os.geteuid() == status.st_uid:
    return bool(status.st_mode & stat.S_IRUSR)
  grouped = status.st_gid in (os.getegid(), *os.getgroups())
  return bool(status.st_mode & (stat.S_IRGRP if grouped else stat.S_IROTH))


def _walk(root: str, endings: Sequence[str], left_out: dict[str, list[str]],
          folders: dict[str, tuple[int, int]]) -> Iterator[tuple[str, int]]:
  """Yields (relative path, size in bytes) of every image; the other files are added to `left_out`, by reason.

  Files with one of the `endings`, in lower case, are images. The identity of every folder is added to `folders`, by its
  relative path.

  Whatever links lead to it, a folder is read once, and a file is one image. The folders inside of `root` come first,
  then the links to folders in the order of their paths, then the links to files. A stack replaces recursion, because
  Python limits the depth of recursion.
  """
  top = os.path.realpath(root)
  read, waiting, folder_links, file_links = {top}, [("", top)], [], []
  while waiting or folder_links:
    if not waiting:
      folder_links.sort(key=lambda link: os.fsencode(link[0]), reverse=True)
      link, above = folder_links.pop()
      target = os.path.realpath(os.path.join(root, link))
      if target in read:
        inside = above == target or above.startswith(target.rstrip("/") + "/")
        left_out["link to a folder above it" if inside else "link to a folder that is read already"].append(link)
        continue
      read.add(target)
      waiting.append((link, target))
    folder, real = waiting.pop()
    folders[folder] = _identity(os.path.join(root, folder))
    for name in _listed(os.path.join(root, folder)):
      path = f"{folder}/{name}" if folder else name
      if name.startswith("."):
        left_out["hidden"].append(path)
        continue
      status, is_link, reason = _look_at(os.path.join(root, path))
      if status is not None and stat.S_ISDIR(status.st_mode):
        if is_link:
          folder_links.append((path, real))
        elif (inner := os.path.join(real, name)) in read:
          left_out["folder that is read already, by a link"].append(path)
        else:
          read.add(inner)
          waiting.append((path, inner))
      elif status is None or not _is_image(name, endings):
        left_out[_BY_ENDING if status is not None else reason].append(path)
      elif reason:
        left_out[reason].append(path)
      elif is_link:
        file_links.append((path, status.st_size))
      else:
        yield path, status.st_size
  for path, size in sorted(file_links, key=lambda link: os.fsencode(link[0])):
    target = os.path.realpath(os.path.join(root, path))
    folder, name = os.path.split(target)
    if target in read or folder in read and _is_image(name, endings):
      left_out["link to an image that is read already"].append(path)
    else:
      read.add(target)
      yield path, size


def _is_image(name: str, endings: Sequence[str]) -> bool:
  return name[0] != "." and os.path.splitext(name)[1].lower() in endings


def _look_at(path: str) -> tuple[os.stat_result | None, bool, str]:
  """Returns (what a path leads to, whether it is a link, why it cannot be read, if so); None if it leads nowhere.

  Raises:
    UserError: the storage fails.
  """
  def look() -> tuple[os.stat_result | None, bool, str]:
    is_link = False
    try:
      status = os.lstat(path)
      if stat.S_ISLNK(status.st_mode):
        status, is_link = os.stat(path), True
    except OSError as error:
      if error.errno in _OF_THE_FILE:
        return None, False, "broken link"
      raise
    if stat.S_ISDIR(status.st_mode):
      return status, is_link, ""
    if not stat.S_ISREG(status.st_mode):
      return status, is_link, "not a regular file"
    if status.st_size == 0:
      return status, is_link, "empty file"
    if not os.access(path, os.R_OK):
      try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
      except PermissionError:
        return status, is_link, "not readable"
    return status, is_link, ""

  return retried(look, lambda: printable(path))


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
