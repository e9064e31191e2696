"""Figures that show whether a run is sound: numbers that are not finite, collapse, and similarities with the bank.

Letters: B batch of all devices, M parts of the batch, K negatives, D dimensions of an embedding.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pirl_jax.runtime.mesh import AXIS

QUANTITIES = ("the loss", "the gradients", "the parameters", "the batch statistics", "the rows of the memory bank")
"""The quantities that each step checks. A number that is not finite spreads from one to the next in this order."""

NOT_FINITE = "not_finite"
"""Name of the result of `not_finite` among the metrics of a step."""

NUM_USABLE = "num_usable"
"""Name of the result of `num_usable` among the metrics of a step."""


def not_finite(loss: Any, gradients: Any, parameters: Any, batch_stats: Any, bank_rows: Any = ()) -> jax.Array:
  """Returns bool[5]: which of `QUANTITIES`, each a tree of f32[...], holds a NaN or an infinity; runs in the step."""
  def holds_one(tree: Any) -> jax.Array:
    return jnp.any(jnp.array([jnp.any(~jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)], bool))

  return jnp.stack([holds_one(tree) for tree in (loss, gradients, parameters, batch_stats, bank_rows)])


def num_usable(usable: jax.Array) -> jax.Array:
  """Returns i32[], the number of usable rows of all devices; `usable` bool[R] are the rows of this device."""
  return jax.lax.psum(jnp.sum(usable, dtype=jnp.int32), AXIS)


def sum_of_shares(share: jax.Array, x: jax.Array) -> jax.Array:
  """Returns f32[], the contribution of a part to the mean of x f32[B / M] over the batch.

  `share` f32[B / M] is the weight of each image in [0, 1]; over the whole batch the weights sum to 1.
  """
  return jnp.sum(x * share)


class Similarities(NamedTuple):
  """Similarities of the images of a part of a batch, f32[B / M] each; a score is a cosine divided by tau."""

  own: jax.Array
  """Score with the image's own row."""
  beaten: jax.Array
  """Number of negatives that are less similar than the own row."""
  negatives: jax.Array
  """Sum of the scores with the negatives."""
  count: jax.Array
  """Number of negatives."""


def watch(score: jax.Array, weight: jax.Array, positive: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns three terms f32[B / M, K]; their sums over the negatives are `beaten`, `negatives` and `count`.

  Args:
    score: f32[B / M, K], scores with the negatives, see `losses.Negatives`.
    weight: f32[B / M, K], 1 for a negative that counts, else 0.
    positive: f32[B / M, 1], scores with the own rows.
  """
  return (score < positive) * weight, score * weight, weight


def similarities(seen: Mapping[str, Similarities], *, mean: Callable, temperature: float) -> dict[str, jax.Array]:
  """Returns figures f32[] that show, without labels, whether the network learns.

  - similarity_own, similarity_own_pretext: mean cosine, in [-1, 1], of the embedding of the image, or of the pretext
    view, with the image's own row.
  - similarity_negatives: mean cosine, in [-1, 1], of the image's embedding with the negatives.
  - negatives_beaten: share, in [0, 1], of the negatives that are less similar than the own row, for the pretext view
    or, if there is none, for the image.

  Args:
    seen: the similarities of the views "pretext" and "image", or of "image" alone.
    mean: mean(x f32[B / M]) -> f32[], the contribution of these images to the mean over the batch.
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
  """Returns the spread of the embeddings, f32[] in [0, 1].

  The spread is the standard deviation over the batch, averaged over the dimensions and multiplied by sqrt(D). It is 1
  if the embeddings fill the sphere, and 0 if they have collapsed to a point.

  Args:
    emb: f32[M, B / M, D], unit vectors.
    share: f32[M, B / M], the weight of each image; the weights sum to 1.
  """
  def mean(x: jax.Array) -> jax.Array:
    return jnp.sum(x * share[..., None], axis=(0, 1), keepdims=True)
  return jnp.mean(jnp.sqrt(mean((emb - mean(emb)) ** 2))) * emb.shape[-1] ** 0.5
