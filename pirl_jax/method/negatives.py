"""The negatives of a batch, and sums over them: scores that stand in memory, or the whole bank, chunk by chunk.

Letters: B batch (of all devices), K negatives of an image held by this device, R rows of the bank on this device,
D embedding. Everything here runs inside `jax.shard_map` over the mesh axis that splits the bank.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pirl_jax.method import memory_bank, products

CHUNK_ROWS = 8_192
"""Rows of the bank that are scored at a time, at most: 32 MB of scores for 1,024 images."""


_Shard = tuple[jax.Array, jax.Array, jax.Array]
"""What a device holds: bank [R, D], usable bool[R], own i32[B] or i32[B, E]."""

_Inputs = tuple[jax.Array, tuple[jax.Array, ...]]
"""What the sums have a gradient by: embeddings f32[B, D], and f32[B] of each image."""


@dataclasses.dataclass(frozen=True)
class Scores:
  """Negatives whose scores f32[B, K] stand in memory.

  Attributes:
    score: f32[B, K], cosine similarities divided by the temperature.
    weight: f32[B, K] in {0, 1}; 0 leaves a negative out.
    axis: mesh axis over which the negatives are split; None: all are here.
  """

  score: jax.Array
  weight: jax.Array
  axis: str | None = None

  def sum(self, terms: Callable, *per_image: jax.Array) -> Any:
    """Returns the sums f32[B] of the terms f32[B, K], see `losses.Negatives.sum`."""
    sums = _row_sums(terms, self.score, self.weight, per_image)
    return sums if self.axis is None else lax.psum(sums, self.axis)


@dataclasses.dataclass(frozen=True)
class EveryRow:
  """Every row of the bank but the image's own, scored in chunks: memory for B x `CHUNK_ROWS` scores.

  The gradient is exact. A sum depends for each image on that image alone, so its slope can be summed up on the way,
  and nothing has to be kept or computed again for the backward pass.

  Attributes:
    bank: [R, D], this device's rows, see `memory_bank.stored`; a constant.
    usable: bool[R]; a row that is not has weight 0.
    own: i32[B], the images' own rows as this device numbers them; those of other devices are outside of [0, R). With
      i32[B, E] there are E rows for each image that are no negatives.
    embeddings: f32[B, D], unit vectors.
    temperature: tau.
    axis: mesh axis that splits the bank.
    product: of embeddings and rows, see `products`.
  """

  bank: jax.Array
  usable: jax.Array
  own: jax.Array
  embeddings: jax.Array
  temperature: float
  axis: str
  product: Callable = products.exact

  def sum(self, terms: Callable, *per_image: jax.Array) -> Any:
    """Returns the sums f32[B] of the terms f32[B, rows of a chunk] over all chunks, see `losses.Negatives.sum`."""
    # What comes in is the same on every device and each adds its rows' part of the gradient: as "varying" it is summed.
    inputs = lax.pcast((self.embeddings, per_image), self.axis, to="varying")
    chunk_sums = functools.partial(_chunk_sums, terms, self.product, self.temperature)
    return lax.psum(_sum_over_rows(chunk_sums, self.axis, (self.bank, self.usable, self.own), inputs), self.axis)


def _row_sums(terms: Callable, score: jax.Array, weight: jax.Array, per_image: Sequence[jax.Array]) -> Any:
  each = terms(score, weight, *(x[:, None] for x in per_image))
  return jax.tree.map(lambda term: jnp.sum(term, axis=1), each)


def _chunk_sums(terms: Callable, product: Callable, temperature: float, shard: _Shard, start: jax.Array,
                inputs: _Inputs) -> Any:
  """Returns the sums f32[B] over the rows from `start` on, `CHUNK_ROWS` of them or as many as there are."""
  bank, usable, own = shard
  embeddings, per_image = inputs
  size = min(CHUNK_ROWS, len(bank))
  first = jnp.minimum(start, len(bank) - size)  # the last chunk begins early enough to be whole
  row = first + jnp.arange(size)
  block = memory_bank.vectors(lax.dynamic_slice_in_dim(bank, first, size)).astype(embeddings.dtype)
  fresh = lax.dynamic_slice_in_dim(usable, first, size) & (row >= start)
  weight = fresh[None]
  for left_out in own.reshape(len(own), -1).T:
    weight &= row[None] != left_out[:, None]
  weight = weight.astype(embeddings.dtype)
  return _row_sums(terms, product(embeddings, block) / temperature, weight, per_image)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_over_rows(chunk_sums: Callable, axis: str, shard: _Shard, inputs: _Inputs) -> Any:
  return _scan(functools.partial(chunk_sums, shard), axis, shard, inputs)


def _forward(chunk_sums: Callable, axis: str, shard: _Shard, inputs: _Inputs) -> tuple[Any, Any]:
  def sums_and_slopes(start: jax.Array, inputs: _Inputs) -> tuple[Any, list[Any]]:
    sums, slopes_fn = jax.linearize(functools.partial(chunk_sums, shard, start), inputs)
    # One sum at a time: a sum without a slope, behind `stop_gradient`, then costs no product. If all are pulled back
    # together, zeros are multiplied for it.
    slopes = [jax.linear_transpose(lambda moved, number=number: jax.tree.leaves(slopes_fn(moved))[number], inputs)(
      jnp.ones_like(leaf))[0] for number, leaf in enumerate(jax.tree.leaves(sums))]
    return sums, slopes

  return _scan(sums_and_slopes, axis, shard, inputs)


def _backward(chunk_sums: Callable, axis: str, slopes: Any, cotangents: Any) -> tuple[None, Any]:
  del chunk_sums, axis
  parts = [jax.tree.map(lambda slope, by=by: slope * by.reshape(by.shape + (1,) * (slope.ndim - 1)), each)
           for by, each in zip(jax.tree.leaves(cotangents), slopes, strict=True)]
  return None, jax.tree.map(lambda *each: sum(each), *parts)


_sum_over_rows.defvjp(_forward, _backward)


def _scan(sums_fn: Callable, axis: str, shard: _Shard, inputs: _Inputs) -> Any:
  """Returns the sum of sums_fn(start, inputs), trees of f32[B, ...], over the chunks of this device's R rows."""
  def add(total: Any, start: jax.Array) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, sums_fn(start, inputs)), None

  num_rows = len(shard[0])
  shapes = jax.eval_shape(sums_fn, 0, inputs)
  zeros = lax.pcast(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), axis, to="varying")
  return lax.scan(add, zeros, jnp.arange(0, num_rows, CHUNK_ROWS))[0]
