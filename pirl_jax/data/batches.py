"""Batches of crops for pre-training, batches of whole images for evaluation.

Letters: B global batch, b this process's part of it, N images, H W S sides in pixels.

A training batch is a function of (seed, step) alone. Nothing has to be saved to go on from step s: the stream
is built again and cut off before batch s. Neither the number of threads nor that of processes changes it.
"""

import atexit
import contextlib
import functools
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING

import grain
import numpy as np

from pirl_jax.data.crops import BrokenImage, centre_crop, decode, random_resized_crop, squash_resize
from pirl_jax.data.records import Source
from pirl_jax.errors import UserError

if TYPE_CHECKING:
  import jax  # `place` alone needs it at run time

Example = dict[str, np.ndarray | np.generic]
"""One image of a batch: crops u8[S, S, 3], and scalars."""

Batch = dict[str, np.ndarray]
"""Crops u8[b, S, S, 3], and b of each scalar."""

Batches = Generator[Batch, None, None]
"""Its `close()` ends the threads that read."""


def steps_per_epoch(num_images: int, batch_size: int) -> int:
  """Returns the number of whole batches in an epoch; the images left over are others in each epoch.

  Raises:
    UserError: fewer images than a batch.
  """
  if not 0 < batch_size <= num_images:
    raise UserError(
      f"batch_size={batch_size}, but there are only {num_images} images: a batch never holds an image twice; "
      f"choose a batch_size from 1 to {num_images}"
    )
  return num_images // batch_size


def train_batches(
  source: Source,
  *,
  crops: Mapping[str, tuple[int, tuple[float, float]]],
  batch_size: int,
  seed: int,
  start_step: int,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int,
) -> Batches:
  """Returns the endless stream of training batches from batch `start_step` on; call its `close()` when done.

  Each image is decoded once and cropped as often as there are `crops`, independently. Within an epoch no image
  comes twice, so that no row of the bank is written twice by one step; each epoch has another order and other crops.

  Args:
    crops: for each name the side S in pixels, and the range of the share of the image's area that the crop covers.
    batch_size: B, over all processes.
    seed: any integer. start_step: batches already seen.
    process_index, process_count: this process gets that block of each batch, of process_count blocks.
    num_threads: threads that decode; 0 works in the caller's thread.

  Returns:
    Iterator of {NAME OF CROP: u8[b, S, S, 3], "index": i32[b], "label": i32[b], "valid": bool[b]}. Where `valid` is
    False the image could not be read and its crops are zero; label is -1 where there is none.

  Raises:
    UserError: fewer images than a batch, a batch that the processes cannot share, a scale outside of (0,
      1].
  """
  for name, (_, (low, high)) in crops.items():
    if not 0 < low <= high <= 1:
      raise UserError(f"crops of {name} cover {low} to {high} of the image; choose 0 < low <= high <= 1")

  crop_fn = functools.partial(_crops, source, crops=dict(crops))
  return _train_stream(
    crop_fn, len(source), batch_size=batch_size, seed=seed, start_step=start_step, process_index=process_index,
    process_count=process_count, num_threads=num_threads)


def labelled_batches(
  source: Source,
  *,
  indices: np.ndarray,
  batch_size: int,
  crop: tuple[int, tuple[float, float]],
  seed: int,
  start_step: int,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int,
) -> Batches:
  """Returns the endless stream of augmented batches with labels, for classifiers: random resized crop and flip.

  Like `train_batches` a function of (seed, step), each epoch in another order; an image comes at most once in an
  epoch, and the images left over are others in each.

  Args:
    source: the images.
    indices: i[N], those of its records that take part.
    batch_size: B, over all processes, at most N.
    crop: its side H in pixels, and the range of the share of the image's area that it covers.
    seed: any integer.
    start_step: batches already seen.
    process_index, process_count: see `train_batches`.
    num_threads: threads that decode; 0 works in the caller's thread.

  Returns:
    Iterator of {"image": u8[b, H, H, 3], "index": i32[b], "label": i32[b], "valid": bool[b]}; `valid` is False, and the
    image zero, where the image could not be read.

  Raises:
    UserError: fewer images than a batch, or a batch that the processes cannot share.
  """
  size, scale = crop
  crop_fn = functools.partial(_labelled_crop, source, np.asarray(indices), size=size, scale=tuple(scale))
  return _train_stream(
    crop_fn, len(indices), batch_size=batch_size, seed=seed, start_step=start_step, process_index=process_index,
    process_count=process_count, num_threads=num_threads)


