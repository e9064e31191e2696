"""One step of training. Letters: B batch of all devices, b this device's part of it, P patches, D embedding."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pirl_jax import losses, memory_bank
from pirl_jax.mesh import AXIS, SPLIT, WHOLE
from pirl_jax.models.network import Network
from pirl_jax.state import state_specs


def make_train_step(network: Network, optimizer: optax.GradientTransformation, views_fn: Callable, loss_fn: Callable,
                    layout: memory_bank.Layout, mesh: Mesh, *, num_negatives: int, negative_sampling: str = "shared",
                    temperature: float, pretext_weight: float, bank_momentum: float) -> Callable:
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
    num_negatives: K, for each of the two terms; 0: every row of the bank, in scores of B x N.
    negative_sampling: "shared", one draw for the whole batch, or "per_image", as the official code draws.
    temperature: tau.
    pretext_weight: lambda of equation 5; at 0 there is no pretext view, and the loss is that of NPID.
    bank_momentum: the weight of the old row when a row moves.
  """
  gather = partial(jax.lax.all_gather, axis_name=AXIS, tiled=True, to="invarying")
  total = partial(jax.lax.psum, axis_name=AXIS)
  # The first term, whose scores set Z, is that of the pretext view, where there is one.
  terms = {"pretext": pretext_weight, "image": 1 - pretext_weight} if pretext_weight else {"image": 1}

  def device_step(state, batch):
    # 1. Randomness depends on the step and on the image alone, so that neither a restart nor the number of devices
    #    changes it. The two terms have a draw of negatives each.
    rows = gather(layout.row_of(batch["index"]))
    num_draws = len(rows) if negative_sampling == "per_image" else None
    draw = partial(memory_bank.draw, layout=layout, num_negatives=num_negatives, axis=AXIS, num_draws=num_draws)
    keys = _step_keys(state.seed, state.step)
    negatives = {term: draw(keys[term]) for term in terms}

    # 2. The two views of every image: [b, H, W, 3] and [b, P, h, w, 3].
    image, pretext, _ = views_fn(view_keys(state.seed, state.step, batch["index"]), batch["image_crop"],
                                 batch.get("pretext_crop"))

    # 3. What both terms compare with is the bank as this step found it: a constant, no gradient. A picture found
    #    broken has no weight from here on.
    usable, valid = memory_bank.retire(state.usable, rows, gather(batch["valid"]), axis=AXIS)
    own, *others = memory_bank.read(state.bank, rows, *negatives.values(), axis=AXIS)
    others = dict(zip(terms, others, strict=True))
    weights = {term: memory_bank.weights(usable, rows, negatives[term], axis=AXIS) for term in terms}
    mean = partial(_weighted_mean, weight=valid.astype(jnp.float32))

    # 4. Each term is against the image's own row: f and g never meet directly.
    def objective(params):
      outputs, updated = network.apply(
        {"params": params, "batch_stats": state.batch_stats}, image, pretext, train=True, mutable=["batch_stats"])
      outputs = dict(zip(("image", "pretext"), outputs, strict=True))
      embs = {term: gather(memory_bank.normalise(outputs[term])) for term in terms}  # [B, D]
      scores = {
        term: (*memory_bank.scores(own, others[term], embs[term], temperature=temperature), weights[term])
        for term in terms}
      normaliser = _normaliser(state.normaliser, losses.nce_normaliser(
        *next(iter(scores.values())), valid, num_images=layout.num_images, total=total))
      each = {term: mean(loss_fn(*scores[term], normaliser=normaliser, total=total)) for term in terms}
      loss = sum(weight * each[term] for term, weight in terms.items())
      metrics = {"loss": loss, **{f"loss_{term}": value for term, value in each.items()}}
      metrics |= _health(scores, embs["image"], mean=mean, total=total, temperature=temperature)
      return loss, (metrics, embs["image"], updated["batch_stats"], normaliser)

    grads, (metrics, image_emb, batch_stats, normaliser) = jax.grad(objective, has_aux=True)(state.params)

    # 5. The parameters move; then this batch's rows of the bank, and no others.
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    bank = memory_bank.update(state.bank, rows, own, image_emb, valid, momentum=bank_momentum, axis=AXIS)
    return state.replace(
      step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state,
      batch_stats=whole_batch_stats(network, batch_stats), bank=bank, usable=usable, normaliser=normaliser), metrics

  return map_step(device_step, mesh)


def map_step(device_step: Callable, mesh: Mesh, *, with_bank: bool = True) -> Callable:
  """Returns device_step(state, batch) -> (state, metrics), mapped over the devices, compiled, its state donated."""
  specs = state_specs(with_bank=with_bank)
  mapped = jax.shard_map(device_step, mesh=mesh, in_specs=(specs, SPLIT), out_specs=(specs, WHOLE))
  return jax.jit(mapped, donate_argnums=0)


def whole_batch_stats(network: Network, batch_stats: Any) -> Any:
  """Returns the batch statistics to keep: those of the devices' own batches differ, and evaluation uses their mean."""
  return batch_stats if network.trunk.batch_norm_axis else jax.lax.pmean(batch_stats, AXIS)


def view_keys(seed: jax.Array | int, step: jax.Array | int, index: jax.Array) -> jax.Array:
  """Returns the keys of the images' views in a step, key[B]: from the seed, the step and the image's index i32[B]."""
  return jax.vmap(jax.random.fold_in, (None, 0))(_step_keys(seed, step)["views"], index)


def _step_keys(seed, step):
  """Returns the keys of a step: of the views, and of the negatives of the pretext and of the image term."""
  keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)
  return dict(zip(("views", "pretext", "image"), keys, strict=True))


def _normaliser(old, first):
  """Returns Z: that of the first batch with a picture that could be read, for ever after."""
  return jax.lax.stop_gradient(jnp.where(old > 0, old, first))


def _weighted_mean(x, weight):
  return jnp.sum(x * weight) / jnp.maximum(jnp.sum(weight), 1)


def _health(scores, image_emb, *, mean, total, temperature):
  """Returns figures that need no label and show whether the network learns, f32[] each.

  similarity_own, similarity_own_pretext: cosine of the image's, and the pretext view's, embedding with its own row;
  similarity_negatives: mean cosine of the image's embedding with the negatives; negatives_beaten: share of them that
  are less similar than the own row, for the pretext view (the image where there is none); embedding_spread: standard
  deviation of each dimension over the batch, averaged and times sqrt(D): 1 when the embeddings fill the sphere, 0 when
  they have collapsed to a point.
  """
  image_positive, image_negative, image_weight = scores["image"]
  first_positive, first_negative, first_weight = next(iter(scores.values()))
  beaten = total(jnp.sum((first_negative < first_positive[:, None]) * first_weight, axis=1))
  centre = jax.vmap(mean, 1)(image_emb)  # [D]
  variance = jax.vmap(mean, 1)((image_emb - centre[None]) ** 2)
  return {
    "similarity_own": mean(image_positive) * temperature,
    **({"similarity_own_pretext": mean(scores["pretext"][0]) * temperature} if "pretext" in scores else {}),
    "similarity_negatives": mean(
      total(jnp.sum(image_negative * image_weight, axis=1))
      / jnp.maximum(total(jnp.sum(image_weight, axis=1)), 1)) * temperature,
    "negatives_beaten": mean(beaten / jnp.maximum(total(jnp.sum(first_weight, axis=1)), 1)),
    "embedding_spread": jnp.mean(jnp.sqrt(variance)) * image_emb.shape[1] ** 0.5,
  }
