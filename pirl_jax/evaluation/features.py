"""Features of images by a frozen network, and batch statistics for one that has none yet.

Letters: B batch, N images with a feature, D features, H W sides.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from pirl_jax.errors import UserError
from pirl_jax.runtime.mesh import AXIS, SPLIT, WHOLE, split, whole
from pirl_jax.views.normalisation import normalise_image

IN_FLIGHT = 2
"""Batches on the devices at once: the next one is decoded while these are computed."""


class Features(NamedTuple):
  """What `extract_features` returns, in the order of `index`; from `stream_features` those of one batch.

  Attributes:
    features: f32[N, D], or a dict of such where the forward function returns one.
    labels: i32[N]; -1: unlabelled.
    index: i32[N], the records' numbers, rising.
    num_broken: images left out because they could not be read.
  """

  features: Any
  labels: np.ndarray
  index: np.ndarray
  num_broken: int


def unit_norm(features: np.ndarray) -> np.ndarray:
  """Returns f32[N, D] with rows of length one, for cosine similarity; a row of zeros stays one."""
  length = np.linalg.norm(features, axis=1, keepdims=True)
  return features / np.maximum(length, np.finfo(np.float32).tiny)


def extract_features(forward_fn: Callable[[Any, jax.Array], Any], variables: Any,
                     batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh,
                     on_batch: Callable[[int], None] | None = None) -> Features:
  """Returns the features of all images that can be read, on the host.

  Arguments as `stream_features`, and:

  Args:
    on_batch: called with the number of images of each batch, padding not counted, once it is computed.

  Raises:
    UserError: B is not a multiple of the number of devices, or there is no image that can be read.
  """
  parts = []
  for part in stream_features(forward_fn, variables, batches, mesh):
    parts.append(part)
    if on_batch is not None:
      on_batch(len(part.index) + part.num_broken)
  num_broken = sum(part.num_broken for part in parts)
  if not sum(len(part.index) for part in parts):
    raise UserError(f"no image to take features of: {num_broken} broken, none that can be read")
  features, labels, index = jax.tree.map(lambda *arrays: np.concatenate(arrays), *(part[:3] for part in parts))
  order = np.argsort(index, kind="stable")
  return Features(jax.tree.map(lambda x: x[order], features), labels[order], index[order], num_broken)


def stream_features(forward_fn: Callable[[Any, jax.Array], Any], variables: Any,
                    batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh) -> Iterator[Features]:
  """Yields the features of one batch after the other, on the host, in the order in which they come.

  Neither batch size nor device count changes a feature (but for the rounding of its sums): `forward_fn` must
  treat every image alone, as batch norm with running statistics does.

  Args:
    forward_fn: forward_fn(variables, image f32[b, H, W, 3] normalised) -> f32[b, D] or a dict of such. It is
      traced once for as long as the same function is given (a new lambda at each call compiles at each call).
    variables: what `forward_fn` reads, the same on every device.
    batches: dicts of image u8[B, H, W, 3], index i32[B], label i32[B], valid bool[B]; B a multiple of the
      number of devices. Padding has valid False and index -1, a broken image valid False and its index.
      Several processes all give all batches.
    mesh: the devices; each computes its part of a batch.

  Raises:
    UserError: B is not a multiple of the number of devices.
  """
  forward = _make_forward(forward_fn, mesh)
  variables = jax.device_put(variables, whole(mesh))
  pending = deque()

  def fetch() -> Features:
    features, label, index, valid = pending.popleft()
    num_broken = int(np.count_nonzero((index >= 0) & ~valid))
    return Features(jax.tree.map(lambda x: np.asarray(x)[valid], features), label[valid], index[valid], num_broken)

  for batch in batches:
    label, index, valid = (np.asarray(batch[name]) for name in ("label", "index", "valid"))
    pending.append((forward(variables, _place(batch["image"], mesh)), label, index, valid))
    if len(pending) > IN_FLIGHT:
      yield fetch()
  while pending:
    yield fetch()


def calibrate_batch_stats(stats_fn: Callable[[Any, jax.Array], Any], variables: Mapping[str, Any],
                          batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, *,
                          momentum: float) -> dict[str, Any]:
  """Returns `variables` with "batch_stats" measured over the images, for a network that has never trained.

  A statistic is the mean, over batches, of the statistic of each batch: no decay, so early batches count as
  much as late ones (the variance is the mean variance within a batch). Images that can be read are gathered
  into full batches; the rest that fills none is dropped, so padding and broken images have no part in it.
  Where there are fewer images than one batch takes, they are repeated in turn until it is full.

  Args:
    stats_fn: stats_fn(variables, image f32[b, H, W, 3] normalised) -> the "batch_stats" after a forward pass
      in training mode. With batch norm over the mesh axis "data", the device count changes nothing; else
      statistics are of each device's part, and their mean is taken.
    variables: {"params": ..., "batch_stats": ...}; parameters are not changed.
    batches: as in `stream_features`.
    mesh: the devices.
    momentum: the share of the old statistics that batch norm keeps, in [0, 1) (flax's meaning of the word).

  Raises:
    UserError: B is not a multiple of the number of devices, or there is no image that can be read.
  """
  measure = _make_stats(stats_fn, mesh)
  # From zeros a pass in training mode leaves (1 - momentum) x the statistics of the batch.
  zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
  start = jax.device_put({**variables, "batch_stats": zeros}, whole(mesh))
  total, num_batches = None, 0
  for image in _full_batches(batches):
    stats = jax.tree.map(lambda x: np.asarray(x, np.float64), measure(start, _place(image, mesh)))
    total = stats if total is None else jax.tree.map(np.add, total, stats)
    num_batches += 1
  scale = 1 / (num_batches * (1 - momentum))
  return {**variables, "batch_stats": jax.tree.map(lambda x: np.asarray(x * scale, np.float32), total)}


def _full_batches(batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[np.ndarray]:
  waiting, size, any_full = None, 0, False
  for batch in batches:
    size = len(batch["image"])
    image = batch["image"][np.asarray(batch["valid"])]
    waiting = image if waiting is None else np.concatenate([waiting, image])
    if len(waiting) >= size:
      any_full = True
      yield waiting[:size]
      waiting = waiting[size:]
  if not any_full:
    if waiting is None or not len(waiting):
      raise UserError("no image to measure batch statistics on: none can be read")
    yield np.resize(waiting, (size, *waiting.shape[1:]))  # repeats the images in turn


def _place(image: np.ndarray, mesh: Mesh) -> np.ndarray | jax.Array:
  if len(image) % mesh.size:
    raise UserError(f"a batch of {len(image)} images cannot be split over {mesh.size} devices; "
                    f"take a multiple of {mesh.size}")
  # Where this process has all devices the compiled program splits a numpy array itself, at a tenth of the price; of a
  # small network on a CPU that is 2 % of the time.
  return jax.device_put(image, split(mesh)) if mesh.is_multi_process else image


# Kept, so that an evaluation every few epochs compiles once.
@functools.lru_cache(maxsize=16)
def _make_forward(forward_fn: Callable, mesh: Mesh) -> Callable:
  def device_forward(variables: Any, image: jax.Array) -> dict[str, jax.Array]:
    return jax.tree.map(lambda x: x.astype(jnp.float32), forward_fn(variables, normalise_image(image)))

  # Whole on every device, so that each of several processes can read all of it.
  return jax.jit(jax.shard_map(device_forward, mesh=mesh, in_specs=(WHOLE, SPLIT), out_specs=SPLIT),
                 in_shardings=(whole(mesh), split(mesh)), out_shardings=whole(mesh))


@functools.lru_cache(maxsize=16)
def _make_stats(stats_fn: Callable, mesh: Mesh) -> Callable:
  def device_stats(variables: Any, image: jax.Array) -> Any:
    return lax.pmean(stats_fn(variables, normalise_image(image)), AXIS)

  return jax.jit(jax.shard_map(device_stats, mesh=mesh, in_specs=(WHOLE, SPLIT), out_specs=WHOLE),
                 in_shardings=(whole(mesh), split(mesh)))
