"""The state that a training run carries from step to step; it is created already split over the mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pirl_jax.method import memory_bank
from pirl_jax.models.network import Network, create_variables
from pirl_jax.runtime import mesh as mesh_lib


class TrainState(flax.struct.PyTreeNode):
  """The state of a run. Bank [S * R, D] and mask bool[S * R] are split over the devices; the rest is replicated.

  Letters: S strata, R rows of a stratum, D dimensions of an embedding.
  """

  step: Any
  """i32[], number of steps taken."""
  seed: Any
  """u32[], seed of the views and the negatives. It is part of the state, so all seeds share one compiled program."""
  params: Any
  """Parameters of trunk and heads, f32."""
  batch_stats: Any
  """Running statistics of batch norm, f32."""
  opt_state: Any
  """The optimizer's state: momentum and its count."""
  usable: Any
  """bool[S * R], split over the devices: False on padding and on the rows of images found broken."""
  bank: Any
  """[S * R, D], rows, see `memory_bank.stored`, split over the devices; None for a system without a bank."""
  normaliser: Any
  """f32[], Z of the `nce` loss; 0 before the first batch has set it, and for other losses; None without a bank."""
  written: Any = None
  """i32[S * R], split over the devices: the step in which each row was last written; None if nothing depends on it."""
  momentum_encoder: Any = None
  """Parameters of the momentum encoder, f32; None without one."""

  @property
  def ages(self) -> jax.Array | None:
    """Returns how many steps ago each row was written, i32[S * R]; None if nothing depends on it."""
    return None if self.written is None else self.step - self.written


def state_specs(*, with_bank: bool = True) -> TrainState:
  """Returns the state's layout on the mesh: bank [S * R, D] and mask bool[S * R] are split, the rest is replicated."""
  specs = dict.fromkeys(TrainState.__dataclass_fields__, mesh_lib.WHOLE) | {
    "usable": mesh_lib.SPLIT, "written": mesh_lib.SPLIT}
  return TrainState(**specs | ({"bank": mesh_lib.SPLIT} if with_bank else {"bank": None, "normaliser": None}))


def state_shardings(mesh: Mesh, *, with_bank: bool) -> TrainState:
  """Returns the layout of `state_specs` as shardings on this mesh."""
  return jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), state_specs(with_bank=with_bank))


@dataclasses.dataclass(frozen=True)
class Keeps:
  """Which fields of a state are not None.

  Attributes:
    bank: `bank` and `normaliser`.
    ages: `written`.
    momentum_encoder: `momentum_encoder`.
  """

  bank: bool = True
  ages: bool = False
  momentum_encoder: bool = False


EVERY_STATE = Keeps()
"""What a state of PIRL has without further options."""


def create_state(seed: int, network: Network, optimizer: optax.GradientTransformation, layout: memory_bank.Layout, *,
                 mesh: Mesh, create_bank: Callable, inputs: tuple[jax.Array | None, jax.Array | None],
                 keeps: Keeps = EVERY_STATE) -> TrainState:
  """Returns the state before the first step. Each device creates its own part, so no device ever holds a whole bank.

  Args:
    seed: of the parameters, the bank, the views and the negatives, taken modulo 2**32.
    network: without a mesh axis, because it is initialised outside of `shard_map`.
    optimizer: see `create_optimizer`.
    layout: of the bank.
    mesh: the devices.
    create_bank: create_bank(key, layout) -> (bank [S * R, D], usable bool[S * R]), see `memory_bank.create`.
    inputs: an image f32[1, H, W, 3] and a pretext view f32[1, P, h, w, 3]; None for a view that the network does not
      use.
    keeps: which fields the state has. At the start all rows of the bank are new.
  """
  def init(seed: jax.Array) -> TrainState:
    params_key, bank_key = jax.random.split(jax.random.key(seed))
    variables = create_variables(network, params_key, *inputs)
    bank, usable = create_bank(bank_key, layout)
    # Flax creates running statistics in float32, but a step returns them in the type of the parameters.
    batch_stats = optax.tree_utils.tree_cast(variables["batch_stats"], jax.tree.leaves(variables["params"])[0].dtype)
    return TrainState(
      step=jnp.zeros((), jnp.int32), seed=seed, params=variables["params"], batch_stats=batch_stats,
      opt_state=optimizer.init(variables["params"]), usable=usable, bank=bank if keeps.bank else None,
      normaliser=jnp.zeros(()) if keeps.bank else None,
      written=jnp.zeros(usable.shape, jnp.int32) if keeps.ages else None,
      momentum_encoder=variables["params"] if keeps.momentum_encoder else None)

  # The seed is an argument of the compiled program, and the bits do not depend on the number of devices.
  return jax.jit(init, out_shardings=state_shardings(mesh, with_bank=keeps.bank))(jnp.uint32(seed % 2**32))
