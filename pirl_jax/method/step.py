"""One step of training. Letters: B batch of all devices, M its parts, b this device's images of a part, P patches,
K negatives held by this device, D embedding."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pirl_jax.method import health, losses, memory_bank
from pirl_jax.method.micro_batches import accumulate, positions, split_batch, whole_batch_stats
from pirl_jax.method.negatives import EveryRow, Scores
from pirl_jax.method.programs import in_one_program, in_two_programs
from pirl_jax.method.randomness import step_keys, view_keys
from pirl_jax.models.network import Network
from pirl_jax.runtime.mesh import AXIS


def make_train_step(
  network: Network, optimizer: optax.GradientTransformation, views_fn: Callable, loss_fn: losses.Loss,
  layout: memory_bank.Layout, mesh: Mesh, *, num_negatives: int, negative_sampling: str = "shared", temperature: float,
  pretext_weight: float, bank_momentum: float, micro_batches: int = 1,
) -> Callable:
  """Returns train_step(state, batch) -> (state, metrics), compiled, and mapped over the devices of `mesh`.

  The state given in is donated: its memory becomes that of the state returned, so there is never a second bank.
  `batch` holds `image_crop` u8[B, H, W, 3], `pretext_crop` u8[B, S, S, 3], `index` i32[B] and `valid` bool[B], split
  over the devices; `metrics` is a flat dict of f32[], but for that of `health.not_finite`. Paper, sections 2.1-2.3,
  equation 5.

  Args:
    network: its batch norm may take statistics over the mesh axis, or over each device.
    optimizer: see `create_optimizer`.
    views_fn: see `views.two_views.make_views`.
    loss_fn: see `losses.make_loss`.
    layout: of the bank.
    mesh: the devices.
    num_negatives: K, for each of the two terms; 0: every row of the bank, in chunks.
    negative_sampling: "shared", one draw for the whole batch, or "per_image", as the official code draws.
    temperature: tau.
    pretext_weight: lambda of equation 5; at 0 there is no pretext view, and the loss is that of NPID.
    bank_momentum: the weight of the old row when a row moves.
    micro_batches: M, parts of the batch that pass through the network one after the other. The bank is read before the
      first and written after the last, and the gradient is that of the whole batch, but for the statistics of batch
      norm, which are those of a part.
  """
  gather = partial(jax.lax.all_gather, axis_name=AXIS, axis=1, tiled=True, to="invarying")
  # The first term, whose scores set Z, is that of the pretext view, where there is one.
  terms = {"pretext": pretext_weight, "image": 1 - pretext_weight} if pretext_weight else {"image": 1}

  def device_step(state, bank, batch):
    # 1. Randomness depends on the step and on the image alone, so that neither a restart nor the number of devices
    #    changes it. The two terms have a draw of negatives each.
    batch = split_batch(batch, micro_batches)  # [M, b, ...]
    rows = gather(layout.row_of(batch["index"]))  # [M, B / M]
    keys = step_keys(state.seed, state.step)
    draw = partial(memory_bank.draw, layout=layout, num_negatives=num_negatives, axis=AXIS)
    negatives = {}
    if negative_sampling == "per_image":
      position = gather(split_batch(positions(rows.size), micro_batches))
      negatives = {term: draw(keys[term], num_draws=rows.size)[position] for term in terms}  # [M, B / M, K]
    elif num_negatives:
      negatives = {term: draw(keys[term]) for term in terms}  # [K]

    # 2. What both terms compare with is the bank as this step found it: a constant, no gradient. A picture found
    #    broken has no weight from here on.
    usable, valid = memory_bank.retire(state.usable, rows.reshape(-1), gather(batch["valid"]).reshape(-1), axis=AXIS)
    own, *others = memory_bank.read(bank, rows.reshape(-1), *negatives.values(), axis=AXIS)
    drawn = {term: (negatives[term], vectors) for term, vectors in zip(negatives, others, strict=True)}
    parts = {"batch": batch, "rows": rows, "own": own.reshape(*rows.shape, -1),
             "share": (valid / jnp.maximum(jnp.sum(valid), 1)).reshape(rows.shape),  # of an image in every mean
             "drawn": drawn if negative_sampling == "per_image" else None}

    # 3. The two views of every image, [b, H, W, 3] and [b, P, h, w, 3], and their embeddings, [B / M, D] each.
    def embed(params, part):
      crops = part["batch"]
      image, pretext, _ = views_fn(view_keys(state.seed, state.step, crops["index"]), crops["image_crop"],
                                   crops.get("pretext_crop"))
      outputs, updated = network.apply(
        {"params": params, "batch_stats": state.batch_stats}, image, pretext, train=True, mutable=["batch_stats"])
      outputs = dict(zip(("image", "pretext"), outputs, strict=True))
      return {term: gather(memory_bank.normalise(outputs[term])[None])[0] for term in terms}, updated["batch_stats"]

    # 4. An embedding is compared with the image's own row and with the negatives: f and g never meet directly.
    def compare(term, emb, part):
      positive = memory_bank.positive_scores(part["own"], emb, temperature=temperature)
      if not num_negatives:
        local, _ = memory_bank.local_rows(bank, part["rows"], axis=AXIS)
        return positive, EveryRow(bank, usable, local, emb, temperature, AXIS)
      local, vectors = (part["drawn"] or drawn)[term]
      return positive, Scores(memory_bank.negative_scores(vectors, emb, temperature=temperature),
                              memory_bank.weights(usable, part["rows"], local, axis=AXIS), AXIS)

    def first_normaliser():
      def sums(part):
        term = next(iter(terms))
        emb = embed(state.params, part)[0][term]
        return losses.nce_normaliser_sums(*compare(term, emb, part), part["share"] > 0)
      return losses.nce_normaliser(*jax.tree.map(jnp.sum, jax.lax.map(sums, parts)), num_images=layout.num_images)

    normaliser = state.normaliser
    if loss_fn.has_normaliser:  # that of the first batch with a picture that could be read, for ever after
      normaliser = jax.lax.cond(normaliser > 0, lambda: state.normaliser, first_normaliser)

    def objective(params, part):
      embs, batch_stats = embed(params, part)
      mean = partial(health.sum_of_shares, part["share"])
      each, watched = {}, {}
      for term, emb in embs.items():
        positive, others = compare(term, emb, part)
        loss, sums = loss_fn(positive, others, normaliser=normaliser, watch=health.watch)
        each[term], watched[term] = mean(loss), (positive, *sums)
      loss = sum(weight * each[term] for term, weight in terms.items())
      metrics = {"loss": loss, **{f"loss_{term}": value for term, value in each.items()}}
      metrics |= health.health(watched, mean=mean, temperature=temperature)
      return loss, (metrics, embs["image"], batch_stats)

    grads, (metrics, image_emb, batch_stats) = accumulate(jax.grad(objective, has_aux=True), state.params, parts)
    metrics = jax.tree.map(jnp.sum, metrics) | {"embedding_spread": health.spread(image_emb, parts["share"])}

    # 5. The parameters move; then this batch's rows of the bank, and no others.
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    state = state.replace(
      step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state,
      batch_stats=whole_batch_stats(network, batch_stats), usable=usable, normaliser=normaliser)
    metrics[health.NOT_FINITE] = health.not_finite(
      metrics["loss"], grads, state.params, state.batch_stats, (own, image_emb))
    return state, (rows.reshape(-1), own, image_emb.reshape(own.shape), valid), metrics

  return (in_one_program if num_negatives else in_two_programs)(
    device_step, partial(memory_bank.update, momentum=bank_momentum, axis=AXIS), mesh)
