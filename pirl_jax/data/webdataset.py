"""A source that reads images from WebDataset shards: tar files, in which a sample's files have one name before the dot.

Record i is the i-th image in the order of the shards' names and, in a shard, of its files. One pass over the headers
finds where each image lies. Then any image is read by itself, with one call of `os.pread`.
"""

import concurrent.futures
import contextlib
import errno
import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from pirl_jax.data.crops import BrokenImage
from pirl_jax.data.folder import MANY, MAX_BYTES, endings_of
from pirl_jax.data.records import Record, Source, printable
from pirl_jax.data.sources import DataSettings
from pirl_jax.errors import UserError
from pirl_jax.runtime.caching import cache_folder
from pirl_jax.runtime.progress import Progress
from pirl_jax.storage.files import locked, replacing

_VERSION = 1
"""Of the stored index; increased whenever the same shards would give another index."""

_THREADS = 16  # shards whose headers are read at a time: on a network most of the time is waiting

_COMPRESSED = re.compile(r"\.(tgz|tar\.\w+)$", re.IGNORECASE)

_NAMES_SHOWN = 3  # names in a message


class _Index(NamedTuple):
  """Where the N images lie.

  Attributes:
    shard: i32[N], the number of the shard.
    offset: i64[N], in bytes from the shard's start.
    size: i64[N], in bytes.
    name_end: i64[N], the end of the image's name in `names`.
    names: u8[...], the names of all images in their shards, one after the other.
    label: i32[N], index into `texts`; -1 for an image without a label.
    texts: the labels as they are stored, each once.
    left_out: by reason, how many samples were left out, and the names of some.
  """

  shard: np.ndarray
  offset: np.ndarray
  size: np.ndarray
  name_end: np.ndarray
  names: np.ndarray
  label: np.ndarray
  texts: list[str]
  left_out: dict[str, tuple[int, list[str]]]


class _Found(NamedTuple):
  """An image in a shard; `dotted` says whether there are further dots between the sample's name and the ending."""

  dotted: bool
  name: str
  offset: int
  size: int


class _Shard(NamedTuple):
  """What one shard holds: (name, offset, size, label) of each image, and the names that were left out, by reason."""

  images: list[tuple[str, int, int, str]]
  left_out: dict[str, list[str]]


