"""Reads the files in which weights are published, without running anything that is in them.

safetensors holds arrays alone. PyTorch's files hold pickles, in two containers: a zip since version 1.6 (July 2020),
and consecutive pickles before. A pickle can name any function of the machine; the unpickler of this file calls none of
them. It knows the few names of which tensors are made, and puts an object without any effect in the place of every
other name.
"""

import dataclasses
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from pirl_jax.errors import UserError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of a file in PyTorch's legacy container."""

STORAGES = {
  "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16, "LongStorage": np.int64,
  "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
  "BoolStorage": np.bool_, "BFloat16Storage": ml_dtypes.bfloat16}
"""The type of the numbers in each storage of PyTorch."""

DAMAGED = (pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError, OSError, EOFError, ValueError, TypeError,
           KeyError, IndexError, AttributeError, struct.error, RecursionError, MemoryError, OverflowError)
"""The errors of reading a damaged file."""


@dataclasses.dataclass(frozen=True)
class Stored:
  """An array in a file, which is read when it is asked for: the file may hold more than anybody wants.

  Attributes:
    shape: of the array.
    read: returns the array, f[...], a copy.
  """

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Storage:
  """A storage of PyTorch: numbers in a row, of which tensors are views.

  Attributes:
    key: its name in the file.
    dtype: of its numbers.
    first: number at which this view of the storage begins.
  """

  key: str
  dtype: Any
  first: int


def read_tree(path: Path) -> dict[str, Any]:
  """Returns what a file of weights holds: nested dicts and lists with `Stored` in the place of arrays.

  The container is recognised by the first bytes, not by the name of the file.

  Raises:
    UserError: the file is missing or damaged, or is none of safetensors and PyTorch's two containers.
  """
  try:
    with open(path, "rb") as file:
      start = file.read(9)
    if start[:4] == b"PK\x03\x04":
      tree = _read_zip(path)
    elif start[:1] == b"\x80":
      tree = _read_legacy(path)
    elif start[8:] == b"{":
      tree = _read_safetensors(path)
    else:
      raise UserError(f"{path} is neither safetensors nor a file of PyTorch")
  except UserError:
    raise
  except DAMAGED as error:
    raise UserError(f"{path} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]}); it is "
                    "damaged, cut short, or no file of weights") from error
  if not isinstance(tree, dict):
    raise UserError(f"{path} holds no arrays with names; give a file with the state dict of a network")
  return tree


def _read_safetensors(path: Path) -> dict[str, Any]:
  def read(name: str) -> np.ndarray:
    with safe_open(path, framework="np") as opened:
      return opened.get_tensor(name)

  with safe_open(path, framework="np") as opened:
    shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
  return {name: Stored(shape, lambda name=name: read(name)) for name, shape in shapes.items()}


def _read_zip(path: Path) -> dict[str, Any]:
  with zipfile.ZipFile(path) as archive:
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
      raise UserError(f"{path} is a zip, but not one of PyTorch: it holds {len(names)} files data.pkl")
    folder = names[0].removesuffix("data.pkl")
    # PyTorch never compresses: what is compressed may be a thousand times as long as the file.
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
      raise UserError(f"{path} is a compressed zip, which PyTorch does not write")

    def bytes_of(storage: Storage) -> bytes:
      with zipfile.ZipFile(path) as archive:
        return archive.read(f"{folder}data/{storage.key}")

    with archive.open(names[0]) as file:
      return _plain(_Inert(file, bytes_of).load())


def _read_legacy(path: Path) -> dict[str, Any]:
  places: dict[str, tuple[int, int]] = {}

  def bytes_of(storage: Storage) -> bytes:
    offset, count = places[storage.key]
    with open(path, "rb") as file:
      file.seek(offset)
      return file.read(count * np.dtype(storage.dtype).itemsize)

  with open(path, "rb") as file:
    if _Inert(file, bytes_of).load() != LEGACY_MAGIC:
      raise UserError(f"{path} is a pickle, and not one of PyTorch. Pickles such as Detectron2's are not read, because "
                      "a pickle can run any code; convert the file to safetensors with the program that wrote it")
    for _ in ("the protocol", "facts about the machine"):
      _Inert(file, bytes_of).load()
    unpickler = _Inert(file, bytes_of)
    tree = _plain(unpickler.load())
    for key in _Inert(file, bytes_of).load():
      count, = struct.unpack("<q", file.read(8))
      places[key] = file.tell(), count
      file.seek(count * np.dtype(unpickler.dtypes[key]).itemsize, 1)
    # Each array is read later; a file that has been cut short must be noticed now.
    end = file.tell()
    if end > file.seek(0, 2):
      raise EOFError("the file ends before its last array")
    return tree


