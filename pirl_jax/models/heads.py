"""The heads between trunk and loss. They are dropped for transfer.

Letters: B batch, P pretext views of an image, C trunk features, D dimensions of an embedding, L classes.

No head normalises its output; the embeddings are normalised in the step.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pirl_jax.models.batch_norm import create_batch_norm, in_groups
from pirl_jax.models.initializers import bias_init, kernel_init

PATCH_FEATURES = 1_000
"""Hidden units for each patch of the covariant jigsaw (vissl jigsaw_8gpu_resnet.yaml)."""


def _linear(x: jax.Array, features: int, name: str) -> jax.Array:
  # The layer computes in the type of its input: the trunk's pooled features are float32 or float64.
  layer = nn.Dense(features, param_dtype=x.dtype, kernel_init=kernel_init, bias_init=bias_init(x.shape[-1]), name=name)
  return layer(x)


class ImageHead(nn.Module):
  """The head f, and the head g of a transform that makes one view.

  The head is a linear layer f32[B, C] -> f32[B, D] or, with `mlp`, linear - ReLU - linear with C hidden units.

  Paper section 2.3 and appendix A.2; vissl configs/config/pretrain/pirl/models/resnet50_mlphead.yaml. In vissl's config
  files for wider networks the setting for the ReLU of this MLP stands at a place where no code reads it; here every
  width has the ReLU.
  """

  dim: int
  mlp: bool = False

  @nn.compact
  def __call__(self, features: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns embeddings f32[B, D] of pooled trunk features f32[B, C] or f32[B, 1, C]; `train` changes nothing."""
    features = jnp.reshape(features, (features.shape[0], -1))
    if self.mlp:
      features = nn.relu(_linear(features, features.shape[-1], "hidden"))
    return _linear(features, self.dim, "embedding")


class PatchesHead(nn.Module):
  """The head g of the jigsaw, f32[B, P, C] -> f32[B, D].

  A first linear layer is applied to each patch. Its outputs are concatenated in the order in which the patches are
  shown, and a second linear layer follows. There is no batch norm, and no ReLU between the two layers. The variant
  `mlp` has an MLP for each patch, which ends with a ReLU. Paper section 2.3 and appendix A.1;
  vissl/models/heads/siamese_concat_view.py.
  """

  dim: int
  mlp: bool = False

  @nn.compact
  def __call__(self, features: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns embeddings f32[B, D] of pooled trunk features f32[B, P, C]; `train` changes nothing."""
    if self.mlp:
      features = nn.relu(_linear(features, features.shape[-1], "hidden"))
    patches = _linear(features, self.dim, "patch")  # [B, P, D]
    if self.mlp:
      patches = nn.relu(patches)
    return _linear(jnp.reshape(patches, (patches.shape[0], -1)), self.dim, "embedding")


class ClassHead(nn.Module):
  """A linear classifier f32[B, C] -> f32[B, L], for the angles of RotNet or the labels of the supervised baseline.

  vissl configs/config/pretrain/rotnet/rotnet_8gpu_resnet.yaml.
  """

  num_classes: int

  @nn.compact
  def __call__(self, features: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns logits f32[B, L] of pooled trunk features f32[B, C] or f32[B, 1, C]; `train` changes nothing."""
    return _linear(jnp.reshape(features, (features.shape[0], -1)), self.num_classes, "logits")


class PatchesClassHead(nn.Module):
  """The classifier of the covariant jigsaw, f32[B, P, C] -> logits f32[B, L] of the L orders.

  Each patch passes linear - batch norm - ReLU; the outputs are concatenated, and a linear layer follows.
  vissl configs/config/pretrain/jigsaw/jigsaw_8gpu_resnet.yaml; vissl/models/heads/siamese_concat_view.py.

  Attributes:
    num_classes: L.
    batch_norm_axis: mesh axis over which batch statistics are computed; None means that each device has its own.
    batch_norm_group: number of images that have batch statistics of their own; None: all images.
  """

  num_classes: int
  batch_norm_axis: str | None = None
  batch_norm_group: int | None = None

  @nn.compact
  def __call__(self, features: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns logits f32[B, L] of pooled trunk features f32[B, P, C]; `train`: see `ResNet.__call__`."""
    group = self.batch_norm_group if train else None
    norm = create_batch_norm(train=train, dtype=features.dtype, param_dtype=features.dtype, axis=self.batch_norm_axis,
                             group=group)
    patches = nn.relu(norm(name="bn")(_linear(in_groups(features, group), PATCH_FEATURES, "patch")))  # [..., P, 1000]
    return _linear(jnp.reshape(patches, (features.shape[0], -1)), self.num_classes, "logits")
