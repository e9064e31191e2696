"""The features of each layer of the trunk as flat vectors of about 9,000 numbers.

The pooling is that of the paper's linear classifiers and SVMs. At 224 pixels vissl's own kernels are used. vissl has no
kernels for other networks and image sizes; for these the rule behind the dimensions of vissl's kernels is used
(`pirl_jax.evaluation.layers.SIZE`).

Letters: B batch, H W height and width, C channels, D numbers of a vector.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pirl_jax.errors import UserError
from pirl_jax.models.network import Ensemble, Model, Network

MapsFn = Callable[[Any, jax.Array], dict[str, jax.Array]]
"""forward_fn(variables, image f32[B, H, W, 3] normalised) -> {layer: f32[B, ...]}."""

EMBEDDING = "embedding"
"""The name of the layer f(v_I), the output of the image head; all other layers belong to the trunk."""

SIZE = 9_216
"""The largest number of values in a pooled map. A map of C channels is pooled to s x s points with
s = floor(sqrt(9,216 / C)). For a ResNet-50, s is 12, 6, 4, 3 and 2, as in vissl's table."""

KERNELS = {
  # (H, C) of the map: kernel, stride, padding (vissl configs/config/benchmark/linear_image_classification/imagenet1k/
  # eval_resnet_8gpu_transfer_in1k_linear.yaml, and its file for w2)
  (112, 64): (10, 10, 4),
  (56, 256): (16, 8, 0),
  (28, 512): (13, 5, 0),
  (14, 1024): (8, 3, 0),
  (7, 2048): (6, 1, 0),
  (112, 128): (20, 13, 4),
  (56, 512): (32, 8, 0),
  (28, 1024): (13, 7, 0),
  (14, 2048): (8, 6, 0),
}

CELLS = {(7, 4096): (2, 1), (14, 4096): (1, 2)}
"""(H, C) of the map: (rows, columns) of cells. vissl gives the number of cells but no kernel for these maps: res5 of
w2, and res4 of w4. (The other maps of w4 have as many cells as the general rule gives.)"""


def layer_names(network: Network | Ensemble) -> tuple[str, ...]:
  """Returns the trunk's layers from the input to the output: "conv1", "res2", ..., "pooled"."""
  trunk = (network.networks[0] if isinstance(network, Ensemble) else network).trunk
  return ("conv1", *(f"res{stage + 2}" for stage in range(len(trunk.blocks))), "pooled")


def has_embedding(network: Network | Ensemble) -> bool:
  """Returns whether the network has the layer "embedding". An ensemble has none: the spaces of its heads f differ."""
  return not isinstance(network, Ensemble) and network.has_embedding


def check_layers(network: Network | Ensemble, layers: Sequence[str], *, field: str) -> None:
  """Raises UserError, naming the config field, for a layer that the network does not have."""
  names = layer_names(network)
  for layer in layers:
    if layer not in names and not (layer == EMBEDDING and has_embedding(network)):
      known = (*names, EMBEDDING) if has_embedding(network) else names
      kind = "ensemble" if isinstance(network, Ensemble) else "network"
      raise UserError(f"{field} names the layer {layer!r}; this {kind} has {', '.join(known)}")


def check_maps(network: Network | Ensemble, variables: Any, layers: Sequence[str], *, image_size: int,
               field: str) -> None:
  """Raises UserError if the pooled maps of a layer have different sizes in the networks of an ensemble.

  Args:
    network: the network or ensemble; a single network always passes.
    variables: of the network; only their shapes matter.
    layers: names of the trunk's layers.
    image_size: H, in pixels.
    field: the config field that the message names.
  """
  if not isinstance(network, Ensemble):
    return
  names, image = layer_names(network), jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  maps = [jax.eval_shape(layer_features(member, names, flat=False), own, image)
          for member, own in zip(network.networks, variables, strict=True)]
  grids = {name: list(dict.fromkeys(found[name].shape[1:-1] for found in maps)) for name in names}
  for layer in layers:
    if len(grids[layer]) > 1:
      sizes = " and ".join(" x ".join(map(str, grid)) for grid in grids[layer])
      fitting = ", ".join(name for name in names if len(grids[name]) == 1)
      raise UserError(f"{field}: the networks of the ensemble have {sizes} points in the pooled map of {layer} at "
                      f"{image_size} pixels, which cannot be concatenated; choose from {fitting}")


