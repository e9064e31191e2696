"""A source that reads a TensorFlow Datasets (TFDS) set from array_record files, without TensorFlow.

Record i is the i-th stored record of the split. TFDS shuffles the records once, when it prepares a set. The order is
therefore a property of the files on disk, and the fingerprint is computed from these files.
"""

import concurrent.futures
import contextlib
import copy
import difflib
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

import numpy as np
import tensorflow_datasets as tfds

from pirl_jax.data.builders import OWN_BUILDERS
from pirl_jax.data.builders.downloads import bounded_downloads
from pirl_jax.data.crops import BrokenImage, decode
from pirl_jax.data.reading import read_record, retried
from pirl_jax.data.records import DAMAGED, Record, Source, printable
from pirl_jax.data.sources import DataSettings
from pirl_jax.errors import UserError
from pirl_jax.storage.files import locked

_T = TypeVar("_T")

_LABEL_THREADS = 8
_SAMPLED_RECORDS = 16  # number of records whose pixels go into the fingerprint

FAILED_CALL = re.compile(r"\w+\(\) failed: ([^;]*)")
"""What array_record says, in a RuntimeError, if the system could not open, read or write a file."""

_FEATURES = "tensorflow_datasets.core.features."
"""Only classes of features below this package are loaded for a features.json."""


