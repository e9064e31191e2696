"""Linear classifiers on the frozen trunk, one for each layer (PIRL, appendix C; its table 7 and figure 5).

The map of a layer, pooled to about 9,000 numbers (`layers.pool`), passes a batch norm over its channels and one linear
layer with bias. The trunk stays as it is, its own batch norm always with running statistics, so one forward pass of it
serves the classifiers of all layers: each has its own cross-entropy, and none sees the others.

Two kinds of batch norm are known: that of the paper's own code has no scale and shift (Goyal et al., ICCV 2019,
`BN_NO_SCALE_SHIFT`), vissl's has (vissl/models/heads/linear_eval_mlp.py). Both measure the whole batch, over all
devices, and judge with running statistics. The linear layer starts from N(0, 0.01^2) and a bias of 0, as in the paper's
own code and in MoCo. Weight decay applies to kernels and biases of the linear layers, not to the batch norm's scale and
shift, as in vissl; the paper does not say.

Letters: B batch of all devices, b this device's part, N images, H side in pixels, h w C a pooled map (a vector has C
alone), D its numbers, L classes.
"""

import dataclasses
import functools
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from pirl_jax.data import batches
from pirl_jax.errors import UserError
from pirl_jax.evaluation import classification, training
from pirl_jax.evaluation.features import stream_features
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.layers import EMBEDDING, layer_features, layer_names, named_layers
from pirl_jax.evaluation.outcome import Outcome
from pirl_jax.evaluation.protocol import Evaluation, Protocol, Reading
from pirl_jax.figures.curves import Curve
from pirl_jax.models.network import Ensemble, Model, Network
from pirl_jax.runtime.mesh import AXIS, whole
from pirl_jax.runtime.progress import Progress
from pirl_jax.views.normalisation import normalise_image

HEADS = ("bn", "bn_affine", "plain")
SCHEDULES = ("steps", "cosine")

KERNEL_STD = 0.01
"""Of the linear layer's first values."""

EPS = 1e-5
MOMENTUM = 0.1
"""Of the batch norm: what is added to the variance, and the share of the new value in the running statistics."""

