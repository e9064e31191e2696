"""One step of the baselines that predict a label: of the transform (Jigsaw, RotNet), or of the class (supervised).

Letters: B batch of all devices, M its parts, b this device's images of a part, L labels.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pirl_jax.method import health, memory_bank
from pirl_jax.method.micro_batches import accumulate, split_batch, whole_batch_stats
from pirl_jax.method.programs import map_step
from pirl_jax.method.randomness import view_keys
from pirl_jax.method.state import TrainState
from pirl_jax.models.network import Network
from pirl_jax.runtime.mesh import AXIS


def make_prediction_step(network: Network, optimizer: optax.GradientTransformation, views_fn: Callable,
                         layout: memory_bank.Layout, mesh: Mesh, *, micro_batches: int = 1) -> Callable:
  """Returns train_step(state, batch) -> (state, metrics), as `make_train_step`, for a state without a bank.

  The loss is the cross-entropy of the transform's label, where the views have one (paper, equation 2), else of the
  batch's `label` i32[B]; a picture whose label is -1 has no weight. `metrics` holds loss and top1, f32[], and
  what `health.not_finite` returns.

  Args:
    network: one of its heads gives logits f32[B, L]; the other view is not there.
    optimizer: see `create_optimizer`.
    views_fn: see `views.two_views.make_views`.
    layout: of the mask of the pictures found broken.
    mesh: the devices.
    micro_batches: M, see `make_train_step`.
  """
  predicts_class = network.pretext_head is None
  gather = partial(jax.lax.all_gather, axis_name=AXIS, axis=1, tiled=True, to="invarying")

  def device_step(state: TrainState, batch):
    batch = split_batch(batch, micro_batches)  # [M, b, ...]
    rows = gather(layout.row_of(batch["index"])).reshape(-1)
    usable, valid = memory_bank.retire(state.usable, rows, gather(batch["valid"]).reshape(-1), axis=AXIS)
    if predicts_class:
      valid &= gather(batch["label"]).reshape(-1) >= 0
    share = valid / jnp.maximum(jnp.sum(valid), 1)

    def objective(params, part):
      part, share = part
      keys = view_keys(state.seed, state.step, part["index"])
      image, pretext, transform = views_fn(keys, part.get("image_crop"), part.get("pretext_crop"))
      outputs, updated = network.apply(
        {"params": params, "batch_stats": state.batch_stats}, image, pretext, train=True, mutable=["batch_stats"])
      logits, = (gather(output[None])[0] for output in outputs if output is not None)  # [B / M, L]
      label = gather((part["label"] if predicts_class else transform)[None])[0]
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
      loss, top1 = jnp.sum(losses * share), jnp.sum((jnp.argmax(logits, axis=1) == label) * share)
      return loss, ({"loss": loss, "top1": top1}, updated["batch_stats"])

    grads, (metrics, batch_stats) = accumulate(
      jax.grad(objective, has_aux=True), state.params, (batch, share.reshape(micro_batches, -1)))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    state = state.replace(
      step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state,
      batch_stats=whole_batch_stats(network, batch_stats), usable=usable)
    metrics = jax.tree.map(jnp.sum, metrics)
    metrics[health.NOT_FINITE] = health.not_finite(metrics["loss"], grads, state.params, state.batch_stats)
    return state, metrics

  return map_step(device_step, mesh, with_bank=False)