class TfdsSource(Source):
  """One split of the TFDS data set `name` ("cifar10", "imagenet2012:5.1.0", "set/config").

  The images are the set's image feature, and the labels are its class-label feature. If the set has several such
  features, the one among its supervised keys is taken. A set without a class-label feature has no labels.

  Args:
    name: as for `tfds.builder`.
    data_dir: TFDS's data directory, "" for TFDS's default.
    split: in TFDS's notation, "train" or "train[:10%]".

  Raises:
    UserError: the name or the split is unknown, the set has no image feature, the set cannot be prepared here, or the
      files on disk have a format without random access.
  """

  slow_labels = True

  @classmethod
  def open(cls, settings: DataSettings, class_names: tuple[str, ...] | None) -> Self:
    """Opens the set; `class_names` is not used, because a TFDS set has its own class names."""
    del class_names
    return cls(settings.name, data_dir=settings.root, split=settings.split)

  def __init__(self, name: str, *, data_dir: str, split: str) -> None:
    builder = _builder(name, data_dir)
    if not os.path.exists(builder.data_dir):
      _prepare(builder, name)
      builder = _builder(name, data_dir)  # reads what is on disk now, whichever process prepared it
    _check_format(builder)
    self._split = split
    num_records = _num_records(builder, split)
    image = _only(builder, tfds.features.Image)
    if image is None:
      raise UserError(
        f"TFDS set {builder.info.full_name} has no image feature, or several: {list(builder.info.features)}"
      )
    self._image, self._label = image, _only(builder, tfds.features.ClassLabel)
    self._present, self._present_easily = _label_sets(builder)
    self._cached_labels: np.ndarray | None = None
    self._cached_targets: np.ndarray | None = None
    self.multi_label = self._present is not None
    names = self._label or self._present
    self.class_names = tuple(builder.info.features[names].names) if names else ()
    self._shards = [(str(shard.filename), shard.take) for shard in builder.info.splits[split].file_instructions]
    try:
      self._sizes = {path: os.stat(path).st_size for path, _ in self._shards}
      self._records = builder.as_data_source(
        split, decoders={image: tfds.decode.SkipDecoding()}, file_format="array_record"
      )
    except (OSError, RuntimeError, ValueError, IndexError) as error:
      raise _damaged(builder, error) from error
    sampled, problem = _sampled(self)
    if not sampled:
      raise _damaged(builder, problem)
    if self._label and all(record.label < 0 for record in sampled):
      self._label, self.class_names = None, ()  # a split without labels in a set with labels, as in STL-10
    digest = DAMAGED if problem else _digest(builder.info.splits[split], sampled)
    self.fingerprint = f"tfds:{builder.info.full_name}:{split}:{num_records}:{digest}"
    classes = f"{len(self.class_names)} classes" if self.class_names else "no labels"
    classes += ", any number of them in an image" if self.multi_label else ""
    self.description = (
      f"TFDS {builder.info.full_name}, split {split}: {num_records} images, {classes}, "
      f"from {printable(str(builder.data_dir))}"
    )

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Record:
    """Returns record `index`, with the bytes of the image.

    Raises:
      BrokenImage: the record is damaged.
      OSError: its shard cannot be read, or is gone.
    """
    return self._read(index, self._as_record)

  def _as_record(self, fields: dict[str, Any]) -> Record:
    return Record(fields[self._image], int(fields[self._label]) if self._label else -1)

  def _read(self, index: int, pick: Callable[[dict[str, Any]], _T]) -> _T:
    """Returns pick(the fields of the stored record `index`); raises as `__getitem__`."""
    try:
      return pick(self._records[index])
    except MemoryError:
      raise
    except Exception:  # array_record raises RuntimeErrors, and a record that does not parse nearly anything
      self._check_shard(index)
    # A reader that has failed once fails for ever, and all records of a shard have one reader: try another.
    fresh = copy.copy(self._records)
    fresh.data_source = copy.copy(fresh.data_source)
    try:
      picked = pick(fresh[index])
    except MemoryError:
      raise
    except Exception as error:
      if call := FAILED_CALL.search(str(error)):
        raise OSError(f"{printable(self._shard(index))}: {call[1]}") from error
      raise BrokenImage(f"damaged record: {' '.join(str(error).split())[:200]}") from error
    self._records = fresh
    return picked

  def _shard(self, index: int) -> str:
    """Returns the path of the file in which the stored record `index` lies."""
    for path, number in self._shards:
      if index < number:
        return path
      index -= number
    raise IndexError(index)

  def _check_shard(self, index: int) -> None:
    """Raises OSError if the shard of a record is gone, cannot be opened, or has another size than at the start."""
    path = self._shard(index)
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
      size = os.fstat(handle).st_size
    finally:
      os.close(handle)
    if size != self._sizes[path]:
      raise OSError(f"{printable(path)} has changed during the run: it had {self._sizes[path]} bytes, now {size}")

  def image_name(self, index: int) -> str:
    """Returns for example "train[12]": the split and the index of the stored record."""
    return f"{self._split}[{index}]"

  def labels(self) -> np.ndarray | None:
    """Returns i32[N], or None if the split has no labels; the first call reads every record."""
    if self._label is None:
      return None
    if self._cached_labels is None:
      with concurrent.futures.ThreadPoolExecutor(_LABEL_THREADS) as threads:
        labels = threads.map(self._read_label, range(len(self)))
        self._cached_labels = np.fromiter(labels, np.int32, len(self))
    return self._cached_labels

  def targets(self) -> np.ndarray | None:
    """Returns i8[N, C] or None, see `Source.targets`; the first call reads every record."""
    if not self.multi_label:
      return super().targets()
    if self._cached_targets is None:
      with concurrent.futures.ThreadPoolExecutor(_LABEL_THREADS) as threads:
        self._cached_targets = np.stack(list(threads.map(self._read_targets, range(len(self)))))
    return self._cached_targets

  def _read_label(self, index: int) -> int:
    """Returns the label of a record, -1 if the record is damaged."""
    try:
      return read_record(self, index).label
    except BrokenImage:
      return -1

  def _read_targets(self, index: int) -> np.ndarray:
    """Returns i8[C], zeros if the record is damaged."""
    def pick(fields: dict[Any, Any]) -> np.ndarray:
      targets = np.zeros(len(self.class_names), np.int8)
      targets[fields[self._present]] = -1
      targets[fields[self._present_easily]] = 1
      return targets

    try:
      return retried(lambda: self._read(index, pick), lambda: self.image_name(index))
    except BrokenImage:
      return np.zeros(len(self.class_names), np.int8)


