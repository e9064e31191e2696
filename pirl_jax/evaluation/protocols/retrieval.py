"""Image retrieval: a plot with the nearest neighbours of some images and, if there are labels, mean average precision.

A gallery image is relevant to a query if the two have the same label.

Letters: Q queries, N gallery images, m M images of a part or block, D numbers of a vector, n neighbours, H side of an
image in pixels.
"""

import concurrent.futures
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

from pirl_jax.data.crops import shrink
from pirl_jax.data.reading import read_image
from pirl_jax.data.records import Source, same_images
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
"""Largest number of neighbours for which the precision is reported."""

QUERIES = 256
SCORES = 2**28
"""QUERIES queries are ranked at a time; fewer, if their similarities to the gallery would be more than SCORES numbers
(1 GiB)."""


@dataclasses.dataclass(frozen=True)
class RetrievalSettings:
  """The queries, the gallery, and how much of the result the plot shows.

  Attributes:
    layer: one of `layers.layer_names`, or "embedding". With the gallery "bank" the layer is always "embedding".
    gallery: "features" of the training images, or "bank" for the rows of the run's memory bank.
    queries: "train" or "test" images; None takes the test images if there are any, else the training images.
    num_queries: number of queries. The seed chooses them among the images that can be read, the same ones on every
      machine; if there are fewer images, all are taken.
    num_shown: number of queries in the plot.
    num_neighbours: number of neighbours of each query in the plot.

  Raises:
    UserError: the gallery is unknown, or a number is below 1.
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
  """The vectors of the queries, or of a part of the gallery.

  Attributes:
    rows: f32[m, D], unit norm.
    index: i32[m], the indices of the records.
    labels: i32[m]; -1 for an image without a label.
    num_broken: number of images that could not be read, among those up to the last image of `rows`.
  """

  rows: np.ndarray
  index: np.ndarray
  labels: np.ndarray
  num_broken: int


class Found(NamedTuple):
  """The result of the search in the gallery.

  Attributes:
    similarity: f32[Q, n], cosine similarities in [-1, 1], the nearest neighbour first.
    ids: i32[Q, n], the indices of the neighbours' records.
    labels: i32[N], by record; -1 for an image without a label or an image that could not be read.
    blocks: the gallery's vectors, see `_ranking_precisions`; empty if there are no labels.
    num_gallery: number of gallery images that could be read.
    num_broken: number of gallery images that could not be read.
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
  """Searches the gallery for the images most similar to each query, and returns how good the results are.

  Similarity is the cosine similarity of the vectors. A PNG shows whole images with names.

  The outcome's figures:

  - `queries`: the queries in the plot, each with `name`, `index`, `class` and `neighbours`; each neighbour has the same
    entries and `similarity`, the nearest first.
  - `mean_similarity_of_nearest` over all queries, in [-1, 1].
  - `num_queries`, `num_gallery`, `num_broken_queries`, `num_broken_gallery`, `gallery` ("features" or "bank"), `layer`,
    `dim` (D), `similarity`, `seed`, `written` (the PNG).
  - `labels`: "classes", or the reason why there are no figures with labels. In that case the table holds the mean
    similarity instead, and there is no curve.

  With labels there are more figures, over the `num_judged` queries that have a relevant image in the gallery:

  - `mean_average_precision` in [0, 1], over the whole ranking. As usual in information retrieval, the average precision
    is the mean over the relevant images of the precision at their rank; of equals the lower index ranks first.
  - `precision_at` 1, 5, 10, ... neighbours, in [0, 1].

  With labels the gallery's vectors are in the host's memory: 10 GB for a ResNet-50 on ImageNet. The similarities of all
  queries to all images are never in memory at once.

  Args:
    model: the frozen network.
    gallery: the images that are searched.
    queries: the images whose neighbours are searched.
    settings: layer, gallery, and numbers of queries and neighbours; `settings.queries` is not used here.
    mesh: the devices.
    bank: f32[N, D], the rows of the memory bank in the order of the gallery's images, used instead of their features.
      A row of zeros belongs to an image that could not be read and is never found. None uses features.
    seed: any integer.
    same_split: True if queries and gallery are the same images; then no query finds itself.
    plot_path: path of the PNG, which the first process writes; its folder is created.

  Raises:
    UserError: the layer is unknown, the bank belongs to other images, or no image can be read.
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
  """Returns the vectors of the first `num_queries` readable images, in the order of a hash of (seed, index).

  A hash is used instead of a random generator, whose draws may change between versions.
  """
  order = shuffled(range(len(queries)), seed=seed)
  chosen = dataclasses.replace(queries, source=Subset(queries.source, order))
  parts, num_read = [], 0
  with (Progress("retrieval: queries", min(num_queries, len(queries))) as progress,
        contextlib.closing(chosen.test_batches()) as batches):  # usually closed long before its end
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
  # Images after the last query do not count, although the last batch may have read them.
  num_met = place[-1] + 1 if num_read == num_queries else len(order)
  return Vectors(rows, np.asarray(order)[place], labels, int(num_met) - num_read)


def _read_gallery(model: Model, gallery: Images, bank: np.ndarray | None, *, mesh: Mesh, layer: str,
                  labelled: bool) -> Iterator[Vectors]:
  """Yields the vectors of the gallery part by part, in ascending order of the index."""
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
  """Returns the neighbours of each query, at most `depth` of them.

  Args:
    asked: the queries.
    parts: the gallery, in ascending order of the index.
    num_images: number of images in the gallery, including those that cannot be read.
    depth: the largest n; a small gallery gives fewer neighbours.
    same_split: True if queries and gallery are the same images; then no query finds itself.
    keep: True returns the gallery's vectors, too.
    mesh: the devices.

  Raises:
    UserError: the gallery has no image that could be found.
  """
  # With `same_split` one more neighbour is searched, because the query itself is left out afterwards.
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
    raise UserError(f"{num_gallery} of {num_images} gallery images can be read; there is no image to be found")
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
  """Returns (number of queries, mean average precision, precision at 1, 2, ... neighbours f64[n]).

  Only queries with a relevant image in the gallery count. If there is no such query, the result is
  (0, NaN, an empty array).
  """
  own = asked.index if same_split else np.full(len(asked.index), -1)
  precision = _ranking_precisions(asked, own, found.blocks, found.labels, mesh=mesh)
  judged = np.isfinite(precision)
  if not judged.any():
    return 0, math.nan, np.zeros(0)
  hits = (found.labels[found.ids] == asked.labels[:, None])[judged, :DEPTH]
  at = np.cumsum(hits, axis=1).mean(axis=0) / np.arange(1, hits.shape[1] + 1)
  return int(judged.sum()), float(precision[judged].mean()), at


def _without(neighbours: Neighbours, own: np.ndarray) -> Neighbours:
  """Returns the neighbours without the query itself, or without the last neighbour if the query is not among them."""
  keep = neighbours.ids != own[:, None]
  keep[keep.all(axis=1), -1] = False
  return Neighbours(*(x[keep].reshape(len(x), -1) for x in neighbours))


def _ranking_precisions(asked: Vectors, own: np.ndarray, blocks: Sequence[tuple[np.ndarray, np.ndarray]],
                        labels: np.ndarray, *, mesh: Mesh) -> np.ndarray:
  """Returns the average precision of each query, f64[Q]; NaN for a query without a label or a relevant gallery image.

  Args:
    asked: the queries.
    own: i32[Q], the gallery index of each query's own image; -1 if the query is not in the gallery.
    blocks: (f32[M, D], i32[M]) pairs of vectors and indices: the gallery in ascending order of the index; index -1 is
      padding.
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
  """Returns the average precision of one query in (0, 1], as defined in information retrieval.

  The average precision is the mean, over the relevant items, of the precision at the item's rank: the share of relevant
  items among all items up to this rank.

  Args:
    similarity: f32[N]; the most similar item ranks first, and equal items keep their order.
    relevant: bool[N], at least one True.
  """
  ranking = np.argsort(-similarity, kind="stable")
  ranks = np.flatnonzero(relevant[ranking]) + 1
  return float(np.mean(np.arange(1, len(ranks) + 1) / ranks))


