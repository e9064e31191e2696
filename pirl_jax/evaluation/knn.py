"""Weighted k-nearest-neighbour classification (NPID, arXiv 1805.01978, section 3.4), exact and on the device.

The k references with the largest cosine similarity s to a query vote for their class with the weight exp(s /
tau). Letters: M references, Q queries, D embedding, T classes returned, S strata of the bank.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from pirl_jax.errors import UserError
from pirl_jax.mesh import AXIS, SPLIT, WHOLE, split, whole

QUERIES = 256
"""Queries scored at a time; the last ones are padded to as many, so that one program serves all."""

ROWS = 4096
"""References a device scores at a time: the most that stands in memory is QUERIES x (ROWS + k) scores."""

TOP = 5
"""Classes returned for each query, best first."""


class Prediction(NamedTuple):
  """What `predict` returns.

  Attributes:
    classes: i32[Q, T], T = min(5, number of classes), the best class first; -1 where no neighbour votes for a
      further class (so that top-5 is never right by a class without a vote).
    k: neighbours asked for each query: `k`, or the number of references that vote where that is smaller.
    num_references: references that vote.
  """

  classes: np.ndarray
  k: int
  num_references: int


def predict(references: jax.Array | np.ndarray, reference_labels: np.ndarray, queries: np.ndarray, *,
            mesh: Mesh, k: int, temperature: float) -> Prediction:
  """Returns the classes that the k nearest references vote for, the same on any number of devices.

  Equal similarities go to the lower row, equal votes to the lower class. Similarities are float32 at full
  precision.

  Args:
    references: f32 or bf16[M, D], unit norm; split over "data" by rows (as the memory bank lies) or in one
      place.
    reference_labels: i32[M], >= 0; -1: never a neighbour (padding, broken, unlabelled).
    queries: f32[Q, D], unit norm.
    mesh: the devices; each searches its own rows.
    k: neighbours, >= 1 (NPID: 200).
    temperature: tau > 0 (NPID: 0.07).

  Raises:
    UserError: k or temperature out of range, or no reference votes.
  """
  reference_labels = np.asarray(reference_labels, np.int32)
  num_references = int(np.count_nonzero(reference_labels >= 0))
  if k < 1:
    raise UserError(f"kNN with k={k}: k must be 1 or more (NPID: 200)")
  if temperature <= 0:
    raise UserError(f"kNN with temperature={temperature}: it must be above 0 (NPID: 0.07)")
  if num_references == 0:
    raise UserError(f"kNN needs labels, and none of the {len(reference_labels)} references has one")
  if reference_labels.shape != references.shape[:1]:
    raise ValueError(f"{references.shape[0]} references, but labels of shape {reference_labels.shape}")

  k = min(k, num_references)
  num_classes = int(reference_labels.max()) + 1
  padding = -len(reference_labels) % mesh.size
  if padding:  # rows that no one can choose, so that every device has as many
    references = jnp.pad(jnp.asarray(references), ((0, padding), (0, 0)))
    reference_labels = np.pad(reference_labels, (0, padding), constant_values=-1)
  references = jax.device_put(references, split(mesh))
  labels = jax.device_put(reference_labels, split(mesh))

  search = _make_search(mesh, k, ROWS)
  classes = []
  for start in range(0, len(queries), QUERIES):
    batch = np.asarray(queries[start:start + QUERIES], np.float32)
    padded = np.zeros((QUERIES, batch.shape[1]), np.float32)
    padded[:len(batch)] = batch
    similarity, label = search(references, labels, jax.device_put(padded, whole(mesh)))
    classes.append(np.asarray(_vote(similarity, label, temperature, num_classes=num_classes))[:len(batch)])
  empty = np.zeros((0, min(TOP, num_classes)), np.int32)
  return Prediction(np.concatenate([empty, *classes]), k, num_references)


def accuracy(references: jax.Array | np.ndarray, reference_labels: np.ndarray, queries: np.ndarray,
             query_labels: np.ndarray, *, mesh: Mesh, k: int, temperature: float) -> dict[str, float | int]:
  """Returns `top1`, `top5` in [0, 1] over labelled queries, `k` as used, `num_references`, `num_queries`.

  Arguments and errors as `predict`; `query_labels` is i32[Q], -1 where there is none.

  Raises:
    UserError: no query has a label.
  """
  labelled = np.asarray(query_labels) >= 0
  if not labelled.any():
    raise UserError(f"kNN needs labels, and none of the {len(labelled)} held-out pictures has one")
  prediction = predict(references, reference_labels, np.asarray(queries)[labelled], mesh=mesh, k=k,
                       temperature=temperature)
  hits = prediction.classes == np.asarray(query_labels)[labelled, None]
  return {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(axis=1).mean()), "k": prediction.k,
          "num_references": prediction.num_references, "num_queries": int(labelled.sum())}


@functools.cache
def _make_search(mesh, k, chunk):
  """Returns search(references, labels, queries) -> (similarity f32[Q, k], label i32[Q, k]), nearest first.

  k references or more must vote: those without a vote take part with similarity -inf.
  """

  def device_search(references, labels, queries):
    num_rows = references.shape[0]
    size = min(chunk, num_rows)

    def visit(best, start):
      # The last chunk begins early enough to be whole; what it shares with the one before is masked.
      first = jnp.minimum(start, num_rows - size)
      row = first + jnp.arange(size)
      block = lax.dynamic_slice_in_dim(references, first, size).astype(jnp.float32)  # a bank may be bfloat16
      block_labels = lax.dynamic_slice_in_dim(labels, first, size)
      scores = jnp.matmul(queries, block.T, precision=lax.Precision.HIGHEST)
      scores = jnp.where((row >= start) & (block_labels >= 0), scores, -jnp.inf)
      return _merge(best, (scores, jnp.broadcast_to(block_labels, scores.shape))), None

    shape = (queries.shape[0], k)
    best = (jnp.full(shape, -jnp.inf), jnp.full(shape, -1, labels.dtype))
    best = jax.tree.map(lambda x: lax.pcast(x, AXIS, to="varying"), best)
    best, _ = lax.scan(visit, best, jnp.arange(0, num_rows, size))
    # Devices in order of their rows: the order among equals stays by row.
    similarity, label = (lax.all_gather(x, AXIS, axis=1, tiled=True, to="invarying") for x in best)
    return _largest(similarity, label)

  def _largest(similarity, label):
    similarity, place = lax.top_k(similarity, k)  # of equals the first, so the lower row
    return similarity, jnp.take_along_axis(label, place, axis=1)

  def _merge(best, found):
    return _largest(*(jnp.concatenate(pair, axis=1) for pair in zip(best, found, strict=True)))

  return jax.jit(jax.shard_map(device_search, mesh=mesh, in_specs=(SPLIT, SPLIT, WHOLE), out_specs=WHOLE))


@functools.partial(jax.jit, static_argnames="num_classes")
def _vote(similarity, label, temperature, *, num_classes):
  """Returns the classes with the most votes, i32[Q, T]; a class without a vote is -1."""
  # Relative to the nearest neighbour: the same ranking, and never do all weights underflow.
  weight = jnp.exp((similarity - similarity[:, :1]) / temperature)
  classes = jnp.arange(num_classes)[None, :]

  # One neighbour of every query at a time: sums in a fixed order, and no Q x k x classes in memory.
  def add(score, neighbour):
    weight, label = (x[:, None] for x in neighbour)
    return jnp.where(label == classes, jnp.maximum(score, 0) + weight, score), None

  score = jnp.full((similarity.shape[0], num_classes), -jnp.inf)
  score, _ = lax.scan(add, score, (weight.T, label.T))
  score, best = lax.top_k(score, min(TOP, num_classes))
  return jnp.where(score >= 0, best, -1)
