"""The parts of a batch that pass through the network one after the other.

Letters: B batch of all devices, b this device's images, M parts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pirl_jax.models.network import Network
from pirl_jax.runtime.mesh import AXIS


def split_batch(batch: Any, micro_batches: int) -> Any:
  """Returns a tree of this device's [b, ...] as [M, b / M, ...], M parts.

  Part j takes every Mth image from the jth on, so that over all devices it has the same images on any number of them.
  """
  return jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)


def accumulate(grad_fn: Callable, params: Any, parts: Any) -> tuple[Any, Any]:
  """Returns the gradients summed over the parts of a batch and over the devices, and the rest of each part, [M, ...].

  Args:
    grad_fn: grad_fn(params, part) -> (gradients, rest); a part is `parts` without the first axis.
    params: the same on every device.
    parts: a tree of [M, ...].
  """
  # As "varying" the parameters have gradients of this device's images: they are summed over the devices once.
  params = jax.lax.pcast(params, AXIS, to="varying")

  def add(total: Any, part: Any) -> tuple[Any, Any]:
    grads, rest = grad_fn(params, part)
    return jax.tree.map(jnp.add, total, grads), rest

  # XLA removes the loop around a single part.
  total, rest = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
  return jax.lax.psum(total, AXIS), rest


def whole_batch_stats(network: Network, batch_stats: Any) -> Any:
  """Returns the batch statistics to keep, of those after each part of the batch [M, ...]: their mean.

  Where each device has its own, it is the mean over the devices, too; evaluation uses it.
  """
  mean = jax.tree.map(partial(jnp.mean, axis=0), batch_stats)
  return mean if network.trunk.batch_norm_axis else jax.lax.pmean(mean, AXIS)


def positions(num_parts: int, part_size: int) -> jax.Array:
  """Returns where the images of each part stand in the batch of all devices, i32[M, B / M].

  Args:
    num_parts: M.
    part_size: B / M, images of a part over all devices.
  """
  num_local = num_parts * part_size // jax.lax.axis_size(AXIS)
  local = jax.lax.axis_index(AXIS) * num_local + jnp.arange(num_local)
  return gather(split_batch(local, num_parts), axis=1)


def gather(x: jax.Array, *, axis: int = 0) -> jax.Array:
  """Returns [..., b, ...] of this device's images as [..., B, ...] of all devices, the same on each; `axis` is b's."""
  return jax.lax.all_gather(x, AXIS, axis=axis, tiled=True, to="invarying")
