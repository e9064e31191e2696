"""One step of the baselines that predict a label: the transform (Jigsaw, RotNet) or the class (supervised).

Letters: B batch of all devices, M parts of the batch, b this device's images of a part, L labels.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pirl_jax.method import health, memory_bank
from pirl_jax.method.forward import forward
from pirl_jax.method.micro_batches import accumulate, gather, split_batch, weighed, whole_batch_stats
from pirl_jax.method.optimizer import Optimizer, descend
from pirl_jax.method.programs import Step, map_step
from pirl_jax.method.state import TrainState
from pirl_jax.models.network import Network
from pirl_jax.runtime.mesh import AXIS


def make_prediction_step(network: Network, optimizer: Optimizer, views_fn: Callable,
                         layout: memory_bank.Layout, mesh: Mesh, *, micro_batches: int = 1) -> Step:
  """Returns train_step(state, batch) -> (state, metrics), as `make_contrastive_step`, for a state without a bank.

  The loss is a cross-entropy in nats. If the network has a pretext head, the loss predicts the label of the transform
  (paper, equation 2). Otherwise it predicts the batch's `label` i32[B]; an image whose label is -1 has no weight.
  `metrics` holds `loss` f32[], `top1` f32[] in [0, 1], `learning_rate` f32[], and those of `health.not_finite` and
  `health.num_usable` and `programs.VOID`.

  Args:
    network: with a single head, which gives logits f32[B, L].
    optimizer: see `create_optimizer`.
    views_fn: see `views.two_views.make_views`.
    layout: of the mask of the images found broken.
    mesh: the devices.
    micro_batches: M, see `make_contrastive_step`.
  """
  predicts_class = network.pretext_head is None

  def device_step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
    # 1. An image that was found broken has no weight from here on; an image without a label, or one that fills up the
    #    last batch of an epoch, has none in this batch.
    batch = split_batch(batch, micro_batches, group=network.trunk.batch_norm_group)  # [M, b, ...]
    rows = gather(layout.row_of(batch["index"]), axis=1)  # [M, B / M]
    usable, valid = memory_bank.retire(state.usable, rows, gather(batch["valid"], axis=1), axis=AXIS)
    valid = weighed(valid, batch)
    if predicts_class:
      valid &= gather(batch["label"], axis=1) >= 0
    share = valid / jnp.maximum(jnp.sum(valid), 1)  # [M, B / M], the weight of each image in every mean

    # 2. The cross-entropy of the label, predicted from the view.
    def objective(params: Any, part: Any) -> tuple[jax.Array, Any]:
      crops, share = part
      passed = forward(network, views_fn, state, params, crops)
      logits, = map(gather, passed.outputs.values())  # [B / M, L]
      target = crops["label"] if predicts_class else passed.labels
      assert target is not None  # if there is a pretext head, the transform has labels
      label = gather(target)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
      mean = partial(health.sum_of_shares, share)
      metrics = {"loss": mean(losses), "top1": mean(jnp.argmax(logits, axis=1) == label)}
      return metrics["loss"], (metrics, passed.batch_stats)

    grads, (metrics, batch_stats) = accumulate(jax.grad(objective, has_aux=True), state.params, (batch, share))

    # 3. The parameters are updated.
    learning_rate = jnp.asarray(optimizer.learning_rate(state.step))
    state = descend(state, optimizer, grads, batch_stats=whole_batch_stats(network, batch_stats), usable=usable)
    metrics = jax.tree.map(jnp.sum, metrics) | {"learning_rate": learning_rate}
    metrics[health.NOT_FINITE] = health.not_finite(metrics["loss"], grads, state.params, state.batch_stats)
    metrics[health.NUM_USABLE] = health.num_usable(state.usable)
    return state, metrics

  return map_step(device_step, mesh)
