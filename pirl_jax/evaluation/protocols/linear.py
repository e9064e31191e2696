"""Linear classifiers on the frozen trunk, one for each layer (PIRL, appendix C; its table 7 and figure 5).

The map of a layer, pooled to about 9,000 numbers (`layers.pool`), passes a batch norm over its channels and one linear
layer with bias. The trunk stays as it is, its own batch norm always with running statistics, so one forward pass of it
serves the classifiers of all layers: each has its own cross-entropy, and none sees the others.

Two kinds of batch norm are known: that of the paper's own code has no scale and shift (Goyal et al., ICCV 2019,
`BN_NO_SCALE_SHIFT`), vissl's has (vissl/models/heads/linear_eval_mlp.py). Both measure the whole batch, over all
devices, and judge with running statistics. The linear layer starts from N(0, 0.01^2) and a bias of 0, as in the paper's
own code and in MoCo. Weight decay applies to kernels and biases of the linear layers, not to the batch norm's scale and
shift, as in vissl; the paper does not say.

Letters: B batch of all devices, b this device's part, N pictures, H side in pixels, h w C a pooled map (a vector has C
alone), D its numbers, L classes.
"""

import dataclasses
import functools
import math
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pirl_jax.data import batches
from pirl_jax.errors import UserError
from pirl_jax.evaluation import classification
from pirl_jax.evaluation.features import stream_features
from pirl_jax.evaluation.inputs import Pictures
from pirl_jax.evaluation.layers import EMBEDDING, check_layers, layer_features, layer_names
from pirl_jax.evaluation.outcome import Outcome
from pirl_jax.figures.curves import Curve
from pirl_jax.models.network import Ensemble, Model, Network
from pirl_jax.runtime.mesh import AXIS, SPLIT, WHOLE, whole
from pirl_jax.runtime.progress import Progress
from pirl_jax.storage.snapshots import Snapshots
from pirl_jax.views.normalisation import normalise

BASE_BATCH = 256
"""Pictures of the batch for which the learning rate is given."""

HEADS = ("bn", "bn_affine", "plain")
SCHEDULES = ("steps", "cosine")

KERNEL_STD = 0.01
"""Of the linear layer's first values."""

EPS = 1e-5
MOMENTUM = 0.1
"""Of the batch norm: what is added to the variance, and the share of the new value in the running statistics."""

STEPS_IN_FLIGHT = 2
"""Steps that the devices may be behind the host."""

CHECK_STEPS = 100
"""Steps after which, and at the end of each epoch, the losses are looked at and a snapshot may be written."""

SNAPSHOT_SECONDS = 60.0
"""Least seconds of training between two snapshots, so that writing stays a small part of the work."""

