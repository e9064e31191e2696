"""One step of PIRL, and of NPID, which is PIRL without a pretext view. Paper, sections 2.1-2.3.

Letters: B batch of all devices, M its parts, b this device's images of a part, P patches, D embedding. A view is
"pretext" or "image".
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pirl_jax.method import health, memory_bank
from pirl_jax.method.contrast import Contrast, Memory
from pirl_jax.method.forward import forward
from pirl_jax.method.micro_batches import accumulate, gather, split_batch, whole_batch_stats
from pirl_jax.method.optimizer import Optimizer, descend
from pirl_jax.method.programs import Step, WithNormaliser, in_one_program, in_two_programs
from pirl_jax.method.randomness import step_keys
from pirl_jax.method.state import TrainState
from pirl_jax.models.network import Network
from pirl_jax.runtime.mesh import AXIS


def make_contrastive_step(network: Network, optimizer: Optimizer, views_fn: Callable,
                          contrast: Contrast, mesh: Mesh, *, pretext_weight: float, bank_momentum: float,
                          micro_batches: int = 1) -> Step:
  """Returns train_step(state, batch) -> (state, metrics), compiled, and mapped over the devices of `mesh`.

  The state given in is donated: its memory becomes that of the state returned, so there is never a second bank.
  `batch` holds `image_crop` u8[B, H, W, 3], `pretext_crop` u8[B, S, S, 3], `index` i32[B] and `valid` bool[B], split
  over the devices, and `fills` bool[B] if the last batch of an epoch may be partial (`micro_batches.weighed`).
  `metrics` is a flat dict of f32[], but for those of `health.not_finite`, `health.num_usable` and `programs.VOID`. A
  step with an index of -1 is void, see `programs`.

  Args:
    network: its batch norm may take statistics over the mesh axis, over each device, or over groups of images.
    optimizer: see `create_optimizer`.
    views_fn: see `views.two_views.make_views`.
    contrast: what embeddings are compared with, and the loss.
    mesh: the devices.
    pretext_weight: lambda of equation 5; at 0 there is no pretext view, and the loss is that of NPID.
    bank_momentum: mu, the weight of the old row when a row moves.
    micro_batches: M, parts of the batch that pass through the network one after the other. The bank is read before the
      first and written after the last, and the gradient is that of the whole batch, but for the statistics of batch
      norm, which are those of a part, or of groups of images whatever the parts.
  """
  view_weights = {"pretext": pretext_weight, "image": 1 - pretext_weight} if pretext_weight else {"image": 1}

  # 1. The bank as a step finds it: the rows m_I of the batch and, for each view, negatives. Both are constants.
  #    Randomness depends on seed, step and image alone: neither a restart nor the number of devices changes it.
  def look_up(state: TrainState, bank: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Memory, Any]:
    batch = split_batch(batch, micro_batches, group=network.trunk.batch_norm_group)  # [M, b, ...]
    memory = contrast.look_up(bank, state.usable, batch, step_keys(state.seed, state.step), views=tuple(view_weights))
    return memory, {"crops": batch, "images": memory.images}

  # 2. Two views of every image, [b, H, W, 3] and [b, P, h, w, 3], and an embedding of each, f(v_I) and g(v_It).
  def embed(state: TrainState, params: Any, part: Any) -> tuple[dict[str, jax.Array], Any]:
    outputs, _, batch_stats = forward(network, views_fn, state, params, part["crops"])
    return {view: gather(memory_bank.normalise(outputs[view])) for view in view_weights}, batch_stats  # [B / M, D]

  def device_step(state: TrainState, bank: jax.Array,
                  batch: Mapping[str, jax.Array]) -> tuple[TrainState, tuple[jax.Array, ...], dict[str, jax.Array]]:
    memory, parts = look_up(state, bank, batch)

    # 3. Equation 5: lambda L(m_I, g(v_It)) + (1 - lambda) L(m_I, f(v_I)). f and g meet in the bank alone.
    def objective(params: Any, part: Any) -> tuple[jax.typing.ArrayLike, Any]:
      embs, batch_stats = embed(state, params, part)
      each, seen = contrast(memory, part["images"], embs, state.normaliser)
      mean = partial(health.sum_of_shares, part["images"].share)
      means = {view: mean(loss) for view, loss in each.items()}
      loss = sum(weight * means[view] for view, weight in view_weights.items())
      metrics = {"loss": loss, **{f"loss_{view}": value for view, value in means.items()}}
      metrics |= health.similarities(seen, mean=mean, temperature=contrast.temperature)
      return loss, (metrics, embs["image"], batch_stats)

    grads, (metrics, image_emb, batch_stats) = accumulate(jax.grad(objective, has_aux=True), state.params, parts)

    # 4. The parameters move; then the rows of this batch, m_I <- mu m_I + (1 - mu) f(v_I), and no others.
    learning_rate = jnp.asarray(optimizer.learning_rate(state.step))
    state = descend(state, optimizer, grads, batch_stats=whole_batch_stats(network, batch_stats), usable=memory.usable)
    metrics = jax.tree.map(jnp.sum, metrics) | {"embedding_spread": health.spread(image_emb, memory.images.share),
                                                "learning_rate": learning_rate}
    metrics[health.NOT_FINITE] = health.not_finite(
      metrics["loss"], grads, state.params, state.batch_stats, (memory.images.own, image_emb))
    metrics[health.NUM_USABLE] = health.num_usable(state.usable)
    return state, memory.moved(image_emb), metrics

  step = (in_two_programs if contrast.reads_every_row else in_one_program)(
    device_step, partial(memory_bank.update, momentum=bank_momentum, axis=AXIS), mesh)
  if not contrast.loss_fn.has_normaliser:
    return step

  # Z of the `nce` loss: the first batch sets it, for ever after.
  def normaliser(state: TrainState, batch: Mapping[str, jax.Array]) -> jax.Array:
    memory, parts = look_up(state, state.bank, batch)
    return contrast.normaliser(memory, lambda part: embed(state, state.params, part)[0], parts)

  return WithNormaliser(step, normaliser, mesh)