CACHE_BYTES = 8 * 2**30
"""The most that the features of all training images may take in memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSettings(training.TrainingSettings):
  """How the classifiers are trained, see `TrainingSettings`, and on what.

  Attributes:
    layers: names with commas between them, see `layers.layer_names`, or "embedding"; "": the whole trunk.
    schedule: "steps" by `milestones`, or "cosine": half a cosine to zero, at each step.
    head: before the linear layer "bn" (batch norm without scale and shift), "bn_affine" (with), or "plain" (nothing).
    cached: features of all training images are taken once, of their centre crop, and kept in memory: for small data,
      without augmentation.
  """

  group: ClassVar[str] = "linear"
  advice: ClassVar[str] = ', or a linear.head with batch norm ("bn")'
  layers: str
  schedule: str
  head: str
  cached: bool

  def __post_init__(self) -> None:
    self.require(self.schedule in SCHEDULES, "schedule", f"choose from {', '.join(SCHEDULES)}")
    self.require(self.head in HEADS, "head", f"choose from {', '.join(HEADS)}")
    super().__post_init__()

  @property
  def falls_at(self) -> tuple[float, ...]:
    """Returns the milestones; of a cosine none."""
    return self.milestones if self.schedule == "steps" else ()

  def as_used(self, seed: int) -> dict[str, Any]:
    """Returns the settings and the seed for a result file, with the learning rate for the batch as it is."""
    used = super().as_used(seed) | {"learning_rate": self.first_rate}
    del used["layers"]  # which stand in the figures themselves
    return used


def measure_linear(model: Model, train: Images, test: Images, settings: LinearSettings, *, mesh: Mesh, seed: int,
                   snapshot_folder: str | os.PathLike) -> Outcome:
  """Returns top-1 and top-5 on the test images of a linear classifier on each layer.

  Judged are the classifiers after the last epoch. Nothing is chosen on the test images but the layer that is called
  the best one, as the paper does for its table 2. Training images without a label take no part. Interrupted, the same
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
    train: labelled images, at least as many as a batch takes.
    test: labelled images of the same classes, judged by their centre crop.
    settings: of the layers and the training; weight decay is on kernels and biases of the linear layers.
    mesh: the devices; their number divides the batch, and changes nothing but rounding.
    seed: of first values, order and crops.
    snapshot_folder: holds what is not finished; belongs to exactly these arguments, and the caller deletes it.

  Raises:
    UserError: an unknown layer, labels missing or of other classes, a batch that the devices cannot share or that is
      larger than the training set, a cache that would be too large (all before anything compiles), no image that can
      be read, or a loss that is not finite.
  """
  layers = linear_layers(model, settings, image_size=train.image_size)
  labels = classification.read_labels(train, test, protocol="linear")
  num_labelled = int(np.count_nonzero(labels >= 0))
  _check_batch(settings, num_labelled, mesh)

  num_classes = len(train.source.class_names)
  shapes = _map_shapes(model, layers, train.image_size)
  frozen = jax.device_put(model.variables, whole(mesh))
  open_stream, step_maps_fn, num_images = _open_training(model, frozen, train, labels, settings, shapes=shapes,
                                                         mesh=mesh, seed=seed)
  _check_batch(settings, num_images, mesh)
  steps_per_epoch = batches.steps_per_epoch(num_images, settings.batch_size)
  optimizer = linear_optimizer(settings, steps_per_epoch)
  state = jax.jit(lambda: create_classifiers(seed, shapes, optimizer, head=settings.head, num_classes=num_classes),
                  out_shardings=whole(mesh))()
  train_step = training.make_classifier_step(linear_step(step_maps_fn, optimizer), mesh,
                                             steps_per_epoch=steps_per_epoch)
  state = training.train_classifier(
    lambda state, batch: train_step(state, frozen, batch), state, open_stream, settings=settings,
    steps_per_epoch=steps_per_epoch, mesh=mesh, folder=Path(snapshot_folder) / "classifiers",
    words=training.Words(f"linear: classifiers on {', '.join(layers)}", layers, _unreadable(num_images)))
  losses, num_read = training.epoch_means(state)
  num_broken = num_labelled - num_images if settings.cached else steps_per_epoch * settings.batch_size - num_read
  variables = {"frozen": frozen, "params": state["params"], "stats": state["stats"]}
  ranks, num_broken_test = _judge(_logits_fn(model.network, layers), variables, test, mesh)

  found = {
    layer: {"top1": float(np.mean(ranks[layer] < 1)), "top5": float(np.mean(ranks[layer] < 5)),
            "dim": math.prod(shapes[layer]), "loss": losses[layer]}
    for layer in layers}
  best = max(layers, key=lambda layer: (found[layer]["top1"], layers.index(layer)))
  return Outcome(
    figures={
      "layers": found, "best_layer": best, "top1": found[best]["top1"], "top5": found[best]["top5"],
      "num_classes": num_classes, "num_train": num_labelled, "num_test": len(ranks[best]),
      "num_broken_train": num_broken, "num_broken_test": num_broken_test,
      "steps": settings.num_epochs * steps_per_epoch, "settings": settings.as_used(seed),
    },
    table={**{layer: found[layer]["top1"] for layer in layers},
           "best layer, top-1": found[best]["top1"], "best layer, top-5": found[best]["top5"]},
    curve=Curve("layer", "top-1", list(layers), [found[layer]["top1"] for layer in layers]))


def linear_layers(model: Model, settings: LinearSettings, *, image_size: int) -> tuple[str, ...]:
  """Returns the layers that classifiers stand on, from the input to the output.

  Raises:
    UserError: an unknown one, or an ensemble cannot put its maps side by side.
  """
  trunk = layer_names(model.network)
  layers = named_layers(model, settings.layers, otherwise=trunk, image_size=image_size, field="linear.layers")
  return tuple(layer for layer in (*trunk, EMBEDDING) if layer in layers)


def linear_optimizer(settings: LinearSettings, steps_per_epoch: int) -> optax.GradientTransformation:
  """Returns SGD with momentum as PyTorch has it; the decay spares batch norm alone."""
  def decayed(params: Mapping[str, Any]) -> dict[str, dict[str, bool]]:
    return {layer: {name: name in ("kernel", "bias") for name in head} for layer, head in params.items()}

  return optax.chain(
    optax.add_decayed_weights(settings.weight_decay, mask=decayed),
    optax.sgd(linear_rate(settings, steps_per_epoch), momentum=settings.momentum, nesterov=settings.nesterov))


def linear_rate(settings: LinearSettings, steps_per_epoch: int) -> optax.Schedule:
  """Returns step -> learning rate, f32[], for steps from 0 on."""
  if settings.schedule == "cosine":
    return optax.cosine_decay_schedule(settings.first_rate, settings.num_epochs * steps_per_epoch)
  return training.falling_rate(settings, steps_per_epoch)


def create_classifiers(seed: int, shapes: Mapping[str, tuple[int, ...]], optimizer: optax.GradientTransformation, *,
                 head: str, num_classes: int) -> dict[str, Any]:
  """Returns the classifiers before the first step.

  {"params": {layer: {"kernel": f32[D, L], "bias": f32[L]}}, with "bn_affine" also "scale" and "shift" f32[C];
  "stats": {layer: {"mean": f32[C], "var": f32[C]}}, {} with "plain"; "opt_state"; and what
  `training.begin_training` adds}.

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
  return training.begin_training({"params": params, "stats": stats, "opt_state": optimizer.init(params)}, shapes)