@functools.cache
def _make_score(mesh: Mesh) -> Callable:
  """Returns score(queries f32[Q, D], references f32[M, D]) -> similarities f32[Q, M], equal to those of `Nearest`."""
  def device_score(queries: jax.Array, references: jax.Array) -> jax.Array:
    return jnp.matmul(queries, references.T, precision=lax.Precision.HIGHEST)

  return jax.jit(jax.shard_map(device_score, mesh=mesh, in_specs=(WHOLE, SPLIT), out_specs=PartitionSpec(None, AXIS)),
                 out_shardings=whole(mesh))


def _describe(gallery: Source, queries: Source, asked: Vectors, found: Found, *, num_shown: int,
              num_neighbours: int) -> list[dict[str, Any]]:
  """Returns the queries of the plot with their neighbours, as JSON values."""
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
  originals = iter(_originals([(queries.source, query["index"]) for query in asked]
                              + [(gallery.source, other["index"]) for query in asked for other in query["neighbours"]],
                              max(1, gallery.num_threads)))
  first = [plots.Shown(next(originals), query["name"], query["class"]) for query in asked]
  rows = [[shown, *(plots.Shown(next(originals), other["name"], other["class"], other["similarity"])
                    for other in query["neighbours"])] for shown, query in zip(first, asked, strict=True)]
  vectors = "the memory bank" if figures["gallery"] == "bank" else f"features ({figures['layer']})"
  plots.save_neighbours(
    path, rows, title=f"Queries and their nearest of {figures['num_gallery']:,} images, cosine similarity by {vectors}")


def _originals(which: Sequence[tuple[Source, int]], num_threads: int) -> list[np.ndarray]:
  """Returns the whole images u8[H, W, 3], not the crop that the network sees; one that cannot be read is black."""
  def read(one: tuple[Source, int]) -> np.ndarray:
    source, index = one
    pixels, _ = read_image(source, index, lambda image: shrink(image, plots.NEIGHBOUR_SIDE))
    return np.zeros((plots.NEIGHBOUR_SIDE, plots.NEIGHBOUR_SIDE, 3), np.uint8) if pixels is None else pixels

  with concurrent.futures.ThreadPoolExecutor(num_threads) as threads:
    return list(threads.map(read, which))


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
  """Raises UserError if the layer is unknown, or if the memory bank is missing or belongs to other images."""
  check_features(evaluation.subject.model, (evaluation.settings.layer,), image_size=evaluation.train.image_size,
                 field="retrieval.layer")
  if evaluation.settings.gallery == "bank":
    run, given = evaluation.single_run(), evaluation.train.source.fingerprint
    if not same_images(given, run.meta["data"]):
      raise UserError(f"the memory bank of {run.label} belongs to other images than those given ({run.meta['data']!r}, "
                      f"and now {given!r}); use --config.retrieval.gallery=features")


PROTOCOL = Protocol(
  RetrievalSettings, _measure, _check,
  reading=Reading(lambda found: {"retrieval mAP": found["mean_average_precision"]}, needs_test=False))
