"""Linear classifiers on the frozen trunk, one for each layer (PIRL, appendix C; its table 7 and figure 5).

The map of a layer is pooled to about 9,000 numbers (`layers.pool`). It then passes a batch norm over its channels and
one linear layer with bias. The trunk is frozen, and its own batch norm always uses running statistics. Therefore one
forward pass of the trunk serves the classifiers of all layers. Each classifier has its own cross-entropy and does not
depend on the others.

There are two kinds of batch norm. The batch norm of the paper's own code has no scale and shift (Goyal et al., ICCV
2019, `BN_NO_SCALE_SHIFT`); vissl's has both (vissl/models/heads/linear_eval_mlp.py). In training both use the
statistics of the whole batch over all devices; on test images both use running statistics. The linear layer is
initialised from N(0, 0.01^2) with a bias of 0, as in the paper's own code and in MoCo, or as PyTorch does by default,
as in vissl. Weight decay applies to kernels and biases of the linear layers, not to the batch norm's scale and shift,
as in vissl; the paper does not say.

Letters: B batch of all devices, b this device's part of the batch, N images, H side in pixels, h w C height, width and
channels of a pooled map (a vector has C alone), D numbers of a pooled map, L classes.
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
from pirl_jax.evaluation.further import judge_sets, open_sets, ranks_by_layer
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.kept import keeping
from pirl_jax.evaluation.layers import EMBEDDING, layer_features, layer_names, named_layers
from pirl_jax.evaluation.outcome import Outcome
from pirl_jax.evaluation.protocol import Evaluation, Protocol, Reading
from pirl_jax.figures.curves import Curve
from pirl_jax.models.initializers import bias_init, kernel_init
from pirl_jax.models.network import Ensemble, Model, Network
from pirl_jax.runtime.mesh import AXIS, whole
from pirl_jax.runtime.progress import Progress
from pirl_jax.views.normalisation import normalise_image

HEADS = ("bn", "bn_affine", "plain")
SCHEDULES = ("steps", "cosine")
INITS = ("normal", "pytorch")

KERNEL_STD = 0.01
"""Standard deviation of the linear layer's initial kernel."""

EPS = 1e-5
MOMENTUM = 0.1
"""Constants of the batch norm: EPS is added to the variance; MOMENTUM is the share of the new value in the running
statistics (PyTorch's definition of momentum)."""

