"""Batches of crops for pre-training, batches of whole images for evaluation.

Letters: B global batch, b this process's part of the global batch, N images, H W S sides in pixels.

A training batch is a function of (seed, step) alone. A run can therefore resume at step s without any saved state:
the stream is built again and its first s batches are skipped. The number of threads and the number of processes do
not change the batches.
"""

import atexit
import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import grain
import numpy as np

from pirl_jax.data.crops import OpenedImage, centre_crop, random_resized_crops, squash_resize
from pirl_jax.data.reading import read_image
from pirl_jax.data.records import Source
from pirl_jax.errors import UserError

if TYPE_CHECKING:
  import jax  # at run time only `place` needs JAX

Example = dict[str, np.ndarray | np.generic]
"""One image of a batch, by name: its crops u8[S, S, 3], and scalars."""

Batch = dict[str, np.ndarray]
"""A batch, by name: crops u8[b, S, S, 3], and arrays [b] of the scalars."""

Batches = Generator[Batch, None, None]
"""A stream of batches; its `close()` ends the reading threads."""


def steps_per_epoch(num_images: int, batch_size: int, *, partial: bool = False) -> int:
  """Returns the number of batches in an epoch.

  The batches are whole, and each epoch leaves out other images (fewer than a batch); with `partial` these images are
  one more batch.

  Raises:
    UserError: there are fewer images than a batch holds.
  """
  if not 0 < batch_size <= num_images:
    raise UserError(
      f"batch_size={batch_size}, but there are only {num_images} images: a batch never holds an image twice; "
      f"choose a batch_size from 1 to {num_images}"
    )
  return -(-num_images // batch_size) if partial else num_images // batch_size


def train_batches(
  source: Source,
  *,
  crops: Mapping[str, tuple[int, tuple[float, float]]],
  batch_size: int,
  seed: int,
  start_step: int,
  process: tuple[int, int] = (0, 1),
  num_threads: int,
  partial: bool = False,
) -> Batches:
  """Returns the endless stream of training batches from batch `start_step` on; call its `close()` when done.

  Each image is decoded once; then every entry of `crops` draws its own crop. An epoch holds no image twice, so no
  step writes a row of the bank twice. Each epoch has another order and other crops.

  Args:
    source: the images.
    crops: for each name the side S in pixels, and the range of the share of the image's area that the crop covers.
    batch_size: B, over all processes.
    seed: any integer.
    start_step: number of batches already seen.
    process: (number of this process, number of processes); each batch is cut into as many equal blocks, and the
      process gets the block of its number.
    num_threads: threads that decode; with 0 the caller's thread decodes.
    partial: True if an epoch holds every image. Images of the epoch's start then fill its last batch up.

  Returns:
    Iterator of {NAME OF CROP: u8[b, S, S, 3], "index": i32[b], "label": i32[b], "valid": bool[b]}. If an image cannot
    be read, its `valid` is False and its crops are zero. If an image has no label, its label is -1. With `partial`
    there is also "fills" bool[b], True for an image that fills the batch up.

  Raises:
    UserError: there are fewer images than a batch holds, the processes cannot share a batch equally, or a scale is
      outside of (0, 1].
  """
  for name, (_, (low, high)) in crops.items():
    if not 0 < low <= high <= 1:
      raise UserError(f"crops of {name} cover {low} to {high} of the image; choose 0 < low <= high <= 1")

  examples = _Examples(functools.partial(_crops, source, crops=dict(crops)), len(source),
                       sum(3 * size**2 for size, _ in crops.values()))
  return _train_stream(
    examples, batch_size=batch_size, seed=seed, start_step=start_step, process=process, num_threads=num_threads,
    partial=partial)


def void_batch(crops: Mapping[str, tuple[int, tuple[float, float]]], num_images: int, *, partial: bool) -> Batch:
  """Returns a batch of `train_batches` without its images: their index is -1, and the step with this batch is void.

  Args:
    crops: see `train_batches`.
    num_images: b.
    partial: see `train_batches`.
  """
  nothing = {name: np.zeros((num_images, size, size, 3), np.uint8) for name, (size, _) in crops.items()}
  numbers = {name: np.full(num_images, -1, np.int32) for name in ("index", "label")}
  flags = {name: np.zeros(num_images, bool) for name in ("valid", *(["fills"] if partial else []))}
  return {**nothing, **numbers, **flags}


def labelled_batches(
  source: Source,
  *,
  indices: np.ndarray,
  batch_size: int,
  crop: tuple[int, tuple[float, float]],
  seed: int,
  start_step: int,
  process: tuple[int, int] = (0, 1),
  num_threads: int,
) -> Batches:
  """Returns the endless stream of augmented batches with labels, for classifiers: random resized crop and flip.

  As in `train_batches`, a batch is a function of (seed, step), and each epoch has another order. An epoch holds an
  image at most once, and each epoch leaves out other images (fewer than a batch).

  Args:
    source: the images.
    indices: i[N], the records of `source` that take part.
    batch_size: B, over all processes, at most N.
    crop: side H of the crop in pixels, and the range of the share of the image's area that the crop covers.
    seed: any integer.
    start_step: number of batches already seen.
    process: see `train_batches`.
    num_threads: threads that decode; with 0 the caller's thread decodes.

  Returns:
    Iterator of {"image": u8[b, H, H, 3], "index": i32[b], "label": i32[b], "valid": bool[b]}. If an image cannot be
    read, its `valid` is False and its pixels are zero.

  Raises:
    UserError: there are fewer images than a batch holds, or the processes cannot share a batch equally.
  """
  size, scale = crop
  examples = _Examples(functools.partial(_labelled_crop, source, np.asarray(indices), size=size, scale=tuple(scale)),
                       len(indices), 3 * size**2)
  return _train_stream(
    examples, batch_size=batch_size, seed=seed, start_step=start_step, process=process, num_threads=num_threads)


def eval_batches(
  source: Source, *, batch_size: int, image_size: int, crop_fraction: float, num_threads: int, start: int = 0,
  squash: bool = False,
) -> Batches:
  """Yields every image from index `start` on, once and in order, in batches of one size; nothing is random.

  Args:
    source: the images.
    batch_size: B.
    image_size: H, side of the test crop in pixels.
    crop_fraction: see `crops.centre_crop`.
    num_threads: threads that decode; with 0 the caller's thread decodes.
    start: index of the first image.
    squash: True takes the whole image instead of its centre; see `crops.squash_resize`, which uses `crop_fraction` too.

  Returns:
    Iterator of {"image": u8[B, H, H, 3], "index": i32[B], "label": i32[B], "valid": bool[B]}. If an image cannot be
    read, its `valid` is False. The last batch is padded with rows whose `valid` is False and whose index is -1. If an
    image has no label, its label is -1.

  Raises:
    UserError: batch_size is below 1.
  """
  if batch_size < 1:
    raise UserError(f"batch_size={batch_size} in an evaluation; choose 1 or more")
  num_batches = -(-max(0, len(source) - start) // batch_size)
  crop_fn = functools.partial(_test_crop, size=image_size, fraction=crop_fraction, squash=squash)
  size = _part_size(batch_size, 3 * image_size**2, num_threads)
  read_fn = functools.partial(_test_images, source, num=size, size=image_size, crop_fn=crop_fn)
  parts = grain.MapDataset.range(start, start + num_batches * batch_size, size).map(read_fn)
  return _start(parts, batch_size // size, num_threads)


def view_batches(
  source: Source, index: np.ndarray, *, num_views: int, batch_size: int, crop: tuple[int, tuple[float, float]],
  seed: int, num_threads: int,
) -> Batches:
  """Yields several random crops of each of some images, in order. A crop depends on the seed and the image alone.

  Args:
    source: the images.
    index: i[N], the records of `source` to read.
    num_views: V, number of crops of each image, which is decoded once.
    batch_size: B, number of images of a batch.
    crop: side H of the crops in pixels, and the range of the share of the image's area that a crop covers.
    seed: any integer.
    num_threads: threads that decode; with 0 the caller's thread decodes.

  Returns:
    Iterator of {"crops": u8[B, V, H, H, 3], "index": i32[B], "valid": bool[B]}. If an image cannot be read, its `valid`
    is False. The last batch is padded with rows whose `valid` is False and whose index is -1.
  """
  size, scale = crop
  crops = {str(view): (size, scale) for view in range(num_views)}
  padding = {"crops": np.zeros((1, num_views, size, size, 3), np.uint8), "index": np.full(1, -1, np.int32),
             "valid": np.zeros(1, bool)}

  def read(position: int) -> Batch:
    if position >= len(index):
      return padding
    rng = np.random.default_rng((seed % 2**64, int(index[position])))
    example = _crops(source, int(index[position]), rng, crops=crops)
    return {"crops": np.stack([example[name] for name in crops])[np.newaxis],
            **{name: np.asarray(example[name])[np.newaxis] for name in ("index", "valid")}}

  num_batches = -(-len(index) // batch_size)
  return _start(grain.MapDataset.range(0, num_batches * batch_size).map(read), batch_size, num_threads)


def place(batch: Batch, mesh: "jax.sharding.Mesh") -> "dict[str, jax.Array]":
  """Returns the batch as global jax arrays [B, ...], split over the axis "data" of the mesh.

  Args:
    batch: the rows of this process, arrays [b, ...] by name; every process gives its own rows.
    mesh: the devices of all processes.

  Raises:
    UserError: the devices of this process cannot share its rows equally.
  """
  import jax  # imported here only: all other code of pirl_jax.data works without JAX

  from pirl_jax.runtime.mesh import split

  rows, num_devices = len(batch["index"]), len(mesh.local_devices)
  if rows % num_devices:
    raise UserError(
      f"{rows} images of a batch cannot be shared by {num_devices} devices; choose a multiple"
    )
  return {name: jax.make_array_from_process_local_data(split(mesh), value) for name, value in batch.items()}


_RUNNING = weakref.WeakSet()

CLOSING_SECONDS = 5
"""How long a stream that is closed waits for its reading threads. A read of a stalled disk never returns."""

_PART_BYTES = 2**22  # upper limit of the images read at a time: 1,365 images of 32 pixels, or 27 of 224


class _Examples(NamedTuple):
  """What a stream consists of: draw(record, rng) for `num_records` records, `num_bytes` bytes each."""

  draw: Callable[..., Example]
  num_records: int
  num_bytes: int


def _train_stream(examples: _Examples, *, batch_size: int, seed: int, start_step: int, process: tuple[int, int],
                  num_threads: int, partial: bool = False) -> Batches:
  """Returns the endless stream of batches of examples, a function of (seed, step); see `train_batches`."""
  num_batches = steps_per_epoch(examples.num_records, batch_size, partial=partial)
  process_index, process_count = process
  if batch_size % process_count:
    raise UserError(
      f"batch_size={batch_size} cannot be shared by {process_count} processes; choose a multiple of it"
    )
  order_seed, crop_seed = (int(word) for word in np.random.SeedSequence(seed % 2**64).generate_state(2))
  local_size = batch_size // process_count
  # The order of these lines is the contract. The crops come before the stream is cut: the random draws of a record
  # depend on its place in the global stream, whichever process reads the record. The cut to whole batches comes before
  # `repeat`: a batch that spans two epochs could hold an image twice. From the endless stream each process takes its
  # block of every batch, from start_step on. In the last batch of an epoch the stream's images may end; then those of
  # the epoch's start come once more.
  stream = grain.MapDataset.range(examples.num_records).shuffle(seed=order_seed).random_map(
    examples.draw, seed=crop_seed)
  num_places = num_batches * batch_size
  num_used = min(num_places, examples.num_records)
  stream = stream[:num_used].repeat()

  size = _part_size(local_size, examples.num_bytes, num_threads)

  def example(number: int) -> Example:
    step, position = divmod(number, local_size)
    epoch, place = divmod(step * batch_size + process_index * local_size + position, num_places)
    found = stream[epoch * num_used + place % num_used]
    assert found is not None  # grain's filters return None, and there are none here
    return {**found, "fills": np.bool_(place >= num_used)} if partial else found

  def read(number: int) -> Batch:
    if size == 1:  # spares a copy
      return {name: np.asarray(value)[np.newaxis] for name, value in example(number).items()}
    part = [example(number + other) for other in range(size)]
    return {name: np.stack([one[name] for one in part]) for name in part[0]}

  first, end = start_step * local_size, len(stream) // process_count
  return _start(grain.MapDataset.range(first, end, size).map(read), local_size // size, num_threads)


def _start(parts: grain.MapDataset, parts_per_batch: int, num_threads: int) -> Batches:
  """Returns the running stream: threads read parts up to two batches ahead, and one more thread joins the parts."""
  buffer = 2 * parts_per_batch if num_threads else 0
  read = parts.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffer))
  batches = read.batch(parts_per_batch, batch_fn=_join)
  if num_threads:
    batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1)
  stream = _stream(batches)
  _RUNNING.add(stream)
  return stream


def _stream(batches: grain.IterDataset) -> Batches:
  running, patience = iter(batches), CLOSING_SECONDS
  try:
    yield from running
  except UserError as error:  # grain has added lines of its own
    raise type(error)(str(error).partition("\n")[0]) from error
  except (SystemExit, KeyboardInterrupt):  # by a signal: there may be little time
    patience = 0
    raise
  finally:
    closing = threading.Thread(target=running.close, daemon=True)
    closing.start()
    closing.join(patience)


@atexit.register
def _close_all() -> None:
  """Closes the streams that are still open: grain's threads must not run while the interpreter shuts down."""
  for stream in list(_RUNNING):
    with contextlib.suppress(ValueError):  # a daemon thread is reading the stream; that thread ends with the process
      stream.close()


def _crops(source: Source, index: int, rng: np.random.Generator, *,
           crops: Mapping[str, tuple[int, tuple[float, float]]]) -> Example:
  cut, label = read_image(source, index, lambda image: random_resized_crops(rng, image, crops))
  return {
    **(cut or {name: np.zeros((size, size, 3), np.uint8) for name, (size, _) in crops.items()}),
    "index": np.int32(index),
    "label": np.int32(label),
    "valid": np.bool_(cut is not None),
  }


def _labelled_crop(
  source: Source, indices: np.ndarray, position: int, rng: np.random.Generator, *, size: int, scale: tuple[float, float]
) -> Example:
  index = int(indices[position])
  example = _crops(source, index, rng, crops={"image": (size, scale)})
  if example["valid"] and rng.random() < 0.5:
    example["image"] = np.ascontiguousarray(np.fliplr(example["image"]))
  return example


def _part_size(batch_size: int, num_bytes: int, num_threads: int) -> int:
  """Returns how many images of `num_bytes` bytes are read at a time, a divisor of `batch_size`.

  Each hand-over between grain's threads costs up to a quarter of a millisecond, fifty times the cost of a small image
  that is already in memory. Reading many images at a time saves these hand-overs. Two limits hold: every thread gets a
  part of the batch, and photographs are read only a few at a time.
  """
  most = min(_PART_BYTES // num_bytes, batch_size // max(1, num_threads))
  return max(size for size in range(1, max(1, most) + 1) if batch_size % size == 0)


def _join(parts: Sequence[Batch]) -> Batch:
  """Returns the parts as one batch: the arrays of each name joined along the first axis."""
  if len(parts) == 1:
    return parts[0]
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _test_crop(image: OpenedImage, *, size: int, fraction: float, squash: bool) -> np.ndarray:
  """Returns u8[H, H, 3], the whole image or its centre, see `eval_batches`."""
  shrunk = min(image.height, image.width) / round(size / fraction)
  pixels = image.pixels(image.reduction(shrunk))
  # An image that has the size already is its own crop. The general way would take a third of the time of such an image.
  if fraction == 1 and pixels.shape[:2] == (size, size):
    return pixels
  return (squash_resize if squash else centre_crop)(pixels, size=size, fraction=fraction)


def _test_images(source: Source, first: int, *, num: int, size: int,
                 crop_fn: Callable[[OpenedImage], np.ndarray]) -> Batch:
  """Returns `num` images from index `first` on as a batch; rows behind the last image of `source` are padding."""
  images = np.empty((num, size, size, 3), np.uint8)
  index, labels = np.full(num, -1, np.int32), np.full(num, -1, np.int32)
  valid = np.zeros(num, bool)
  num_there = max(0, min(num, len(source) - first))
  for row in range(num_there):
    crop, labels[row] = read_image(source, first + row, crop_fn)
    if crop is not None:
      images[row], valid[row] = crop, True
  index[:num_there] = np.arange(first, first + num_there)
  images[~valid] = 0
  return {"image": images, "index": index, "label": labels, "valid": valid}