def check_features(model: Model, layers: Sequence[str], *, image_size: int, field: str) -> None:
  """Raises UserError, naming the config field, unless the model has features of all these layers.

  This runs `check_layers` and `check_maps`.
  """
  check_layers(model.network, layers, field=field)
  check_maps(model.network, model.variables, layers, image_size=image_size, field=field)


def named_layers(model: Model, names: str, *, otherwise: Sequence[str], image_size: int,
                 field: str) -> tuple[str, ...]:
  """Returns the layers that `names` lists, or `otherwise` if `names` is empty.

  Args:
    model: the frozen network, or an ensemble.
    names: names separated by commas, for example "res4,res5", in any order.
    otherwise: layers of the model.
    image_size: H, in pixels.
    field: the config field that an error message names.

  Raises:
    UserError: the model has no such layer, or the maps of an ensemble's networks have different sizes.
  """
  layers = tuple(part.strip() for part in names.split(",")) if names else tuple(otherwise)
  check_features(model, layers, image_size=image_size, field=field)
  return layers


def pool(features: jax.Array) -> jax.Array:
  """Returns f32[B, h, w, C]: a map [B, H, W, C], average-pooled to at most `SIZE` values per image.

  If vissl has a kernel for the size of the map, this kernel is used. The kernel of conv1 counts the zeros of the
  padding, as PyTorch's AvgPool2d does. For other maps the average is taken over the cells of PyTorch's adaptive
  pooling. A map that is small enough stays as it is.
  """
  features = features.astype(jnp.float32)
  height, width, channels = features.shape[1:]
  if height == width and (height, channels) in KERNELS:
    kernel, stride, padding = KERNELS[height, channels]
    return nn.avg_pool(features, (kernel, kernel), (stride, stride), [(padding, padding)] * 2)
  side = max(1, math.isqrt(SIZE // channels))
  rows, columns = CELLS.get((height, channels), (side, side)) if height == width else (side, side)
  return _adaptive_mean(_adaptive_mean(features, 1, rows), 2, columns)


def _adaptive_mean(x: jax.Array, axis: int, size: int) -> jax.Array:
  length = x.shape[axis]
  if length <= size:
    return x
  cells = [jax.lax.slice_in_dim(x, i * length // size, -(-(i + 1) * length // size), axis=axis) for i in range(size)]
  return jnp.stack([cell.mean(axis=axis) for cell in cells], axis=axis)


# Cached, so that a program that uses the function is traced only once for all runs of the same network.
@functools.cache
def layer_features(network: Network | Ensemble, layers: tuple[str, ...], *, flat: bool = True) -> MapsFn:
  """Returns forward_fn(variables, image f32[B, H, W, 3] normalised) -> {layer: f32[B, D]} of the frozen network.

  The maps are pooled, see `pool`. With `flat` False they are returned as f32[B, h, w, C]. "pooled" and "embedding" are
  vectors in both cases, and they are not normalised. For an ensemble the channels of its networks are concatenated.
  Each network's map is pooled by the rule for its own channels, so D is the sum of the networks' D and may be above
  `SIZE`.
  """
  forward = _joint_maps(network, layers) if isinstance(network, Ensemble) else _maps(network, layers)
  if not flat:
    return forward
  return lambda variables, image: {layer: x.reshape(x.shape[0], -1) for layer, x in forward(variables, image).items()}


def _maps(network: Network, layers: tuple[str, ...]) -> MapsFn:
  def forward(variables: Any, image: jax.Array) -> dict[str, jax.Array]:
    found: Any = network.apply(variables, image, method="features")
    if EMBEDDING in layers:
      found[EMBEDDING] = network.apply(variables, found["pooled"], method=lambda net, x: net.image_head(x))
    return {layer: pool(found[layer]) if found[layer].ndim == 4 else found[layer].astype(jnp.float32)
            for layer in layers}

  return forward


def _joint_maps(ensemble: Ensemble, layers: tuple[str, ...]) -> MapsFn:
  member_fns = [_maps(network, layers) for network in ensemble.networks]

  def forward(variables: Any, image: jax.Array) -> dict[str, jax.Array]:
    found = [member_fn(own, image) for member_fn, own in zip(member_fns, variables, strict=True)]
    return {layer: jnp.concatenate([maps[layer] for maps in found], axis=-1) for layer in layers}

  return forward