CACHE_BYTES = 8 * 2**30
"""Upper limit of the memory for the features of all training images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSettings(training.TrainingSettings):
  """How the classifiers are trained (see `TrainingSettings`), and on which layers.

  Attributes:
    layers: names separated by commas, of `layers.layer_names` or "embedding"; "" takes all layers of the trunk.
    schedule: "steps" multiplies the learning rate at `milestones`; "cosine" lowers it at each step along half a cosine
      to zero.
    head: what stands before the linear layer: "bn" (batch norm without scale and shift), "bn_affine" (batch norm with
      scale and shift), or "plain" (nothing).
    init: of the linear layer: "normal", N(0, 0.01^2) with a bias of 0, or "pytorch", kernel and bias uniform in
      +-1/sqrt(D).
    cached: True computes the features of all training images once, from their centre crops and so without augmentation,
      and keeps them in memory. This is for small data sets.
    further: folders of further test images, separated by commas, see `further.open_sets`.
  """

  group: ClassVar[str] = "linear"
  advice: ClassVar[str] = ', or a linear.head with batch norm ("bn")'
  layers: str
  schedule: str
  head: str
  cached: bool
  init: str = "normal"
  further: str = ""

  def __post_init__(self) -> None:
    self.require(self.schedule in SCHEDULES, "schedule", f"choose from {', '.join(SCHEDULES)}")
    self.require(self.head in HEADS, "head", f"choose from {', '.join(HEADS)}")
    self.require(self.init in INITS, "init", f"choose from {', '.join(INITS)}")
    super().__post_init__()

  @property
  def falls_at(self) -> tuple[float, ...]:
    """Returns the milestones, or () for the schedule "cosine"."""
    return self.milestones if self.schedule == "steps" else ()

  def as_used(self, seed: int) -> dict[str, Any]:
    """Returns the settings and the seed for a result file, with the learning rate scaled to the batch size."""
    used = super().as_used(seed) | {"learning_rate": self.first_rate}
    del used["layers"], used["further"]  # the figures themselves name the layers and the sets
    return used


def measure_linear(model: Model, train: Images, test: Images, settings: LinearSettings, *, mesh: Mesh, seed: int,
                   snapshot_folder: str | os.PathLike, keep: Callable[..., Any] = lambda *_: None) -> Outcome:
  """Returns top-1 and top-5 accuracy on the test images of a linear classifier on each layer.

  The classifiers after the last epoch are tested. The test images are used for a single choice, that of the best layer,
  as in the paper's table 2. Training images without a label are left out. If the call was interrupted, the same call
  resumes from its last snapshot and gives the same figures. A layer's classifier does not depend on the other layers.

  The outcome's figures:

  - `layers`: for each layer, from the input to the output, `top1` and `top5` in [0, 1], `dim` (D) and `loss` (mean over
    the last epoch, in nats). Top-5 counts an image if its true class is among the five highest scores, or among all
    scores if there are fewer classes.
  - `best_layer`: the layer with the highest top-1, the deeper one of equals; `top1` and `top5` of this layer.
  - `num_classes`; `num_train` (labelled images); `num_test` (labelled images that can be read).
  - `num_broken_train`: labelled images that could not be read in the last epoch or, with `cached`, at all;
    `num_broken_test`.
  - `steps`; `settings` as used, with `learning_rate` scaled to the batch size.

  Args:
    model: the frozen network, or an ensemble, whose channels together go into one batch norm and linear layer.
    train: images of which at least a batch has labels.
    test: labelled images of the same classes; their centre crops are classified.
    settings: of the layers and the training; weight decay acts on kernels and biases of the linear layers.
    mesh: the devices. Their number must divide the batch size; it changes nothing except rounding.
    seed: of the initial kernels, the order of the images and the crops.
    snapshot_folder: holds unfinished work. No call with other arguments may use it; the caller deletes it.
    keep: called once as keep({"params", "stats"} of the best layer's classifier, {"layer", "top1"}).

  Raises:
    UserError: a layer is unknown, labels are missing or of other classes, the devices cannot share the batch, the batch
      is larger than the training set, or the cache would be too large (all before anything compiles); no image can be
      read, or a loss is not finite.
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
  state = jax.jit(lambda: create_classifiers(seed, shapes, optimizer, settings, num_classes=num_classes),
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
  ranks, num_broken_test = ranks_by_layer(linear_logits(model.network, layers), variables, test, mesh)

  found = {
    layer: {"top1": float(np.mean(ranks[layer] < 1)), "top5": float(np.mean(ranks[layer] < 5)),
            "dim": math.prod(shapes[layer]), "loss": losses[layer]}
    for layer in layers}
  best = max(layers, key=lambda layer: (found[layer]["top1"], layers.index(layer)))
  keep({name: state[name][best] for name in ("params", "stats")}, {"layer": best, "top1": found[best]["top1"]})
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
  """Returns the layers that get a classifier, from the input to the output.

  Raises:
    UserError: a layer is unknown, or the maps of an ensemble's networks have different sizes.
  """
  trunk = layer_names(model.network)
  layers = named_layers(model, settings.layers, otherwise=trunk, image_size=image_size, field="linear.layers")
  return tuple(layer for layer in (*trunk, EMBEDDING) if layer in layers)


def linear_optimizer(settings: LinearSettings, steps_per_epoch: int) -> optax.GradientTransformation:
  """Returns SGD with PyTorch's momentum; weight decay acts on everything except the batch norm's scale and shift."""
  def decayed(params: Mapping[str, Any]) -> dict[str, dict[str, bool]]:
    return {layer: {name: name in ("kernel", "bias") for name in head} for layer, head in params.items()}

  return optax.chain(
    optax.add_decayed_weights(settings.weight_decay, mask=decayed),
    optax.sgd(linear_rate(settings, steps_per_epoch), momentum=settings.momentum, nesterov=settings.nesterov))


def linear_rate(settings: LinearSettings, steps_per_epoch: int) -> optax.Schedule:
  """Returns schedule(step) -> learning rate f32[], for steps from 0 on."""
  if settings.schedule == "cosine":
    return optax.cosine_decay_schedule(settings.first_rate, settings.num_epochs * steps_per_epoch)
  return training.falling_rate(settings, steps_per_epoch)


def create_classifiers(seed: int, shapes: Mapping[str, tuple[int, ...]], optimizer: optax.GradientTransformation,
                       settings: LinearSettings, *, num_classes: int) -> dict[str, Any]:
  """Returns the classifiers before the first step, as a dict.

  - "params": {layer: {"kernel": f32[D, L], "bias": f32[L]}}; with the head "bn_affine" also "scale" and "shift" f32[C].
  - "stats": {layer: {"mean": f32[C], "var": f32[C]}}; with the head "plain" {layer: {}}.
  - "opt_state", and the entries that `training.begin_training` adds.

  Args:
    seed: of the initial kernels.
    shapes: (h, w, C) or (C,) of the layers' maps.
    optimizer: of the parameters.
    settings: its `head` and `init` count.
    num_classes: L.
  """
  params, stats = {}, {}
  for layer, shape in shapes.items():
    # The key depends on the layer's name, so a layer's initial kernel does not depend on the other layers.
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(layer.encode()))
    params[layer] = _initial_layer(key, math.prod(shape), num_classes, settings.init)
    if settings.head == "bn_affine":
      params[layer] |= {"scale": jnp.ones(shape[-1]), "shift": jnp.zeros(shape[-1])}
    stats[layer] = {} if settings.head == "plain" else {"mean": jnp.zeros(shape[-1]), "var": jnp.ones(shape[-1])}
  return training.begin_training({"params": params, "stats": stats, "opt_state": optimizer.init(params)}, shapes)


def _initial_layer(key: jax.Array, num_inputs: int, num_classes: int, init: str) -> dict[str, jax.Array]:
  shape = num_inputs, num_classes
  if init == "normal":
    return {"kernel": KERNEL_STD * jax.random.normal(key, shape), "bias": jnp.zeros(num_classes)}
  return {"kernel": kernel_init(key, shape), "bias": bias_init(num_inputs)(jax.random.fold_in(key, 1), (num_classes,))}


def linear_step(maps_fn: Callable, optimizer: optax.GradientTransformation) -> Callable:
  """Returns device_step(state, frozen, batch) -> (state, losses, num_read), for `training.make_classifier_step`.

  `state` is the state of `create_classifiers`, with all classifiers. `batch` holds label i32[b], valid bool[b] and the
  arrays that `maps_fn` reads. `losses` {layer: f32[]} are the mean cross-entropies in nats.

  Args:
    maps_fn: maps_fn(frozen, batch) -> {layer: f32[b, h, w, C] or f32[b, C]}; it treats every image independently.
    optimizer: of all classifiers.
  """
  total = functools.partial(jax.lax.psum, axis_name=AXIS)

  def device_step(state: dict[str, Any], frozen: Any,
                  batch: Mapping[str, jax.Array]) -> tuple[dict[str, Any], dict[str, jax.Array], jax.Array]:
    weight = batch["valid"].astype(jnp.float32)  # [b]
    num_read = total(jnp.sum(weight))
    # 1. The batch norm's statistics need no gradient, because the maps are constants: the trunk is frozen.
    inputs, stats = {}, {}
    for layer, x in maps_fn(frozen, batch).items():
      inputs[layer], stats[layer] = x, {}
      if state["stats"][layer]:
        mean, var, stats[layer] = _batch_statistics(x, weight, num_read, state["stats"][layer], total)
        inputs[layer] = _standardise(x, mean, var)

    # 2. One gradient of the sum of the losses: each loss depends on the parameters of its own classifier only.
    def objective(params: Mapping[str, Any]) -> tuple[jax.typing.ArrayLike, dict[str, jax.Array]]:
      losses = {}
      for layer, x in inputs.items():
        # An image that cannot be read may have the label -1. Its weight is 0; any valid label will do.
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
                   process: tuple[int, int] = (0, 1)) -> batches.Batches:
  """Returns the endless stream of batches of features in memory, from batch `start_step` on.

  A batch is a function of (seed, step). An epoch holds no image twice; each epoch leaves out other images (fewer than a
  batch).

  Args:
    maps: {layer: f32[N, h, w, C] or f32[N, C]}.
    labels: i32[N].
    batch_size: B, over all processes, at most N.
    seed: any integer.
    start_step: number of batches already seen.
    process: see `batches.train_batches`.

  Returns:
    Iterator of {layer: f32[b, ...], "index": i32[b] (row of the maps), "label": i32[b], "valid": bool[b], all True}.
  """
  steps_per_epoch = len(labels) // batch_size
  process_index, process_count = process
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
  """Returns (mean f32[C], variance f32[C], new running statistics {"mean", "var"}) of x f32[b, ..., C].

  Mean and variance are over the images of all devices that can be read. The new running statistics take a share of 0.1
  of the mean and of the unbiased variance, as in PyTorch. If no image can be read, they do not change.
  """
  axes = tuple(range(x.ndim - 1))
  weight = weight.reshape(-1, *[1] * (x.ndim - 1))
  count = jnp.maximum(num_read * math.prod(x.shape[1:-1]), 1)
  mean = total(jnp.sum(x * weight, axes)) / count
  var = total(jnp.sum((x - mean.reshape(*[1] * len(axes), -1)) ** 2 * weight, axes)) / count
  new = {"mean": mean, "var": var * count / jnp.maximum(count - 1, 1)}
  share = jnp.where(num_read > 0, MOMENTUM, 0.0)
  return mean, var, {name: (1 - share) * running[name] + share * new[name] for name in ("mean", "var")}


