"""SGD with momentum and the cosine schedule of the official runs, from plain numbers."""

import jax
import jax.numpy as jnp
import optax

from pirl_jax.errors import UserError


def cosine_schedule(*, base_rate: float, end_factor: float, num_steps: int, warmup_steps: int = 0,
                    hold_steps: int = 1) -> optax.Schedule:
  """Returns step -> learning rate: a linear warm-up from 0, then half a cosine down to `end_factor * base_rate`.

  vissl's ClassyVision scheduler: end + (start - end) * (1 + cos(pi * progress)) / 2, updated once an epoch in the
  official runs (`update_interval: epoch`).

  Args:
    base_rate: the rate at the top.
    end_factor: what is left of it at the end, 1/1000 in the paper.
    num_steps: steps of the whole run.
    warmup_steps: of them, those that warm up; the paper has none.
    hold_steps: the rate changes only every so many steps: 1, or the steps of an epoch.
  """
  if not 0 <= warmup_steps < num_steps:
    raise UserError(f"the warm-up takes {warmup_steps} steps, but the run has only {num_steps}; "
                    "lower optimizer.warmup_epochs or raise num_epochs")
  cosine = optax.cosine_decay_schedule(base_rate, num_steps - warmup_steps, alpha=end_factor)
  warmup = optax.linear_schedule(0, base_rate, warmup_steps) if warmup_steps else cosine
  joined = optax.join_schedules([warmup, cosine], [warmup_steps])
  return lambda step: joined(step // hold_steps * hold_steps)


def create_optimizer(schedule: optax.Schedule, *, momentum: float, weight_decay: float,
                     nesterov: bool = False) -> optax.GradientTransformation:
  """Returns SGD with momentum, PyTorch's rule: velocity <- momentum * velocity + gradient + decay * weight.

  The decay applies to the kernels of convolutions and linear layers only, not to batch norm and not to biases
  (vissl pirl_jigsaw_4node_resnet50.yaml: `regularize_bn: False`, `regularize_bias: False`).
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=_decayed),
    optax.sgd(schedule, momentum=momentum, nesterov=nesterov))


def _decayed(params):
  return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)