CACHE_BYTES = 8 * 2**30
"""The most that the features of all training pictures may take in memory."""


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How the classifiers are trained, see `measure_linear`."""

  num_epochs: int
  batch_size: int
  learning_rate: float
  schedule: str
  milestones: tuple[float, ...]
  decay_factor: float
  momentum: float
  nesterov: bool
  weight_decay: float
  head: str
  image_scale: tuple[float, float]
  cached: bool
  seed: int

  @property
  def first_rate(self) -> float:
    """Returns the learning rate of the first step, for the batch as it is."""
    return self.learning_rate * self.batch_size / BASE_BATCH


def measure_linear(model: Model, train: Pictures, test: Pictures, *, mesh: Mesh, layers: tuple[str, ...],
                   num_epochs: int, batch_size: int, learning_rate: float, schedule: str, milestones: Sequence[float],
                   decay_factor: float, momentum: float, nesterov: bool, weight_decay: float, head: str,
                   image_scale: Sequence[float], cached: bool, seed: int,
                   snapshot_folder: str | os.PathLike) -> Outcome:
  """Returns top-1 and top-5 on the test pictures of a linear classifier on each layer.

  Judged are the classifiers after the last epoch. Nothing is chosen on the test pictures but the layer that is called
  the best one, as the paper does for its table 2. Training pictures without a label take no part. Interrupted, the same
  call goes on from its last snapshot, to the same figures. A layer's classifier does not depend on which other layers
  are asked for.

  The outcome's figures are `layers`, from the input to the output, with `top1`, `top5` in [0, 1] (top-5: the true class
  is among the five, or as many as there are, with the highest scores), `dim` (D) and `loss` (mean over the last epoch,
  in nats); `best_layer` (by top-1, of equals the deeper one) with its `top1` and `top5`; `num_classes`; `num_train`
  (labelled), `num_test` (labelled and readable); `num_broken_train` (labelled ones that could not be read, among those
  met in the last epoch, or with `cached` among all), `num_broken_test`; `steps`; and `settings` as used, of them
  `learning_rate` after scaling.

  Args:
    model: the frozen network, or an ensemble; batch norm and linear layer are on all channels together.
    train: labelled pictures.
    test: labelled pictures of the same classes, judged by their centre crop.
    mesh: the devices; their number divides the batch, and changes nothing but rounding.
    layers: see `layers.layer_names`, or "embedding"; in any order.
    num_epochs: >= 1; a batch is always whole, and the pictures left over are others in each epoch.
    batch_size: B, >= 1, at most the labelled training pictures.
    learning_rate: for a batch of 256; scaled in proportion to the batch.
    schedule: "steps", or "cosine": half a cosine to zero, at each step.
    milestones: with "steps", epochs in (0, num_epochs) after which the rate is multiplied by `decay_factor`.
    decay_factor: in (0, 1].
    momentum: of SGD, in [0, 1).
    nesterov: PyTorch's variant of it.
    weight_decay: on kernels and biases of the linear layers.
    head: before the linear layer "bn" (batch norm without scale and shift), "bn_affine" (with), or "plain" (nothing).
    image_scale: range of the share of the picture's area that the random crop covers.
    cached: features of all training pictures are taken once, of their centre crop, and kept in memory: for small data,
      without augmentation.
    seed: of first values, order and crops.
    snapshot_folder: holds what is not finished; belongs to exactly these arguments, and the caller deletes it.

  Raises:
    UserError: an unknown layer, a value out of range, labels missing or of other classes, a batch that the devices
      cannot share or that is larger than the training set, a cache that would be too large (all before anything
      compiles), no picture that can be read, or a loss that is not finite.
  """
  recipe = Recipe(num_epochs, batch_size, learning_rate, schedule, tuple(milestones), decay_factor, momentum, nesterov,
                  weight_decay, head, tuple(image_scale), cached, seed)
  check_layers(model.network, layers, field="linear.layers")
  layers = tuple(layer for layer in (*layer_names(model.network), EMBEDDING) if layer in layers)
  if not layers:
    raise UserError(f"linear.layers is empty; choose from {', '.join(layer_names(model.network))}")
  _check_recipe(recipe)
  labels = classification.read_labels(train, test, protocol="linear")
  indices = np.flatnonzero(labels >= 0)
  _check_batch(batch_size, len(indices), mesh)

  num_classes = len(train.source.class_names)
  maps_fn = layer_features(model.network, layers, flat=False)
  image = jax.ShapeDtypeStruct((1, train.image_size, train.image_size, 3), jnp.float32)
  maps = jax.eval_shape(maps_fn, model.variables, image)
  shapes = {layer: maps[layer].shape[1:] for layer in layers}  # JAX put the names into the order of letters
  frozen = jax.device_put(model.variables, whole(mesh))

  here = {"process_index": jax.process_index(), "process_count": jax.process_count()}
  if cached:
    maps, cached_labels = _take_cache(maps_fn, frozen, train, labels, shapes, mesh)
    _check_batch(batch_size, len(cached_labels), mesh)
    open_stream = functools.partial(cached_batches, maps, cached_labels, batch_size=batch_size, seed=seed, **here)
    step_maps_fn = _cached_maps(layers)
    num_pictures = len(cached_labels)
  else:
    open_stream = functools.partial(
      batches.labelled_batches, train.source, indices=indices, batch_size=batch_size, image_size=train.image_size,
      image_scale=recipe.image_scale, seed=seed, num_threads=train.num_threads, **here)
    step_maps_fn = _image_maps(maps_fn)
    num_pictures = len(indices)

  steps_per_epoch = batches.steps_per_epoch(num_pictures, batch_size)
  state = _train(open_stream, step_maps_fn, frozen, shapes, recipe, mesh=mesh, num_classes=num_classes,
                 steps_per_epoch=steps_per_epoch, folder=Path(snapshot_folder) / "classifiers")
  losses, num_read = _epoch_means(state)
  variables = {"frozen": frozen, "params": state["params"], "stats": state["stats"]}
  ranks, num_broken_test = _judge(_logits_fn(model.network, layers), variables, test, mesh)

  found = {
    layer: {"top1": float(np.mean(ranks[layer] < 1)), "top5": float(np.mean(ranks[layer] < 5)),
            "dim": math.prod(shapes[layer]), "loss": losses[layer]}
    for layer in layers}
  best = max(layers, key=lambda layer: (found[layer]["top1"], layers.index(layer)))
  settings = dataclasses.asdict(recipe) | {"learning_rate": recipe.first_rate, "image_scale": list(image_scale),
                                           "milestones": list(milestones) if schedule == "steps" else []}
  num_broken = len(indices) - num_pictures if cached else steps_per_epoch * batch_size - num_read
  return Outcome(
    figures={
      "layers": found,
      "best_layer": best,
      "top1": found[best]["top1"],
      "top5": found[best]["top5"],
      "num_classes": num_classes,
      "num_train": len(indices),
      "num_test": len(ranks[best]),
      "num_broken_train": num_broken,
      "num_broken_test": num_broken_test,
      "steps": num_epochs * steps_per_epoch,
      "settings": settings,
    },
    table={**{layer: found[layer]["top1"] for layer in layers},
           "best layer, top-1": found[best]["top1"], "best layer, top-5": found[best]["top5"]},
    curve=Curve("layer", "top-1", list(layers), [found[layer]["top1"] for layer in layers]))


def create_schedule(recipe: Recipe, steps_per_epoch: int) -> optax.Schedule:
  """Returns step -> learning rate, f32[], for steps from 0 on."""
  if recipe.schedule == "cosine":
    return optax.cosine_decay_schedule(recipe.first_rate, recipe.num_epochs * steps_per_epoch)
  return classification.falling_rate(recipe.first_rate, milestones=recipe.milestones, decay_factor=recipe.decay_factor,
                                     steps_per_epoch=steps_per_epoch)


def create_optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
  """Returns SGD with momentum as PyTorch has it; the decay spares batch norm alone."""
  def decayed(params):
    return {layer: {name: name in ("kernel", "bias") for name in head} for layer, head in params.items()}

  return optax.chain(
    optax.add_decayed_weights(recipe.weight_decay, mask=decayed),
    optax.sgd(create_schedule(recipe, steps_per_epoch), momentum=recipe.momentum, nesterov=recipe.nesterov))


def create_state(seed: int, shapes: Mapping[str, tuple[int, ...]], optimizer: optax.GradientTransformation, *,
                 head: str, num_classes: int) -> dict[str, Any]:
  """Returns the classifiers before the first step.

  {"params": {layer: {"kernel": f32[D, L], "bias": f32[L]}}, with "bn_affine" also "scale" and "shift" f32[C];
  "stats": {layer: {"mean": f32[C], "var": f32[C]}}, {} with "plain"; "opt_state"; "step": i32[]; "epoch": what the
  epoch of the last step has added up to, "loss" {layer: f32[]} over "num_read" i32[] pictures}.

  Args:
    seed: of the kernels.
    shapes: (h, w, C) or (C,) of the layers' maps.
    optimizer: of the parameters.
    head: of `HEADS`.
    num_classes: L.
  """
  params, stats = {}, {}
  for layer, shape in shapes.items():
    # By its name: a layer's classifier starts alike whichever others there are.
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(layer.encode()))
    params[layer] = {"kernel": KERNEL_STD * jax.random.normal(key, (math.prod(shape), num_classes)),
                     "bias": jnp.zeros(num_classes)}
    if head == "bn_affine":
      params[layer] |= {"scale": jnp.ones(shape[-1]), "shift": jnp.zeros(shape[-1])}
    stats[layer] = {} if head == "plain" else {"mean": jnp.zeros(shape[-1]), "var": jnp.ones(shape[-1])}
  return {"params": params, "stats": stats, "opt_state": optimizer.init(params), "step": jnp.int32(0),
          "epoch": {"loss": {layer: jnp.float32(0) for layer in shapes}, "num_read": jnp.int32(0)}}


def make_train_step(maps_fn: Callable, optimizer: optax.GradientTransformation, mesh: Mesh, *,
                    steps_per_epoch: int) -> Callable:
  """Returns train_step(state, frozen, batch) -> (state, losses): one program, mapped over the devices of `mesh`.

  `state` is that of `create_state`, whole on every device, and donated; `frozen` is never changed. `batch` holds label
  i32[B] and valid bool[B], split over the devices, and what `maps_fn` reads. `losses` {layer: f32[]} are the mean
  cross-entropies, before the step, over the pictures of the whole batch that could be read (0 where there is none).

  Args:
    maps_fn: maps_fn(frozen, batch) -> {layer: f32[b, h, w, C] or f32[b, C]}, each picture alone.
    optimizer: of all classifiers.
    mesh: the devices.
    steps_per_epoch: after so many steps the sums of `state["epoch"]` begin anew.
  """
  total = functools.partial(jax.lax.psum, axis_name=AXIS)

  def device_step(state, frozen, batch):
    weight = batch["valid"].astype(jnp.float32)  # [b]
    num_read = total(jnp.sum(weight))
    # 1. No gradient passes the batch norm's statistics: what they are taken of is a constant.
    inputs, stats = {}, {}
    for layer, x in maps_fn(frozen, batch).items():
      inputs[layer], stats[layer] = x, {}
      if state["stats"][layer]:
        mean, var, stats[layer] = _batch_statistics(x, weight, num_read, state["stats"][layer], total)
        inputs[layer] = _standardise(x, mean, var)

    # 2. The sum of the losses: each moves the parameters of its own classifier alone.
    def objective(params):
      losses = {}
      for layer, x in inputs.items():
        # A picture that cannot be read may have the label -1: it has no weight, and must only not disturb.
        loss = optax.softmax_cross_entropy_with_integer_labels(_linear(params[layer], x),
                                                               jnp.maximum(batch["label"], 0))
        losses[layer] = total(jnp.sum(loss * weight)) / jnp.maximum(num_read, 1)
      return sum(losses.values()), losses

    grads, losses = jax.grad(objective, has_aux=True)(state["params"])
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])

    # 3. The sums of the epoch stay on the device, so that no step waits for the host.
    goes_on = state["step"] % steps_per_epoch != 0
    added = {"loss": jax.tree.map(lambda loss: loss * num_read, losses), "num_read": num_read.astype(jnp.int32)}
    epoch = jax.tree.map(lambda old, new: jnp.where(goes_on, old, 0) + new, state["epoch"], added)
    return {"params": optax.apply_updates(state["params"], updates), "stats": stats, "opt_state": opt_state,
            "step": state["step"] + 1, "epoch": epoch}, losses

  mapped = jax.shard_map(device_step, mesh=mesh, in_specs=(WHOLE, WHOLE, SPLIT), out_specs=(WHOLE, WHOLE))
  return jax.jit(mapped, donate_argnums=0)


def cached_batches(maps: Mapping[str, np.ndarray], labels: np.ndarray, *, batch_size: int, seed: int, start_step: int,
                   process_index: int = 0, process_count: int = 1) -> Iterator[dict[str, np.ndarray]]:
  """Returns the endless stream of batches of features in memory, from batch `start_step` on.

  A batch is a function of (seed, step); in an epoch no picture comes twice, and those left over are others in each.

  Args:
    maps: {layer: f32[N, h, w, C] or f32[N, C]}.
    labels: i32[N].
    batch_size: B, over all processes, at most N.
    seed: any integer.
    start_step: batches already seen.
    process_index, process_count: this process gets that block of each, of process_count blocks.

  Returns:
    Iterator of {layer: f32[b, ...], "index": i32[b] (row of the maps), "label": i32[b], "valid": bool[b], all True}.
  """
  steps_per_epoch = len(labels) // batch_size
  local_size = batch_size // process_count
  epoch, first = divmod(start_step, steps_per_epoch)
  while True:
    order = np.random.default_rng((seed % 2**64, epoch)).permutation(len(labels)).astype(np.int32)
    for step in range(first, steps_per_epoch):
      rows = order[step * batch_size + process_index * local_size:][:local_size]
      yield {**{layer: x[rows] for layer, x in maps.items()}, "index": rows, "label": labels[rows],
             "valid": np.ones(len(rows), bool)}
    epoch, first = epoch + 1, 0


def _standardise(x, mean, var):
  mean, var = (value.reshape(*[1] * (x.ndim - 1), -1) for value in (mean, var))
  return (x - mean) * jax.lax.rsqrt(var + EPS)


def _batch_statistics(x, weight, num_read, running, total):
  """Returns mean and variance f32[C] of x f32[b, ..., C] over the readable pictures of all devices, and {"mean", "var"}
  with a tenth of them, of the variance PyTorch's unbiased one; as they were where no picture could be read."""
  axes = tuple(range(x.ndim - 1))
  weight = weight.reshape(-1, *[1] * (x.ndim - 1))
  count = jnp.maximum(num_read * math.prod(x.shape[1:-1]), 1)
  mean = total(jnp.sum(x * weight, axes)) / count
  var = total(jnp.sum((x - mean.reshape(*[1] * len(axes), -1)) ** 2 * weight, axes)) / count
  new = {"mean": mean, "var": var * count / jnp.maximum(count - 1, 1)}
  share = jnp.where(num_read > 0, MOMENTUM, 0.0)
  return mean, var, {name: (1 - share) * running[name] + share * new[name] for name in ("mean", "var")}