class WebDatasetSource(Source):
  """The images of the shards in `root` / `split`.

  Args:
    root: a folder of shards, or a pattern of their paths: `*` and `?` as in a shell, and {000..099} and {a,b}, whose
      shards must all be there.
    split: a sub-folder of `root`, a pattern of the shards in `root`, or "".
    labels: "folder" reads the labels that lie beside the images (.cls, or "label" in .json), if there are any; "none"
      gives no labels.
    formats: a key of `folder.ENDINGS`.
    class_names: classes to use instead of the labels found, so that a held-out split has the same classes as the
      training split.

  Raises:
    UserError: there are no shards, one is missing, compressed or damaged, they hold no images, or a label cannot be
      read or is not among `class_names`.
  """

  @classmethod
  def open(cls, settings: DataSettings, class_names: tuple[str, ...] | None) -> Self:
    """Returns the source of the shards that the settings name; the first time this reads all of their headers."""
    return cls(settings.root, split=settings.split, labels=settings.labels, class_names=class_names,
               formats=settings.formats)

  def __init__(self, root: str, *, split: str, labels: str, class_names: tuple[str, ...] | None = None,
               formats: str = "common") -> None:
    endings = endings_of(formats)
    self._folder, self._shards = _find_shards(root, split)
    self._shard_sizes, index = _index_of(self._folder, self._shards, endings, labels != "none")
    shown = printable(self._folder)
    left_out = "".join(f"\n  left out, {reason}: {number} ({', '.join(names)}{', ...' * (number > len(names))})"
                       for reason, (number, names) in sorted(index.left_out.items()))
    number = len(index.shard)
    if not number:
      raise UserError(f"no images in the {len(self._shards)} shards of {shown}{left_out.replace(chr(10) + ' ', ';')}: "
                      f"files ending in {', '.join(endings)} are read; point data.root and data.split at them")
    self._index = index
    digest = hashlib.sha256("\0".join(self._shards).encode("utf-8", "surrogateescape"))
    for array in (index.shard, index.size, index.name_end, index.names):
      digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    self.fingerprint = f"webdataset:{number}:{digest.hexdigest()[:32]}"
    self._labels, self.class_names = None, ()
    if index.texts:
      self._labels, self.class_names = _label(index, shown, class_names)
    classes = f"{len(self.class_names)} classes" if self._labels is not None else "no labels"
    self.description = f"shards in {shown}: {len(self._shards)} of them, {number} images, {classes}{left_out}"
    num_out = sum(number for number, _ in index.left_out.values())
    if num_out > MANY * (num_out + number):
      self.description += f"\n  warning: {num_out / (num_out + number):.0%} of the samples were left out"

  def __len__(self) -> int:
    return len(self._index.shard)

  def __getitem__(self, index: int) -> Record:
    """Returns record `index`, with the bytes of the file in its shard.

    Raises:
      BrokenImage: the image has too many bytes.
      OSError: the shard cannot be read, has vanished or changed: its thousands of images may all be sound.
    """
    number, size = self._index.shard[index], int(self._index.size[index])
    if size > MAX_BYTES:
      raise BrokenImage(f"{size:,} bytes are too many")
    try:
      # Opened for each image: sets have more shards than a process may have open files, and copies need no open file.
      handle = os.open(os.path.join(self._folder, self._shards[number]), os.O_RDONLY | os.O_NONBLOCK)
      try:
        if (now := os.fstat(handle).st_size) != self._shard_sizes[number]:
          raise OSError(errno.ESTALE, f"{self._path(number)} has changed during the run: it had "
                        f"{self._shard_sizes[number]} bytes and has {now} now; bring it back")
        content = os.pread(handle, size, int(self._index.offset[index]))
      finally:
        os.close(handle)
    except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
      raise OSError(error.errno, f"{self._path(number)} has vanished during the run ({error.strerror})") from error
    if len(content) < size:
      raise OSError(errno.EIO, f"{self._path(number)} ended early")
    return Record(content, -1 if self._labels is None else int(self._labels[index]))

  def image_name(self, index: int) -> str:
    """Returns SHARD/NAME."""
    start, end = self._index.name_end[index - 1] if index else 0, self._index.name_end[index]
    name = self._index.names[start:end].tobytes().decode("utf-8", "surrogateescape")
    return printable(f"{self._shards[self._index.shard[index]]}/{name}")

  def listing(self) -> list[str] | None:
    """Returns a line "SIZE SHARD/NAME" for every image, with the size in bytes."""
    return [f"{size} {self.image_name(index)}" for index, size in enumerate(self._index.size)]

  def labels(self) -> np.ndarray | None:
    """Returns i32[N], or None if `labels` is "none" or no image has a label."""
    return self._labels

  def _path(self, number: int) -> str:
    return printable(os.path.join(self._folder, self._shards[number]))


def _find_shards(root: str, split: str) -> tuple[str, list[str]]:
  """Returns (a folder, the paths of the shards below it, sorted byte by byte)."""
  if not root:
    raise UserError("data.root is empty; give the folder of the shards, e.g. --config.data.root=/path/to/shards")
  root = os.path.abspath(os.path.expanduser(root))
  if os.path.isdir(os.path.join(root, split)):
    folder, names = os.path.normpath(os.path.join(root, split)), os.listdir(os.path.join(root, split))
    found = [name for name in names if name.endswith(".tar") and not name.startswith(".")]
    if compressed := sorted(filter(_COMPRESSED.search, names)):
      raise _compressed(os.path.join(folder, compressed[0]))
  else:
    folder, pattern = (root, split) if os.path.isdir(root) else _cut(os.path.join(root, split).rstrip("/"))
    found = list(itertools.chain.from_iterable(
      glob.glob(name, root_dir=folder) if glob.has_magic(name) else [name] for name in _expand(pattern)))
    there = _what_is_in(folder)
    if not re.search(r"[*?\[{]", pattern) and not os.path.exists(os.path.join(folder, pattern)):
      what = f"split {printable(split)!r}" if split else f"data.root={printable(root)}"
      raise UserError(f"{what} is neither a folder nor a pattern of shards (NAME-*.tar, NAME-{{00..99}}.tar); {there}")
  missing = [name for name in found if not os.path.isfile(os.path.join(folder, name))]
  if missing:
    raise UserError(f"{len(missing)} of {len(found)} shards are missing: {_some(folder, missing)}; bring them back")
  if not found:
    raise UserError(f"no shards in {printable(os.path.join(root, split))}: files ending in .tar are read; "
                    f"{_what_is_in(folder)}; point data.root (and data.split) at the shards")
  return folder, sorted(set(found), key=os.fsencode)


def _what_is_in(folder: str) -> str:
  names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
  return f"in {printable(folder)} there are: {', '.join(map(printable, names[:10])) or 'no files'}" + (
    ", ..." * (len(names) > 10))


