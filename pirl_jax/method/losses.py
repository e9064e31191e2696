"""Contrastive losses: scores in, one loss for each image out. Arithmetic only.

Letters: B batch, K negatives, N images in the data set. Scores are cosine similarities divided by the temperature, so
they lie in [-1/tau, 1/tau].

A loss is defined by the terms it sums over the negatives. How the negatives are stored (in memory, split over devices,
streamed in chunks) is hidden behind `Negatives.sum`. Two scores differ by `2 / temperature` at most, so the softmax
losses are written in exp(negative - positive), which float32 holds for tau >= 0.03: no maximum has to travel. A loss
of your own: docs/extending.md.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from pirl_jax.errors import UserError

EPS = 2.0**-23
"""Added to the denominators of `nce`: the float32 machine epsilon, as in vissl/losses/nce_loss.py."""

MIN_TEMPERATURE = 0.03


class Negatives(Protocol):
  """The negatives of each image of a batch: scores f32[B, K], and which of them count."""

  def sum(self, terms: Callable, *per_image: jax.Array) -> Any:
    """Returns the sums over the negatives of all devices, with their gradient: f32[B] in the place of f32[B, K].

    Args:
      terms: terms(score f32[B, K], weight f32[B, K], *per_image, each f32[B, 1]) -> a tree of f32[B, K], each entry of
        the own image alone. Weights are 1 and 0; what has weight 0 is to add nothing.
      per_image: f32[B] each.
    """


@dataclasses.dataclass(frozen=True)
class Loss:
  """A loss of sums over the negatives: from scores f32[B] and f32[B, K] to f32[B].

  Attributes:
    passes: one after the other, each terms(score, weight, positive, log_z, *sums) -> tuple of f32[B, K], to be summed
      over the negatives. Score and weight are f32[B, K]; positive, log_z and the sums of earlier passes are f32[B, 1].
    finish: finish(positive, log_z, *sums) -> f32[B], all f32[B].
    has_normaliser: whether it looks at Z, f32[].
  """

  passes: tuple[Callable, ...]
  finish: Callable
  has_normaliser: bool = False

  def __call__(self, positive: jax.Array, negatives: Negatives, *, normaliser: jax.Array,
               watch: Callable | None = None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the loss f32[B] of each image, and what is watched on the way.

    Args:
      positive: f32[B], score of each image with its own row.
      negatives: those of each image.
      normaliser: f32[], Z; 0 as long as no image could be read, and then no loss has any weight.
      watch: watch(score, weight, positive) -> tuple of f32[B, K]: their sums over the negatives, a tuple of f32[B]
        without gradient, are the second thing returned.
    """
    log_z = jnp.full_like(positive, jnp.log(jnp.where(normaliser > 0, normaliser, 1)))
    first, *others = self.passes

    def watched_terms(score: jax.Array, weight: jax.Array, positive: jax.Array, log_z: jax.Array) -> tuple[Any, Any]:
      seen = () if watch is None else jax.lax.stop_gradient(watch(score, weight, positive))
      return first(score, weight, positive, log_z), seen

    sums, watched = negatives.sum(watched_terms, positive, log_z)  # in one pass: it may go over a whole bank
    for terms in others:
      sums += negatives.sum(terms, positive, log_z, *sums)
    return self.finish(positive, log_z, *sums), watched


