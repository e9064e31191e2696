"""SGD with momentum, the learning rate schedules of the official runs, and the update of the state's parameters."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax

from pirl_jax.errors import UserError
from pirl_jax.method.state import TrainState


def cosine_schedule(*, base_rate: float, end_factor: float, num_steps: int, warmup_steps: int = 0,
                    warmup_factor: float = 0.0, hold_steps: int = 1) -> optax.Schedule:
  """Returns schedule(step i32[]) -> learning rate f32[]: a linear warm-up, then half a cosine.

  The cosine falls from `base_rate` to `end_factor * base_rate`. This is the scheduler of vissl's ClassyVision:
  end + (start - end) * (1 + cos(pi * progress)) / 2, updated once per epoch in the official runs
  (`update_interval: epoch`).

  Args:
    base_rate: the learning rate after the warm-up.
    end_factor: share of `base_rate` at the end, in [0, 1]; 1/1000 in the paper.
    num_steps: number of steps of the whole run.
    warmup_steps: number of steps of the warm-up; the paper has none.
    warmup_factor: share of `base_rate` at which the warm-up starts.
    hold_steps: number of steps between two changes of the learning rate: 1, or the steps of an epoch.

  Raises:
    UserError: the warm-up is not shorter than the run.
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
                  warmup_steps: int = 0, warmup_factor: float = 0.0, hold_steps: int = 1) -> optax.Schedule:
  """Returns schedule(step i32[]) -> learning rate f32[]: constant, and multiplied by a factor at each milestone.

  NPID's and the covariant runs use this schedule:
  vissl configs/config/pretrain/{npid/npid,jigsaw/jigsaw,rotnet/rotnet}_8gpu_resnet.yaml.

  Args:
    base_rate: the learning rate before the first milestone.
    milestones: shares of the run in (0, 1), in ascending order.
    decay_factor: factor for the learning rate at each milestone.
    num_steps: number of steps of the whole run.
    warmup_steps: number of steps at the start in which the learning rate rises linearly.
    warmup_factor: share of `base_rate` at which the warm-up starts.
    hold_steps: number of steps between two changes of the learning rate in the warm-up: 1, or the steps of an epoch.

  Raises:
    UserError: the warm-up reaches the first milestone, or the milestones are not ascending shares in (0, 1).
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
    return jnp.where(step < warmup_steps, warmup(step // hold_steps * hold_steps), falling(step))

  return warmed_up


class Optimizer(optax.GradientTransformation):
  """A transformation of gradients that also tells its learning rate, so that a step can report the rate."""

  learning_rate: optax.Schedule
  """learning_rate(step i32[]) -> learning rate f32[] of the update that follows `step` updates."""

  def __new__(cls, transformation: optax.GradientTransformation, learning_rate: optax.Schedule) -> Self:
    """Returns `transformation` with its learning rate."""
    self = super().__new__(cls, *transformation)
    self.learning_rate = learning_rate
    return self


def create_optimizer(schedule: optax.Schedule, *, momentum: float, weight_decay: float, nesterov: bool = False,
                     decay_biases: bool = False, decay_batch_norm: bool = False) -> Optimizer:
  """Returns SGD with PyTorch's momentum: velocity <- momentum * velocity + gradient + weight_decay * weight.

  Weight decay acts on the kernels of convolutions and linear layers, not on batch norm and biases
  (vissl pirl_jigsaw_4node_resnet50.yaml: `regularize_bn: False`, `regularize_bias: False`). In vissl's other files it
  also acts on the biases of linear layers, and in lemniscate and PyContrast on every parameter.

  Args:
    schedule: schedule(step i32[]) -> learning rate f32[].
    momentum: in [0, 1).
    weight_decay: >= 0.
    nesterov: True for Nesterov momentum in PyTorch's form.
    decay_biases: True for weight decay on the biases of linear layers (vissl's `regularize_bias`).
    decay_batch_norm: True for weight decay on scales and biases of batch norm (vissl's `regularize_bn`).
  """
  return Optimizer(optax.chain(
    optax.add_decayed_weights(weight_decay, mask=partial(_decayed, biases=decay_biases, batch_norm=decay_batch_norm)),
    optax.sgd(schedule, momentum=momentum, nesterov=nesterov)), learning_rate=schedule)


@jax.named_scope("optimizer")
def descend(state: TrainState, optimizer: optax.GradientTransformation, grads: Any, **fields: Any) -> TrainState:
  """Returns the state after an update: `step` i32[] is one higher, the parameters f32[...] are updated.

  Args:
    state: before the update.
    optimizer: see `create_optimizer`.
    grads: the gradients, a tree of f32[...] of the same shapes as the parameters.
    fields: new values of further fields of the state, by name.
  """
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state, **fields)


def _decayed(params: Any, *, biases: bool, batch_norm: bool) -> Any:
  """Returns a tree of bool like `params`, the parameters of a network by layer: which of them decay."""
  if not isinstance(next(iter(params.values())), Mapping):
    others = biases if "kernel" in params else batch_norm  # a layer without a kernel is batch norm
    return {name: name == "kernel" or others for name in params}
  return {name: _decayed(layer, biases=biases, batch_norm=batch_norm) for name, layer in params.items()}
