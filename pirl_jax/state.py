"""Everything that a training run carries from step to step, created already split over the mesh."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pirl_jax import memory_bank
from pirl_jax import mesh as mesh_lib
from pirl_jax.models.network import Network


class TrainState(flax.struct.PyTreeNode):
  """The state of a run. Letters: S strata, R rows of a stratum, D embedding."""

  step: Any
  """i32[], steps taken."""
  params: Any
  """Parameters of trunk and heads, f32."""
  batch_stats: Any
  """Running statistics of batch norm, f32."""
  opt_state: Any
  """The optimizer's state: momentum and its count."""
  bank: Any
  """[S * R, D], unit rows, split over the devices."""
  usable: Any
  """bool[S * R], split likewise: False on padding and on the rows of pictures found broken."""
  normaliser: Any
  """f32[], Z of the `nce` loss; 0 until the first batch has set it."""


def state_specs() -> TrainState:
  """Returns how the state lies on the mesh: whole on every device, but for the bank and its mask."""
  specs = dict.fromkeys(TrainState.__dataclass_fields__, mesh_lib.WHOLE)
  return TrainState(**specs | {"bank": mesh_lib.SPLIT, "usable": mesh_lib.SPLIT})


def state_shardings(mesh: Mesh) -> TrainState:
  """Returns `state_specs` as shardings on this mesh."""
  return jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), state_specs())


def create_state(seed: int, network: Network, optimizer: optax.GradientTransformation, layout: memory_bank.Layout, *,
                 mesh: Mesh, dim: int, bank_dtype: Any, image_shape: tuple[int, ...],
                 pretext_shape: tuple[int, ...]) -> TrainState:
  """Returns the state before the first step. It is made on the devices that keep it: no device holds a whole bank.

  Args:
    seed: of the parameters and of the bank.
    network: without a mesh axis: it is initialised outside of `shard_map`.
    optimizer: see `create_optimizer`.
    layout: of the bank.
    mesh: the devices.
    dim: D.
    bank_dtype: in which the bank is stored.
    image_shape: (H, W, 3) of an image view.
    pretext_shape: (P, h, w, 3) of a pretext view.
  """
  def init():
    params_key, bank_key = jax.random.split(jax.random.key(seed))
    variables = network.init(params_key, jnp.zeros((1, *image_shape)), jnp.zeros((1, *pretext_shape)), train=False)
    bank, usable = memory_bank.create(bank_key, layout, dim=dim, dtype=bank_dtype)
    return TrainState(
      step=jnp.zeros((), jnp.int32), params=variables["params"], batch_stats=variables["batch_stats"],
      opt_state=optimizer.init(variables["params"]), bank=bank, usable=usable, normaliser=jnp.zeros(()))

  # The init key is data of the traced program: the same bits whatever the number of devices.
  return jax.jit(init, out_shardings=state_shardings(mesh))()