def linear_step(maps_fn: Callable, optimizer: optax.GradientTransformation) -> Callable:
  """Returns device_step(state, frozen, batch) -> (state, losses, num_read), for `training.make_classifier_step`.

  `state` is that of `create_classifiers`, of all classifiers. `batch` holds label i32[b] and valid bool[b], and what
  `maps_fn` reads. `losses` {layer: f32[]} are the mean cross-entropies.

  Args:
    maps_fn: maps_fn(frozen, batch) -> {layer: f32[b, h, w, C] or f32[b, C]}, each image alone.
    optimizer: of all classifiers.
  """
  total = functools.partial(jax.lax.psum, axis_name=AXIS)

  def device_step(state: dict[str, Any], frozen: Any,
                  batch: Mapping[str, jax.Array]) -> tuple[dict[str, Any], dict[str, jax.Array], jax.Array]:
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
    def objective(params: Mapping[str, Any]) -> tuple[jax.typing.ArrayLike, dict[str, jax.Array]]:
      losses = {}
      for layer, x in inputs.items():
        # An image that cannot be read may have the label -1: it has no weight, and must only not disturb.
        loss = optax.softmax_cross_entropy_with_integer_labels(_linear(params[layer], x),
                                                               jnp.maximum(batch["label"], 0))
        losses[layer] = total(jnp.sum(loss * weight)) / jnp.maximum(num_read, 1)
      return sum(losses.values()), losses

    grads, losses = jax.grad(objective, has_aux=True)(state["params"])
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "stats": stats, "opt_state": opt_state}, losses, num_read

  return device_step


