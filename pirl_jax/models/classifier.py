"""A trunk with a new linear layer on its pooled features; both are trained together on labels.

Letters: B batch, H W height and width, C trunk features, L classes.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pirl_jax.models.initializers import bias_init, kernel_init
from pirl_jax.models.resnet import ResNet


class Classifier(nn.Module):
  """The trunk and a linear layer with bias, f32[B, H, W, 3] -> logits f32[B, L].

  The linear layer computes in float32, also if the trunk computes in bfloat16.
  """

  trunk: ResNet
  num_classes: int

  @nn.compact
  def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
    """Returns logits f32[B, L] of normalised images f32[B, H, W, 3]; `train`: see `ResNet`."""
    pooled = self.trunk(image, train=train)["pooled"]
    # PyTorch's default initialisation, as in vissl's head (vissl/models/heads/mlp.py, PARAMS_MULTIPLIER 1).
    layer = nn.Dense(self.num_classes, kernel_init=kernel_init, bias_init=bias_init(pooled.shape[-1]), name="linear")
    return layer(pooled)


def on_trunk(classifier: Classifier, key: jax.Array, variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {"params", "batch_stats"}, f32[...] each, of the classifier: a copy of a trunk, and a new linear layer.

  Call this inside of a jitted function: there the second trunk, which is initialised but not used, costs nothing.

  Args:
    classifier: without a mesh axis.
    key: of the new layer.
    variables: {"params", "batch_stats"} of a `Network` with the same trunk.
  """
  fresh = classifier.init(key, jnp.zeros((1, 32, 32, 3)), train=False)  # no parameter depends on the image's size
  # The trunk is copied, because the training donates its arrays; without a copy jit may return the argument itself.
  trunk = {name: jax.tree.map(jnp.copy, variables[name]["trunk"]) for name in ("params", "batch_stats")}
  return {"params": {**fresh["params"], "trunk": trunk["params"]}, "batch_stats": {"trunk": trunk["batch_stats"]}}
