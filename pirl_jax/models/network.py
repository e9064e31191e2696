"""The whole network of a run (one trunk for both views, and a head for each view), and ensembles of networks."""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pirl_jax.models.heads import ImageHead
from pirl_jax.models.resnet import ResNet


@partial(jax.jit, static_argnums=0)
def create_variables(network: nn.Module, key: jax.Array, *inputs: jax.Array | None) -> Any:
  """Returns new variables {"params", "batch_stats": tree} of a network or a trunk, drawn from the key.

  JAX keeps the traced program. For the same network and shapes the code of the network, which takes a second for a
  ResNet-50, runs once in a process: for the state of a run, and for all `variable_shapes`.

  Args:
    network: what is called with these inputs and `train=False`.
    key: for the parameters.
    inputs: one of each kind, see `system.network_inputs`; only shapes matter.
  """
  return network.init(key, *inputs, train=False)


def variable_shapes(network: nn.Module, *inputs: jax.Array | None) -> Any:
  """Returns the shapes of what `create_variables` gives, a `jax.ShapeDtypeStruct` for each array."""
  return create_variables.eval_shape(network, jax.random.key(0), *inputs)


class Network(nn.Module):
  """Trunk and heads: (image f32[B, H, W, 3], pretext f32[B, P, h, w, 3]) -> (f32[B, D], f32[B, D]).

  Letters: B batch, P pretext views of an image, H W h w sides in pixels, D outputs of a head, C trunk features.

  Attributes:
    trunk: the same for both views.
    image_head: f, or the classifier of the supervised baseline; None if the loss does not use the image view.
    pretext_head: g, or the classifier of a covariant task; None if there is no pretext view.
    angle_head: a classifier of the angle by which an image is turned, beside f; None if nothing predicts it.
  """

  trunk: ResNet
  image_head: nn.Module | None = None
  pretext_head: nn.Module | None = None
  angle_head: nn.Module | None = None

  if TYPE_CHECKING:
    def __hash__(self) -> int: ...  # Flax adds this method, but without a declaration

  def __call__(self, image: jax.Array | None, pretext: jax.Array | None, *, train: bool) -> tuple[
      jax.Array | None, jax.Array | None]:
    """Returns the outputs of the heads, f(v_I) and g(v_It), each f32[B, D], not normalised to unit norm.

    The trunk runs twice: on the pretext views, then on the images. Each call has its own batch statistics, and the
    running statistics are updated twice, in the official order (vissl/models/base_ssl_model.py).

    Args:
      image: f32[B, H, W, 3], normalised images; None gives None.
      pretext: f32[B, P, h, w, 3], normalised pretext views; None gives None.
      train: see `ResNet`.
    """
    pretext_out = None if pretext is None else self.embed_pretext(pretext, train=train)
    image_out = None if image is None else self.embed_image(image, train=train)
    if self.angle_head is not None and self.is_initializing():
      assert image is not None
      self.predict_angle(image)
    return image_out, pretext_out

  @property
  def has_embedding(self) -> bool:
    """Returns whether the network has a head f whose output is an embedding of the image."""
    return isinstance(self.image_head, ImageHead)

  def embed_image(self, image: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns f(v_I), f32[B, D], without unit norm, of normalised images f32[B, H, W, 3]."""
    assert self.image_head is not None
    return self.image_head(self.trunk(image, train=train)["pooled"], train=train)

  def embed_pretext(self, pretext: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns g(v_It), f32[B, D], without unit norm, of normalised pretext views f32[B, P, h, w, 3]."""
    assert self.pretext_head is not None
    batch, patches = pretext.shape[:2]
    features = self.trunk(jnp.reshape(pretext, (batch * patches, *pretext.shape[2:])), train=train,
                          views=patches)["pooled"]
    return self.pretext_head(jnp.reshape(features, (batch, patches, -1)), train=train)

  def predict_angle(self, image: jax.Array, *, train: bool = False) -> jax.Array:
    """Returns the logits f32[B, 4] of the quarter turns of normalised images f32[B, H, W, 3]."""
    assert self.angle_head is not None
    return self.angle_head(self.trunk(image, train=train)["pooled"], train=train)

  def features(self, image: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
    """Returns the trunk's features by layer, see `ResNet.__call__`, of normalised images f32[B, H, W, 3]."""
    return self.trunk(image, train=train)

  def with_batch_norm(self, *, axis: str | None = None, group: int | None = None) -> "Network":
    """Returns the network with other batch statistics in training.

    Args:
      axis: mesh axis over which they are taken; None: each device has its own.
      group: number of consecutive images of a device that have their own; None: all of them together.
    """
    def changed(module: Any) -> Any:
      return (module.clone(batch_norm_axis=axis, batch_norm_group=group) if hasattr(module, "batch_norm_axis")
              else module)
    return self.clone(trunk=changed(self.trunk), image_head=changed(self.image_head),
                      pretext_head=changed(self.pretext_head))


@dataclasses.dataclass(frozen=True)
class Ensemble:
  """Several networks whose features are concatenated (PIRL, section 3.2: PIRL-ens.).

  All networks get the same image f32[B, H, W, 3]. For each layer their channels are concatenated, see
  `evaluation.layers.layer_features`. The variables of an ensemble are a tuple of the networks' variables, in the same
  order.

  Attributes:
    networks: two or more; they may differ, but their trunks must have the same number of stages.
  """

  networks: tuple[Network, ...]


@dataclasses.dataclass(frozen=True)
class Model:
  """A network and its restored variables.

  Attributes:
    network: the network that the run has built, or an ensemble.
    variables: {"params": ..., "batch_stats": ...}, f32[...] each, replicated on every device of the mesh; a tuple of
      such dicts for an ensemble.
  """

  network: Network | Ensemble
  variables: Any

  @property
  def single(self) -> Network:
    """Returns the network; the model must not be an ensemble."""
    assert not isinstance(self.network, Ensemble)
    return self.network
