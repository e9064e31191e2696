"""The whole network of a run: one trunk for both views, a head for each."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pirl_jax.models.heads import ImageHead, PatchesHead
from pirl_jax.models.resnet import ResNet, create_resnet


class Network(nn.Module):
  """Trunk and heads f and g. Letters: B batch, P patches, D embedding, C trunk features."""

  trunk: ResNet
  image_head: ImageHead
  pretext_head: PatchesHead

  def __call__(self, image: jax.Array, pretext: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
    """Returns f(v_I) and g(v_It), each f32[B, D] and not yet normalised, of both views of a batch.

    The trunk runs twice, on the patches and then on the images, so each call has its own batch statistics and the
    running ones move twice, in the official order (vissl/models/base_ssl_model.py).

    Args:
      image: f32[B, H, W, 3], normalised.
      pretext: f32[B, P, h, w, 3], normalised.
      train: see `ResNet`.
    """
    pretext_emb = self.embed_pretext(pretext, train=train)
    return self.embed_image(image, train=train), pretext_emb

  def embed_image(self, image: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns f(v_I), f32[B, D], not yet normalised, of normalised images f32[B, H, W, 3]."""
    return self.image_head(self.trunk(image, train=train)["pooled"])

  def embed_pretext(self, pretext: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns g(v_It), f32[B, D], not yet normalised, of normalised pretext views f32[B, P, h, w, 3]."""
    batch, patches = pretext.shape[:2]
    features = self.trunk(jnp.reshape(pretext, (batch * patches, *pretext.shape[2:])), train=train)["pooled"]
    return self.pretext_head(jnp.reshape(features, (batch, patches, -1)))

  def features(self, image: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
    """Returns the trunk's features by stage, see `ResNet.__call__`, of normalised images f32[B, H, W, 3]."""
    return self.trunk(image, train=train)


def create_network(*, arch: str, width: int, stem: str, head: str, dim: int, dtype: str) -> Network:
  """Returns the network of a config's `model` group (its `batch_norm` belongs to the step, not to the network).

  Raises:
    UserError: see `create_resnet`.
  """
  return Network(create_resnet(arch, width=width, stem=stem, dtype=jnp.dtype(dtype)),
                 ImageHead(dim, mlp=head == "mlp"), PatchesHead(dim, mlp=head == "mlp"))
