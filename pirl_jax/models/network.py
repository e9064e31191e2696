"""The whole network of a run: one trunk for both views, a head for each. And several networks as one."""

import dataclasses
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pirl_jax.models.heads import ImageHead
from pirl_jax.models.resnet import ResNet


class Network(nn.Module):
  """Trunk and heads. Letters: B batch, P pretext views of an image, D what a head gives, C trunk features.

  Attributes:
    trunk: for both views.
    image_head: f, or the classifier of the supervised baseline; None where the loss does not look at the image view.
    pretext_head: g, or the classifier of a covariant task; None where there is no pretext view.
  """

  trunk: ResNet
  image_head: nn.Module | None = None
  pretext_head: nn.Module | None = None

  if TYPE_CHECKING:
    def __hash__(self) -> int: ...  # Flax adds it, without declaring it

  def __call__(self, image: jax.Array | None, pretext: jax.Array | None, *, train: bool) -> tuple[
      jax.Array | None, jax.Array | None]:
    """Returns what the heads give for both views of a batch: f(v_I) and g(v_It), each f32[B, D], not yet normalised.

    The trunk runs twice, on the patches and then on the images, so each call has its own batch statistics and the
    running ones move twice, in the official order (vissl/models/base_ssl_model.py).

    Args:
      image: f32[B, H, W, 3], normalised; None gives None.
      pretext: f32[B, P, h, w, 3], normalised; None gives None.
      train: see `ResNet`.
    """
    pretext_out = None if pretext is None else self.embed_pretext(pretext, train=train)
    image_out = None if image is None else self.embed_image(image, train=train)
    return image_out, pretext_out

  @property
  def has_embedding(self) -> bool:
    """Returns whether there is an f whose output represents an image."""
    return isinstance(self.image_head, ImageHead)

  def embed_image(self, image: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns f(v_I), f32[B, D], not yet normalised, of normalised images f32[B, H, W, 3]."""
    assert self.image_head is not None
    return self.image_head(self.trunk(image, train=train)["pooled"], train=train)

  def embed_pretext(self, pretext: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns g(v_It), f32[B, D], not yet normalised, of normalised pretext views f32[B, P, h, w, 3]."""
    assert self.pretext_head is not None
    batch, patches = pretext.shape[:2]
    features = self.trunk(jnp.reshape(pretext, (batch * patches, *pretext.shape[2:])), train=train)["pooled"]
    return self.pretext_head(jnp.reshape(features, (batch, patches, -1)), train=train)

  def features(self, image: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
    """Returns the trunk's features by stage, see `ResNet.__call__`, of normalised images f32[B, H, W, 3]."""
    return self.trunk(image, train=train)

  def with_batch_norm_axis(self, axis: Any) -> "Network":
    """Returns the network, as a step maps it, with batch statistics over that mesh axis (None: each device its own)."""
    def on_axis(module: Any) -> Any:
      return module.clone(batch_norm_axis=axis) if hasattr(module, "batch_norm_axis") else module
    return self.clone(trunk=on_axis(self.trunk), image_head=on_axis(self.image_head),
                      pretext_head=on_axis(self.pretext_head))


@dataclasses.dataclass(frozen=True)
class Ensemble:
  """Several networks as one, for whoever needs nothing but features (PIRL, section 3.2: PIRL-ens.).

  They look at the same image. What each finds in a layer is put side by side, see `layer_features`.

  Its variables are a tuple with those of each network, in the same order.

  Attributes:
    networks: two or more; they may differ, but their trunks have as many stages.
  """

  networks: tuple[Network, ...]


@dataclasses.dataclass(frozen=True)
class Model:
  """A network and its restored values.

  Attributes:
    network: as the run built it; batch norm with running statistics unless a protocol trains it. Or several as one.
    variables: {"params": ..., "batch_stats": ...}, whole on every device of the mesh; of an ensemble a tuple of them.
  """

  network: Network | Ensemble
  variables: Any

  @property
  def single(self) -> Network:
    """Returns the network of a model that is no ensemble."""
    assert not isinstance(self.network, Ensemble)
    return self.network
