"""Weighted k-nearest-neighbour classification (NPID, arXiv 1805.01978, section 3.4), exact and on the device.

The k references with the largest cosine similarity s to a query vote for their class with the weight exp(s / tau).

Letters: M references, m references of a part, Q queries, D numbers of a vector, T classes returned.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from pirl_jax.errors import UserError
from pirl_jax.evaluation.classification import check_classes
from pirl_jax.evaluation.features import extract_features, stream_features, unit_norm
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.layers import check_features, layer_features
from pirl_jax.evaluation.outcome import Outcome
from pirl_jax.evaluation.protocol import Evaluation, Protocol, Reading
from pirl_jax.figures.curves import Curve
from pirl_jax.method.memory_bank import vectors
from pirl_jax.models.network import Model
from pirl_jax.runtime.mesh import AXIS, SPLIT, WHOLE, split, whole
from pirl_jax.runtime.progress import Progress

QUERIES = 256
"""Number of queries scored at a time. The last group is padded to this number, so one compiled program serves all."""

ROWS = 4096
"""Number of references that a device scores at a time; at most QUERIES x (ROWS + k) scores are in memory."""

BLOCK_ROWS = 16_384
BLOCK_NUMBERS = 2**25
"""References are gathered from a stream into blocks before the search. A block has at most BLOCK_ROWS references and at
most BLOCK_NUMBERS numbers (128 MiB); the second limit applies to vectors of more than 2,048 numbers."""

TOP = 5
"""Largest number of classes returned for each query."""


@dataclasses.dataclass(frozen=True)
class KnnSettings:
  """The layer whose features are compared, and how the neighbours vote.

  Attributes:
    layer: one of `layers.layer_names`, or "embedding".
    k: number of neighbours, >= 1 (NPID: 200).
    temperature: tau > 0 (NPID: 0.07).

  Raises:
    UserError: k or temperature is out of range.
  """

  layer: str
  k: int
  temperature: float

  def __post_init__(self) -> None:
    _check_vote(self.k, self.temperature)


class Prediction(NamedTuple):
  """The classes that `predict` returns.

  Attributes:
    classes: i32[Q, T], T = min(5, number of classes), the best class first. If fewer than T classes have a vote, the
      rest is -1, so a class without a vote never counts as a correct top-5 prediction.
    k: number of neighbours of each query: the given k, or the number of references that vote if it is smaller.
    num_references: number of references that vote.
  """

  classes: np.ndarray
  k: int
  num_references: int


class Neighbours(NamedTuple):
  """The neighbours that `Nearest.result` returns, the nearest first.

  Attributes:
    similarity: f32[Q, k], cosine similarities in [-1, 1]; if fewer than k references were visited, the rest is -inf.
    ids: i32[Q, k]; if fewer than k references were visited, the rest is -1.
  """

  similarity: np.ndarray
  ids: np.ndarray


class Nearest:
  """Finds the k references most similar to each query, exactly. The references may come all at once or in blocks.

  Similarities are float32 at full precision. Of equally similar references the one visited earlier is preferred; within
  a block it is the lower row. So with ascending ids the lower id is preferred. The sizes of the blocks and the number
  of devices change only the rounding of similarities. Every device holds all queries with their neighbours so far, and
  its own rows of one block.
  """

  def __init__(self, queries: np.ndarray, *, k: int, mesh: Mesh) -> None:
    """Places the queries on the devices.

    Args:
      queries: f32[Q, D], unit norm.
      k: number of neighbours of each query, >= 1.
      mesh: the devices; each device searches its own rows of a block.
    """
    self._mesh, self._k, self._num_queries = mesh, k, len(queries)
    self._search = _make_search(mesh, k, ROWS)
    self._queries = []
    for start in range(0, len(queries), QUERIES):
      batch = np.zeros((QUERIES, queries.shape[1]), np.float32)
      rows = queries[start:start + QUERIES]
      batch[:len(rows)] = rows
      self._queries.append(jax.device_put(batch, whole(mesh)))
    none_yet = (np.full((QUERIES, k), -np.inf, np.float32), np.full((QUERIES, k), -1, np.int32))
    self._best = [jax.device_put(none_yet, whole(mesh))] * len(self._queries)

  def visit(self, references: jax.Array | np.ndarray, ids: np.ndarray) -> None:
    """Searches further references; a block with another M is compiled again.

    Args:
      references: f32[M, D] of unit norm, or in the stored form of a memory bank. The rows may be split over "data", as
        those of the memory bank are, or lie on one device or the host.
      ids: i32[M], the ids that `result` returns; a reference with id -1 is never a neighbour.
    """
    # The host gathers at most one block while another is searched, because each block needs memory until it is done.
    jax.block_until_ready(self._best)
    ids = np.asarray(ids, np.int32)
    padding = -len(ids) % self._mesh.size
    if padding:  # rows that are never a neighbour, so that all devices have the same number of rows
      references = jnp.pad(jnp.asarray(references), ((0, padding), (0, 0)))
      ids = np.pad(ids, (0, padding), constant_values=-1)
    references, ids = (jax.device_put(x, split(self._mesh)) for x in (references, ids))
    self._best = [self._search(best, references, ids, queries)
                  for best, queries in zip(self._best, self._queries, strict=True)]

  def result(self) -> Neighbours:
    """Returns the neighbours of each query among all references visited so far."""
    if not self._best:
      return Neighbours(np.zeros((0, self._k), np.float32), np.zeros((0, self._k), np.int32))
    return Neighbours(*(np.concatenate([np.asarray(x) for x in parts])[:self._num_queries]
                        for parts in zip(*self._best, strict=True)))


def gather_blocks(parts: Iterable[tuple[np.ndarray, np.ndarray]], *, num_references: int, dim: int,
                  mesh: Mesh) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields references in blocks of one size, in their order. One size means that `Nearest.visit` compiles only once.

  Args:
    parts: (f32[m, D], i32[m]) pairs of references and ids, with any m.
    num_references: upper limit of the number of references; a smaller set gets smaller blocks.
    dim: D.
    mesh: the devices; the size of a block is a multiple of their number.

  Returns:
    Iterator of (f32[M, D], i32[M]); the last block is padded with zeros and id -1.
  """
  num_rows = max(1, min(BLOCK_ROWS, BLOCK_NUMBERS // dim, num_references))
  num_rows += -num_rows % mesh.size

  def empty() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((num_rows, dim), np.float32), np.full(num_rows, -1, np.int32)

  (block, block_ids), filled = empty(), 0
  for references, ids in parts:
    while len(ids):
      count = min(num_rows - filled, len(ids))
      block[filled:filled + count], block_ids[filled:filled + count] = references[:count], ids[:count]
      references, ids = references[count:], ids[count:]
      filled += count
      if filled == num_rows:
        yield block, block_ids
        (block, block_ids), filled = empty(), 0  # new arrays, because the devices may still read the previous ones
  if filled:
    yield block, block_ids


def measure_knn(model: Model, train: Images, test: Images, settings: KnnSettings, *, mesh: Mesh) -> Outcome:
  """Returns the accuracy of weighted kNN on a layer's features, for k and for smaller numbers of neighbours.

  The outcome's figures: `top1` and `top5` in [0, 1], `top1_by_k` (fewer neighbours of the same search vote), `k` as
  given and `k_used` (smaller than `k` if there are fewer training images), `temperature`, `layer`, `dim` (D),
  `similarity`, `num_train` (labelled images that voted), `num_test` (labelled images that were classified),
  `num_broken_train`, `num_broken_test`. The number of devices and the batch size change only the rounding.

  The features of all held-out images are in memory, on the host and on every device (0.4 GB for 50,000 images with
  2,048 numbers each). The features of the training images are searched block by block and are never all in memory.

  Args:
    model: the frozen network.
    train: the images that vote.
    test: the images that are classified.
    settings: the layer, and how the neighbours vote.
    mesh: the devices.

  Raises:
    UserError: the layer is unknown, there are no labels, or no image can be read.
  """
  layer, k = settings.layer, settings.k
  check_features(model, (layer,), image_size=train.image_size, field="knn.layer")
  check_classes(train, test, protocol="kNN")
  forward_fn = layer_features(model.network, (layer,))
  with Progress("kNN: features of held-out images", len(test)) as progress:
    held_out = extract_features(forward_fn, model.variables, test.test_batches(), mesh, on_batch=progress.update)
  judged = held_out.labels >= 0
  if not judged.any():
    raise UserError(f"kNN needs labels, and none of the {len(judged)} held-out images has one")
  queries = unit_norm(held_out.features[layer][judged])

  nearest = Nearest(queries, k=min(k, len(train)), mesh=mesh)
  labels = np.full(len(train), -1, np.int32)
  num_broken = 0
  with Progress("kNN: training images searched", len(train)) as progress:
    def voters() -> Iterator[tuple[np.ndarray, np.ndarray]]:
      nonlocal num_broken
      for part in stream_features(forward_fn, model.variables, train.test_batches(), mesh):
        voting = part.labels >= 0
        labels[part.index] = part.labels
        num_broken += part.num_broken
        yield unit_norm(part.features[layer][voting]), part.index[voting]
        progress.update(len(part.index) + part.num_broken)

    for block in gather_blocks(voters(), num_references=len(train), dim=queries.shape[1], mesh=mesh):
      nearest.visit(*block)
    found = nearest.result()
  num_train = int(np.count_nonzero(labels >= 0))
  if num_train == 0:
    raise UserError(f"kNN needs labels, and none of the {len(train)} training images that can be read has one")

  k_used = min(k, num_train)
  ks = ladder(k_used)
  classes = _classes(found, labels, ks, temperature=settings.temperature)
  hits = classes == held_out.labels[judged][None, :, None]  # [ks, Q, T]
  top1 = hits[:, :, 0].mean(axis=1).tolist()
  top5 = float(hits[-1].any(axis=1).mean())
  return Outcome(
    figures={
      "layer": layer,
      "k": k,
      "k_used": k_used,
      "temperature": settings.temperature,
      "similarity": "cosine",
      "top1": top1[-1],
      "top5": top5,
      "top1_by_k": {str(size): accuracy for size, accuracy in zip(ks, top1, strict=True)},
      "num_train": num_train,
      "num_test": len(queries),
      "num_broken_train": num_broken,
      "num_broken_test": held_out.num_broken,
      "dim": queries.shape[1],
    },
    table={"top-1": top1[-1], "top-5": top5, "top-1, k=1": top1[0]},
    curve=Curve("neighbours k", "top-1 accuracy", ks, top1, log_x=True))


def ladder(k: int) -> list[int]:
  """Returns the numbers of neighbours to report: [1, 5, 10, 20, 50, 100, 200, 500, ..., k]."""
  steps = [1, *(step * 10**power for power in range(len(str(k))) for step in (5, 10, 20))]
  return [*(step for step in steps if step < k), k]


def predict(references: jax.Array | np.ndarray, reference_labels: np.ndarray, queries: np.ndarray, *,
            mesh: Mesh, k: int, temperature: float) -> Prediction:
  """Returns the classes that the k nearest references vote for; the number of devices does not change the result.

  Of equal similarities the lower row is preferred, of equal votes the lower class. Similarities are float32 at full
  precision.

  Args:
    references: f32[M, D] of unit norm, or in the stored form of a memory bank. The rows may be split over "data", as
      those of the memory bank are, or lie on one device or the host.
    reference_labels: i32[M], >= 0; a reference with label -1 is never a neighbour (padding, broken or unlabelled).
    queries: f32[Q, D], unit norm.
    mesh: the devices; each device searches its own rows.
    k: number of neighbours, >= 1 (NPID: 200).
    temperature: tau > 0 (NPID: 0.07).

  Raises:
    UserError: k or temperature is out of range, or no reference votes.
  """
  reference_labels = np.asarray(reference_labels, np.int32)
  votes = reference_labels >= 0
  num_references = int(np.count_nonzero(votes))
  _check_vote(k, temperature)
  if num_references == 0:
    raise UserError(f"kNN needs labels, and none of the {len(reference_labels)} references has one")
  if reference_labels.shape != references.shape[:1]:
    raise ValueError(f"{references.shape[0]} references, but labels of shape {reference_labels.shape}")

  k = min(k, num_references)
  nearest = Nearest(queries, k=k, mesh=mesh)
  nearest.visit(references, np.where(votes, np.arange(len(votes)), -1))
  (classes,) = _classes(nearest.result(), reference_labels, [k], temperature=temperature)
  return Prediction(classes, k, num_references)


def accuracy(references: jax.Array | np.ndarray, reference_labels: np.ndarray, queries: np.ndarray,
             query_labels: np.ndarray, *, mesh: Mesh, k: int, temperature: float) -> dict[str, float | int]:
  """Returns `top1` and `top5` in [0, 1] over labelled queries, `k` as used, `num_references` and `num_queries`.

  `query_labels` is i32[Q], with -1 for a query without a label. The other arguments are those of `predict`.

  Raises:
    UserError: no query has a label; or see `predict`.
  """
  labelled = np.asarray(query_labels) >= 0
  if not labelled.any():
    raise UserError(f"kNN needs labels, and none of the {len(labelled)} held-out images has one")
  prediction = predict(references, reference_labels, np.asarray(queries)[labelled], mesh=mesh, k=k,
                       temperature=temperature)
  hits = prediction.classes == np.asarray(query_labels)[labelled, None]
  return {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(axis=1).mean()), "k": prediction.k,
          "num_references": prediction.num_references, "num_queries": int(labelled.sum())}


def _check_vote(k: int, temperature: float) -> None:
  if k < 1:
    raise UserError(f"kNN with k={k}: k must be 1 or more (NPID: 200)")
  if not 0 < temperature <= 1_000:
    raise UserError(f"kNN with temperature={temperature}: it lies in (0, 1000] (NPID: 0.07)")


_Found = tuple[jax.Array, jax.Array]
"""(similarities f32[Q, k], ids i32[Q, k]) of the nearest references so far."""


@functools.cache
def _make_search(mesh: Mesh, k: int, chunk: int) -> Callable[..., _Found]:
  """Returns search(best, references f32[M, D], ids i32[M], queries f32[Q, D]) -> best.

  `best` is (similarity f32[Q, k], ids i32[Q, k]), the nearest first. A reference with id -1 has similarity -inf.
  """

  def device_search(best: _Found, references: jax.Array, ids: jax.Array, queries: jax.Array) -> _Found:
    num_rows = references.shape[0]
    size = min(chunk, num_rows)

    def visit(found: _Found, start: jax.Array) -> tuple[_Found, None]:
      # All chunks have the same size, so the last chunk may overlap the chunk before; the shared rows are masked.
      first = jnp.minimum(start, num_rows - size)
      row = first + jnp.arange(size)
      block = vectors(lax.dynamic_slice_in_dim(references, first, size)).astype(jnp.float32)
      block_ids = lax.dynamic_slice_in_dim(ids, first, size)
      block_ids = jnp.where(row >= start, block_ids, -1)
      scores = jnp.matmul(queries, block.T, precision=lax.Precision.HIGHEST)
      scores = jnp.where((block_ids >= 0)[None, :], scores, -jnp.inf)
      return _largest(found, (scores, jnp.broadcast_to(block_ids[None, :], scores.shape))), None

    none_yet = (jnp.full_like(best[0], -jnp.inf), jnp.full_like(best[1], -1))
    none_yet = jax.tree.map(lambda x: lax.pcast(x, AXIS, to="varying"), none_yet)
    found, _ = lax.scan(visit, none_yet, jnp.arange(0, num_rows, size))
    # Earlier visits come first, then the devices in the order of their rows: top_k prefers the first of equals.
    return _largest(best, tuple(lax.all_gather(x, AXIS, axis=1, tiled=True, to="invarying") for x in found))

  def _largest(*candidates: _Found) -> _Found:
    similarity, candidate_ids = (jnp.concatenate(pair, axis=1) for pair in zip(*candidates, strict=True))
    similarity, place = lax.top_k(similarity, k)  # prefers the first of equals
    return similarity, jnp.take_along_axis(candidate_ids, place, axis=1)

  return jax.jit(jax.shard_map(device_search, mesh=mesh, in_specs=(WHOLE, SPLIT, SPLIT, WHOLE), out_specs=WHOLE))


def _classes(neighbours: Neighbours, labels: np.ndarray, ks: Sequence[int], *, temperature: float) -> np.ndarray:
  """Returns i32[len(ks), Q, T], the classes that the first ks[0], ks[1], ... neighbours vote for.

  Args:
    neighbours: at least ks[-1] neighbours of each query.
    labels: i32[M], by id.
    ks: numbers of neighbours, in ascending order.
    temperature: tau.
  """
  num_queries, num_classes = len(neighbours.ids), int(labels.max()) + 1
  found = [np.zeros((len(ks), 0, min(TOP, num_classes)), np.int32)]
  for start in range(0, num_queries, QUERIES):
    rows = slice(start, start + QUERIES)
    padding = ((0, max(0, start + QUERIES - num_queries)), (0, 0))
    similarity = np.pad(neighbours.similarity[rows, :ks[-1]], padding)
    label = np.pad(labels[neighbours.ids[rows, :ks[-1]]], padding, constant_values=-1)
    found.append(np.asarray(_vote(similarity, label, temperature, num_classes=num_classes, ks=tuple(ks))))
  return np.concatenate(found, axis=1)[:, :num_queries]


@functools.partial(jax.jit, static_argnames=("num_classes", "ks"))
def _vote(similarity: jax.Array, label: jax.Array, temperature: jax.Array, *, num_classes: int,
          ks: tuple[int, ...]) -> jax.Array:
  """Returns the classes with the most votes, i32[len(ks), Q, T]; a class without a vote is -1."""
  # The weights are relative to the nearest neighbour's. The ranking is the same, and not all weights can underflow.
  weight = jnp.exp((similarity - similarity[:, :1]) / temperature)
  classes = jnp.arange(num_classes)[None, :]

  # Adds one neighbour of every query at a time. The order of the sums is fixed, and no array of
  # Q x k x number of classes is needed.
  def add(score: jax.Array, neighbour: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    weight, label = (x[:, None] for x in neighbour)
    return jnp.where(label == classes, jnp.maximum(score, 0) + weight, score), None

  score = jnp.full((similarity.shape[0], num_classes), -jnp.inf)
  found = []
  for start, end in itertools.pairwise((0, *ks)):
    score, _ = lax.scan(add, score, (weight[:, start:end].T, label[:, start:end].T))
    votes, best = lax.top_k(score, min(TOP, num_classes))
    found.append(jnp.where(votes >= 0, best, -1))
  return jnp.stack(found)


def _measure(evaluation: Evaluation) -> Outcome:
  return measure_knn(evaluation.subject.model, evaluation.train, evaluation.labelled_test(), evaluation.settings,
                     mesh=evaluation.mesh)


def _check(evaluation: Evaluation) -> None:
  check_features(evaluation.subject.model, (evaluation.settings.layer,), image_size=evaluation.train.image_size,
                 field="knn.layer")


PROTOCOL = Protocol(KnnSettings, _measure, _check, reading=Reading(lambda found: {"kNN top-1": found["top1"]}))
