"""The heads f (image) and g (pretext) between trunk and loss. They are dropped for transfer.

Letters: B batch, P patches, C trunk features, D embedding. Neither head normalises: the loss does.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pirl_jax.models.initializers import bias_init, kernel_init


def _linear(x: jax.Array, features: int, name: str) -> jax.Array:
  layer = nn.Dense(features, kernel_init=kernel_init, bias_init=bias_init(x.shape[-1]), name=name)
  return layer(x)


class ImageHead(nn.Module):
  """f: one linear layer, or linear - ReLU - linear with as many hidden units as inputs.

  Paper section 2.3; vissl configs/config/pretrain/pirl/models/resnet50_mlphead.yaml.
  """

  dim: int
  mlp: bool = False

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Returns f32[B, D] of pooled trunk features f32[B, C]."""
    if self.mlp:
      features = nn.relu(_linear(features, features.shape[-1], "hidden"))
    return _linear(features, self.dim, "embedding")


class PatchesHead(nn.Module):
  """g of the jigsaw: one layer shared by the patches, their concatenation in the order seen, and a second layer.

  There is no batch norm, and no ReLU between the two (the MLP variant has one: it ends each patch's MLP with it).
  Paper section 2.3 and appendix A.1; vissl/models/heads/siamese_concat_view.py.
  """

  dim: int
  mlp: bool = False

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Returns f32[B, D] of pooled trunk features f32[B, P, C]."""
    if self.mlp:
      features = nn.relu(_linear(features, features.shape[-1], "hidden"))
    patches = _linear(features, self.dim, "patch")  # [B, P, D]
    if self.mlp:
      patches = nn.relu(patches)
    return _linear(jnp.reshape(patches, (patches.shape[0], -1)), self.dim, "embedding")