def _builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
  if not name:
    raise UserError("data.name is empty; give the name of a TFDS data set, e.g. --config.data.name=cifar10")
  directory = os.path.abspath(os.path.expanduser(data_dir)) if data_dir else None
  base, _, version = name.partition(":")
  try:
    if base in OWN_BUILDERS:
      return OWN_BUILDERS[base](data_dir=directory, version=version or None)
    with _features_of_tfds_only():
      return tfds.builder(name, data_dir=directory)
  except tfds.core.DatasetNotFoundError as error:
    known = sorted({*tfds.list_builders(with_community_datasets=False), *OWN_BUILDERS})
    near = difflib.get_close_matches(base.split("/")[0], known, n=5, cutoff=0.5)
    hint = (
      f"did you mean: {', '.join(near)}?"
      if near
      else "see https://www.tensorflow.org/datasets/catalog for the names"
    )
    raise UserError(f"TFDS has no data set {printable(name)!r}; {hint}") from error
  except ImportError as error:
    raise UserError(_needs_tensorflow(name, data_dir, error)) from error
  except (ValueError, AssertionError) as error:  # an unknown config or version, a name that cannot be parsed
    raise UserError(
      f"TFDS cannot open data set {printable(name)!r}: {' '.join(str(error).split())[:400]}"
    ) from error


@contextlib.contextmanager
def _features_of_tfds_only() -> Iterator[None]:
  """A context in which TFDS imports no module that a features.json names, except those of its own features."""
  kind, before = tfds.features.FeatureConnector, vars(tfds.features.FeatureConnector)["cls_from_name"]

  def class_of(cls: type, name: str) -> type:
    if not name.startswith(_FEATURES):
      raise UserError(f"the features.json of the TFDS set names {printable(name)}, which is no feature of TFDS, and is "
                      "not imported; take the set from another place")
    return before.__func__(cls, name)

  kind.cls_from_name = classmethod(class_of)  # pyrefly: ignore[bad-assignment]  # it does not know classmethods
  try:
    yield
  finally:
    kind.cls_from_name = before


def _damaged(builder: tfds.core.DatasetBuilder, error: Exception | None) -> UserError:
  return UserError(
    f"the files of TFDS set {builder.info.full_name} in {printable(str(builder.data_dir))} are damaged or missing "
    f"({printable(' '.join(str(error).split())[:200])}); bring them back, or move that folder away and start again")


def _prepare(builder: tfds.core.DatasetBuilder, name: str) -> None:
  """Prepares the set. If another process is preparing the set at the same time, waits for that process instead."""
  try:
    folder = pathlib.Path(builder.data_dir).parent
    with locked(folder):
      left = sorted(path.name for path in folder.glob("incomplete.*"))
      if left:
        print(f"unfinished preparations, which can be deleted, lie in {printable(str(folder))}: {', '.join(left)}")
      if not os.path.exists(builder.data_dir):
        with bounded_downloads():
          builder.download_and_prepare(file_format="array_record")
  except UserError:
    raise
  except ImportError as error:
    raise UserError(_needs_tensorflow(name, builder.data_dir_root, error)) from error
  except Exception as error:  # no network, no space, files to be fetched by hand: the message names the cause
    # A process of another machine has prepared the set at the same time, on a file system without locks.
    if os.path.exists(builder.data_dir):
      return
    raise UserError(
      f"TFDS set {builder.info.full_name} is not in {builder.data_dir_root} and cannot be prepared there "
      f"({type(error).__name__}: {' '.join(str(error).split())[:600]}); "
      f"prepare it where that is possible: {_build_command(name, builder.data_dir_root)}"
    ) from error


def _build_command(name: str, data_dir: str | os.PathLike[str]) -> str:
  directory = f" --data_dir={data_dir}" if data_dir else ""
  return (
    f"pip install tensorflow importlib_resources && tfds build {name} --file_format=array_record{directory}"
  )


