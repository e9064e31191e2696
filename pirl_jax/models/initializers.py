"""PyTorch's default initialisation, which the official runs used for every convolution and linear layer.

vissl/models/trunks/resnext.py rebuilds the stages after torchvision's constructor, so torchvision's Kaiming-normal
never takes effect and the default of `Conv2d` and `Linear` stays: uniform in +-1/sqrt(fan_in), biases included.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Uniform in +-1/sqrt(fan_in): Kaiming-uniform with a = sqrt(5)."""


def bias_init(fan_in: int) -> Callable[..., jax.Array]:
  """Returns an initialiser that draws uniformly in +-1/sqrt(fan_in), as PyTorch does for the bias of a layer."""
  def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)
  return init
