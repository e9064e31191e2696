"""The programs of a run, lowered for devices that need not be there, from shapes alone. Nothing runs.

Letters: B images, S side in pixels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pirl_jax import system
from pirl_jax.data.records import Source
from pirl_jax.errors import UserError
from pirl_jax.method import memory_bank
from pirl_jax.method.momentum_encoder import CROP
from pirl_jax.method.randomness import view_keys
from pirl_jax.method.state import state_shardings
from pirl_jax.models.network import variable_shapes
from pirl_jax.models.pooling import max_pool
from pirl_jax.planning.loss_program import loss_programs
from pirl_jax.runtime.mesh import SPLIT, WHOLE
from pirl_jax.training import parts as parts_lib
from pirl_jax.views.normalisation import normalise_image

PARTS = ("views", "cut", "pool", "loss", "evaluate")
"""Of a step, those that `lower_part` lowers by themselves."""


class Described(Source):
  """Images of which only the number and the classes are known."""

  description, fingerprint = "known by their number alone", ""

  def __init__(self, num_images: int, num_classes: int) -> None:
    """Takes the number of images and of classes."""
    self._num_images = num_images
    self.class_names = tuple(str(number) for number in range(num_classes))

  def __len__(self) -> int:
    return self._num_images

  def __getitem__(self, index: Any) -> Any:
    raise NotImplementedError("nothing runs")

  def labels(self) -> np.ndarray:
    """Has none to give: nothing runs."""
    raise NotImplementedError("nothing runs")

  def image_name(self, index: int) -> str:
    """Returns the number."""
    return str(index)


def lower_step(config: ConfigDict, mesh: Mesh, source: Source, *, device_bytes: int) -> list[jax.stages.Lowered]:
  """Returns the program, or the two programs, of a step on these devices.

  Args:
    config: of the run.
    mesh: the devices.
    source: the training images; their number and classes count.
    device_bytes: memory of a device.

  Raises:
    UserError: see `parts.assemble`.
  """
  parts = parts_lib.assemble(config, Path("runs"), mesh, system.views_of(config), source, None,
                             device_bytes=device_bytes)
  shardings = state_shardings(mesh, with_bank=system.has_bank(config))
  state = jax.eval_shape(parts.initial_state)
  state = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state,
                       jax.tree.broadcast(shardings, state))
  batch = _crops(config, config.batch_size, mesh)
  scalars = {"index": jnp.int32, "label": jnp.int32, "valid": bool}
  if config.partial_batch:
    scalars["fills"] = bool
  for name, dtype in scalars.items():
    batch[name] = _shaped((config.batch_size,), dtype, mesh, SPLIT)
  lowered = parts_lib.make_step(parts).lower(state, batch)
  return list(lowered) if isinstance(lowered, tuple) else [lowered]


def lower_part(part: str, config: ConfigDict, mesh: Mesh, num_images: int) -> list[jax.stages.Lowered]:
  """Returns a part of a step: what one of the devices does with its share of a batch and of the bank.

  Args:
    part: one of `PARTS`.
    config: of the run.
    mesh: all devices; the part is lowered for the first of them.
    num_images: of the training set.

  Raises:
    UserError: the run does not have this part, or its settings do not fit.
  """
  if part == "loss" and not system.has_bank(config) or part == "cut" and not system.uses_pretext(config):
    raise UserError(f"part={part} is not possible: {config.name} has none")
  device = Mesh(mesh.devices[:1], mesh.axis_names)
  if part == "loss":
    return _lower_loss(config, device, num_images, mesh.size)
  run, arguments = {"views": _views, "cut": _cut, "pool": _pool, "evaluate": _evaluation}[part](
    config, config.batch_size // mesh.size, device)
  return [jax.jit(run).lower(*arguments)]


def _shaped(shape: tuple[int, ...], dtype: Any, mesh: Mesh, spec: Any = WHOLE) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))


def _crops(config: ConfigDict, count: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns a batch of crops, u8[B, S, S, 3] each."""
  return {name: _shaped((count, size, size, 3), jnp.uint8, mesh, SPLIT)
          for name, (size, _) in system.crops_of(config).items()}


def _views(config: ConfigDict, count: int, device: Mesh) -> tuple[Callable, tuple]:
  views_fn = system.views_of(config)

  def run(index: jax.Array, crops: dict[str, jax.Array]) -> Any:
    keys = view_keys(0, jnp.int32(0), index)
    second = views_fn(keys, crops[CROP], None) if CROP in crops else ()
    return views_fn(keys, crops.get("image_crop"), crops.get("pretext_crop")), second

  return run, (_shaped((count,), jnp.int32, device), _crops(config, count, device))


def _cut(config: ConfigDict, count: int, device: Mesh) -> tuple[Callable, tuple]:
  pretext = system.pretext_of(config)

  def run(index: jax.Array, crop: jax.Array) -> Any:
    return jax.vmap(lambda key, crop: pretext(key, crop, lambda patches: patches))(
      view_keys(0, jnp.int32(0), index), crop)

  return run, (_shaped((count,), jnp.int32, device), _crops(config, count, device)["pretext_crop"])


def _pool(config: ConfigDict, count: int, device: Mesh) -> tuple[Callable, tuple]:
  side = config.data.image_size // 2
  shapes = [(count, n, n, 64 * config.model.width) for n in (side, (side - 1) // 2 + 1)]

  def run(x: jax.Array, slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    out, pullback = jax.vjp(max_pool, x)
    return out, pullback(slope)[0]

  return run, tuple(_shaped(shape, config.model.dtype, device) for shape in shapes)


def _evaluation(config: ConfigDict, count: int, device: Mesh) -> tuple[Callable, tuple]:
  network = system.network_of(config, num_classes=1_000)
  variables = variable_shapes(network, *system.network_inputs(config))

  def run(variables: Any, image: jax.Array) -> Any:
    return network.apply(variables, normalise_image(image), method=lambda net, x: net.trunk(x, train=False)["pooled"])

  size = config.data.image_size
  return run, (jax.tree.map(lambda x: _shaped(x.shape, x.dtype, device), variables),
               _shaped((count, size, size, 3), jnp.uint8, device))


def _lower_loss(config: ConfigDict, device: Mesh, num_images: int, num_devices: int) -> list[jax.stages.Lowered]:
  """Returns the loss with its gradient by all embeddings of the batch, and the update of the bank, on one device.

  The device has its share of the bank and of the negatives.
  """
  of_all = memory_bank.create_layout(num_images, num_devices=num_devices, num_negatives=config.num_negatives)
  layout = memory_bank.Layout(num_images // num_devices, of_all.num_strata // num_devices)
  contrast = parts_lib.contrast_of(config, layout, num_negatives=config.num_negatives // num_devices)
  views = ["image", "pretext"] if system.uses_pretext(config) else ["image"]
  count, dim = config.batch_size, config.model.dim
  stored = jax.eval_shape(lambda: memory_bank.stored(jnp.zeros(()), config.bank.dtype)).dtype
  bank = _shaped((layout.num_rows, dim), stored, device, SPLIT)
  given = (bank, _shaped((layout.num_rows,), bool, device, SPLIT),
           {"index": _shaped((count,), jnp.int32, device, SPLIT), "valid": _shaped((count,), bool, device, SPLIT)},
           {view: _shaped((count, dim), jnp.float32, device) for view in views})
  look, write = loss_programs(contrast, device, views=views, bank_momentum=config.bank.momentum)
  *_, moved, _ = jax.eval_shape(look, *given)
  return [look.lower(*given), write.lower(bank, *moved)]
