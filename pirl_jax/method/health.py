"""Is the run still sound? What a step must not hold (NaN, infinity), and what it should not come to (collapse).

Letters: B batch of all devices, M its parts, K negatives, D embedding.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

QUANTITIES = ("the loss", "the gradients", "the parameters", "the batch statistics", "the rows of the memory bank")
"""Looked at in each step, in the order in which a number that is not finite passes from one to the next."""

NOT_FINITE = "not_finite"
"""Name among the metrics of a step of what `not_finite` returns."""


def not_finite(loss: Any, gradients: Any, parameters: Any, batch_stats: Any, bank_rows: Any = ()) -> jax.Array:
  """Returns bool[5]: in which of `QUANTITIES`, trees of f32[...], there is a NaN or an infinity. Runs in the step."""
  def holds_one(tree: Any) -> jax.Array:
    return jnp.any(jnp.array([jnp.any(~jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)], bool))

  return jnp.stack([holds_one(tree) for tree in (loss, gradients, parameters, batch_stats, bank_rows)])


def sum_of_shares(share: jax.Array, x: jax.Array) -> jax.Array:
  """Returns what a part of a batch adds to the mean of x f32[B / M], f32[]; `share` f32[B / M] weighs each image."""
  return jnp.sum(x * share)


class Similarities(NamedTuple):
  """Scores of the images of a part of a batch, f32[B / M] each: cosines divided by the temperature."""

  own: jax.Array
  """With the own row."""
  beaten: jax.Array
  """How many negatives are less similar than the own row."""
  negatives: jax.Array
  """With the negatives, summed."""
  count: jax.Array
  """How many negatives there are."""


def watch(score: jax.Array, weight: jax.Array, positive: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the terms f32[B / M, K] whose sums over the negatives are the last three of `Similarities`, in their order.

  Args:
    score, weight: f32[B / M, K], of the negatives; see `losses.Negatives`.
    positive: f32[B / M, 1], the scores with the own rows.
  """
  return (score < positive) * weight, score * weight, weight


def similarities(seen: Mapping[str, Similarities], *, mean: Callable, temperature: float) -> dict[str, jax.Array]:
  """Returns figures that need no label and show whether the network learns, f32[] each.

  similarity_own, similarity_own_pretext: cosine of the image's, and the pretext view's, embedding with its own row;
  similarity_negatives: mean cosine of the image's embedding with the negatives; negatives_beaten: share of them that
  are less similar than the own row, for the pretext view (the image if there is none).

  Args:
    seen: of each view, "pretext" and "image", or "image" alone.
    mean: mean(x f32[B / M]) -> what these images add to the mean over the batch, f32[].
    temperature: tau.
  """
  image, harder = seen["image"], seen.get("pretext", seen["image"])
  return {
    "similarity_own": mean(image.own) * temperature,
    **({"similarity_own_pretext": mean(seen["pretext"].own) * temperature} if "pretext" in seen else {}),
    "similarity_negatives": mean(image.negatives / jnp.maximum(image.count, 1)) * temperature,
    "negatives_beaten": mean(harder.beaten / jnp.maximum(harder.count, 1)),
  }


def spread(emb: jax.Array, share: jax.Array) -> jax.Array:
  """Returns the spread of embeddings f32[M, B / M, D], a health figure, f32[].

  It is the standard deviation of each dimension over the batch, averaged and times sqrt(D): 1 when the embeddings fill
  the sphere, 0 when they have collapsed to a point.

  Args:
    emb: unit vectors.
    share: f32[M, B / M], the weight of each image; they sum up to 1.
  """
  def mean(x: jax.Array) -> jax.Array:
    return jnp.sum(x * share[..., None], axis=(0, 1), keepdims=True)
  return jnp.mean(jnp.sqrt(mean((emb - mean(emb)) ** 2))) * emb.shape[-1] ** 0.5
