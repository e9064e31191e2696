"""A momentum encoder: a copy of the network that follows the network slowly and makes the rows of the bank.

InfoMin (2005.10243) and its code, PyContrast, train PIRL in this way, as MoCo (1911.05722) does: a second crop of each
image passes through the copy, and both views are compared with what comes out. The copy takes batch statistics as the
network does in training. An image and its second crop must not share the statistics of a small group of images, by
which the network would recognise the group; so the second crops are put into other groups, as MoCo shuffles them over
the GPUs.

Letters: M parts of the batch, B batch of all devices, b this device's images of a part, H W sides in pixels, D
embedding.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from pirl_jax.method import memory_bank
from pirl_jax.method.micro_batches import gather
from pirl_jax.method.randomness import view_keys
from pirl_jax.method.state import TrainState
from pirl_jax.models.network import Network
from pirl_jax.runtime.mesh import AXIS

CROP = "second_crop"
"""Name of the second crop in a batch, u8[B, H, W, 3]."""

_KEY = 4
"""Number of the key of an image's second view; `method.forward` and `views.two_views` use those below."""


def embed(network: Network, views_fn: Callable, state: TrainState, batch: Mapping[str, jax.Array]) -> jax.Array:
  """Returns the embeddings f32[M, B / M, D] of the second views of a batch, unit vectors.

  Args:
    network: the network of which the state has a momentum encoder.
    views_fn: see `views.two_views.make_views`; the second view is augmented as the image view is.
    state: gives the momentum encoder, the seed and the step.
    batch: this device's `second_crop` u8[M, b, H, W, 3] and `index` i32[M, b], see `split_batch`.
  """
  def part(crops: tuple[jax.Array, jax.Array]) -> jax.Array:
    crop, index = crops
    with jax.named_scope("views"):
      keys = jax.vmap(lambda key: jax.random.fold_in(key, _KEY))(view_keys(state.seed, state.step, index))
      image, *_ = views_fn(keys, crop, None)
    with jax.named_scope("network"):
      variables = {"params": state.momentum_encoder, "batch_stats": state.batch_stats}
      emb, _ = network.apply(variables, image, train=True, mutable=["batch_stats"], method="embed_image")
      return memory_bank.normalise(emb)

  crops = batch[CROP], batch["index"]
  if network.trunk.batch_norm_axis:  # the statistics of the whole batch tell nothing about an image
    return gather(jax.lax.map(part, crops), axis=1)
  number = crops[1].shape[1]
  order = other_groups(number * jax.lax.axis_size(AXIS), network.trunk.batch_norm_group or number)
  mine = jax.lax.axis_index(AXIS) * number + jnp.arange(number)
  shuffled = tuple(gather(x, axis=1)[:, order[mine]] for x in crops)
  return gather(jax.lax.map(part, shuffled), axis=1)[:, jnp.argsort(order)]


def other_groups(number: int, group: int) -> jax.Array:
  """Returns an order i32[B] of B images in which those of a group are as far apart as can be.

  Args:
    number: B.
    group: size of the groups, which are consecutive; a divisor of B.
  """
  return jnp.arange(number).reshape(-1, group).T.reshape(-1)


@jax.named_scope("optimizer")
def follow(state: TrainState, *, momentum: float) -> TrainState:
  """Returns the state whose momentum encoder e has moved to the network: e <- m e + (1 - m) w.

  Args:
    state: after the update of the parameters.
    momentum: m, in (0, 1).
  """
  return state.replace(momentum_encoder=jax.tree.map(
    lambda old, new: momentum * old + (1 - momentum) * new, state.momentum_encoder, state.params))