def _linear(params, x):
  """Returns logits f32[B, L] of standardised maps."""
  if "scale" in params:
    scale, shift = (params[name].reshape(*[1] * (x.ndim - 1), -1) for name in ("scale", "shift"))
    x = x * scale + shift
  # Full precision, as PyTorch has it: GPUs would round to TF32. It is little beside the trunk.
  logits = jnp.matmul(x.reshape(x.shape[0], -1), params["kernel"], precision=jax.lax.Precision.HIGHEST)
  return logits + params["bias"][None]


def _image_maps(maps_fn):
  return lambda frozen, batch: maps_fn(frozen, normalise(batch["image"]))


def _cached_maps(layers):
  return lambda frozen, batch: {layer: batch[layer] for layer in layers}


# Kept, so that the test pictures of several runs of one network go through one program.
@functools.cache
def _logits_fn(network: Network | Ensemble, layers: tuple[str, ...]) -> Callable[
    [Any, jax.Array], dict[str, jax.Array]]:
  """Returns forward_fn(variables, image) -> {layer: f32[B, L]} with running statistics, see `stream_features`."""
  maps_fn = layer_features(network, layers, flat=False)

  def forward(variables, image):
    logits = {}
    for layer, x in maps_fn(variables["frozen"], image).items():
      if stats := variables["stats"][layer]:
        x = _standardise(x, stats["mean"], stats["var"])
      logits[layer] = _linear(variables["params"][layer], x)
    return logits

  return forward


