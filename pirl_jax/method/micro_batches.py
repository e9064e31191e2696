"""Micro-batches: parts of a batch that pass through the network one after the other.

Letters: B batch of all devices, b this device's images, M parts of the batch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pirl_jax.models.network import Network
from pirl_jax.runtime.mesh import AXIS


def split_batch(batch: Any, micro_batches: int) -> Any:
  """Returns a tree of this device's arrays [b, ...], cut into M parts: [M, b / M, ...].

  Part j takes every Mth image, starting with the jth. So over all devices a part has the same images on any number of
  devices.
  """
  return jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)


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

  If each device has its own statistics, the mean is also over the devices; evaluations use this mean.
  """
  mean = jax.tree.map(partial(jnp.mean, axis=0), batch_stats)
  return mean if network.trunk.batch_norm_axis else jax.lax.pmean(mean, AXIS)


def positions(num_parts: int, part_size: int) -> jax.Array:
  """Returns the positions i32[M, B / M], in [0, B), of the images of each part in the batch of all devices.

  Args:
    num_parts: M.
    part_size: B / M, number of images of a part over all devices.
  """
  num_local = num_parts * part_size // jax.lax.axis_size(AXIS)
  local = jax.lax.axis_index(AXIS) * num_local + jnp.arange(num_local)
  return gather(split_batch(local, num_parts), axis=1)


def gather(x: jax.Array, *, axis: int = 0) -> jax.Array:
  """Returns the arrays [..., b, ...] of all devices as one array [..., B, ...], the same on every device.

  `axis` is the position of b among the axes of x.
  """
  return jax.lax.all_gather(x, AXIS, axis=axis, tiled=True, to="invarying")