def nce_normaliser_sums(positive: jax.Array, negatives: Negatives, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns what a part of a batch adds to Z: the sum of exp(score) and the number of scores, f32[] each.

  Args:
    positive: f32[B], score of each image with its own row.
    negatives: those of each image.
    counts: bool[B]; False leaves an image out.
  """
  summed, number = negatives.sum(lambda score, weight: (jnp.exp(score) * weight, weight))
  return jnp.sum((jnp.exp(positive) + summed) * counts), jnp.sum((1 + number) * counts)


def nce_normaliser(summed: jax.Array, number: jax.Array, *, num_images: int) -> jax.Array:
  """Returns Z = N * mean(exp(score)) over the positives and the negatives of a batch, f32[]; 0 if all are left out.

  The official loss takes it once, from the patch scores of the very first batch, and never again.
  vissl/losses/nce_loss.py, `compute_partition_function`; NPID paper, section 3.2.

  Args:
    summed, number: of the whole batch, see `nce_normaliser_sums`.
    num_images: N.
  """
  return num_images * summed / jnp.maximum(number, 1)


def nce(*, num_images: int, num_negatives: int) -> Loss:
  """Returns NPID's noise-contrastive loss f32[B], the one the official runs used.

  With P = exp(score) / Z and c = K/N:  -log(P0 / (P0 + c + eps)) - sum_k log(c / (Pk + c + eps)),
  a sum over the negatives, not a mean. vissl/losses/nce_loss.py, `NCECriterion`; NPID paper, equations 5-7.

  Args:
    num_images: N.
    num_negatives: K.
  """
  noise = num_negatives / num_images

  def terms(score: jax.Array, weight: jax.Array, positive: jax.Array, log_z: jax.Array) -> tuple[jax.Array]:
    # -log(c / (P + c + eps)) = log1p((P + eps) / c): K small terms keep their digits.
    return jnp.log1p((jnp.exp(score - log_z) + EPS) / noise) * weight,

  def finish(positive: jax.Array, log_z: jax.Array, total: jax.Array) -> jax.Array:
    # log(x / (x + c + eps)) as a difference of logs: P itself may be too small for float32.
    return jnp.log(jnp.exp(positive - log_z) + noise + EPS) - (positive - log_z) + total

  return Loss((terms,), finish, has_normaliser=True)


def infonce() -> Loss:
  """Returns the softmax cross-entropy f32[B] of the positive among itself and the negatives.

  vissl/losses/nce_loss.py with `loss_type: cross_entropy`; the MLP-head models of the official release.
  """
  return Loss((_odds,), lambda positive, log_z, odds: jnp.log1p(odds))


def eq4() -> Loss:
  """Returns the loss f32[B] of the paper's equations 3 and 4 as written: -log h0 - sum_j log(1 - hj), h a softmax.

  Every h has the same denominator, that of the positive (reading A: e_j / (e_0 + sum_k e_k)).
  """
  def terms(score: jax.Array, weight: jax.Array, positive: jax.Array, log_z: jax.Array,
            total_odds: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    odds, = _odds(score, weight, positive, log_z)
    h = odds / (1 + total_odds)
    # One negative at most has h > 1/2. Its 1 - h would lose its digits, so it is summed from what is left without it.
    large = h > 0.5
    return jnp.log1p(-jnp.where(large, 0, h)), jnp.where(large, 0, odds), jax.lax.stop_gradient(large.astype(h.dtype))

  def finish(positive: jax.Array, log_z: jax.Array, total_odds: jax.Array, log_one_minus_h: jax.Array, rest: jax.Array,
             num_large: jax.Array) -> jax.Array:
    log_denominator = jnp.log1p(total_odds)
    return log_denominator - log_one_minus_h - num_large * (jnp.log1p(rest) - log_denominator)

  return Loss((_odds, terms), finish)


def _odds(score: jax.Array, weight: jax.Array, positive: jax.Array, log_z: jax.Array) -> tuple[jax.Array]:
  """Returns exp(negative) / exp(positive), (f32[B, K],), and 0 (with gradient 0) for a negative that is left out."""
  return jnp.exp(jnp.where(weight > 0, score - positive, 0)) * weight,


LOSSES = {"nce": nce, "infonce": lambda **sizes: infonce(), "eq4": lambda **sizes: eq4()}
"""By name, a function of `num_images` N and `num_negatives` K that returns the `Loss`."""


def make_loss(name: str, *, temperature: float, num_images: int, num_negatives: int) -> Loss:
  """Returns the loss of that name, for scores in [-1 / tau, 1 / tau].

  Args:
    name: one of `LOSSES`.
    temperature: tau.
    num_images: N.
    num_negatives: K over all devices.

  Raises:
    UserError: an unknown name, or a temperature too low for float32.
  """
  if not temperature >= MIN_TEMPERATURE:
    raise UserError(f"temperature={temperature}: exp(2 / temperature) would leave float32; "
                    f"use {MIN_TEMPERATURE} or more")
  if name not in LOSSES:
    raise UserError(f"loss={name!r} is unknown; choose from {', '.join(LOSSES)}")
  return LOSSES[name](num_images=num_images, num_negatives=num_negatives)
