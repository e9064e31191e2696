"""The features of each layer of the trunk as flat vectors of about 9,000 numbers.

The pooling of the paper's linear classifiers and SVMs: at 224 pixels with vissl's own kernels, for networks and picture
sizes that it does not know by the rule behind their dimensions (`pirl_jax.evaluation.layers.SIZE`).

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
from pirl_jax.models.network import Network

EMBEDDING = "embedding"
"""The name of f(v_I), behind the image head; the other layers are the trunk's."""

SIZE = 9_216
"""The most numbers of a pooled map: of C channels, floor(sqrt(9,216 / C)) squared points are kept. For a ResNet-50
that is 12, 6, 4, 3 and 2 a side, as in vissl's table."""

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

CELLS = {(7, 4096): (2, 1)}
"""(H, C) of the map: rows and columns of cells, where vissl has no kernel but says how many (res5 of w2)."""


def layer_names(network: Network) -> tuple[str, ...]:
  """Returns the trunk's layers from the input to the output: "conv1", "res2", ..., "pooled"."""
  return ("conv1", *(f"res{stage + 2}" for stage in range(len(network.trunk.blocks))), "pooled")


def check_layers(network: Network, layers: Sequence[str], *, field: str) -> None:
  """Raises UserError, naming the config field, for a layer that the network does not have."""
  known = (*layer_names(network), EMBEDDING)
  for layer in layers:
    if layer not in known:
      raise UserError(f"{field} names the layer {layer!r}; this network has {', '.join(known)}")


def pool(features: jax.Array) -> jax.Array:
  """Returns f32[B, h, w, C], average-pooled to at most `SIZE` numbers a picture, of a map [B, H, W, C].

  Where vissl has a kernel for the map's size it is used; conv1's counts the zeros of the padding, as PyTorch's
  AvgPool2d does. Else the average is over the cells of PyTorch's adaptive pooling; a map that is small enough stays.
  """
  features = features.astype(jnp.float32)
  height, width, channels = features.shape[1:]
  if height == width and (height, channels) in KERNELS:
    kernel, stride, padding = KERNELS[height, channels]
    return nn.avg_pool(features, (kernel, kernel), (stride, stride), [(padding, padding)] * 2)
  side = max(1, math.isqrt(SIZE // channels))
  rows, columns = CELLS.get((height, channels), (side, side)) if height == width else (side, side)
  return _adaptive_mean(_adaptive_mean(features, 1, rows), 2, columns)


def _adaptive_mean(x, axis, size):
  length = x.shape[axis]
  if length <= size:
    return x
  cells = [jax.lax.slice_in_dim(x, i * length // size, -(-(i + 1) * length // size), axis=axis) for i in range(size)]
  return jnp.stack([cell.mean(axis=axis) for cell in cells], axis=axis)


# Kept, so that whatever traces the function traces it once for runs of the same network.
@functools.cache
def layer_features(network: Network, layers: tuple[str, ...], *, flat: bool = True) -> Callable[
    [Any, jax.Array], dict[str, jax.Array]]:
  """Returns forward_fn(variables, image f32[B, H, W, 3] normalised) -> {layer: f32[B, D]}, by the frozen network.

  The maps are pooled, see `pool`; with `flat` False they stay f32[B, h, w, C] ("pooled" and "embedding" are vectors in
  any case, and neither is normalised).
  """
  def forward(variables, image):
    found = network.apply(variables, image, method="features")
    if EMBEDDING in layers:
      found[EMBEDDING] = network.apply(variables, found["pooled"], method=lambda net, x: net.image_head(x))
    maps = {layer: pool(found[layer]) if found[layer].ndim == 4 else found[layer].astype(jnp.float32)
            for layer in layers}
    return {layer: x.reshape(x.shape[0], -1) if flat else x for layer, x in maps.items()}

  return forward
