"""Contrastive losses: scores in, one loss for each image out. Arithmetic only.

Letters: B batch, K negatives held by this device (all of them when there is one device), N images in the data set.
`scores` are cosine similarities divided by the temperature, so they lie in [-1/tau, 1/tau].

A loss is a sum over the negatives, and the negatives may be split over devices: `total` adds up the devices' sums
(`jax.lax.psum` over the mesh; the default is for one device). Two scores differ by `2 / temperature` at most, so the
softmax losses are written in exp(negative - positive), which float32 holds for tau >= 0.03: no maximum has to travel.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pirl_jax.errors import UserError

EPS = 2.0**-23
"""Added to the denominators of `nce`: the float32 machine epsilon, as in vissl/losses/nce_loss.py."""

MIN_TEMPERATURE = 0.03


def _one_device(x: jax.Array) -> jax.Array:
  return x


def nce_normaliser(positive: jax.Array, negative: jax.Array, negative_weight: jax.Array, image_weight: jax.Array, *,
                   num_images: int, total: Callable = _one_device) -> jax.Array:
  """Returns Z = N * mean(exp(score)) over the positives and the negatives of a batch, f32[]; 0 if all are left out.

  The official loss takes it once, from the patch scores of the very first batch, and never again.
  vissl/losses/nce_loss.py, `compute_partition_function`; NPID paper, section 3.2.

  Args:
    positive: f32[B], score of each image with its own row.
    negative: f32[B, K], scores with the negatives.
    negative_weight: f32[B, K] in {0, 1}; 0 leaves a negative out.
    image_weight: f32[B] in {0, 1}; 0 leaves an image out.
    num_images: N.
    total: adds up a sum over the devices that hold the negatives.
  """
  weight = negative_weight * image_weight[:, None]
  summed = jnp.sum(jnp.exp(positive) * image_weight) + total(jnp.sum(jnp.exp(negative) * weight))
  count = jnp.sum(image_weight) + total(jnp.sum(weight))
  return num_images * summed / jnp.maximum(count, 1)


def nce(positive: jax.Array, negative: jax.Array, negative_weight: jax.Array, *, normaliser: jax.Array,
        num_images: int, num_negatives: int, total: Callable = _one_device) -> jax.Array:
  """Returns NPID's noise-contrastive loss f32[B], the one the official runs used.

  With P = exp(score) / Z and c = K/N:  -log(P0 / (P0 + c + eps)) - sum_k log(c / (Pk + c + eps)),
  a sum over the negatives, not a mean. vissl/losses/nce_loss.py, `NCECriterion`; NPID paper, equations 5-7.

  Args:
    positive: f32[B].
    negative: f32[B, K].
    negative_weight: f32[B, K] in {0, 1}.
    normaliser: f32[], Z; 0 as long as no picture could be read, when no loss has any weight.
    num_images: N.
    num_negatives: K over all devices.
    total: adds up a sum over the devices that hold the negatives.
  """
  noise = num_negatives / num_images
  log_z = jnp.log(jnp.where(normaliser > 0, normaliser, 1))
  # log(x / (x + c + eps)) as a difference of logs: P itself may be too small for float32.
  log_positive = positive - log_z - jnp.log(jnp.exp(positive - log_z) + noise + EPS)
  # -log(c / (P + c + eps)) = log1p((P + eps) / c): K small terms keep their digits.
  log_negative = jnp.log1p((jnp.exp(negative - log_z) + EPS) / noise)
  return -log_positive + total(jnp.sum(log_negative * negative_weight, axis=1))


def infonce(positive: jax.Array, negative: jax.Array, negative_weight: jax.Array, *,
            total: Callable = _one_device) -> jax.Array:
  """Returns the softmax cross-entropy f32[B] of the positive among itself and the negatives.

  vissl/losses/nce_loss.py with `loss_type: cross_entropy`; the MLP-head models of the official release.

  Args:
    positive: f32[B].
    negative: f32[B, K].
    negative_weight: f32[B, K] in {0, 1}.
    total: adds up a sum over the devices that hold the negatives.
  """
  return jnp.log1p(total(jnp.sum(_odds(positive, negative, negative_weight), axis=1)))


def eq4(positive: jax.Array, negative: jax.Array, negative_weight: jax.Array, *,
        total: Callable = _one_device) -> jax.Array:
  """Returns the paper's equations 3 and 4 as written, f32[B]: -log h0 - sum_j log(1 - hj), h a softmax over all.

  Every h has the same denominator, that of the positive (reading A: e_j / (e_0 + sum_k e_k)).

  Args:
    positive: f32[B].
    negative: f32[B, K].
    negative_weight: f32[B, K] in {0, 1}.
    total: adds up a sum over the devices that hold the negatives.
  """
  odds = _odds(positive, negative, negative_weight)
  log_denominator = jnp.log1p(total(jnp.sum(odds, axis=1)))
  h = odds * jnp.exp(-log_denominator)[:, None]
  # One negative at most has h > 1/2. Its 1 - h would lose its digits, so it is summed from what is left without it.
  large = h > 0.5
  log_rest = jnp.log1p(total(jnp.sum(jnp.where(large, 0, odds), axis=1)))
  log_one_minus_h = jnp.where(large, (log_rest - log_denominator)[:, None], jnp.log1p(-jnp.where(large, 0, h)))
  return log_denominator - total(jnp.sum(log_one_minus_h, axis=1))


def _odds(positive, negative, negative_weight):
  """Returns exp(negative) / exp(positive), f32[B, K], and 0 (with gradient 0) for a negative that is left out."""
  difference = jnp.where(negative_weight > 0, negative - positive[:, None], 0)
  return jnp.exp(difference) * negative_weight


def make_loss(name: str, *, temperature: float, num_images: int, num_negatives: int) -> Callable:
  """Returns loss_fn(positive, negative, negative_weight, *, normaliser, total) -> f32[B] of that name.

  Args:
    name: "nce", "infonce" or "eq4"; only the first looks at the normaliser.
    temperature: tau.
    num_images: N.
    num_negatives: K over all devices.

  Raises:
    UserError: an unknown name, or a temperature too low for float32.
  """
  if not temperature >= MIN_TEMPERATURE:
    raise UserError(f"temperature={temperature}: exp(2 / temperature) would leave float32; "
                    f"use {MIN_TEMPERATURE} or more")
  if name == "nce":
    return partial(nce, num_images=num_images, num_negatives=num_negatives)
  if name in ("infonce", "eq4"):
    softmax_loss = {"infonce": infonce, "eq4": eq4}[name]
    return lambda *scores, normaliser, total: softmax_loss(*scores, total=total)
  raise UserError(f"loss={name!r} is unknown; choose from nce, infonce, eq4")