def cached_batches(maps: Mapping[str, np.ndarray], labels: np.ndarray, *, batch_size: int, seed: int, start_step: int,
                   process_index: int = 0, process_count: int = 1) -> batches.Batches:
  """Returns the endless stream of batches of features in memory, from batch `start_step` on.

  A batch is a function of (seed, step); in an epoch no image comes twice, and those left over are others in each.

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


def _standardise(x: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
  mean, var = (value.reshape(*[1] * (x.ndim - 1), -1) for value in (mean, var))
  return (x - mean) * jax.lax.rsqrt(var + EPS)


def _batch_statistics(x: jax.Array, weight: jax.Array, num_read: jax.Array, running: Mapping[str, jax.Array],
                      total: Callable) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
  """Returns mean and variance f32[C] of x f32[b, ..., C] over the readable images of all devices, and {"mean", "var"}
  with a tenth of them, of the variance PyTorch's unbiased one; as they were where no image could be read."""
  axes = tuple(range(x.ndim - 1))
  weight = weight.reshape(-1, *[1] * (x.ndim - 1))
  count = jnp.maximum(num_read * math.prod(x.shape[1:-1]), 1)
  mean = total(jnp.sum(x * weight, axes)) / count
  var = total(jnp.sum((x - mean.reshape(*[1] * len(axes), -1)) ** 2 * weight, axes)) / count
  new = {"mean": mean, "var": var * count / jnp.maximum(count - 1, 1)}
  share = jnp.where(num_read > 0, MOMENTUM, 0.0)
  return mean, var, {name: (1 - share) * running[name] + share * new[name] for name in ("mean", "var")}