def _some(folder: str, names: Sequence[str]) -> str:
  shown = ", ".join(printable(os.path.join(folder, name)) for name in names[:_NAMES_SHOWN])
  return shown + ", ..." * (len(names) > _NAMES_SHOWN)


def _cut(pattern: str) -> tuple[str, str]:
  """Returns (the folders of a path before the first part with a sign of a pattern, the rest)."""
  parts = pattern.split("/")
  first = next((number for number, part in enumerate(parts) if re.search(r"[*?\[{]", part)), len(parts) - 1)
  return "/".join(parts[:first]) or "/", "/".join(parts[first:])


def _expand(pattern: str) -> list[str]:
  """Returns the texts that a pattern with {000..099} or {a,b} stands for."""
  found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
  if not found:
    return [pattern]
  first, last, words = found.groups()
  choices = words.split(",") if words else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
  return [text for choice in choices for text in _expand(pattern[:found.start()] + choice + pattern[found.end():])]


def _compressed(path: str) -> UserError:
  return UserError(f"{printable(path)} is compressed, and a compressed tar has no random access; unpack the shards "
                   "into plain .tar files, e.g. with gunzip (images are compressed already, so they do not grow)")


def _index_of(folder: str, shards: Sequence[str], endings: Sequence[str],
              labelled: bool) -> tuple[list[int], _Index]:
  """Returns (the sizes of the shards in bytes, the index), from the cache if it has the index of these very shards."""
  facts = []
  for name in shards:
    try:
      facts.append(os.stat(os.path.join(folder, name)))
    except OSError as error:
      raise UserError(f"{_some(folder, [name])} cannot be read ({error.strerror}); repair it") from error
  sizes = [fact.st_size for fact in facts]
  which = json.dumps([_VERSION, folder, list(shards), list(endings), labelled])
  state = json.dumps([which, sizes, [fact.st_mtime_ns for fact in facts]])
  try:
    path = cache_folder() / "webdataset" / f"{hashlib.sha256(which.encode()).hexdigest()[:32]}.npz"
  except RuntimeError:  # no home, no cache
    path = None
  if path and (stored := _load(path, state)):
    return sizes, stored
  with (Progress("reading the shards' headers", len(shards), unit="shards") as progress,
        concurrent.futures.ThreadPoolExecutor(_THREADS) as threads):
    found = []
    for shard in threads.map(lambda name: _scan(os.path.join(folder, name), endings, labelled), shards):
      found.append(shard)
      progress.update()
  index = _join(found, shards)
  if path:
    _save(path, state, index)
  return sizes, index


def _load(path: Path, state: str) -> _Index | None:
  """Returns the stored index, or None if there is none, it is damaged, or the shards have changed since then."""
  try:
    with np.load(path) as stored:
      about = json.loads(stored["about"].tobytes())
      if about["state"] != state:
        return None
      arrays = {name: stored[name] for name in _Index._fields[:6]}
      return _Index(**arrays, texts=about["texts"], left_out=about["left_out"])
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None


def _save(path: Path, state: str, index: _Index) -> None:
  """Stores the index. If that is not possible, or another process is storing it, nothing is stored."""
  about = json.dumps({"state": state, "texts": index.texts, "left_out": index.left_out}).encode()
  arrays = {name: getattr(index, name) for name in _Index._fields[:6]}
  with contextlib.suppress(OSError), locked(path.parent, patience=0), replacing(path) as file:
    np.savez(file, about=np.frombuffer(about, np.uint8), **arrays)