def _needs_tensorflow(name: str, data_dir: str | os.PathLike[str], error: ImportError) -> str:
  missing: BaseException | None = error
  # TFDS raises the error again without the name of the missing package; an earlier error of the chain has the name.
  while missing is not None and not getattr(missing, "name", None):
    missing = missing.__cause__ or missing.__context__
  return (
    f"TFDS needs {getattr(missing, 'name', 'another package')} once to prepare {name} (not to read it); "
    "prepare it with: "
    f"{_build_command(name, data_dir)}"
  )


def _check_format(builder: tfds.core.DatasetBuilder) -> None:
  formats = {file_format.value for file_format in builder.info.available_file_formats()}
  if "array_record" not in formats:
    raise UserError(
      f"TFDS set {builder.info.full_name} lies in {builder.data_dir} as "
      f"{', '.join(sorted(formats)) or 'nothing readable'}, which has no random access; "
      "convert it with: pip install tensorflow importlib_resources && "
      f"tfds convert_format --dataset_version_dir={builder.data_dir} --out_file_format=array_record"
    )


def _num_records(builder: tfds.core.DatasetBuilder, split: str) -> int:
  try:
    num_records = builder.info.splits[split].num_examples
  except (KeyError, ValueError) as error:
    raise UserError(
      f"TFDS set {builder.info.full_name} has no split {printable(split)!r}; "
      f"there are: {', '.join(builder.info.splits)}"
    ) from error
  if not num_records:
    raise UserError(
      f"split {printable(split)!r} of TFDS set {builder.info.full_name} is empty; choose another"
    )
  return num_records


def _only(builder: tfds.core.DatasetBuilder, kind: type) -> str | None:
  """Returns the key of the only feature of a kind, or None if there is no such feature or the choice is open.

  If there are several, the one among the set's supervised keys is taken.
  """
  keys = [key for key, feature in builder.info.features.items() if isinstance(feature, kind)]
  if len(keys) > 1:
    keys = [key for key in keys if key in (builder.info.supervised_keys or ())]
  return keys[0] if len(keys) == 1 else None


def _label_sets(builder: tfds.core.DatasetBuilder) -> tuple[str, str] | tuple[None, None]:
  """Returns the keys of two features of a multi-label set: all classes, and the classes that are not only difficult.

  A multi-label set has sequences of class labels and no single class label; for other sets the result is (None, None).
  If the set does not mark difficult objects, both keys are the same.
  """
  features = builder.info.features
  keys = [key for key, feature in features.items()
          if isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.ClassLabel)]
  if any(isinstance(feature, tfds.features.ClassLabel) for feature in features.values()):
    return None, None
  if sorted(keys) == ["labels", "labels_no_difficult"]:
    return "labels", "labels_no_difficult"
  return (keys[0], keys[0]) if len(keys) == 1 else (None, None)


def _digest(info: Any, sampled: list[Record]) -> str:
  """Returns a hash of the lengths of the shards and of the pixels of some images.

  If the order on disk differs, the hash almost surely differs. The pixels are hashed, not the stored bytes: if the same
  set is prepared twice, the fields of its records may be stored in another order.

  Args:
    info: of the split.
    sampled: the sampled records.
  """
  digest = hashlib.sha256(
    repr([(shard.skip, shard.examples_in_shard) for shard in info.file_instructions]).encode()
  )
  for image, label in sampled:
    with contextlib.suppress(BrokenImage):
      image = decode(image).tobytes()
    digest.update(image + b"%d" % label)
  return digest.hexdigest()[:32]


def _sampled(source: Source) -> tuple[list[Record], Exception | None]:
  """Returns (the sampled records that can be read, the problem of a damaged one or None).

  The sample are `_SAMPLED_RECORDS` records, evenly spaced from the first to the last.
  """
  found, problem = [], None
  for index in np.linspace(0, len(source) - 1, _SAMPLED_RECORDS).astype(int).tolist():
    try:
      found.append(read_record(source, index))
    except BrokenImage as error:
      problem = error
  return found, problem