def _take_cache(maps_fn, frozen, train, labels, shapes, mesh):
  """Returns ({layer: f32[N, ...]}, i32[N]): maps and labels of the labelled training pictures that can be read."""
  num_labelled = int(np.count_nonzero(labels >= 0))
  num_bytes = num_labelled * 4 * sum(map(math.prod, shapes.values()))
  if num_bytes > CACHE_BYTES:
    raise UserError(
      f"the features of {num_labelled:,} training pictures on {', '.join(shapes)} take {num_bytes / 2**30:.1f} GiB, "
      f"and linear.cached allows {CACHE_BYTES / 2**30:g}; use --config.linear.cached=False, or fewer of linear.layers")
  # Filled in place: put together from the batches it would be in memory twice.
  maps = {layer: np.empty((num_labelled, *shape), np.float32) for layer, shape in shapes.items()}
  kept = np.empty(num_labelled, np.int32)
  filled = 0
  with Progress("linear: features of training pictures", len(train)) as progress:
    for part in stream_features(maps_fn, frozen, train.test_batches(), mesh):
      labelled = part.labels >= 0
      rows = slice(filled, filled + np.count_nonzero(labelled))
      kept[rows] = part.labels[labelled]
      for layer, x in part.features.items():
        maps[layer][rows] = x[labelled]
      filled = rows.stop
      progress.update(len(part.index) + part.num_broken)
  if not filled:
    raise _unreadable(num_labelled)
  return {layer: x[:filled] for layer, x in maps.items()}, kept[:filled]