def _scan(path: str, endings: Sequence[str], labelled: bool) -> _Shard:
  """Reads the headers of a shard, and the labels if they are asked for."""
  images: dict[str, list[_Found]] = {}
  labels: dict[str, str] = {}
  others, left_out, seen = {}, {}, set()
  try:
    with open(path, "rb") as file:
      if file.read(2) == b"\x1f\x8b":
        raise _compressed(path)
      file.seek(0)
      with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
          tar.members = []  # pyrefly: ignore[missing-attribute]  # else tarfile keeps all of them
          stem, _, ending = os.path.basename(member.name).partition(".")
          if member.isdir() or not stem:  # hidden files, such as ._NAME of macOS
            continue
          if member.name in seen:
            raise UserError(f"{printable(path)} holds {printable(member.name)} twice; write the shard again")
          seen.add(member.name)
          key, last = os.path.join(os.path.dirname(member.name), stem), "." + ending.lower().rpartition(".")[2]
          if not member.isreg() or member.issparse() or not member.size:
            left_out.setdefault("an empty file or no regular file", []).append(member.name)
          elif last in endings:
            images.setdefault(key, []).append(_Found("." in ending, member.name, member.offset_data, member.size))
          else:
            others.setdefault(key, member.name)
            if labelled and ending.lower() in ("cls", "json"):
              content = os.pread(file.fileno(), member.size, member.offset_data)
              _add_label(labels, key, ending.lower(), content, f"{printable(path)}/{printable(member.name)}")
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0") or file.tell() != tar.offset + tarfile.BLOCKSIZE:
          raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")  # tarfile would stop here in silence
  except tarfile.TarError as error:
    raise UserError(f"{printable(path)} is damaged or cut short ({error}); copy or write this shard again") from error
  except OSError as error:
    raise UserError(f"{printable(path)} cannot be read ({error.strerror or error}); repair it") from error
  without = [name for key, name in others.items() if key not in images]
  if without:
    left_out["samples without an image"] = without
  chosen = {key: _the_image(path, found) for key, found in images.items()}
  return _Shard([(image.name, image.offset, image.size, labels.get(key, "")) for key, image in chosen.items()],
                left_out)


def _add_label(labels: dict[str, str], key: str, ending: str, content: bytes, name: str) -> None:
  """Adds the label of a sample as text; one in .cls takes the place of one in .json."""
  try:
    if ending == "cls":
      labels[key] = content.decode().strip()
    elif (label := json.loads(content).get("label")) is not None:
      labels.setdefault(key, str(label))
  except (ValueError, AttributeError) as error:
    raise UserError(f"the label in {name} cannot be read ({error}); repair it, or set data.labels=none") from error


def _the_image(path: str, found: list[_Found]) -> _Found:
  """Returns the image of a sample: NAME.jpg comes before NAME.mask.png."""
  plainest = [image for image in found if image.dotted == min(other.dotted for other in found)]
  if len(plainest) > 1:
    raise UserError(f"{printable(path)} has {len(plainest)} images of one sample, "
                    f"{' and '.join(printable(image.name) for image in plainest[:2])}: a sample is what has one name "
                    "up to the first dot, and has one image; rename the files and write the shard again")
  return plainest[0]


def _join(found: Sequence[_Shard], shards: Sequence[str]) -> _Index:
  """Returns the index of all shards."""
  names = [name.encode("utf-8", "surrogateescape") for shard in found for name, _, _, _ in shard.images]
  numbers: dict[str, int] = {"": -1}
  label = [numbers.setdefault(text, len(numbers) - 1) for shard in found for _, _, _, text in shard.images]
  left_out: dict[str, tuple[int, list[str]]] = {}
  for shard_name, shard in zip(shards, found, strict=True):
    for reason, some in shard.left_out.items():
      number, before = left_out.get(reason, (0, []))
      here = [printable(f"{shard_name}/{name}") for name in some[:_NAMES_SHOWN]]
      left_out[reason] = (number + len(some), (before + here)[:_NAMES_SHOWN])
  return _Index(
    np.repeat(np.arange(len(found), dtype=np.int32), [len(shard.images) for shard in found]),
    np.array([offset for shard in found for _, offset, _, _ in shard.images], np.int64),
    np.array([size for shard in found for _, _, size, _ in shard.images], np.int64),
    np.cumsum([len(name) for name in names], dtype=np.int64), np.frombuffer(b"".join(names), np.uint8),
    np.array(label, np.int32), [text for text in numbers if text], left_out)


def _label(index: _Index, shown: str, class_names: tuple[str, ...] | None) -> tuple[np.ndarray, tuple[str, ...]]:
  """Returns (labels i32[N], class names). If all labels are numbers, they are sorted as numbers, and -1 is no label."""
  numeric = all(re.fullmatch(r"-1|\d+", text) for text in index.texts)
  texts = [str(int(text)) if numeric else printable(text) for text in index.texts]
  if class_names is None:
    class_names = tuple(sorted({*texts} - {"-1"}, key=int if numeric else str.encode))
  number = {name: label for label, name in enumerate(class_names)}
  for text in texts:
    if text not in number and text != "-1":
      raise UserError(
        f"class {text!r} of {shown} is not among the {len(class_names)} classes of the training images "
        f"({', '.join(class_names[:10])}{', ...' if len(class_names) > 10 else ''}); both splits need the same classes")
  of_text = np.array([number.get(text, -1) for text in texts] + [-1], np.int32)
  return of_text[index.label], class_names
