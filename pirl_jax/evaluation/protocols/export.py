"""Writes the features of the images into files for other programs, as `.npz` or Parquet.

Letters: N images that can be read, D numbers of a feature, n images of a batch, H side of an image in pixels.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pirl_jax.data.records import Source
from pirl_jax.errors import UserError
from pirl_jax.evaluation.features import IN_FLIGHT, stream_features
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.layers import check_features, layer_features
from pirl_jax.evaluation.outcome import Outcome
from pirl_jax.evaluation.protocol import Evaluation, Protocol, beside
from pirl_jax.models.network import Model
from pirl_jax.runtime.progress import Progress
from pirl_jax.storage.files import replacing

NAMES_SHOWN = 10
"""Number of broken images whose names the figures hold."""

BLOCK_NUMBERS = 2**22
"""Numbers in a Parquet row group (16 MiB); a batch with more numbers makes a row group by itself."""

# write(features f32[n, D], index i32[n], label i32[n])
_Write = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class ExportSettings:
  """Which features are written, and in which format.

  Attributes:
    layer: one of `layers.layer_names`, or "embedding".
    splits: any splits of the data; () takes the training and the held-out split of the evaluation.
    format: "npz" or "parquet".

  Raises:
    UserError: the format is unknown.
  """

  layer: str
  splits: tuple[str, ...]
  format: str

  def __post_init__(self) -> None:
    if self.format not in _WRITERS:
      raise UserError(f"features.format={self.format!r} is unknown; choose one of: {', '.join(_WRITERS)}")


def export_features(model: Model, images: Images, settings: ExportSettings, *, mesh: Mesh,
                    path: str | os.PathLike) -> Outcome:
  """Writes the features of all images that can be read, in the order of their index, and returns what was written.

  - "npz" holds `features` f32[N, D], `index` i32[N], `label` i32[N], `name` str[N], `class_names` str[classes] and
    `layer` str. The file is not compressed, and np.load can read it without pickle.
  - "parquet" has the columns index i32, label i32, name, class (null for an image without a label) and features (lists
    of D floats). The metadata of the file hold `layer`, and `class_names` as JSON.

  `label` is the index of the class in `class_names`, or -1 for an image without a label. `name` is the source's name of
  the image. If an image may show several classes, there is also `targets`, i8[N, classes] or a column of lists: 1 means
  that the class is present, 0 absent, and -1 present only as a difficult object.

  The file appears only when it is complete. The first process writes it. Only a few batches or one block of features
  are in memory at a time. An `.npz` needs twice its size on the disk while it is written: the header of an array holds
  the number of rows, which is known only after the last image has been read.

  The outcome's figures: `path`, `format`, `layer`, `dtype`, `dim` (D), `num_images` (N), `num_broken`, `broken` (the
  names of the first broken images) and `features_per_second`. The last is the number of images per second, including
  reading and writing. It leaves out the first batches, which wait for the compiler, unless there are no others.

  Args:
    model: the frozen network.
    images: of one split.
    settings: the layer and the format; `splits` is not used here, because `images` are of one split already.
    mesh: the devices.
    path: the file; its folder is created.

  Raises:
    UserError: the layer is unknown, the disk has too little space, or no image can be read.
  """
  layer, format = settings.layer, settings.format
  check_features(model, (layer,), image_size=images.image_size, field="features.layer")
  forward_fn = layer_features(model.network, (layer,))
  like = jax.ShapeDtypeStruct((1, images.image_size, images.image_size, 3), jnp.float32)
  dim = jax.eval_shape(forward_fn, model.variables, like)[layer].shape[1]
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  _check_room(path, len(images), dim, format)

  source = images.source
  seen = np.zeros(len(images), bool)
  num_counted, began = 0, perf_counter()
  first_done = began
  writing = _WRITERS[format](path, dim, layer, source)
  with (writing if jax.process_index() == 0 else contextlib.nullcontext(_write_nothing) as write,
        Progress(f"features of {layer}", len(images)) as progress,
        contextlib.closing(images.test_batches()) as batches):
    for number, part in enumerate(stream_features(forward_fn, model.variables, batches, mesh)):
      if number == 0:
        first_done = perf_counter()
      if number > IN_FLIGHT:  # earlier batches had been started before the first batch was done
        num_counted += len(part.index)
      seen[part.index] = True
      write(part.features[layer], part.index, part.labels)
      progress.update(len(part.index) + part.num_broken)
    if not seen.any():
      raise UserError(f"no features to write: none of the {len(images)} images can be read")
  ended = perf_counter()
  num_images, broken = int(np.count_nonzero(seen)), np.flatnonzero(~seen)
  return Outcome(
    figures={
      "path": str(path),
      "format": format,
      "layer": layer,
      "dtype": "float32",
      "dim": dim,
      "num_images": num_images,
      "num_broken": len(broken),
      "broken": _names(source, broken[:NAMES_SHOWN]),
      "features_per_second": num_counted / (ended - first_done) if num_counted else num_images / (ended - began),
    },
    table={"images": num_images, "numbers an image": dim})


def _check_room(path: Path, num_images: int, dim: int, format: str) -> None:
  needed = 4 * num_images * dim * (2 if format == "npz" else 1)
  free = shutil.disk_usage(path.parent).free
  if needed > free:
    half = ", and --config.features.format=parquet needs half of that" if format == "npz" else ""
    raise UserError(f"{num_images} images x {dim} numbers need {needed / 1e9:.2f} GB for {format}, but "
                    f"{path.parent} has {free / 1e9:.2f} GB free; --workdir=DIR writes elsewhere{half}")


def _write_nothing(*_: np.ndarray) -> None:
  pass


def _names(source: Source, index: np.ndarray) -> list[str]:
  return [source.image_name(i) for i in index.tolist()]


def _targets(source: Source) -> np.ndarray | None:
  """Returns i8[N, classes], see `Source.targets`, or None if the images have at most one class each."""
  return source.targets() if source.multi_label else None


@contextlib.contextmanager
def _npz(path: Path, dim: int, layer: str, source: Source) -> Iterator[_Write]:
  indices, labels = [], []
  with replacing(path) as file, tempfile.TemporaryFile(dir=path.parent) as rows:
    def write(features: np.ndarray, index: np.ndarray, label: np.ndarray) -> None:
      rows.write(features.data)
      indices.append(index)
      labels.append(label)

    yield write
    rows.seek(0)
    index = np.concatenate(indices)
    arrays = {"index": index, "label": np.concatenate(labels), "name": _names(source, index),
              "class_names": source.class_names, "layer": layer}
    if (targets := _targets(source)) is not None:
      arrays["targets"] = targets[index]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
      with archive.open("features.npy", "w", force_zip64=True) as entry:
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(index), dim)}
        np.lib.format.write_array_header_1_0(entry, header)
        shutil.copyfileobj(rows, entry, 2**22)
      for name, value in arrays.items():
        with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
          array = value if isinstance(value, np.ndarray) else np.array(value, np.str_)
          np.lib.format.write_array(entry, array, allow_pickle=False)


@contextlib.contextmanager
def _parquet(path: Path, dim: int, layer: str, source: Source) -> Iterator[_Write]:
  # The import takes a tenth of a second, which only this format should cost.
  import pyarrow as pa
  from pyarrow import parquet

  fields = [("index", pa.int32()), ("label", pa.int32()), ("name", pa.string()), ("class", pa.string()),
            ("features", pa.list_(pa.float32(), dim))]
  if source.multi_label:
    fields.append(("targets", pa.list_(pa.int8(), len(source.class_names))))
  schema = pa.schema(fields, metadata={
    "layer": layer, "class_names": json.dumps(source.class_names, ensure_ascii=False)})
  block = []

  with (replacing(path) as file,
        parquet.ParquetWriter(file, schema, compression="none", use_dictionary=["label", "class"],
                              write_statistics=["index", "label"]) as writer):
    def flush() -> None:
      features, index, label = (np.concatenate(arrays) for arrays in zip(*block, strict=True))
      classes = [source.class_names[i] if i >= 0 else None for i in label.tolist()]
      columns = [pa.array(index), pa.array(label), pa.array(_names(source, index), pa.string()),
                 pa.array(classes, pa.string()), pa.FixedSizeListArray.from_arrays(features.reshape(-1), dim)]
      if (targets := _targets(source)) is not None:
        columns.append(pa.FixedSizeListArray.from_arrays(targets[index].reshape(-1), targets.shape[1]))
      writer.write_table(pa.table(columns, schema=schema))
      block.clear()

    def write(features: np.ndarray, index: np.ndarray, label: np.ndarray) -> None:
      block.append((features, index, label))
      if sum(features.size for features, _, _ in block) >= BLOCK_NUMBERS:
        flush()

    yield write
    if block:
      flush()


_WRITERS = {"npz": _npz, "parquet": _parquet}


def _measure(evaluation: Evaluation) -> Outcome:
  """Writes the features of all splits that the settings name, and returns what was written."""
  settings, data = evaluation.settings, evaluation.data
  known = {data["split"]: evaluation.train}
  if evaluation.test is not None:  # if there is no held-out split, its name is "", which would mean a whole folder
    known[data["test_split"] or "held_out"] = evaluation.test
  splits, whole = tuple(settings.splits) or tuple(known), "train" if data["holdout"] else "all"
  images = {split: known.get(split) or evaluation.open_split(split) for split in splits}
  found = {
    split: export_features(
      evaluation.subject.model, part, settings, mesh=evaluation.mesh,
      path=beside(evaluation, re.sub(r"[^A-Za-z0-9_.]+", "_", split) or whole, settings.format))
    for split, part in images.items()}
  return Outcome(
    figures={"splits": {split: outcome.figures for split, outcome in found.items()},
             "written": [outcome.figures["path"] for outcome in found.values()]},
    table={f"{split or 'all'}, {row}": value
           for split, outcome in found.items() for row, value in outcome.table.items()})


def _check(evaluation: Evaluation) -> None:
  check_features(evaluation.subject.model, (evaluation.settings.layer,), image_size=evaluation.train.image_size,
                 field="features.layer")


PROTOCOL = Protocol(ExportSettings, _measure, _check, share=False)