class _Inert(pickle.Unpickler):
  """An unpickler that calls nothing which the pickle names.

  What it returns are dicts, lists, strings, numbers, `Stored`, and objects without any effect.
  """

  def __init__(self, file: BinaryIO | Any, bytes_of: Callable[[Storage], bytes]) -> None:
    super().__init__(file, encoding="latin1")
    self.dtypes: dict[str, Any] = {}
    self._bytes_of = bytes_of

  def find_class(self, module_name: str, global_name: str) -> Any:
    """Returns what stands for a name in the pickle. Each call makes it anew, so that no pickle can change it."""
    if (module_name, global_name) == ("collections", "OrderedDict"):
      return type("Ordered", (dict,), {})
    if (module_name, global_name) == ("torch._utils", "_rebuild_tensor_v2"):
      return lambda storage, offset, size, stride, *_: self._tensor(storage, offset, tuple(size), tuple(stride))
    if (module_name, global_name) == ("torch._utils", "_rebuild_parameter"):
      return lambda tensor, *_: tensor
    if module_name == "torch" and global_name in STORAGES:
      return type(global_name, (), {"dtype": STORAGES[global_name]})
    return _inert_class()

  def persistent_load(self, pid: Any) -> Storage:
    """Returns the storage that the pickle refers to."""
    kind, storage_type, key, _, _, *view = pid
    dtype = getattr(storage_type, "dtype", None)
    if kind != "storage" or not isinstance(key, str) or dtype is None:
      raise ValueError(f"it refers to a storage of an unknown kind: {key!r}")
    self.dtypes[key] = dtype
    first = view[0][1] if view and view[0] else 0
    return Storage(key, dtype, first)

  def _tensor(self, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Stored:
    if not isinstance(storage, Storage) or len(size) != len(stride) or min((offset, *size, *stride)) < 0:
      raise ValueError("it holds a tensor without a storage, or of an impossible shape")

    def read() -> np.ndarray:
      numbers = np.frombuffer(self._bytes_of(storage), storage.dtype)
      first = storage.first + offset
      if 0 not in size and first + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= len(numbers):
        raise UserError(f"the storage {storage.key} of a file of weights is too short for a tensor of shape {size}")
      steps = [step * numbers.itemsize for step in stride]
      return np.lib.stride_tricks.as_strided(numbers[first:], size, steps).copy()

    return Stored(size, read)


def _inert_class() -> type:
  """Returns a new class whose objects accept everything that a pickle does to an object, and do nothing."""
  def ignore(*_: Any, **__: Any) -> None:
    return None

  names = ("__init__", "__setstate__", "__setitem__", "append", "extend", "add", "update")
  made: Any = type("Inert", (), dict.fromkeys(names, ignore))
  made.__new__ = lambda cls, *_, **__: object.__new__(cls)
  made.__call__ = lambda self, *_, **__: made()
  return made


def _plain(tree: Any) -> Any:
  """Returns the tree with dicts and lists of Python itself; of everything else only `Stored` and scalars stay."""
  if isinstance(tree, dict):
    return {key: _plain(value) for key, value in dict.items(tree) if isinstance(key, str)}
  if isinstance(tree, list | tuple):
    return [_plain(value) for value in tree]
  return tree if isinstance(tree, Stored | str | int | float | bool) else None


def leaves_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Stored]]:
  """Yields (name, array) of all arrays in nested dicts, the names joined by dots."""
  for name, value in tree.items():
    if isinstance(value, Stored):
      yield prefix + name, value
    elif isinstance(value, dict):
      yield from leaves_of(value, f"{prefix}{name}.")
