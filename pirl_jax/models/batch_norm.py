"""Batch norm, with the statistics of the whole batch, of each device, or of groups of images.

Letters: N images (or views of images), G groups of them, C channels.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-5

MOMENTUM = 0.9
"""What the running statistics keep of themselves at each step; PyTorch calls the rest, 0.1, momentum."""


def in_groups(x: jax.Array, group: int | None) -> jax.Array:
  """Returns f[N, ...] as f[G, N / G, ...], in groups of `group` consecutive images; None leaves it as it is.

  A network keeps this shape from its first layer to its last. If batch norm alone had it, XLA would not compute the
  statistics in the kernels that write their input: 5 % more bytes in a step on an H100.
  """
  return x if group is None else x.reshape(-1, group, *x.shape[1:])


def create_batch_norm(*, train: bool, dtype: Any, param_dtype: Any, axis: str | None,
                      group: int | None) -> Callable[..., nn.Module]:
  """Returns norm(name=...), which makes a layer f[N, ..., C] -> dtype[N, ..., C].

  Args:
    train: the layer takes the statistics of its input and moves the running ones; otherwise it uses the running ones.
    dtype: of the result; statistics are float32, or float64 with it.
    param_dtype: of scale and bias.
    axis: mesh axis over which the statistics are taken; None: each device its own.
    group: None, or the input is f[G, N / G, ..., C], see `in_groups`: each group has its own statistics, in training.
  """
  if group is not None:
    return partial(GroupedBatchNorm, dtype=dtype, param_dtype=param_dtype)
  return partial(nn.BatchNorm, use_running_average=not train, momentum=MOMENTUM, epsilon=EPSILON, dtype=dtype,
                 param_dtype=param_dtype, axis_name=axis)


class GroupedBatchNorm(nn.Module):
  """Batch norm in training, with the statistics of each group: f[G, N / G, ..., C] -> dtype[G, N / G, ..., C].

  Variables, their names and the values are those of Flax's `BatchNorm`. The running statistics move by the mean of the
  groups' means and variances.

  Attributes:
    dtype: of the result.
    param_dtype: of scale and bias.
  """

  dtype: Any
  param_dtype: Any

  if TYPE_CHECKING:
    def __hash__(self) -> int: ...  # Flax adds it, without declaring it

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the normalised groups, dtype[G, N / G, ..., C]."""
    channels = x.shape[-1]
    running = [self.variable("batch_stats", name, init, (channels,), jnp.float32)
               for name, init in (("mean", jnp.zeros), ("var", jnp.ones))]
    scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)

    exact = x.astype(jnp.promote_types(self.dtype, jnp.float32))
    mean_of = partial(jnp.mean, axis=range(1, x.ndim - 1), keepdims=True)
    mean = mean_of(exact)  # [G, 1, ..., C]
    var = jnp.maximum(0, mean_of(exact**2) - mean**2)
    if not self.is_initializing():
      for variable, stat in zip(running, (mean, var), strict=True):
        variable.value = MOMENTUM * variable.value + (1 - MOMENTUM) * stat.reshape(-1, channels).mean(axis=0)

    # One factor and one summand for each group: the gradient of Flax's form sums over the groups and over all images.
    scale, bias = (jnp.expand_dims(param, range(x.ndim - 1)) for param in (scale, bias))
    factor = jax.lax.rsqrt(var + EPSILON) * scale
    return (exact * factor + (bias - mean * factor)).astype(self.dtype)