def _linear(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
  """Returns logits f32[B, L] of standardised maps."""
  if "scale" in params:
    scale, shift = (params[name].reshape(*[1] * (x.ndim - 1), -1) for name in ("scale", "shift"))
    x = x * scale + shift
  # Full precision, as PyTorch has it: GPUs would round to TF32. It is little beside the trunk.
  logits = jnp.matmul(x.reshape(x.shape[0], -1), params["kernel"], precision=jax.lax.Precision.HIGHEST)
  return logits + params["bias"][None]


def _image_maps(maps_fn: Callable) -> Callable:
  return lambda frozen, batch: maps_fn(frozen, normalise_image(batch["image"]))


def _cached_maps(layers: Iterable[str]) -> Callable:
  return lambda frozen, batch: {layer: batch[layer] for layer in layers}


# Kept, so that the test images of several runs of one network go through one program.
@functools.cache
def _logits_fn(network: Network | Ensemble, layers: tuple[str, ...]) -> Callable[
    [Any, jax.Array], dict[str, jax.Array]]:
  """Returns forward_fn(variables, image) -> {layer: f32[B, L]} with running statistics, see `stream_features`."""
  maps_fn = layer_features(network, layers, flat=False)

  def forward(variables: Mapping[str, Any], image: jax.Array) -> dict[str, jax.Array]:
    logits = {}
    for layer, x in maps_fn(variables["frozen"], image).items():
      if stats := variables["stats"][layer]:
        x = _standardise(x, stats["mean"], stats["var"])
      logits[layer] = _linear(variables["params"][layer], x)
    return logits

  return forward


def _map_shapes(model: Model, layers: Sequence[str], image_size: int) -> dict[str, tuple[int, ...]]:
  """Returns {layer: (h, w, C) or (C,)}, in the order of `layers`."""
  image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  maps = jax.eval_shape(layer_features(model.network, layers, flat=False), model.variables, image)
  return {layer: maps[layer].shape[1:] for layer in layers}  # JAX put the names into the order of letters


def _open_training(model: Model, frozen: Any, train: Images, labels: np.ndarray, settings: LinearSettings, *,
                   shapes: Mapping[str, tuple[int, ...]], mesh: Mesh,
                   seed: int) -> tuple[Callable[..., batches.Batches], Callable, int]:
  """Returns (open_stream(start_step=), maps_fn(frozen, batch), number of images): those with a label, from the files
  or, if cached, in memory without those that cannot be read."""
  maps_fn = layer_features(model.network, tuple(shapes), flat=False)
  here = {"process_index": jax.process_index(), "process_count": jax.process_count()}
  if settings.cached:
    maps, kept = _take_cache(maps_fn, frozen, train, labels, shapes, mesh)
    return (functools.partial(cached_batches, maps, kept, batch_size=settings.batch_size, seed=seed, **here),
            _cached_maps(shapes), len(kept))
  indices = np.flatnonzero(labels >= 0)
  return (functools.partial(
    batches.labelled_batches, train.source, indices=indices, batch_size=settings.batch_size,
    crop=(train.image_size, settings.image_scale), seed=seed, num_threads=train.num_threads, **here),
    _image_maps(maps_fn), len(indices))


def _take_cache(maps_fn: Callable, frozen: Any, train: Images, labels: np.ndarray,
                shapes: Mapping[str, tuple[int, ...]], mesh: Mesh) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Returns ({layer: f32[N, ...]}, i32[N]): maps and labels of the labelled training images that can be read."""
  num_labelled = int(np.count_nonzero(labels >= 0))
  num_bytes = num_labelled * 4 * sum(map(math.prod, shapes.values()))
  if num_bytes > CACHE_BYTES:
    raise UserError(
      f"the features of {num_labelled:,} training images on {', '.join(shapes)} take {num_bytes / 2**30:.1f} GiB, "
      f"and linear.cached allows {CACHE_BYTES / 2**30:g}; use --config.linear.cached=False, or fewer of linear.layers")
  # Filled in place: put together from the batches it would be in memory twice.
  maps = {layer: np.empty((num_labelled, *shape), np.float32) for layer, shape in shapes.items()}
  kept = np.empty(num_labelled, np.int32)
  filled = 0
  with Progress("linear: features of training images", len(train)) as progress:
    for part in stream_features(maps_fn, frozen, train.test_batches(), mesh):
      labelled = part.labels >= 0
      rows = slice(filled, filled + np.count_nonzero(labelled))
      kept[rows] = part.labels[labelled]
      for layer, x in part.features.items():
        maps[layer][rows] = x[labelled]
      filled = rows.stop
      progress.update(len(part.index) + part.num_broken)
  if not filled:
    raise UserError(f"linear: {_unreadable(num_labelled)}")
  return {layer: x[:filled] for layer, x in maps.items()}, kept[:filled]


def _unreadable(num_images: int) -> str:
  return f"none of {num_images} labelled training images can be read; check the files"


def _judge(forward_fn: Callable, variables: Mapping[str, Any], test: Images,
           mesh: Mesh) -> tuple[dict[str, np.ndarray], int]:
  """Returns {layer: i[N]}, how many classes come before the true one, of the labelled test images that can be read,
  and the number of those that cannot."""
  ranks, num_broken = {layer: [] for layer in variables["params"]}, 0
  with Progress("linear: test images", len(test)) as progress:
    for part in stream_features(forward_fn, variables, test.test_batches(), mesh):
      labelled = part.labels >= 0
      num_broken += part.num_broken
      for layer, logits in part.features.items():
        ranks[layer].append(classification.true_ranks(logits[labelled], part.labels[labelled]))
      progress.update(len(part.index) + part.num_broken)
  ranks = {layer: np.concatenate(parts) for layer, parts in ranks.items()}
  if not all(map(len, ranks.values())):
    raise UserError(f"none of the {len(test)} test images has a label and can be read: {num_broken} are broken")
  return ranks, num_broken


def _check_batch(settings: LinearSettings, num_images: int, mesh: Mesh) -> None:
  training.check_divides(settings, mesh)
  size = settings.batch_size
  if size > num_images:
    fits = num_images // mesh.size * mesh.size
    way_out = f"try --config.linear.batch_size={fits}" if fits else f"{mesh.size} devices need {mesh.size} of them"
    raise UserError(f"linear.batch_size={size}, but there are only {num_images} training images with a label "
                    f"that can be read: a batch never holds an image twice; {way_out}")


def _measure(evaluation: Evaluation) -> Outcome:
  return measure_linear(evaluation.subject.model, evaluation.train, evaluation.labelled_test(), evaluation.settings,
                        mesh=evaluation.mesh, seed=evaluation.config.seed, snapshot_folder=evaluation.snapshots)


def _check(evaluation: Evaluation) -> None:
  linear_layers(evaluation.subject.model, evaluation.settings, image_size=evaluation.train.image_size)


PROTOCOL = Protocol(
  LinearSettings, _measure, _check,
  reading=Reading(lambda found: {"linear top-1 of the best layer": found["top1"]}, ("linear top-1", "top1")))
