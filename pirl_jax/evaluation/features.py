"""Features of images by a frozen network, and batch statistics for a network that has not been trained.

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
"""Number of batches that the devices compute while the host decodes the next batch."""


class Features(NamedTuple):
  """The features of the images that can be read: of all images (`extract_features`) or of a batch (`stream_features`).

  Attributes:
    features: f32[N, D], or a dict of such arrays if the forward function returns a dict.
    labels: i32[N]; -1 for an image without a label.
    index: i32[N], the indices of the records in the source, in ascending order.
    num_broken: number of images that were left out because they could not be read.
  """

  features: Any
  labels: np.ndarray
  index: np.ndarray
  num_broken: int


def unit_norm(features: np.ndarray) -> np.ndarray:
  """Returns `features` f[..., D], each vector scaled to unit norm, for cosine similarity; a vector of zeros stays."""
  length = np.linalg.norm(features, axis=-1, keepdims=True)
  return features / np.maximum(length, np.finfo(np.float32).tiny)


def extract_features(forward_fn: Callable[[Any, jax.Array], Any], variables: Any,
                     batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh,
                     on_batch: Callable[[int], None] | None = None) -> Features:
  """Returns the features of all images that can be read, as arrays f32[N, D] on the host.

  The arguments are those of `stream_features`, and:

  Args:
    on_batch: called after each batch with the number of its images, without padding.

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
  """Yields the features of one batch after the other, on the host, in the order of the batches.

  The batch size and the number of devices do not change a feature, except for the rounding of sums. For this,
  `forward_fn` must treat every image independently, as batch norm with running statistics does.

  Args:
    forward_fn: forward_fn(variables, image f32[b, H, W, 3] normalised) -> f32[b, D], or a dict of such arrays. Pass the
      same function object each time: it is compiled once per object, so a new lambda at each call compiles each time.
    variables: the variables that `forward_fn` reads, the same on every device.
    batches: dicts of image u8[B, H, W, 3], index i32[B], label i32[B], valid bool[B]; B is a multiple of the number of
      devices. Padding has valid False and index -1. An image that cannot be read has valid False and its own index.
      With several processes, each process gives all batches.
    mesh: the devices; each device computes its part of a batch.

  Raises:
    UserError: B is not a multiple of the number of devices, or a feature is not finite.
  """
  forward = _make_forward(forward_fn, mesh)
  variables = jax.device_put(variables, whole(mesh))
  pending = deque()

  def fetch() -> Features:
    features, label, index, valid = pending.popleft()
    num_broken = int(np.count_nonzero((index >= 0) & ~valid))
    found = jax.tree.map(lambda x: np.asarray(x)[valid], features)
    for layer in jax.tree.leaves(found):
      finite = np.isfinite(layer).all(axis=tuple(range(1, layer.ndim)))
      if not finite.all():
        raise UserError(f"the features of {np.count_nonzero(~finite)} image(s), first of number "
                        f"{index[valid][~finite][0]}, are not finite; the network has overflowed, so that no figure of "
                        "it would mean anything")
    return Features(found, label[valid], index[valid], num_broken)

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
  """Returns `variables` with "batch_stats" measured on the images, for a network that has not been trained.

  Each statistic is the plain mean, over batches, of the batch's own statistic; early and late batches have the same
  weight. The variance is the mean of the variances within a batch. Only images that can be read count. They are
  gathered into full batches, and the remaining images, fewer than a batch, are dropped. If there are fewer images than
  a batch holds, the images are repeated until the batch is full.

  Args:
    stats_fn: stats_fn(variables, image f32[b, H, W, 3] normalised) -> the "batch_stats" after a forward pass in
      training mode. If batch norm works over the mesh axis "data", the number of devices does not matter. Otherwise
      each device has the statistics of its part of the batch, and their mean is taken.
    variables: {"params": ..., "batch_stats": ...}; the parameters are not changed.
    batches: as in `stream_features`.
    mesh: the devices.
    momentum: the share of the old statistics that batch norm keeps, in [0, 1) (flax's definition of momentum).

  Raises:
    UserError: B is not a multiple of the number of devices, or there is no image that can be read.
  """
  measure = _make_stats(stats_fn, mesh)
  # If the statistics start at zero, a pass in training mode gives (1 - momentum) x the statistics of the batch.
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
  # If this process has all devices, the compiled program can split a numpy array itself, which costs a tenth of
  # `device_put`. For a small network on a CPU this saves 2 % of the time.
  return jax.device_put(image, split(mesh)) if mesh.is_multi_process else image


# Cached, so that an evaluation that is repeated every few epochs compiles only once.
@functools.lru_cache(maxsize=16)
def _make_forward(forward_fn: Callable, mesh: Mesh) -> Callable:
  def device_forward(variables: Any, image: jax.Array) -> dict[str, jax.Array]:
    return jax.tree.map(lambda x: x.astype(jnp.float32), forward_fn(variables, normalise_image(image)))

  # The output is replicated on every device, so that each of several processes can read all of it.
  return jax.jit(jax.shard_map(device_forward, mesh=mesh, in_specs=(WHOLE, SPLIT), out_specs=SPLIT),
                 in_shardings=(whole(mesh), split(mesh)), out_shardings=whole(mesh))


@functools.lru_cache(maxsize=16)
def _make_stats(stats_fn: Callable, mesh: Mesh) -> Callable:
  def device_stats(variables: Any, image: jax.Array) -> Any:
    return lax.pmean(stats_fn(variables, normalise_image(image)), AXIS)

  return jax.jit(jax.shard_map(device_stats, mesh=mesh, in_specs=(WHOLE, SPLIT), out_specs=WHOLE),
                 in_shardings=(whole(mesh), split(mesh)))