def eval_batches(
  source: Source, *, batch_size: int, image_size: int, crop_fraction: float, num_threads: int, start: int = 0,
  squash: bool = False,
) -> Batches:
  """Returns every image from index `start` on once, in order, in batches of one size; nothing is random.

  Args:
    batch_size: B. image_size: H, side of the test crop. crop_fraction: see `crops.centre_crop`.
    squash: the whole image instead of its centre, see `crops.squash_resize`; crop_fraction has a part in it too.
    num_threads: threads that decode; 0 works in the caller's thread.

  Returns:
    Iterator of {"image": u8[B, H, H, 3], "index": i32[B], "label": i32[B], "valid": bool[B]}. An image that
    cannot be read has valid False; the last batch is filled up with valid False and index -1. Label is -1
    where there is none.

  Raises:
    UserError: batch_size below 1.
  """
  if batch_size < 1:
    raise UserError(f"batch_size={batch_size} in an evaluation; choose 1 or more")
  num_batches = -(-max(0, len(source) - start) // batch_size)
  crop_fn = functools.partial(squash_resize if squash else _centre_crop, fraction=crop_fraction)
  size = _part_size(batch_size, image_size, num_threads)
  read_fn = functools.partial(_test_images, source, num=size, size=image_size, crop_fn=crop_fn)
  parts = grain.MapDataset.range(start, start + num_batches * batch_size, size).map(read_fn)
  return _start(parts, batch_size // size, num_threads, batch_fn=_join)


def place(batch: Batch, mesh: "jax.sharding.Mesh") -> "dict[str, jax.Array]":
  """Returns the batch as global jax arrays, split over the axis "data" of the mesh; each process gives its
  own rows.

  Raises:
    UserError: the rows of this process cannot be shared by its devices.
  """
  import jax  # here alone: the rest of the data room works without

  from pirl_jax.runtime.mesh import split

  rows, num_devices = len(batch["index"]), len(mesh.local_devices)
  if rows % num_devices:
    raise UserError(
      f"{rows} images of a batch cannot be shared by {num_devices} devices; choose a multiple"
    )
  return {name: jax.make_array_from_process_local_data(split(mesh), value) for name, value in batch.items()}


_RUNNING = weakref.WeakSet()

_PART_BYTES = 2**20  # at most, of the test images read at a time: 341 of 32 pixels, 6 of 224


def _train_stream(crop_fn: Callable[..., Example], num_records: int, *, batch_size: int, seed: int, start_step: int,
                  process_index: int, process_count: int, num_threads: int) -> Batches:
  """Returns the endless stream of crop_fn(record, rng) in batches, a function of (seed, step); see `train_batches`."""
  whole_batches = steps_per_epoch(num_records, batch_size)
  if batch_size % process_count:
    raise UserError(
      f"batch_size={batch_size} cannot be shared by {process_count} processes; choose a multiple of it"
    )
  order_seed, crop_seed = (int(word) for word in np.random.SeedSequence(seed % 2**64).generate_state(2))
  local_size = batch_size // process_count
  # The order of these lines is the contract. Crops before anything is cut: a record's draws follow from its place in
  # the global stream, whichever process has it. Whole batches before repeat: no batch straddles two epochs, which could
  # hold an image twice. Of the endless stream each process takes its block of every batch, from start_step on.
  stream = grain.MapDataset.range(num_records).shuffle(seed=order_seed).random_map(crop_fn, seed=crop_seed)
  stream = stream[: whole_batches * batch_size].repeat()

  def place(number: int) -> int:
    step, position = divmod(number, local_size)
    return step * batch_size + process_index * local_size + position

  first, end = start_step * local_size, len(stream) // process_count
  return _start(grain.MapDataset.range(first, end).map(lambda number: stream[place(number)]), local_size, num_threads)


def _start(records: grain.MapDataset, batch_size: int, num_threads: int,
           batch_fn: Callable[[Sequence[Batch]], Batch] | None = None) -> Batches:
  """Returns the running stream: threads read records, two batches ahead, one more puts batches together.

  `batch_fn` makes a batch of `batch_size` records; None stacks them.
  """
  buffer = 2 * batch_size if num_threads else 0
  read = records.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffer))
  batches = read.batch(batch_size, batch_fn=batch_fn)
  if num_threads:
    batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1)
  stream = _stream(batches)
  _RUNNING.add(stream)
  return stream


