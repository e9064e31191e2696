"""PyTorch's default initialisation, which the official runs used for every convolution and linear layer.

vissl/models/trunks/resnext.py builds the stages again after torchvision's constructor. Therefore torchvision's
Kaiming-normal initialisation has no effect. PyTorch's default for `Conv2d` and `Linear` remains: weights and biases are
uniform in +-1/sqrt(fan_in).
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Uniform in +-1/sqrt(fan_in): Kaiming-uniform with a = sqrt(5)."""


def bias_init(fan_in: int) -> Callable[..., jax.Array]:
  """Returns init(key, shape, dtype) -> f32[shape], uniform in +-1/sqrt(fan_in), as PyTorch initialises biases."""
  def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)
  return init
