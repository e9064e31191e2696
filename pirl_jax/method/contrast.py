"""What embeddings are compared with: the image's own row of the memory bank and negatives, as a step found them.

This is the seam for another kind of loss. A loss that sums over these negatives needs a few lines of `losses.py` alone
(docs/extending.md). One with other positives or negatives is a subclass of `Contrast` with a `scores` of its own.

Letters: B batch of all devices, M its parts, b this device's images of a part, K negatives held by this device,
D embedding, R rows of the bank on this device. A view is "pretext" or "image".
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pirl_jax.method import losses, memory_bank, neighbours, products
from pirl_jax.method.health import Similarities, watch
from pirl_jax.method.micro_batches import gather, weighed
from pirl_jax.method.negatives import EveryRow, Scores
from pirl_jax.runtime.mesh import AXIS

Draws = Mapping[str, tuple[jax.Array, jax.Array]]
"""{view: (the negatives' rows on this device, their vectors)}: (i32[..., K], f32[..., K, D]) of a view."""


class BatchRows(NamedTuple):
  """What belongs to the images of a batch, [M, B / M, ...]; in one part of the batch, [B / M, ...]."""

  rows: jax.Array
  """i32[M, B / M], the images' rows in the bank."""
  own: jax.Array
  """f32[M, B / M, D], the vectors in these rows."""
  valid: jax.Array
  """bool[M, B / M]; False for an image found broken, now or in an earlier step, and for one that fills up a batch."""
  share: jax.Array
  """f32[M, B / M], the weight of each image in every mean over the batch; 0 if it is not valid."""
  drawn: Draws
  """Rows i32[M, B / M, K] and vectors f32[M, B / M, K, D] for each view, if each image has negatives of its own."""
  near: tuple[()] | tuple[jax.Array, jax.Array]
  """Rows i32[M, B / M] and vectors f32[M, B / M, D] of the nearest other images, if they are positives, too."""


@dataclasses.dataclass(frozen=True)
class Memory:
  """The bank as a step found it. All of it is constant: no gradient flows into the bank.

  Attributes:
    bank: [R, D], this device's rows, see `memory_bank.stored`.
    usable: bool[R]; False on padding and on the rows of images found broken, those of this batch included.
    counts: bool[R]; the rows among which negatives are: usable ones, and none older than `Contrast.max_age`.
    images: of the whole batch, [M, B / M, ...].
    drawn: rows i32[K] and vectors f32[K, D] for each view, if the whole batch shares its negatives.
  """

  bank: jax.Array
  usable: jax.Array
  counts: jax.Array
  images: BatchRows
  drawn: Draws

  def stamped(self, written: jax.Array | None, step: jax.Array) -> jax.Array | None:
    """Returns `TrainState.written` i32[R] after this step, whose number is i32[]; None stays None."""
    return None if written is None else memory_bank.stamp(
      written, self.images.rows.reshape(-1), self.images.valid.reshape(-1), step, axis=AXIS)

  def to_write(self, emb: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns what `memory_bank.update` takes: rows i32[B], own f32[B, D], embeddings f32[B, D], valid bool[B].

    Args:
      emb: f32[M, B / M, D], unit vectors, to which the rows move.
    """
    flat = partial(jnp.reshape, shape=(-1, emb.shape[-1]))
    return self.images.rows.reshape(-1), flat(self.images.own), flat(emb), self.images.valid.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Contrast:
  """Compares embeddings f32[B / M, D] with the image's own row and with negatives, and has a loss of these scores.

  Attributes:
    loss_fn: L, see `losses.make_loss`.
    layout: of the bank.
    num_negatives: K over all devices, for each view; 0: every row of the bank, in chunks.
    negative_sampling: "shared", one draw of negatives for the whole batch, or "per_image", as the official code draws.
    own_row_is_negative: True if a draw may hold the image's own row and then counts it, as in the official code; False
      leaves the own row out, as in the paper. Not for K = 0.
    nearest_positive: weight in [0, 1] of a second loss, in which the row of another image that is nearest to the own
      row is the positive, see `neighbours.nearest`. This row is then no negative.
    negative_ranks: the negatives that count, see `neighbours.ranked`.
    max_age: rows that were written more than this many steps ago are no negatives, as they would have left MoCo's
      queue; 0: there is no limit.
    temperature: tau.
    product: of embeddings and rows, see `products`.
  """

  loss_fn: losses.Loss
  layout: memory_bank.Layout
  _: dataclasses.KW_ONLY
  num_negatives: int
  negative_sampling: str = "shared"
  own_row_is_negative: bool = False
  nearest_positive: float = 0.0
  negative_ranks: tuple[float, float] = (0.0, 1.0)
  max_age: int = 0
  temperature: float
  product: Callable = products.exact

  @property
  def reads_every_row(self) -> bool:
    """Returns whether a step reads the whole bank, so that the bank has to be written by a program of its own."""
    return not self.num_negatives or self.nearest_positive > 0

  @jax.named_scope("bank")
  def look_up(self, bank: jax.Array, usable: jax.Array, batch: Mapping[str, jax.Array], keys: Mapping[str, jax.Array],
              views: tuple[str, ...], moved: Callable[[jax.Array], jax.Array] | None = None,
              ages: jax.Array | None = None) -> Memory:
    """Returns what the batch is compared with. An image found broken has no weight from here on.

    Args:
      bank: [R, D], this device's rows.
      usable: bool[R].
      batch: this device's `index` i32[M, b], `valid` bool[M, b] and `position` i32[M, b], see `split_batch`, and
        perhaps `fills`, see `micro_batches.weighed`.
      keys: key[] of the negatives of each view.
      views: those that are compared.
      moved: from the images' own rows f32[M, B / M, D] to what takes their place as positives, of the same shape.
      ages: i32[R], see `TrainState.ages`; needed for `max_age`.
    """
    rows = gather(self.layout.row_of(batch["index"]), axis=1)  # [M, B / M]
    usable, valid = memory_bank.retire(usable, rows, gather(batch["valid"], axis=1), axis=AXIS)
    valid = weighed(valid, batch)
    draw = partial(memory_bank.draw, layout=self.layout, num_negatives=self.num_negatives, axis=AXIS)
    negatives = {}
    if self.negative_sampling == "per_image":
      position = gather(batch["position"], axis=1)
      negatives = {view: draw(keys[view], num_draws=rows.size)[position] for view in views}  # [M, B / M, K]
    elif self.num_negatives:
      negatives = {view: draw(keys[view]) for view in views}  # [K]
    own, *vectors = memory_bank.read(bank, rows.reshape(-1), *negatives.values(), axis=AXIS)
    if moved is not None:
      own = moved(own.reshape(*rows.shape, -1)).reshape(own.shape)
    drawn = dict(zip(negatives, zip(negatives.values(), vectors, strict=True), strict=True))
    share = valid / jnp.maximum(jnp.sum(valid), 1)
    near: Any = ()
    if self.nearest_positive:
      near = neighbours.nearest(bank, usable, rows.reshape(-1), own, axis=AXIS, product=self.product)
      near = jax.tree.map(lambda x: x.reshape(*rows.shape, *x.shape[1:]), near)
    of_images, of_all = (drawn, {}) if self.negative_sampling == "per_image" else ({}, drawn)
    counts = usable & (ages <= self.max_age) if ages is not None else usable
    images = BatchRows(rows, own.reshape(*rows.shape, -1), valid, share, of_images, near)
    return Memory(bank, usable, counts, images, of_all)

  def normaliser(self, memory: Memory, embs_fn: Callable, parts: Any) -> jax.Array:
    """Returns Z, f32[], of this batch; 0 if no image of it could be read.

    Z is taken from the scores of the pretext view, if there is one.

    Args:
      memory: of this step.
      embs_fn: embs_fn(part) -> {view: f32[B / M, D]}.
      parts: the batch, a tree of [M, ...], with `images` among it.
    """
    def sums(part: Any) -> tuple[jax.Array, jax.Array]:
      images, embs = part["images"], embs_fn(part)
      view = "pretext" if "pretext" in embs else "image"
      return losses.nce_normaliser_sums(*self.scores(memory, images, view, embs[view]), images.share > 0)

    return losses.nce_normaliser(*jax.tree.map(jnp.sum, jax.lax.map(sums, parts)), num_images=self.layout.num_images)

  @jax.named_scope("loss")
  def __call__(self, memory: Memory, images: BatchRows, embs: Mapping[str, jax.Array],
               normaliser: jax.Array) -> tuple[dict[str, jax.Array], dict[str, Similarities]]:
    """Returns for each view the losses of the images, f32[B / M], and the similarities behind them.

    Args:
      memory: of this step.
      images: those of one part of the batch, [B / M, ...].
      embs: f32[B / M, D] of each view, unit vectors.
      normaliser: f32[], Z.
    """
    each, seen = {}, {}
    for view, emb in embs.items():
      positive, negatives = self.scores(memory, images, view, emb)
      each[view], sums = self.loss_fn(positive, negatives, normaliser=normaliser, watch=watch)
      if images.near:
        second = memory_bank.positive_scores(images.near[1], emb, temperature=self.temperature)
        of_near, _ = self.loss_fn(second, negatives, normaliser=normaliser)
        each[view] = (1 - self.nearest_positive) * each[view] + self.nearest_positive * of_near
      seen[view] = Similarities(positive, *sums)
    return each, seen

  def scores(self, memory: Memory, images: BatchRows, view: str,
             emb: jax.Array) -> tuple[jax.Array, losses.Negatives]:
    """Returns the scores f32[B / M] of embeddings with the images' own rows, and their negatives.

    Args:
      memory: of this step.
      images: those of one part of the batch, [B / M, ...].
      view: of which these are the embeddings.
      emb: f32[B / M, D], unit vectors.
    """
    positive = memory_bank.positive_scores(images.own, emb, temperature=self.temperature)
    negatives = self._negatives(memory, images, view, emb)
    if self.negative_ranks != (0, 1):
      still = self._negatives(memory, images, view, jax.lax.stop_gradient(emb))
      negatives = neighbours.ranked(negatives, still, self.negative_ranks, len(emb))
    return positive, negatives

  def _negatives(self, memory: Memory, images: BatchRows, view: str, emb: jax.Array) -> losses.Negatives:
    no_negatives = [images.rows, *images.near[:1]]
    if not self.num_negatives:
      local = [memory_bank.local_rows(memory.bank, rows, axis=AXIS)[0] for rows in no_negatives]
      return EveryRow(memory.bank, memory.counts, jnp.stack(local, axis=-1), emb, self.temperature, AXIS, self.product)
    rows, vectors = (images.drawn or memory.drawn)[view]
    score = memory_bank.negative_scores(vectors, emb, temperature=self.temperature, product=self.product)
    weights = memory_bank.weights(memory.counts, images.rows, rows, with_own=self.own_row_is_negative, axis=AXIS)
    for near in images.near[:1]:
      weights *= memory_bank.weights(memory.counts, near, rows, axis=AXIS)
    return Scores(score, weights, AXIS)