def _stream(batches: grain.IterDataset) -> Batches:
  running = iter(batches)
  try:
    yield from running
  finally:
    running.close()


@atexit.register
def _close_all() -> None:
  """Ends the streams that nobody closed: grain's threads must not meet a half torn down interpreter."""
  for stream in list(_RUNNING):
    with contextlib.suppress(ValueError):  # a daemon thread is inside it; the process ends it
      stream.close()


_NO_IMAGE = FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError
"""What there is instead of a file that was there when the run began."""


def _read(source: Source, index: int) -> tuple[np.ndarray | None, int]:
  """Returns (u8[H, W, 3] or None for an image that cannot be read, label).

  Raises:
    UserError: not the image is at fault but the disk or the network.
  """
  label = -1
  try:
    record = source[index]
    label = record.label
    return decode(record.image), label
  except (BrokenImage, *_NO_IMAGE):
    return None, label
  # A disk that fails is no property of the image and must not drop it from the training.
  except OSError as error:
    raise UserError(f"{source.image_name(index)} cannot be read because the disk or the network fails "
                    f"({error.strerror or error}); once it is back, or the file is there again from a copy, the same "
                    "command goes on") from error


def _crops(source: Source, index: int, rng: np.random.Generator, *,
           crops: Mapping[str, tuple[int, tuple[float, float]]]) -> Example:
  image, label = _read(source, index)
  return {
    **{name: np.zeros((size, size, 3), np.uint8) if image is None
       else random_resized_crop(rng, image, size=size, scale=scale) for name, (size, scale) in crops.items()},
    "index": np.int32(index),
    "label": np.int32(label),
    "valid": np.bool_(image is not None),
  }


def _labelled_crop(
  source: Source, indices: np.ndarray, position: int, rng: np.random.Generator, *, size: int, scale: tuple[float, float]
) -> Example:
  index = int(indices[position])
  image, label = _read(source, index)
  if image is None:
    crop = np.zeros((size, size, 3), np.uint8)
  else:
    crop = random_resized_crop(rng, image, size=size, scale=scale)
    if rng.random() < 0.5:
      crop = np.ascontiguousarray(crop[:, ::-1])
  return {
    "image": crop,
    "index": np.int32(index),
    "label": np.int32(label),
    "valid": np.bool_(image is not None),
  }


def _part_size(batch_size: int, image_size: int, num_threads: int) -> int:
  """Returns how many test images are read at a time, a divisor of B.

  Each hand-over between grain's threads costs up to a quarter of a millisecond, fifty times what a small image does
  that lies in memory. But every thread has a part of the batch, and photographs still come a few at a time.
  """
  most = min(_PART_BYTES // (3 * image_size**2), batch_size // max(1, num_threads))
  return max(size for size in range(1, max(1, most) + 1) if batch_size % size == 0)


def _join(parts: Sequence[Batch]) -> Batch:
  """Returns one batch of the parts."""
  if len(parts) == 1:
    return parts[0]
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _centre_crop(image: np.ndarray, *, size: int, fraction: float) -> np.ndarray:
  # Such an image is its own crop; to work that out would be a third of what it costs.
  return image if fraction == 1 and image.shape[:2] == (size, size) else centre_crop(
    image, size=size, fraction=fraction)


def _test_images(source: Source, first: int, *, num: int, size: int,
                 crop_fn: Callable[..., np.ndarray]) -> Batch:
  """Returns the images from `first` on as a batch of `num`; those behind the last one are padding."""
  images = np.empty((num, size, size, 3), np.uint8)
  index, labels = np.full(num, -1, np.int32), np.full(num, -1, np.int32)
  valid = np.zeros(num, bool)
  num_there = max(0, min(num, len(source) - first))
  for row in range(num_there):
    image, labels[row] = _read(source, first + row)
    if image is not None:
      images[row] = crop_fn(image, size=size)
      valid[row] = True
  index[:num_there] = np.arange(first, first + num_there)
  images[~valid] = 0
  return {"image": images, "index": index, "label": labels, "valid": valid}
