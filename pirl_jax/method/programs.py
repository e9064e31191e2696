"""A step as one compiled program or two, mapped over the devices.

Letters: R rows of the bank, D embedding, B batch. `moved` is what the update of the bank takes: `Memory.to_write`.

A step is void if one of its images has the index -1. A process gives such images if its disk does not answer: the other
processes have begun the step and wait. A void step returns the state that it was given.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pirl_jax.method.state import TrainState, state_specs
from pirl_jax.runtime.mesh import AXIS, SPLIT, WHOLE

VOID = "void"
"""Name of bool[] among the metrics of a step: whether the step is void."""


class Step(Protocol):
  """A step of training, compiled for the devices of a mesh."""

  def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after the step, and its metrics, f32[] each; the state given in is donated."""
    ...

  def lower(self, state: TrainState, batch: Any) -> Any:
    """Returns its program, or programs, lowered for these shapes."""


def in_one_program(device_step: Callable, update: Callable, mesh: Mesh) -> Step:
  """Returns step(state, batch) -> (state, metrics), whose bank [R, D] is written in the same program.

  Args:
    device_step: device_step(state without bank, bank, batch) -> (state without bank, moved, metrics), what one device
      does, with its rows of the bank and its images of the batch.
    update: update(bank, *moved) -> bank.
    mesh: the devices.
  """
  def step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
    rest, moved, metrics = _bank_step(device_step)(state.replace(bank=None), state.bank, batch)
    return rest.replace(bank=update(state.bank, *moved)), metrics

  return _mapped(step, mesh)


@dataclasses.dataclass(frozen=True)
class TwoPrograms:
  """A step whose bank [R, D] is written by a program of its own.

  If all rows are read, XLA would copy the bank in a single program.

  Attributes:
    look: look(state without bank, bank, batch) -> (state without bank, moved, metrics).
    write: write(bank, *moved) -> bank.
  """

  look: jax.stages.Wrapped
  write: jax.stages.Wrapped

  def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after the step, and its metrics, f32[] each; the state given in is donated."""
    rest, moved, metrics = self.look(state.replace(bank=None), state.bank, batch)
    return rest.replace(bank=self.write(state.bank, *moved)), metrics

  def lower(self, state: TrainState, batch: Any) -> tuple[Any, Any]:
    """Returns both programs, lowered for these shapes."""
    given = state.replace(bank=None), state.bank, batch
    return self.look.lower(*given), self.write.lower(state.bank, *jax.eval_shape(self.look, *given)[1])


def in_two_programs(device_step: Callable, update: Callable, mesh: Mesh) -> TwoPrograms:
  """Returns the step of `in_one_program` with the bank [R, D] written in a program of its own, see `TwoPrograms`."""
  rest = state_specs().replace(bank=None)
  look = jax.shard_map(_bank_step(device_step), mesh=mesh, in_specs=(rest, SPLIT, SPLIT),
                       out_specs=(rest, WHOLE, WHOLE))
  write = jax.shard_map(update, mesh=mesh, in_specs=(SPLIT, *[WHOLE] * 4), out_specs=SPLIT)
  return TwoPrograms(jax.jit(look, donate_argnums=0), jax.jit(write, donate_argnums=0))


class WithNormaliser:
  """A step whose loss looks at Z, with a program of its own that takes Z from the first batch, for ever after.

  In the program of the step Z would cost a third forward pass, compiled in every run and used once. The program for Z
  is compiled only if a state comes that has none.
  """

  def __init__(self, step: Step, normaliser: Callable, mesh: Mesh) -> None:
    """Takes what a step consists of.

    Args:
      step: step(state, batch) -> (state, metrics), compiled.
      normaliser: normaliser(state, batch) -> Z f32[], what one device does; 0 if no image of the batch could be read.
      mesh: the devices.
    """
    self._step = step
    self._normaliser = jax.jit(jax.shard_map(normaliser, mesh=mesh, in_specs=(state_specs(), SPLIT), out_specs=WHOLE))
    self._known = None  # the last Z that was returned and is not 0

  def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after the step, and its metrics, f32[] each; the state given in is donated."""
    # To look at the value waits for it. A step hands on the array that the step before it returned.
    known = state.normaliser is self._known or _is_set(state)
    if not known:
      state = state.replace(normaliser=self._normaliser(state, batch))
      known = _is_set(state)
    state, metrics = self._step(state, batch)
    self._known = state.normaliser if known else None
    return state, metrics

  def lower(self, state: TrainState, batch: Any) -> Any:
    """Returns the program or programs of the step, lowered for these shapes, without that of Z."""
    return self._step.lower(state, batch)


def _is_set(state: TrainState) -> bool:
  return bool(jax.device_get(state.normaliser) > 0)


def map_step(device_step: Callable, mesh: Mesh) -> Step:
  """Returns device_step(state, batch) -> (state, metrics), of a state without a bank, as one program.

  Args:
    device_step: what one device does, with its images of a batch [B, ...].
    mesh: the devices.
  """
  def step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
    after, metrics = device_step(state, batch)
    after, void = _unless_void(state, after, batch)
    return after, {**metrics, VOID: void}

  return _mapped(step, mesh, with_bank=False)


def _bank_step(device_step: Callable) -> Callable:
  """Returns `device_step`, see `in_one_program`, whose state and rows of the bank do not move if the step is void."""
  def step(state: TrainState, bank: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[TrainState, tuple, dict]:
    after, (*moved, valid), metrics = device_step(state, bank, batch)
    after, void = _unless_void(state, after, batch)
    return after, (*moved, valid & ~void), {**metrics, VOID: void}

  return step


def _unless_void(before: TrainState, after: TrainState,
                 batch: Mapping[str, jax.Array]) -> tuple[TrainState, jax.Array]:
  """Returns (`after`, or `before` if the step is void; whether it is void, bool[])."""
  void = jax.lax.psum(jnp.any(batch["index"] < 0).astype(jnp.int32), AXIS) > 0
  return jax.tree.map(lambda old, new: jnp.where(void, old, new), before, after), void


def _mapped(device_step: Callable, mesh: Mesh, *, with_bank: bool = True) -> Step:
  """Returns device_step(state, batch) -> (state, metrics), mapped over the devices, compiled, its state donated."""
  specs = state_specs(with_bank=with_bank)
  mapped = jax.shard_map(device_step, mesh=mesh, in_specs=(specs, SPLIT), out_specs=(specs, WHOLE))
  return jax.jit(mapped, donate_argnums=0)
