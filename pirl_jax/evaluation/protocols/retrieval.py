"""Nearest neighbours of some images, for people to look at, and mean average precision where there are labels.

A gallery image is relevant to a query if it has the query's label. Letters: Q queries, N gallery images, D numbers
of a vector, n neighbours.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from pirl_jax.data.records import Source
from pirl_jax.data.subsets import Subset, shuffled
from pirl_jax.errors import UserError
from pirl_jax.evaluation.features import stream_features, unit_norm
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.layers import EMBEDDING, check_features, layer_features
from pirl_jax.evaluation.outcome import Outcome
from pirl_jax.evaluation.protocol import Evaluation, Protocol, Reading, beside
from pirl_jax.evaluation.protocols.knn import Nearest, Neighbours, gather_blocks, ladder
from pirl_jax.figures import plots
from pirl_jax.figures.curves import Curve
from pirl_jax.method.memory_bank import Layout
from pirl_jax.models.network import Model
from pirl_jax.runtime.mesh import AXIS, SPLIT, WHOLE, split, whole
from pirl_jax.runtime.progress import Progress
from pirl_jax.storage.checkpoints import Checkpoints

DEPTH = 50
"""Neighbours up to which precision is told."""

QUERIES = 256
SCORES = 2**28
"""Queries ranked at a time, fewer where so many similarities to the gallery would stand in memory (1 GiB)."""


@dataclasses.dataclass(frozen=True)
class RetrievalSettings:
  """What is sought, among what, and how much of it is shown.

  Attributes:
    layer: one of `layers.layer_names`, or "embedding". With a bank it is "embedding" in any case.
    gallery: "features" of the training images, or "bank": the run's memory bank.
    queries: "train" or "test" images; None: test, if there are any.
    num_queries: so many readable images, chosen by the seed, the same on every machine; all if there are fewer.
    num_shown: of them on the PNG.
    num_neighbours: of each on the PNG.

  Raises:
    UserError: an unknown gallery, or a number below 1.
  """

  layer: str
  gallery: str
  queries: str | None
  num_queries: int
  num_shown: int
  num_neighbours: int

  def __post_init__(self) -> None:
    if self.gallery not in ("features", "bank"):
      raise UserError(f"retrieval.gallery={self.gallery!r} is not possible: choose features or bank")
    for name in ("num_queries", "num_shown", "num_neighbours"):
      if getattr(self, name) < 1:
        raise UserError(f"retrieval.{name}={getattr(self, name)}; choose 1 or more")


class Vectors(NamedTuple):
  """Queries or a part of the gallery.

  Attributes:
    rows: f32[m, D], unit norm.
    index: i32[m], the records' numbers.
    labels: i32[m]; -1: unlabelled.
    num_broken: images that could not be read, up to the last one.
  """

  rows: np.ndarray
  index: np.ndarray
  labels: np.ndarray
  num_broken: int


class Found(NamedTuple):
  """What the search of the gallery gives.

  Attributes:
    similarity: f32[Q, n], nearest first.
    ids: i32[Q, n], the records' numbers.
    labels: i32[N], by the record's number; -1: unlabelled or not read.
    blocks: the gallery's vectors, see `_ranking_precisions`; empty without labels.
    num_gallery: images that could be read.
    num_broken: those that could not.
  """

  similarity: np.ndarray
  ids: np.ndarray
  labels: np.ndarray
  blocks: list[tuple[np.ndarray, np.ndarray]]
  num_gallery: int
  num_broken: int


def measure_retrieval(model: Model, gallery: Images, queries: Images, settings: RetrievalSettings, *, mesh: Mesh,
                      bank: np.ndarray | None, seed: int, same_split: bool,
                      plot_path: str | os.PathLike) -> Outcome:
  """Returns how well an image finds its like by cosine similarity; writes some queries and what they found as a PNG.

  The figures: `queries`, those shown, each with `name`, `index`, `class` and `neighbours` (the same and `similarity`,
  nearest first); `mean_similarity_of_nearest` over all queries, in [-1, 1]; `num_queries`, `num_gallery`,
  `num_broken_queries`, `num_broken_gallery`, `gallery` ("features" or "bank"), `layer`, `dim`, `similarity`, `seed`,
  `written` (the PNG).

  With labels, in [0, 1] and over the `num_judged` queries that have a relevant image in the gallery:
  `mean_average_precision` (average precision as in information retrieval, over the whole ranking: the mean, over the
  relevant images, of the precision at their rank; equals by lower index) and `precision_at` 1, 5, 10, ... neighbours.
  `labels` is "classes", or says why these figures are left out; then the table holds the mean similarity instead, and
  there is no curve.

  With labels the gallery's vectors stand in the host's memory, 10 GB for those of a ResNet-50 on ImageNet; similarities
  of all queries to all images never do.

  Args:
    model: the frozen network.
    gallery: the images that are found.
    queries: the images for which others are sought.
    mesh: the devices.
    bank: f32[N, D], the memory bank's rows in the order of the gallery's images, instead of their features; a row of
      zeros (an image that could not be read) is never found. None: features.
    seed: any integer.
    same_split: queries and gallery are the same images; then none finds itself.
    plot_path: the PNG, written by the first process; its folder is created.

  Raises:
    UserError: unknown layer, a bank of other images, or no readable images.
  """
  layer = settings.layer if bank is None else EMBEDDING
  check_features(model, (layer,), image_size=gallery.image_size, field="retrieval.layer")
  if bank is not None and len(bank) != len(gallery):
    raise UserError(f"a memory bank of {len(bank)} images, but the gallery has {len(gallery)}; "
                    "take the images that the run was trained on")
  asked = _read_queries(model, queries, mesh=mesh, layer=layer, num_queries=settings.num_queries, seed=seed)
  no_labels = _why_no_labels(gallery.source, queries.source)
  found = _search(asked, _read_gallery(model, gallery, bank, mesh=mesh, layer=layer, labelled=not no_labels),
                  len(gallery), depth=max(DEPTH, settings.num_neighbours), same_split=same_split,
                  keep=not no_labels, mesh=mesh)

  figures = {
    "layer": layer,
    "gallery": "features" if bank is None else "bank",
    "similarity": "cosine",
    "labels": no_labels or "classes",
    "num_queries": len(asked.index),
    "num_gallery": found.num_gallery,
    "num_broken_queries": asked.num_broken,
    "num_broken_gallery": found.num_broken,
    "dim": asked.rows.shape[1],
    "seed": seed,
    "mean_similarity_of_nearest": float(found.similarity[:, 0].mean()),
  }
  table, curve = {"similarity of the nearest": figures["mean_similarity_of_nearest"]}, None
  if not no_labels:
    judged = _judge(asked, found, same_split=same_split, mesh=mesh)
    if judged is None:
      figures["labels"] = "none: no query has an image of its class in the gallery"
    else:
      more, table, curve = judged
      figures |= more
  figures["queries"] = _describe(gallery.source, queries.source, asked, found, num_shown=settings.num_shown,
                                 num_neighbours=settings.num_neighbours)
  if jax.process_index() == 0:
    _save_plot(plot_path, gallery, queries, figures)
  figures["written"] = [str(plot_path)]
  return Outcome(figures, table, curve)


def _why_no_labels(gallery: Source, queries: Source) -> str:
  for name, source in (("gallery", gallery), ("query", queries)):
    if not source.class_names:
      return f"none: the {name} images have no labels"
    if source.multi_label:
      return f"none: the {name} images may show several classes each"
  return "" if gallery.class_names == queries.class_names else "none: the classes of gallery and queries differ"


def _read_queries(model: Model, queries: Images, *, mesh: Mesh, layer: str, num_queries: int, seed: int) -> Vectors:
  """Returns the first readable images by the hash of their number: no generator whose draws could change."""
  order = shuffled(range(len(queries)), seed=seed)
  chosen = dataclasses.replace(queries, source=Subset(queries.source, order))
  parts, num_read = [], 0
  with (Progress("retrieval: queries", min(num_queries, len(queries))) as progress,
        contextlib.closing(chosen.test_batches()) as batches):  # mostly left long before its end
    for part in stream_features(layer_features(model.network, (layer,)), model.variables, batches, mesh):
      count = min(len(part.index), num_queries - num_read)
      parts.append((unit_norm(part.features[layer][:count]), part.index[:count], part.labels[:count]))
      num_read += count
      progress.update(count)
      if num_read == num_queries:
        break
  if not num_read:
    raise UserError(f"none of the {len(queries)} query images can be read")
  rows, place, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
  num_met = place[-1] + 1 if num_read == num_queries else len(order)  # not those behind, which a large batch reads too
  return Vectors(rows, np.asarray(order)[place], labels, int(num_met) - num_read)


def _read_gallery(model: Model, gallery: Images, bank: np.ndarray | None, *, mesh: Mesh, layer: str,
                  labelled: bool) -> Iterator[Vectors]:
  """Yields the gallery part by part, by rising index."""
  if bank is None:
    for part in stream_features(layer_features(model.network, (layer,)), model.variables, gallery.test_batches(), mesh):
      yield Vectors(unit_norm(part.features[layer]), part.index, part.labels, part.num_broken)
    return
  labels = gallery.labels() if labelled else np.full(len(gallery), -1, np.int32)
  for start in range(0, len(bank), gallery.batch_size):
    rows = np.asarray(bank[start:start + gallery.batch_size], np.float32)
    usable = rows.any(axis=1)
    index = start + np.flatnonzero(usable)
    yield Vectors(unit_norm(rows[usable]), index, labels[index], int(np.count_nonzero(~usable)))


def _search(asked: Vectors, parts: Iterator[Vectors], num_images: int, *, depth: int, same_split: bool, keep: bool,
            mesh: Mesh) -> Found:
  """Returns the neighbours of each query, at most `depth`.

  Args:
    asked: the queries.
    parts: the gallery, by rising index.
    num_images: of the gallery, those that cannot be read among them.
    depth: n, or fewer in a small gallery.
    same_split: no query finds itself.
    keep: the gallery's vectors are returned, too.
    mesh: the devices.

  Raises:
    UserError: the gallery has no image to be found.
  """
  # One more than needed, to leave out the query itself.
  depth = min(depth, num_images - same_split)
  nearest = Nearest(asked.rows, k=depth + same_split, mesh=mesh)
  labels = np.full(num_images, -1, np.int32)
  num_gallery = num_broken = 0
  blocks = []
  with Progress("retrieval: gallery", num_images) as progress:
    def rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
      nonlocal num_gallery, num_broken
      for part in parts:
        labels[part.index] = part.labels
        num_gallery += len(part.index)
        num_broken += part.num_broken
        yield part.rows, part.index
        progress.update(len(part.index) + part.num_broken)

    for block in gather_blocks(rows(), num_references=num_images, dim=asked.rows.shape[1], mesh=mesh):
      nearest.visit(*block)
      if keep:
        blocks.append(block)
  if num_gallery <= same_split:
    raise UserError(f"the gallery has {num_gallery} images that can be read of {num_images}, none to be found")
  depth = min(depth, num_gallery - same_split)
  neighbours = nearest.result()
  if same_split:
    neighbours = _without(neighbours, asked.index)
  return Found(neighbours.similarity[:, :depth], neighbours.ids[:, :depth], labels, blocks, num_gallery, num_broken)


def _judge(asked: Vectors, found: Found, *, same_split: bool,
           mesh: Mesh) -> tuple[dict[str, Any], dict[str, float], Curve] | None:
  """Returns figures, table and curve of the precisions; None if no query has a relevant image in the gallery."""
  num_judged, mean, at = _precisions(asked, found, same_split=same_split, mesh=mesh)
  if not num_judged:
    return None
  return ({"num_judged": num_judged, "mean_average_precision": mean,
           "precision_at": {str(size): float(at[size - 1]) for size in ladder(len(at))}},
          {"mean average precision": mean,
           **{f"precision at {size}": float(at[size - 1]) for size in (1, 10) if size <= len(at)}},
          Curve("neighbours n", "precision at n", list(range(1, len(at) + 1)), at.tolist(), log_x=True))


def _precisions(asked: Vectors, found: Found, *, same_split: bool, mesh: Mesh) -> tuple[int, float, np.ndarray]:
  """Returns how many queries have a relevant image in the gallery, the mean of their average precisions, and their
  precision at 1, 2, ... neighbours, f64[n]; (0, NaN, nothing) if there is none."""
  own = asked.index if same_split else np.full(len(asked.index), -1)
  precision = _ranking_precisions(asked, own, found.blocks, found.labels, mesh=mesh)
  judged = np.isfinite(precision)
  if not judged.any():
    return 0, math.nan, np.zeros(0)
  hits = (found.labels[found.ids] == asked.labels[:, None])[judged, :DEPTH]
  at = np.cumsum(hits, axis=1).mean(axis=0) / np.arange(1, hits.shape[1] + 1)
  return int(judged.sum()), float(precision[judged].mean()), at


def _without(neighbours: Neighbours, own: np.ndarray) -> Neighbours:
  """Leaves out each query itself, or where it was not found the last neighbour."""
  keep = neighbours.ids != own[:, None]
  keep[keep.all(axis=1), -1] = False
  return Neighbours(*(x[keep].reshape(len(x), -1) for x in neighbours))


def _ranking_precisions(asked: Vectors, own: np.ndarray, blocks: Sequence[tuple[np.ndarray, np.ndarray]],
                        labels: np.ndarray, *, mesh: Mesh) -> np.ndarray:
  """Returns f64[Q], NaN for a query without a label or without a relevant image in the gallery.

  Args:
    asked: the queries.
    own: i32[Q], the gallery image that each query is; -1: none.
    blocks: (f32[M, D], i32[M]) pairs, the gallery by rising index; index -1 is padding.
    labels: i32[N], by index.
    mesh: the devices.
  """
  index = np.concatenate([block_index for _, block_index in blocks])
  score = _make_score(mesh)
  size = max(1, min(QUERIES, SCORES // len(index), len(asked.index)))
  found = np.full(len(asked.index), np.nan)
  with Progress("retrieval: ranking", len(found), unit="queries") as progress:
    for start in range(0, len(found), size):
      rows = asked.rows[start:start + size]
      batch = jax.device_put(np.pad(rows, ((0, size - len(rows)), (0, 0))), whole(mesh))
      similarity = np.concatenate([np.asarray(score(batch, jax.device_put(block, split(mesh)))) for block, _ in blocks],
                                  axis=1)
      for query in range(start, start + len(rows)):
        others = (index >= 0) & (index != own[query])
        relevant = labels[index[others]] == asked.labels[query]
        if asked.labels[query] >= 0 and relevant.any():
          found[query] = ranking_precision(similarity[query - start, others], relevant)
      progress.update(len(rows))
  return found


def ranking_precision(similarity: np.ndarray, relevant: np.ndarray) -> float:
  """Returns the average precision as in information retrieval, in (0, 1].

  It is the mean, over the relevant items, of the share of relevant ones among those ranked no lower.

  Args:
    similarity: f32[N]; the ranking falls with it, equals stay in their order.
    relevant: bool[N], at least one True.
  """
  ranking = np.argsort(-similarity, kind="stable")
  ranks = np.flatnonzero(relevant[ranking]) + 1
  return float(np.mean(np.arange(1, len(ranks) + 1) / ranks))


@functools.cache
def _make_score(mesh: Mesh) -> Callable:
  """Returns score(queries f32[Q, D], references f32[M, D]) -> f32[Q, M], as `Nearest` scores."""
  def device_score(queries: jax.Array, references: jax.Array) -> jax.Array:
    return jnp.matmul(queries, references.T, precision=lax.Precision.HIGHEST)

  return jax.jit(jax.shard_map(device_score, mesh=mesh, in_specs=(WHOLE, SPLIT), out_specs=PartitionSpec(None, AXIS)),
                 out_shardings=whole(mesh))


def _describe(gallery: Source, queries: Source, asked: Vectors, found: Found, *, num_shown: int,
              num_neighbours: int) -> list[dict[str, Any]]:
  """Returns the queries shown, with their neighbours, as JSON values."""
  def describe(source: Source, index: np.integer, label: np.integer) -> dict[str, Any]:
    return {"name": source.image_name(int(index)), "index": int(index),
            "class": source.class_names[label] if label >= 0 else None}

  shown, near = slice(0, num_shown), slice(0, num_neighbours)
  return [{**describe(queries, index, label),
           "neighbours": [{**describe(gallery, other, found.labels[other]), "similarity": float(value)}
                          for other, value in zip(others, values, strict=True)]}
          for index, label, others, values in zip(asked.index[shown], asked.labels[shown], found.ids[shown, near],
                                                  found.similarity[shown, near], strict=True)]


def _save_plot(path: str | os.PathLike, gallery: Images, queries: Images, figures: Mapping[str, Any]) -> None:
  asked = figures["queries"]
  found = [query["neighbours"] for query in asked]
  image = _read_images(queries, [query["index"] for query in asked])
  others = _read_images(gallery, [other["index"] for row in found for other in row])
  vectors = "the memory bank" if figures["gallery"] == "bank" else f"features ({figures['layer']})"
  plots.save_neighbours(
    path, image, np.reshape(others, (len(asked), -1, *image.shape[1:])),
    title=f"Queries and their nearest of {figures['num_gallery']:,} images, cosine similarity by {vectors}",
    similarity=[[other["similarity"] for other in row] for row in found],
    query_classes=[query["class"] for query in asked],
    classes=[[other["class"] for other in row] for row in found])


def _read_images(of: Images, index: Sequence[int]) -> np.ndarray:
  """Returns u8[len(index), H, H, 3] under the test transform, black where an image cannot be read."""
  batches = dataclasses.replace(of, source=Subset(of.source, index), batch_size=len(index)).test_batches()
  return np.concatenate([batch["image"] for batch in batches])


def _measure(evaluation: Evaluation) -> Outcome:
  queries = evaluation.either(evaluation.settings.queries, "retrieval.queries")
  bank = None
  if evaluation.settings.gallery == "bank":
    run = evaluation.single_run()
    with Checkpoints(run.folder / "checkpoints", keep=1) as checkpoints:
      bank = checkpoints.restore_bank(run.step, Layout(run.meta["num_images"], run.meta["num_strata"]))
  return measure_retrieval(
    evaluation.subject.model, evaluation.train, queries, evaluation.settings, mesh=evaluation.mesh, bank=bank,
    seed=evaluation.config.seed, same_split=queries is evaluation.train,
    plot_path=beside(evaluation, "neighbours", "png"))


def _check(evaluation: Evaluation) -> None:
  """Raises UserError for an unknown layer, or a memory bank that is not there or of other images."""
  check_features(evaluation.subject.model, (evaluation.settings.layer,), image_size=evaluation.train.image_size,
                 field="retrieval.layer")
  if evaluation.settings.gallery == "bank":
    run, given = evaluation.single_run(), evaluation.train.source.fingerprint
    if given != run.meta["data"]:
      raise UserError(f"the bank of {run.label} is of other images than those given ({run.meta['data']!r}, and now "
                      f"{given!r}); use --config.retrieval.gallery=features")


PROTOCOL = Protocol(
  RetrievalSettings, _measure, _check,
  reading=Reading(lambda found: {"retrieval mAP": found["mean_average_precision"]}, needs_test=False))
