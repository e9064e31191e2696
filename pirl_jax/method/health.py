"""Is the run still sound? What a step must not hold (NaN, infinity), and what it should not come to (collapse)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

QUANTITIES = ("the loss", "the gradients", "the parameters", "the batch statistics", "the rows of the memory bank")
"""Looked at in each step, in the order in which a number that is not finite passes from one to the next."""

NOT_FINITE = "not_finite"
"""Name among the metrics of a step of what `not_finite` returns."""


def not_finite(loss: Any, gradients: Any, parameters: Any, batch_stats: Any, bank_rows: Any = ()) -> jax.Array:
  """Returns bool[5]: in which of `QUANTITIES`, trees of arrays, there is a NaN or an infinity. Runs within the step."""
  def holds_one(tree):
    return jnp.any(jnp.array([jnp.any(~jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)], bool))

  return jnp.stack([holds_one(tree) for tree in (loss, gradients, parameters, batch_stats, bank_rows)])


def sum_of_shares(share: jax.Array, x: jax.Array) -> jax.Array:
  """Returns what a part of a batch adds to the mean of x f32[B / M], f32[]: `share` is that of each image in it."""
  return jnp.sum(x * share)


def watch(score: jax.Array, weight: jax.Array, positive: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns what `health` needs of the negatives: which are less similar than the own row, the similarities, all."""
  return (score < positive) * weight, score * weight, weight


def health(watched: Mapping[str, Any], *, mean: Callable, temperature: float) -> dict[str, jax.Array]:
  """Returns figures that need no label and show whether the network learns, f32[] each.

  similarity_own, similarity_own_pretext: cosine of the image's, and the pretext view's, embedding with its own row;
  similarity_negatives: mean cosine of the image's embedding with the negatives; negatives_beaten: share of them that
  are less similar than the own row, for the pretext view (the image where there is none).
  """
  own, _, similarity, count = watched["image"]
  _, beaten, _, first_count = next(iter(watched.values()))
  return {
    "similarity_own": mean(own) * temperature,
    **({"similarity_own_pretext": mean(watched["pretext"][0]) * temperature} if "pretext" in watched else {}),
    "similarity_negatives": mean(similarity / jnp.maximum(count, 1)) * temperature,
    "negatives_beaten": mean(beaten / jnp.maximum(first_count, 1)),
  }


def spread(emb: jax.Array, share: jax.Array) -> jax.Array:
  """Returns the spread of embeddings f[M, B / M, D], a health figure, f32[].

  It is the standard deviation of each dimension over the batch, averaged and times sqrt(D): 1 when the embeddings fill
  the sphere, 0 when they have collapsed to a point.
  """
  def mean(x):
    return jnp.sum(x * share[..., None], axis=(0, 1), keepdims=True)
  return jnp.mean(jnp.sqrt(mean((emb - mean(emb)) ** 2))) * emb.shape[-1] ** 0.5
