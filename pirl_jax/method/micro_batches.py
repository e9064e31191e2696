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
    grad_fn: grad_fn(params, part) -> (gradients, rest).
    params: the same on every device.
    parts: a tree of [M, ...].
  """
  # As "varying" the parameters have gradients of this device's images: they are summed over the devices once.
  params = jax.lax.pcast(params, AXIS, to="varying")

  def add(total, part):
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


def positions(batch_size: int) -> jax.Array:
  """Returns where this device's images stand in the batch, i32[b]."""
  num_local = batch_size // jax.lax.axis_size(AXIS)
  return jax.lax.axis_index(AXIS) * num_local + jnp.arange(num_local)
