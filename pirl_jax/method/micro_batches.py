"""Micro-batches: parts of a batch that pass through the network one after the other.

Letters: B batch of all devices, b this device's images, M parts of the batch.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pirl_jax.models.network import Network
from pirl_jax.runtime.mesh import AXIS


def split_batch(batch: Mapping[str, jax.Array], micro_batches: int, *,
                group: int | None = None) -> dict[str, jax.Array]:
  """Returns this device's arrays [b, ...], cut into M parts: [M, b / M, ...], and `position` i32[M, b / M].

  Part j takes every Mth image, starting with the jth. So over all devices a part has the same images on any number of
  devices. If batch norm has groups of images, part j takes every Mth group instead: no group is cut, and its statistics
  do not depend on M. The `position` of an image is its place in the batch of all devices, in [0, B).

  Args:
    batch: a dict with `index` i32[b].
    micro_batches: M.
    group: number of consecutive images that stay together, a divisor of b / M.
  """
  num_local = len(batch["index"])
  positions = jax.lax.axis_index(AXIS) * num_local + jnp.arange(num_local)

  def cut(x: jax.Array) -> jax.Array:
    groups = x.reshape(-1, micro_batches, group or 1, *x.shape[1:]).swapaxes(0, 1)
    return groups.reshape(micro_batches, -1, *x.shape[1:])

  return {name: cut(x) for name, x in {**batch, "position": positions}.items()}


def accumulate(grad_fn: Callable, params: Any, parts: Any) -> tuple[Any, Any]:
  """Returns (gradients, rest): the gradients summed over the parts and the devices, the rest of each part [M, ...].

  Args:
    grad_fn: grad_fn(params, part) -> (gradients, rest); a part is `parts` without the first axis.
    params: the parameters f32[...], the same on every device.
    parts: a tree of arrays [M, ...].
  """
  # With "varying" parameters the gradients are those of this device's images; they are summed over the devices once, at
  # the end, instead of once for each part.
  params = jax.lax.pcast(params, AXIS, to="varying")

  def add(total: Any, part: Any) -> tuple[Any, Any]:
    grads, rest = grad_fn(params, part)
    return jax.tree.map(jnp.add, total, grads), rest

  # XLA removes the loop around a single part.
  total, rest = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
  return jax.lax.psum(total, AXIS), rest


def whole_batch_stats(network: Network, batch_stats: Any) -> Any:
  """Returns the batch statistics f32[...] to keep: the mean of the statistics f32[M, ...] after each part of the batch.

  If each device, or each group of images, has its own statistics, the mean is also over the devices; evaluations use
  this mean. (In PyTorch they would use the statistics of the first device.)
  """
  mean = jax.tree.map(partial(jnp.mean, axis=0), batch_stats)
  return mean if network.trunk.batch_norm_axis else jax.lax.pmean(mean, AXIS)


def weighed(valid: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
  """Returns bool[M, B / M]: `valid` of the same shape without the images that fill up the last batch of an epoch.

  Args:
    valid: False for an image found broken.
    batch: this device's arrays [M, b, ...], with `fills` bool[M, b] if the last batch of an epoch may be partial.
  """
  return valid & ~gather(batch["fills"], axis=1) if "fills" in batch else valid


def gather(x: jax.Array, *, axis: int = 0) -> jax.Array:
  """Returns the arrays [..., b, ...] of all devices as one array [..., B, ...], the same on every device.

  `axis` is the position of b among the axes of x.
  """
  return jax.lax.all_gather(x, AXIS, axis=axis, tiled=True, to="invarying")