def _linear(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
  """Returns logits f32[B, L] of standardised maps f32[B, h, w, C] or vectors f32[B, C]."""
  if "scale" in params:
    scale, shift = (params[name].reshape(*[1] * (x.ndim - 1), -1) for name in ("scale", "shift"))
    x = x * scale + shift
  # Full float32 precision, as in PyTorch; GPUs would otherwise round to TF32. The cost is small beside the trunk's.
  logits = jnp.matmul(x.reshape(x.shape[0], -1), params["kernel"], precision=jax.lax.Precision.HIGHEST)
  return logits + params["bias"][None]


def _image_maps(maps_fn: Callable) -> Callable:
  return lambda frozen, batch: maps_fn(frozen, normalise_image(batch["image"]))


def _cached_maps(layers: Iterable[str]) -> Callable:
  return lambda frozen, batch: {layer: batch[layer] for layer in layers}


# Cached, so that several runs of the same network share one compiled program for the test images.
@functools.cache
def linear_logits(network: Network | Ensemble, layers: tuple[str, ...]) -> Callable[
    [Any, jax.Array], dict[str, jax.Array]]:
  """Returns forward_fn(variables, image) -> {layer: f32[B, L]} with running statistics, see `stream_features`.

  `variables` are {"frozen": those of the network, "params" and "stats": by layer, see `create_classifiers`}.
  """
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
  return {layer: maps[layer].shape[1:] for layer in layers}  # eval_shape has sorted the names alphabetically


def _open_training(model: Model, frozen: Any, train: Images, labels: np.ndarray, settings: LinearSettings, *,
                   shapes: Mapping[str, tuple[int, ...]], mesh: Mesh,
                   seed: int) -> tuple[Callable[..., batches.Batches], Callable, int]:
  """Returns (open_stream(start_step=), maps_fn(frozen, batch), number of training images).

  The training images are those with a label, read from their files. With `cached` their maps are in memory, and images
  that cannot be read are left out.
  """
  maps_fn = layer_features(model.network, tuple(shapes), flat=False)
  here = {"process": (jax.process_index(), jax.process_count())}
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
  # The arrays are filled in place; joining the batches at the end would need the memory twice.
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


def with_batches_that_fill(settings: LinearSettings, num_images: int, mesh: Mesh) -> LinearSettings:
  """Returns the settings with a batch that so many labelled images fill; as they are if the images fill it already.

  If there are fewer images than devices, the settings stay as they are, too, and `measure_linear` refuses them.
  """
  if not mesh.size <= num_images < settings.batch_size:
    return settings
  return dataclasses.replace(settings, batch_size=num_images // mesh.size * mesh.size)


def _check_batch(settings: LinearSettings, num_images: int, mesh: Mesh) -> None:
  training.check_divides(settings, mesh)
  size = settings.batch_size
  if size > num_images:
    fits = num_images // mesh.size * mesh.size
    way_out = f"try --config.linear.batch_size={fits}" if fits else f"{mesh.size} devices need {mesh.size} of them"
    raise UserError(f"linear.batch_size={size}, but there are only {num_images} training images with a label "
                    f"that can be read: a batch never holds an image twice; {way_out}")


def _measure(evaluation: Evaluation) -> Outcome:
  model, settings, mesh, train = evaluation.subject.model, evaluation.settings, evaluation.mesh, evaluation.train
  number = int(np.count_nonzero(train.labels() >= 0)) if train.source.class_names else 0
  settings = with_batches_that_fill(settings, number, mesh)
  if settings is not evaluation.settings:
    print(f"linear.batch_size is {settings.batch_size}, because {number} training images have a label; the learning "
          "rate is scaled to it")
  sets, judged = open_sets(evaluation, settings.further), {}

  def measure(keep: Callable[..., Any]) -> Outcome:
    def keep_and_judge(best: Mapping[str, Any], about: Mapping[str, Any]) -> None:
      keep(best, about)
      layer = about["layer"]
      variables = {"frozen": jax.device_put(model.variables, whole(mesh)),
                   **{name: {layer: tree} for name, tree in best.items()}}
      judged.update(judge_sets(sets, linear_logits(model.network, (layer,)), variables, mesh))

    return measure_linear(model, train, evaluation.labelled_test(), settings, mesh=mesh,
                          seed=evaluation.config.seed, snapshot_folder=evaluation.snapshots, keep=keep_and_judge)

  outcome = keeping(evaluation, measure)
  if not judged:
    return outcome
  table = {f"{name}, top-1 of {found['num_classes']} classes": found["top1"] for name, found in judged.items()}
  return dataclasses.replace(outcome, figures=outcome.figures | {"further": judged}, table=outcome.table | table)


def _check(evaluation: Evaluation) -> None:
  linear_layers(evaluation.subject.model, evaluation.settings, image_size=evaluation.train.image_size)
  open_sets(evaluation, evaluation.settings.further)


PROTOCOL = Protocol(
  LinearSettings, _measure, _check,
  reading=Reading(lambda found: {"linear top-1 of the best layer": found["top1"]}, ("linear top-1", "top1")))
