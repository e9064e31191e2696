"""SGD with momentum and the schedules of the official runs, from plain numbers; and the step that they take."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pirl_jax.errors import UserError
from pirl_jax.method.state import TrainState


def cosine_schedule(*, base_rate: float, end_factor: float, num_steps: int, warmup_steps: int = 0,
                    warmup_factor: float = 0.0, hold_steps: int = 1) -> optax.Schedule:
  """Returns step i32[] -> learning rate f32[]: a linear warm-up, then half a cosine down to `end_factor * base_rate`.

  vissl's ClassyVision scheduler: end + (start - end) * (1 + cos(pi * progress)) / 2, updated once an epoch in the
  official runs (`update_interval: epoch`).

  Args:
    base_rate: the rate at the top.
    end_factor: what is left of it at the end, 1/1000 in the paper.
    num_steps: steps of the whole run.
    warmup_steps: of them, those that warm up; the paper has none.
    warmup_factor: share of `base_rate` from which it rises.
    hold_steps: the rate changes only every so many steps: 1, or the steps of an epoch.
  """
  if not 0 <= warmup_steps < num_steps:
    raise UserError(f"the warm-up takes {warmup_steps} steps, but the run has only {num_steps}; "
                    "lower optimizer.warmup_epochs or raise num_epochs")
  cosine = optax.cosine_decay_schedule(base_rate, num_steps - warmup_steps, alpha=end_factor)
  warmup = optax.linear_schedule(warmup_factor * base_rate, base_rate, warmup_steps) if warmup_steps else cosine
  joined = optax.join_schedules([warmup, cosine], [warmup_steps])

  def held(step: Any) -> Any:
    return joined(step // hold_steps * hold_steps)

  return held


def step_schedule(*, base_rate: float, milestones: Sequence[float], decay_factor: float, num_steps: int,
                  warmup_steps: int = 0, warmup_factor: float = 0.0) -> optax.Schedule:
  """Returns step i32[] -> learning rate f32[]: constant but for a factor at each milestone.

  So did NPID's and the covariant runs:
  vissl configs/config/pretrain/{npid/npid,jigsaw/jigsaw,rotnet/rotnet}_8gpu_resnet.yaml.

  Args:
    base_rate: the rate before the first milestone.
    milestones: shares of the run, rising, in (0, 1).
    decay_factor: by which each multiplies the rate.
    num_steps: steps of the whole run.
    warmup_steps: of them, those in which the rate rises linearly.
    warmup_factor: share of `base_rate` from which it rises.

  Raises:
    UserError: the warm-up reaches the first milestone, or the milestones do not rise within the run.
  """
  if not all(low < high for low, high in itertools.pairwise((0, *milestones, 1))):
    raise UserError(f"optimizer.milestones={tuple(milestones)}: shares of the run are needed, rising, between 0 and 1")
  boundaries = [round(share * num_steps) for share in milestones]
  if not 0 <= warmup_steps < min([*boundaries, num_steps]):
    raise UserError(f"the warm-up takes {warmup_steps} steps, but the rate falls after "
                    f"{min([*boundaries, num_steps])}; lower optimizer.warmup_epochs or raise num_epochs")
  falling = optax.piecewise_constant_schedule(base_rate, dict.fromkeys(boundaries, decay_factor))
  warmup = optax.linear_schedule(warmup_factor * base_rate, base_rate, max(warmup_steps, 1))

  def warmed_up(step: Any) -> Any:
    return jnp.where(step < warmup_steps, warmup(step), falling(step))

  return warmed_up


def create_optimizer(schedule: optax.Schedule, *, momentum: float, weight_decay: float, nesterov: bool = False,
                     decay_biases: bool = False) -> optax.GradientTransformation:
  """Returns SGD with momentum, PyTorch's rule: velocity <- momentum * velocity + gradient + decay * weight.

  The decay applies to the kernels of convolutions and linear layers only, not to batch norm and not to biases
  (vissl pirl_jigsaw_4node_resnet50.yaml: `regularize_bn: False`, `regularize_bias: False`); with `decay_biases` to the
  biases of linear layers, too (npid_8gpu_resnet.yaml).
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=partial(_decayed, biases=decay_biases)),
    optax.sgd(schedule, momentum=momentum, nesterov=nesterov))


@jax.named_scope("optimizer")
def descend(state: TrainState, optimizer: optax.GradientTransformation, grads: Any, **fields: Any) -> TrainState:
  """Returns the state one step i32[] on: its parameters moved by the gradients, and the other fields as given.

  Args:
    state: before the step.
    optimizer: see `create_optimizer`.
    grads: by the parameters, a tree of the same shapes.
    fields: what else has changed, by name.
  """
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state, **fields)


def _decayed(params: Any, *, biases: bool) -> Any:
  if not isinstance(params, Mapping):
    return jnp.ndim(params) > 1
  linear = biases and "kernel" in params  # batch norm has a bias, too, and no kernel
  return {name: (linear and name == "bias") or _decayed(value, biases=biases) for name, value in params.items()}
