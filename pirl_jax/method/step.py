"""One step of PIRL, and of NPID, which is PIRL without a pretext view. Paper, sections 2.1-2.3.

Letters: B batch of all devices, M its parts, b this device's images of a part, P patches, D embedding. A view is
"pretext" or "image".
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pirl_jax.method import health, memory_bank, momentum_encoder
from pirl_jax.method.contrast import Contrast, Memory
from pirl_jax.method.forward import ANGLE, Passed, forward, quarter_turns
from pirl_jax.method.micro_batches import accumulate, gather, split_batch, whole_batch_stats
from pirl_jax.method.optimizer import Optimizer, descend
from pirl_jax.method.programs import Step, WithNormaliser, in_one_program, in_two_programs
from pirl_jax.method.randomness import step_keys
from pirl_jax.method.state import TrainState
from pirl_jax.models.network import Network
from pirl_jax.runtime.mesh import AXIS


@dataclasses.dataclass(frozen=True)
class Weights:
  """The weights of the terms of the loss.

  Attributes:
    pretext: lambda of equation 5, of the pretext view; the image view has 1 - lambda. At 0 there is no pretext view,
      and the loss is that of NPID.
    angle: of a cross-entropy beside them, which predicts by which of four angles the image view was turned (e-SSL,
      2111.00899); at 0 the network has no head for the angle.
  """

  pretext: float
  angle: float = 0.0

  @property
  def of_views(self) -> dict[str, float]:
    """Returns the weight of each view that is compared with the bank."""
    return {"pretext": self.pretext, "image": 1 - self.pretext} if self.pretext else {"image": 1}


@dataclasses.dataclass(frozen=True)
class Momenta:
  """What stays of the old at each step.

  Attributes:
    bank: mu, the weight of the old row when a row moves.
    encoder: in (0, 1), of a momentum encoder, whose embedding of a second crop is what a row moves to, see
      `momentum_encoder`; the row moves before it is compared with. 0: there is none, and a row moves to the embedding
      of the image view, after it was compared with.
  """

  bank: float
  encoder: float = 0.0

  @property
  def written(self) -> float:
    """Returns the weight of the old row when a row is written; a row that has moved already is written as it is."""
    return 0.0 if self.encoder else self.bank


def make_contrastive_step(network: Network, optimizer: Optimizer, views_fn: Callable, contrast: Contrast, mesh: Mesh,
                          *, weights: Weights, momenta: Momenta, micro_batches: int = 1) -> Step:
  """Returns train_step(state, batch) -> (state, metrics), compiled, and mapped over the devices of `mesh`.

  The state given in is donated: its memory becomes that of the state returned, so there is never a second bank.
  `batch` holds `image_crop` u8[B, H, W, 3], `pretext_crop` u8[B, S, S, 3], `index` i32[B] and `valid` bool[B], split
  over the devices; `fills` bool[B] if the last batch of an epoch may be partial (`micro_batches.weighed`); and
  `second_crop` u8[B, H, W, 3] for a momentum encoder. `metrics` is a flat dict of f32[], but for `health.not_finite`,
  `health.num_usable` and `programs.VOID`. A step with an index of -1 is void, see `programs`.

  Args:
    network: its batch norm may take statistics over the mesh axis, over each device, or over groups of images.
    optimizer: see `create_optimizer`.
    views_fn: see `views.two_views.make_views`.
    contrast: what embeddings are compared with, and the loss.
    mesh: the devices.
    weights: of the terms of the loss.
    momenta: of the bank and of a momentum encoder.
    micro_batches: M, parts of the batch that pass through the network one after the other. The bank is read before the
      first and written after the last, and the gradient is that of the whole batch, but for the statistics of batch
      norm, which are those of a part, or of groups of images whatever the parts.
  """
  view_weights = weights.of_views

  # 1. The bank as a step finds it: the rows m_I of the batch and, for each view, negatives. Both are constants.
  #    Randomness depends on seed, step and image alone: neither a restart nor the number of devices changes it.
  def look_up(state: TrainState, bank: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Memory, Any]:
    batch = split_batch(batch, micro_batches, group=network.trunk.batch_norm_group)  # [M, b, ...]
    moved = partial(memory_bank.moved_row, momentum=momenta.bank, embeddings=momentum_encoder.embed(
      network, views_fn, state, batch)) if momenta.encoder else None
    keys, views = step_keys(state.seed, state.step), tuple(view_weights)
    memory = contrast.look_up(bank, state.usable, batch, keys, views, moved, state.ages)
    return memory, {"crops": batch, "images": memory.images}

  # 2. Two views of every image, [b, H, W, 3] and [b, P, h, w, 3], and an embedding of each, f(v_I) and g(v_It).
  def embed(state: TrainState, params: Any, part: Any) -> tuple[dict[str, jax.Array], Passed]:
    passed = forward(network, views_fn, state, params, part["crops"])
    return {view: gather(memory_bank.normalise(passed.outputs[view])) for view in view_weights}, passed  # [B / M, D]

  def device_step(state: TrainState, bank: jax.Array,
                  batch: Mapping[str, jax.Array]) -> tuple[TrainState, tuple[jax.Array, ...], dict[str, jax.Array]]:
    memory, parts = look_up(state, bank, batch)

    # 3. Equation 5: lambda L(m_I, g(v_It)) + (1 - lambda) L(m_I, f(v_I)). f and g meet in the bank alone.
    def objective(params: Any, part: Any) -> tuple[jax.typing.ArrayLike, Any]:
      embs, passed = embed(state, params, part)
      each, seen = contrast(memory, part["images"], embs, state.normaliser)
      mean = partial(health.sum_of_shares, part["images"].share)
      means = {view: mean(loss) for view, loss in each.items()}
      loss = sum(weight * means[view] for view, weight in view_weights.items())
      metrics: dict[str, Any] = {"loss": loss, **{f"loss_{view}": value for view, value in means.items()}}
      metrics |= health.similarities(seen, mean=mean, temperature=contrast.temperature)
      if weights.angle:
        metrics |= _angle_terms(passed.outputs[ANGLE], quarter_turns(state, part["crops"]["index"]), mean)
        metrics["loss"] = loss = loss + weights.angle * metrics["loss_angle"]
      return loss, (metrics, embs["image"], passed.batch_stats)

    grads, (metrics, image_emb, batch_stats) = accumulate(jax.grad(objective, has_aux=True), state.params, parts)

    # 4. The parameters move, and their copy; then this batch's rows, unless they have: m_I <- mu m_I + (1 - mu) f(v_I).
    learning_rate = jnp.asarray(optimizer.learning_rate(state.step))
    state = descend(state, optimizer, grads, batch_stats=whole_batch_stats(network, batch_stats), usable=memory.usable,
                    written=memory.stamped(state.written, state.step))
    if momenta.encoder:
      state = momentum_encoder.follow(state, momentum=momenta.encoder)
    metrics = {"learning_rate": learning_rate, **jax.tree.map(jnp.sum, metrics)}
    metrics |= _health_of(state, grads, metrics["loss"], memory, image_emb)
    return state, memory.to_write(memory.images.own if momenta.encoder else image_emb), metrics

  step = (in_two_programs if contrast.reads_every_row else in_one_program)(
    device_step, partial(memory_bank.update, momentum=momenta.written, axis=AXIS), mesh)

  # Z of the `nce` loss: the first batch sets it, for ever after.
  def normaliser(state: TrainState, batch: Mapping[str, jax.Array]) -> jax.Array:
    memory, parts = look_up(state, state.bank, batch)
    return contrast.normaliser(memory, lambda part: embed(state, state.params, part)[0], parts)

  return WithNormaliser(step, normaliser, mesh) if contrast.loss_fn.has_normaliser else step


def _health_of(state: TrainState, grads: Any, loss: jax.Array, memory: Memory, emb: jax.Array) -> dict[str, jax.Array]:
  """Returns the figures of `health` after a step: spread of the embeddings, what is not finite, rows in use.

  Args:
    state: after the step.
    grads: of the parameters.
    loss: f32[].
    memory: of the step.
    emb: f32[M, B / M, D], of the image views.
  """
  return {"embedding_spread": health.spread(emb, memory.images.share),
          health.NOT_FINITE: health.not_finite(loss, grads, state.params, state.batch_stats, (memory.images.own, emb)),
          health.NUM_USABLE: health.num_usable(state.usable)}


def _angle_terms(logits: jax.Array, turns: jax.Array, mean: Callable) -> dict[str, jax.Array]:
  """Returns the cross-entropy in nats of the angles i32[b] of this device's images, and the share of hits, f32[] each.

  Args:
    logits: f32[b, 4].
    turns: i32[b], quarter turns.
    mean: from f32[B / M], of all devices, to f32[].
  """
  logits, turns = gather(logits), gather(turns)
  return {"loss_angle": mean(optax.softmax_cross_entropy_with_integer_labels(logits, turns)),
          "top1_angle": mean(jnp.argmax(logits, axis=1) == turns)}