def _train(open_stream, maps_fn, frozen, shapes, recipe, *, mesh, num_classes, steps_per_epoch, folder):
  """Returns the state after the last step; interrupted before, it goes on from the last snapshot in `folder`."""
  num_steps = recipe.num_epochs * steps_per_epoch
  optimizer = create_optimizer(recipe, steps_per_epoch)
  train_step = make_train_step(maps_fn, optimizer, mesh, steps_per_epoch=steps_per_epoch)
  state = jax.jit(lambda: create_state(recipe.seed, shapes, optimizer, head=recipe.head, num_classes=num_classes),
                  out_shardings=whole(mesh))()
  with Snapshots(folder) as snapshots:
    start_step, state = snapshots.restore(state, mesh)
    if start_step:
      print(f"goes on from step {start_step} of {num_steps}")
    in_flight, saved = deque(), time.perf_counter()
    with closing(open_stream(start_step=start_step)) as stream, Progress(
        f"linear: classifiers on {', '.join(shapes)}", (num_steps - start_step) * recipe.batch_size) as progress:
      for step in range(start_step + 1, num_steps + 1):
        state, losses = train_step(state, frozen, batches.place(next(stream), mesh))
        in_flight.append(losses)
        if len(in_flight) > STEPS_IN_FLIGHT:
          jax.block_until_ready(in_flight.popleft())
        progress.update(recipe.batch_size)
        if step % steps_per_epoch and step % CHECK_STEPS:
          continue
        epoch = -(-step // steps_per_epoch)
        means = _check_losses(state, recipe, epoch, at_end=step % steps_per_epoch == 0)
        note = " ".join(f"{layer} {means[layer]:.3f}" for layer in shapes)
        progress.update(0, note=f"epoch {epoch} of {recipe.num_epochs}, loss {note}")
        # Processes must agree whether to save, and their clocks need not.
        due = time.perf_counter() - saved >= SNAPSHOT_SECONDS
        if multihost_utils.broadcast_one_to_all(np.bool_(due)):
          snapshots.save(step, state)
          saved = time.perf_counter()
  return state


def _epoch_means(state):
  """Returns ({layer: mean loss of the epoch so far}, pictures read in it)."""
  sums = jax.device_get(state["epoch"])
  num_read = int(sums["num_read"])
  return {layer: float(loss) / max(num_read, 1) for layer, loss in sums["loss"].items()}, num_read


def _check_losses(state, recipe, epoch, *, at_end):
  """Returns {layer: mean loss}; raises UserError for one that is not finite, or an epoch without any picture."""
  losses, num_read = _epoch_means(state)
  if at_end and not num_read:
    raise _unreadable(recipe.batch_size)
  for layer, loss in losses.items():
    if not math.isfinite(loss):
      raise UserError(f"linear: the loss on {layer} is {loss} in epoch {epoch} at a learning rate of "
                      f"{recipe.learning_rate} for {BASE_BATCH} pictures; choose a lower linear.learning_rate, or a "
                      'linear.head with batch norm ("bn")')
  return losses


def _unreadable(num_pictures):
  return UserError(f"linear: none of {num_pictures} labelled training pictures can be read; check the files")


def _judge(forward_fn, variables, test, mesh):
  """Returns {layer: i[N]}, how many classes come before the true one, of the labelled test pictures that can be read,
  and the number of those that cannot."""
  ranks, num_broken = {layer: [] for layer in variables["params"]}, 0
  with Progress("linear: test pictures", len(test)) as progress:
    for part in stream_features(forward_fn, variables, test.test_batches(), mesh):
      labelled = part.labels >= 0
      num_broken += part.num_broken
      for layer, logits in part.features.items():
        ranks[layer].append(classification.ranks(logits[labelled], part.labels[labelled]))
      progress.update(len(part.index) + part.num_broken)
  ranks = {layer: np.concatenate(parts) for layer, parts in ranks.items()}
  if not all(map(len, ranks.values())):
    raise UserError(f"none of the {len(test)} test pictures has a label and can be read: {num_broken} are broken")
  return ranks, num_broken


def _check_recipe(recipe):
  def require(condition, field, range_text):
    if not condition:
      raise UserError(f"linear.{field}={getattr(recipe, field)!r} is not possible: {range_text}")

  for field in ("num_epochs", "batch_size"):
    require(getattr(recipe, field) >= 1, field, "a whole number from 1 is needed")
  require(0 < recipe.learning_rate < math.inf, "learning_rate", "a finite number above 0 is needed")
  require(recipe.schedule in SCHEDULES, "schedule", f"choose from {', '.join(SCHEDULES)}")
  if recipe.schedule == "steps":
    # Past the end the rate would never fall, without a word.
    require(all(0 < milestone < recipe.num_epochs for milestone in recipe.milestones), "milestones",
            f"they lie within the {recipe.num_epochs} epochs (in the config as shares, between 0 and 1)")
  require(0 < recipe.decay_factor <= 1, "decay_factor", "it lies in (0, 1]")
  require(0 <= recipe.momentum < 1, "momentum", "it lies in [0, 1)")
  require(0 <= recipe.weight_decay < math.inf, "weight_decay", "a finite number from 0 is needed")
  require(recipe.head in HEADS, "head", f"choose from {', '.join(HEADS)}")
  scale = recipe.image_scale
  require(len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1, "image_scale", "it is (smallest, largest), within (0, 1]")


def _check_batch(batch_size, num_pictures, mesh):
  if batch_size % mesh.size:
    raise UserError(f"linear.batch_size={batch_size} does not divide among {mesh.size} devices; "
                    f"try --config.linear.batch_size={max(1, batch_size // mesh.size) * mesh.size}")
  if batch_size > num_pictures:
    fits = num_pictures // mesh.size * mesh.size
    way_out = f"try --config.linear.batch_size={fits}" if fits else f"{mesh.size} devices need {mesh.size} of them"
    raise UserError(f"linear.batch_size={batch_size}, but there are only {num_pictures} training pictures with a label "
                    f"that can be read: a batch never holds a picture twice; {way_out}")
