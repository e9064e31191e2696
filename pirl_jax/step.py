"""One step of training. Letters: B batch of all devices, b this device's part of it, P patches, D embedding."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pirl_jax import losses, memory_bank
from pirl_jax.mesh import AXIS, SPLIT, WHOLE
from pirl_jax.models.network import Network
from pirl_jax.state import state_specs


def make_train_step(network: Network, optimizer: optax.GradientTransformation, views_fn: Callable, loss_fn: Callable,
                    layout: memory_bank.Layout, mesh: Mesh, *, num_negatives: int, temperature: float,
                    pretext_weight: float, bank_momentum: float, seed: int) -> Callable:
  """Returns train_step(state, batch) -> (state, metrics): one compiled program, mapped over the devices of `mesh`.

  The state given in is donated: its memory becomes that of the state returned, so there is never a second bank.
  `batch` holds `image_crop` u8[B, H, W, 3], `pretext_crop` u8[B, S, S, 3], `index` i32[B] and `valid` bool[B], split
  over the devices; `metrics` is a flat dict of f32[]. Paper, sections 2.1-2.3, equation 5.

  Args:
    network: its batch norm may take statistics over the mesh axis, or over each device.
    optimizer: see `create_optimizer`.
    views_fn: see `views.two_views.make_views`.
    loss_fn: see `losses.make_loss`.
    layout: of the bank.
    mesh: the devices.
    num_negatives: K, for each of the two terms.
    temperature: tau.
    pretext_weight: lambda of equation 5.
    bank_momentum: the weight of the old row when a row moves.
    seed: of the views and of the negatives.
  """
  gather = partial(jax.lax.all_gather, axis_name=AXIS, tiled=True, to="invarying")
  total = partial(jax.lax.psum, axis_name=AXIS)
  draw = partial(memory_bank.draw, layout=layout, num_negatives=num_negatives, axis=AXIS)

  def device_step(state, batch):
    # 1. Randomness depends on the step and on the image alone, so that neither a restart nor the number of devices
    #    changes it. The two terms have a draw of negatives each.
    _, pretext_key, image_key = _step_keys(seed, state.step)
    pretext_negatives, image_negatives = draw(pretext_key), draw(image_key)

    # 2. The two views of every image.
    keys = view_keys(seed, state.step, batch["index"])
    image, pretext = views_fn(keys, batch["image_crop"], batch["pretext_crop"])  # [b, H, W, 3], [b, P, h, w, 3]

    # 3. What both terms compare with is the bank as this step found it: a constant, no gradient. A picture found
    #    broken has no weight from here on.
    rows = gather(layout.row_of(batch["index"]))
    usable, valid = memory_bank.retire(state.usable, rows, gather(batch["valid"]), axis=AXIS)
    own, pretext_others, image_others = memory_bank.read(
      state.bank, rows, pretext_negatives, image_negatives, axis=AXIS)
    weights = partial(memory_bank.weights, usable, rows, axis=AXIS)
    mean = partial(_weighted_mean, weight=valid.astype(jnp.float32))

    # 4. Two terms against the image's own row: f and g never meet directly.
    def objective(params):
      (image_emb, pretext_emb), updated = network.apply(
        {"params": params, "batch_stats": state.batch_stats}, image, pretext, train=True, mutable=["batch_stats"])
      image_emb, pretext_emb = (gather(memory_bank.normalise(emb)) for emb in (image_emb, pretext_emb))  # [B, D]
      score = partial(memory_bank.scores, own, temperature=temperature)
      pretext_scores = *score(pretext_others, pretext_emb), weights(pretext_negatives)
      image_scores = *score(image_others, image_emb), weights(image_negatives)
      normaliser = _normaliser(state.normaliser, losses.nce_normaliser(
        *pretext_scores, valid, num_images=layout.num_images, total=total))
      loss_pretext = mean(loss_fn(*pretext_scores, normaliser=normaliser, total=total))
      loss_image = mean(loss_fn(*image_scores, normaliser=normaliser, total=total))
      loss = pretext_weight * loss_pretext + (1 - pretext_weight) * loss_image
      metrics = {"loss": loss, "loss_image": loss_image, "loss_pretext": loss_pretext}
      metrics |= _health(pretext_scores, image_scores, image_emb, mean=mean, total=total, temperature=temperature)
      return loss, (metrics, image_emb, updated["batch_stats"], normaliser)

    grads, (metrics, image_emb, batch_stats, normaliser) = jax.grad(objective, has_aux=True)(state.params)

    # 5. The parameters move; then this batch's rows of the bank, and no others.
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    bank = memory_bank.update(state.bank, rows, own, image_emb, valid, momentum=bank_momentum, axis=AXIS)
    return state.replace(
      step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state,
      # Statistics of a device alone differ between devices; their mean is what evaluation uses.
      batch_stats=batch_stats if network.trunk.batch_norm_axis else jax.lax.pmean(batch_stats, AXIS),
      bank=bank, usable=usable, normaliser=normaliser), metrics

  specs = state_specs()
  mapped = jax.shard_map(device_step, mesh=mesh, in_specs=(specs, SPLIT), out_specs=(specs, WHOLE))
  return jax.jit(mapped, donate_argnums=0)


def view_keys(seed: int, step: jax.Array | int, index: jax.Array) -> jax.Array:
  """Returns the keys of the images' views in a step, key[B]: from the seed, the step and the image's index i32[B]."""
  return jax.vmap(jax.random.fold_in, (None, 0))(_step_keys(seed, step)[0], index)


def _step_keys(seed, step):
  """Returns the keys of a step: of the views, and of the negatives of the pretext and of the image term."""
  return jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)


def _normaliser(old, first):
  """Returns Z: that of the first batch with a picture that could be read, for ever after."""
  return jax.lax.stop_gradient(jnp.where(old > 0, old, first))


def _weighted_mean(x, weight):
  return jnp.sum(x * weight) / jnp.maximum(jnp.sum(weight), 1)


def _health(pretext_scores, image_scores, image_emb, *, mean, total, temperature):
  """Returns figures that need no label and show whether the network learns, f32[] each.

  similarity_own, similarity_own_pretext: cosine of the image's, and the pretext view's, embedding with its own row;
  similarity_negatives: mean cosine of the image's embedding with the negatives; negatives_beaten: share of them that
  are less similar than the own row, for the pretext view; embedding_spread: standard deviation of each dimension over
  the batch, averaged and times sqrt(D): 1 when the embeddings fill the sphere, 0 when they have collapsed to a point.
  """
  image_positive, image_negative, image_weight = image_scores
  pretext_positive, pretext_negative, pretext_weight = pretext_scores
  beaten = total(jnp.sum((pretext_negative < pretext_positive[:, None]) * pretext_weight, axis=1))
  centre = jax.vmap(mean, 1)(image_emb)  # [D]
  variance = jax.vmap(mean, 1)((image_emb - centre[None]) ** 2)
  return {
    "similarity_own": mean(image_positive) * temperature,
    "similarity_own_pretext": mean(pretext_positive) * temperature,
    "similarity_negatives": mean(
      total(jnp.sum(image_negative * image_weight, axis=1))
      / jnp.maximum(total(jnp.sum(image_weight, axis=1)), 1)) * temperature,
    "negatives_beaten": mean(beaten / jnp.maximum(total(jnp.sum(pretext_weight, axis=1)), 1)),
    "embedding_spread": jnp.mean(jnp.sqrt(variance)) * image_emb.shape[1] ** 0.5,
  }
