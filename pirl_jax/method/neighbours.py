"""Positives and negatives by their similarity: the nearest row of the whole bank, and negatives of chosen ranks.

A bank that holds every image is what makes both possible. Everything here runs inside `jax.shard_map` over the mesh
axis that splits the bank, is exact on any number of devices, and needs memory for B x `CHUNK_ROWS` scores.

Letters: B batch (of all devices), K negatives of an image held by this device, R rows of the bank on this device,
D embedding.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pirl_jax.method import memory_bank, products
from pirl_jax.method.losses import Negatives
from pirl_jax.method.negatives import CHUNK_ROWS

BITS = 2
"""Bits of a score that one pass over the negatives decides: 2^BITS - 1 counts at a time, 32 / BITS passes."""


def nearest(bank: jax.Array, usable: jax.Array, rows: jax.Array, own: jax.Array, *, axis: str,
            product: Callable = products.exact) -> tuple[jax.Array, jax.Array]:
  """Returns for each image the row of another image that is most similar to its own: (i32[B], its vector f32[B, D]).

  Both are the same on every device. Of equal rows the first one is taken. If no other row is usable, the own row is
  returned. NNCLR (2104.14548) takes such a row as the positive.

  Args:
    bank: [R, D], this device's rows, see `memory_bank.stored`.
    usable: bool[R]; False on padding and on the rows of broken images.
    rows: i32[B], the images' own rows.
    own: f32[B, D], the vectors in these rows.
    axis: mesh axis that splits the bank.
    product: of embeddings and rows, see `products`.
  """
  size, (local, _) = min(CHUNK_ROWS, len(bank)), memory_bank.local_rows(bank, rows, axis=axis)

  def look(best: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
    first = jnp.minimum(start, len(bank) - size)  # the last chunk begins early enough to be whole
    row = first + jnp.arange(size)
    score = product(own, memory_bank.vectors(lax.dynamic_slice_in_dim(bank, first, size)).astype(own.dtype))
    other = lax.dynamic_slice_in_dim(usable, first, size)[None] & (row[None] != local[:, None])
    score = jnp.where(other, score, -jnp.inf)
    place = jnp.argmax(score, axis=1)
    found = jnp.take_along_axis(score, place[:, None], axis=1)[:, 0]
    return (jnp.maximum(found, best[0]), jnp.where(found > best[0], row[place], best[1])), None

  start = lax.pcast((jnp.full(len(own), -jnp.inf, own.dtype), jnp.zeros(len(own), jnp.int32)), axis, to="varying")
  (score, place), _ = lax.scan(look, start, jnp.arange(0, len(bank), size))
  highest, device = lax.pmax(score, axis), lax.axis_index(axis)
  winner = lax.pmin(jnp.where((score == highest) & (score > -jnp.inf), device, lax.axis_size(axis)), axis)
  mine = winner == device
  row = lax.psum(jnp.where(mine, device * len(bank) + place, 0), axis)
  vector = lax.psum(jnp.where(mine[:, None], memory_bank.vectors(bank[place]), 0), axis).astype(own.dtype)
  alone = winner == lax.axis_size(axis)
  return jnp.where(alone, rows, row), jnp.where(alone[:, None], own, vector)


@dataclasses.dataclass(frozen=True)
class Ranked:
  """Those of an image's negatives whose scores have certain ranks among all of them.

  Attributes:
    negatives: all of them.
    lowest: f32[B], the smallest score that counts.
    below: f32[B]; a score that counts is below this one.
  """

  negatives: Negatives
  lowest: jax.Array
  below: jax.Array

  def sum(self, terms: Callable, *per_image: jax.Array) -> Any:
    """Returns the sums f32[B] of the terms f32[B, K], see `losses.Negatives.sum`."""
    def chosen(score: jax.Array, weight: jax.Array, lowest: jax.Array, below: jax.Array, *given: jax.Array) -> Any:
      return terms(score, weight * ((score >= lowest) & (score < below)), *given)

    return self.negatives.sum(chosen, self.lowest, self.below, *per_image)


def ranked(negatives: Negatives, still: Negatives, shares: tuple[float, float], num_images: int) -> Ranked:
  """Returns the negatives between two shares of the ranks, counted from the most similar one.

  (0, 0.08) takes the hardest 8 %; (0.01, 0.1) leaves out the nearest hundredth, which may show the same thing as the
  image, and takes a ring around it (conditional noise-contrastive estimation, 2010.02037). Of n negatives, those of the
  ranks floor(low n) + 1 to ceil(high n) count. Negatives with the score of the last one count, too, and those with the
  score of the last one left out do not.

  Args:
    negatives: those of a part of the batch.
    still: the same ones without a gradient: none flows through the choice.
    shares: (low, high), 0 <= low < high <= 1.
    num_images: B.
  """
  low, high = shares
  number = still.sum(lambda score, weight: (weight > 0).astype(jnp.int32))
  below, lowest = jnp.full(num_images, jnp.inf), jnp.full(num_images, -jnp.inf)
  if low > 0:
    skipped = jnp.floor(low * number).astype(jnp.int32)
    below = jnp.where(skipped > 0, score_of_rank(still, skipped, num_images), below)
  if high < 1:
    lowest = score_of_rank(still, jnp.ceil(high * number).astype(jnp.int32), num_images)
  return Ranked(negatives, lowest, below)


def score_of_rank(negatives: Negatives, rank: jax.Array, num_images: int) -> jax.Array:
  """Returns f32[B], the score of an image's negative of this rank i32[B]; rank 1 is the largest score.

  The score is found bit by bit, from counts: nothing is sorted, and the counts of the devices are added up.
  """
  found = jnp.zeros(num_images, jnp.uint32)
  for shift in range(32 - BITS, -1, -BITS):
    def at_least(score: jax.Array, weight: jax.Array, found: jax.Array, shift: int = shift) -> tuple[jax.Array, ...]:
      order = _order(score)
      return tuple(((order >= found + jnp.uint32(step << shift)) & (weight > 0)).astype(jnp.int32)
                   for step in range(1, 1 << BITS))

    enough = sum((count >= rank).astype(jnp.uint32) for count in negatives.sum(at_least, found))
    found = found + (enough << shift)
  return _score(found)


def _order(score: jax.Array) -> jax.Array:
  """Returns u32[...] in the order of the scores f32[...]: positive numbers after negative ones."""
  bits = lax.bitcast_convert_type(score.astype(jnp.float32), jnp.uint32)
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _score(order: jax.Array) -> jax.Array:
  """Returns the scores f32[...] that `_order` turns into these numbers u32[...]."""
  bits = jnp.where(order >> 31 == 1, order & jnp.uint32((1 << 31) - 1), ~order)
  return lax.bitcast_convert_type(bits, jnp.float32)
