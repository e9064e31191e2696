"""A momentum encoder: a copy of the network that follows the network slowly and makes the rows of the bank.

InfoMin (2005.10243) and its code, PyContrast, train PIRL in this way, as MoCo (1911.05722) does: a second crop of each
image passes through the copy, and both views are compared with what comes out. Batch norm is that of EMAN (2101.08482):
the copy has running statistics of its own, which follow those of the network. MoCo instead takes the statistics of a
batch that is shuffled over the GPUs, because an image and its second crop must not share a batch's statistics, by which
they would recognise each other; here no statistics of the batch are used at all.

Letters: M parts of the batch, B batch of all devices, b this device's images of a part, H W sides in pixels, D
embedding.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pirl_jax.method import memory_bank
from pirl_jax.method.micro_batches import gather
from pirl_jax.method.randomness import view_keys
from pirl_jax.method.state import TrainState
from pirl_jax.models.network import Network

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
      emb: Any = network.apply(state.momentum_encoder, image, method="embed_image")
      return memory_bank.normalise(emb)

  return gather(jax.lax.map(part, (batch[CROP], batch["index"])), axis=1)


@jax.named_scope("optimizer")
def follow(state: TrainState, image_stats: Any, *, momentum: float) -> TrainState:
  """Returns the state whose momentum encoder e has moved to the network: e <- m e + (1 - m) w.

  m is the smaller one of `momentum` and (1 + n) / (10 + n) after n steps. So a short run does not compare its images
  with a copy of the random network, and the copy's statistics, which begin at 0 and 1, fit its layers soon.

  Args:
    state: after the update of the parameters; its number of steps counts this one.
    image_stats: f32[...], statistics of the image views of this batch. The running ones of the network would not do:
      they also follow the pretext views, whose statistics are others.
    momentum: in (0, 1).
  """
  before = (state.step - 1).astype(float)
  weight = jnp.minimum(momentum, (1 + before) / (10 + before))
  return state.replace(momentum_encoder=jax.tree.map(
    lambda old, new: (weight * old + (1 - weight) * new).astype(new.dtype),
    state.momentum_encoder, {"params": state.params, "batch_stats": image_stats}))
