"""Semi-supervised learning: the whole network, fine-tuned on a share of the labels (PIRL section 3.3).

The procedure is that of NPID (arXiv 1805.01978, section 4.3), which the paper follows: a new linear layer on the pooled
features, SGD with momentum on all parameters, 70 epochs from a rate of 0.01, divided by ten every 30 epochs; vissl
(configs/config/benchmark/semi_supervised/imagenet1k/) has other milestones and Nesterov. Augmentation is random crop
and flip.

Batch norm trains: with the statistics of the batch over all devices, so that their number changes nothing (vissl's are
of each GPU's part), and its running statistics move; they judge the test pictures. A picture that cannot be read has no
weight in the loss, but its black image takes part in the batch's statistics, as in pre-training.

Letters: B batch of all devices, b this device's part, N pictures, L classes, H W sides.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Sequence
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
from pirl_jax.data.subsets import draw_subset, subset_digest
from pirl_jax.errors import UserError
from pirl_jax.evaluation import classification
from pirl_jax.evaluation.features import extract_features
from pirl_jax.evaluation.inputs import Pictures
from pirl_jax.evaluation.outcome import Outcome
from pirl_jax.figures.curves import Curve
from pirl_jax.method import optimizer as optimizer_lib
from pirl_jax.models.classifier import Classifier, on_trunk
from pirl_jax.models.network import Model
from pirl_jax.models.resnet import ResNet
from pirl_jax.runtime.mesh import AXIS, SPLIT, WHOLE, whole
from pirl_jax.runtime.progress import Progress
from pirl_jax.storage.files import read_json, write_json
from pirl_jax.storage.snapshots import Snapshots
from pirl_jax.views.normalisation import normalise

BASE_BATCH = 256
"""Pictures of the batch for which the learning rate is given."""

STEPS_IN_FLIGHT = 2
"""Steps that the devices may be behind the host."""

SNAPSHOT_SECONDS = 45.0
"""Least seconds of training between two snapshots, so that writing stays a small part of the work."""


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a network is fine-tuned, see `measure_semi_supervised`."""

  num_epochs: int
  batch_size: int
  learning_rate: float
  milestones: tuple[float, ...]
  decay_factor: float
  momentum: float
  nesterov: bool
  weight_decay: float
  image_scale: tuple[float, float]
  seed: int


def measure_semi_supervised(model: Model, train: Pictures, test: Pictures, *, mesh: Mesh, fractions: Sequence[float],
                            balanced: bool, num_epochs: int, batch_size: int, learning_rate: float,
                            milestones: Sequence[float], decay_factor: float, momentum: float, nesterov: bool,
                            weight_decay: float, image_scale: Sequence[float], seed: int,
                            snapshot_folder: str | os.PathLike) -> Outcome:
  """Returns top-1 and top-5 on the test pictures after fine-tuning on each share of the labels.

  Every share starts from `model`, which is not changed. What is judged is the network after the last epoch: nothing is
  chosen on the test pictures. Interrupted, the same call goes on from its last snapshot, and a share that was finished
  is not trained again.

  The outcome's figures are `num_test`, `num_broken_test`, `num_labelled`, `num_classes`, `settings` and, by share,
  `fractions`: `top1`, `top5` in [0, 1], `num_pictures`, `num_classes_seen` (classes with a picture in the subset),
  `batch_size` and `learning_rate` as used (a subset that fills no batch has batches of the largest power of two that it
  fills), `steps`, `train_loss` (mean of the last epoch, in nats), `num_broken` (pictures met in the last epoch that
  cannot be read), and of the subset `digest`, `indices` and `files` (the last two None for a share of 1, which is every
  labelled picture).

  Args:
    model: the pre-trained network; its heads are dropped.
    train: labelled pictures, from which the subsets are drawn, see `draw_subset`.
    test: labelled pictures of the same classes, judged by their centre crop.
    mesh: the devices; their number divides every batch.
    fractions: shares of the labels, in (0, 1]; a smaller subset is part of a larger one.
    balanced: the same share of every class.
    num_epochs: >= 1; a batch is always whole, and the pictures left over are others in each epoch.
    batch_size: B, >= 1.
    learning_rate: for a batch of 256; scaled in proportion to the batch.
    milestones: epochs after which the rate is multiplied by `decay_factor`.
    decay_factor: in (0, 1].
    momentum: of SGD, in [0, 1); nesterov: PyTorch's variant of it.
    weight_decay: on kernels, not on batch norm and biases.
    image_scale: range of the share of the picture's area that the random crop covers.
    seed: of subsets, new layer, order and crops.
    snapshot_folder: holds what is not finished; belongs to exactly these arguments, and the caller deletes it.

  Raises:
    UserError: labels are missing or of other classes, a value is out of range, a share leaves no picture, a batch
      cannot be split over the devices (all before anything compiles), no picture of a subset can be read, or the loss
      is not finite.
  """
  recipe = Recipe(num_epochs, batch_size, learning_rate, tuple(milestones), decay_factor, momentum, nesterov,
                  weight_decay, tuple(image_scale), seed)
  _check_recipe(recipe)
  labels = classification.read_labels(train, test, protocol="semi_supervised")
  if not fractions:
    raise UserError("semi_supervised.fractions is empty; name shares of the labels, (0.01, 0.1) for example")
  fractions = sorted(set(map(float, fractions)))
  subsets = {fraction: draw_subset(labels, fraction, seed=seed, balanced=balanced) for fraction in fractions}
  sizes = {fraction: _batch_size(batch_size, len(indices), fraction, mesh) for fraction, indices in subsets.items()}

  num_classes = len(train.source.class_names)
  found = {}
  for fraction, indices in subsets.items():
    folder = Path(snapshot_folder) / f"fraction-{fraction}"
    finished = folder.with_name(f"{folder.name}.json")
    if (done := read_json(finished)) is not None:
      found[str(fraction)] = done
      continue
    num_seen = len(np.unique(labels[indices]))
    print(f"{_share(fraction)}: {len(indices):,} pictures, {num_seen:,} of {num_classes:,} classes")
    variables, figures = _fine_tune(
      model, train, indices, mesh=mesh, recipe=dataclasses.replace(recipe, batch_size=sizes[fraction]),
      num_classes=num_classes, folder=folder, title=f"fine-tuning on {_share(fraction)}")
    found[str(fraction)] = {
      **_judge(model.network.trunk, variables, test, num_classes, mesh),
      "num_pictures": len(indices), "num_classes_seen": num_seen, **figures, "digest": subset_digest(indices),
      "indices": indices.tolist() if fraction < 1 else None,
      "files": [train.source.picture_name(i) for i in indices.tolist()] if fraction < 1 else None}
    if jax.process_index() == 0:
      write_json(finished, found[str(fraction)])

  # The same for every share: the pictures are.
  counts = [{name: figures.pop(name) for name in ("num_test", "num_broken_test")} for figures in found.values()][0]
  table = {f"{_share(fraction)}, {top}": found[str(fraction)][top.replace("-", "")]
           for fraction in fractions for top in ("top-1", "top-5")}
  settings = {"balanced": balanced, **dataclasses.asdict(recipe)}
  return Outcome(
    figures={"fractions": found, **counts, "num_labelled": int(np.count_nonzero(labels >= 0)),
             "num_classes": num_classes,
             "settings": settings | {name: list(settings[name]) for name in ("milestones", "image_scale")}},
    table=table,
    curve=Curve("share of the labels", "top-1", fractions, [found[str(fraction)]["top1"] for fraction in fractions],
                log_x=True))


def create_schedule(recipe: Recipe, steps_per_epoch: int) -> optax.Schedule:
  """Returns step -> learning rate, f32[]: scaled with the batch, and falling at the milestones."""
  return classification.falling_rate(
    recipe.learning_rate * recipe.batch_size / BASE_BATCH, milestones=recipe.milestones,
    decay_factor=recipe.decay_factor, steps_per_epoch=steps_per_epoch)


def create_optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
  """Returns that of pre-training, with this recipe's schedule."""
  return optimizer_lib.create_optimizer(create_schedule(recipe, steps_per_epoch), momentum=recipe.momentum,
                                        weight_decay=recipe.weight_decay, nesterov=recipe.nesterov)


def make_train_step(classifier: Classifier, optimizer: optax.GradientTransformation, mesh: Mesh) -> Callable:
  """Returns train_step(state, batch) -> (state, metrics): one compiled program, mapped over the devices of `mesh`.

  `state` is {"params", "batch_stats", "opt_state"}, whole on every device, and donated. `batch` holds image
  u8[B, H, W, 3], label i32[B] and valid bool[B], split over the devices. Of the metrics, `loss` f32[] is
  the mean cross-entropy, before the step, over the pictures of the whole batch that could be read (0 where there is
  none), and `num_read` f32[] their number.

  Args:
    classifier: its batch norm over the mesh axis.
    optimizer: of all parameters.
    mesh: the devices.
  """
  def device_step(state, batch):
    def objective(params):
      logits, updated = classifier.apply(
        {"params": params, "batch_stats": state["batch_stats"]}, normalise(batch["image"]), train=True,
        mutable=["batch_stats"])
      weight = batch["valid"].astype(jnp.float32)  # [b]
      # A label of -1 belongs to a picture without weight, and must only not disturb.
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["label"], 0))
      # Both sums are over all devices, so the mean is that of the batch however it is split, and so is its gradient.
      total, num_read = jax.lax.psum((jnp.sum(losses * weight), jnp.sum(weight)), AXIS)
      return total / jnp.maximum(num_read, 1), (num_read, updated["batch_stats"])

    (loss, (num_read, batch_stats)), grads = jax.value_and_grad(objective, has_aux=True)(state["params"])
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "batch_stats": batch_stats, "opt_state": opt_state}, {"loss": loss, "num_read": num_read}

  mapped = jax.shard_map(device_step, mesh=mesh, in_specs=(WHOLE, SPLIT), out_specs=(WHOLE, WHOLE))
  return jax.jit(mapped, donate_argnums=0)


def _fine_tune(model: Model, train: Pictures, indices: np.ndarray, *, mesh: Mesh, recipe: Recipe, num_classes: int,
               folder: Path, title: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the classifier's variables after the last step, and figures of the training."""
  steps_per_epoch = batches.steps_per_epoch(len(indices), recipe.batch_size)
  num_steps = recipe.num_epochs * steps_per_epoch
  optimizer = create_optimizer(recipe, steps_per_epoch)
  trunk = model.network.trunk
  train_step = make_train_step(Classifier(trunk.clone(batch_norm_axis=AXIS), num_classes), optimizer, mesh)

  def create_state(variables):
    variables = on_trunk(Classifier(trunk, num_classes), jax.random.key(recipe.seed), variables)
    return {**variables, "opt_state": optimizer.init(variables["params"])}

  variables = jax.device_put({name: model.variables[name] for name in ("params", "batch_stats")}, whole(mesh))
  state = jax.jit(create_state, out_shardings=whole(mesh))(variables)

  with Snapshots(folder) as snapshots:
    start_step, state = snapshots.restore(state, mesh)
    if start_step:
      print(f"goes on from step {start_step} of {num_steps}")
    stream = batches.labelled_batches(
      train.source, indices=indices, batch_size=recipe.batch_size, image_size=train.image_size,
      image_scale=recipe.image_scale, seed=recipe.seed, start_step=start_step, process_index=jax.process_index(),
      process_count=jax.process_count(), num_threads=train.num_threads)
    saved = time.perf_counter()
    with closing(stream), Progress(title, (num_steps - start_step) * recipe.batch_size) as progress:
      for epoch in range(start_step // steps_per_epoch + 1, recipe.num_epochs + 1):
        metrics = []
        for _ in range(steps_per_epoch):
          if len(metrics) > STEPS_IN_FLIGHT:
            jax.block_until_ready(metrics[-1 - STEPS_IN_FLIGHT])
          state, figures = train_step(state, batches.place(next(stream), mesh))
          metrics.append(figures)
          progress.update(recipe.batch_size)
        train_loss, num_read = _mean_loss(jax.device_get(metrics))
        if not num_read:
          raise UserError(f"{title}: none of the {len(indices)} pictures can be read, for example "
                          f"{train.source.picture_name(int(indices[0]))}; check the files")
        if not math.isfinite(train_loss):
          raise UserError(f"{title}: the loss is {train_loss} in epoch {epoch} at a learning rate of "
                          f"{recipe.learning_rate} for {BASE_BATCH} pictures; choose a lower "
                          "semi_supervised.learning_rate")
        progress.update(0, note=f"epoch {epoch} of {recipe.num_epochs}, loss {train_loss:.3f}")
        # Processes must agree whether to save, and their clocks need not. After the last epoch the figures are stored.
        due = epoch < recipe.num_epochs and time.perf_counter() - saved >= SNAPSHOT_SECONDS
        if multihost_utils.broadcast_one_to_all(np.bool_(due)):
          snapshots.save(epoch * steps_per_epoch, state)
          saved = time.perf_counter()
  return {name: state[name] for name in ("params", "batch_stats")}, {
    "batch_size": recipe.batch_size, "learning_rate": recipe.learning_rate * recipe.batch_size / BASE_BATCH,
    "steps": num_steps, "train_loss": train_loss, "num_broken": steps_per_epoch * recipe.batch_size - num_read}


def _mean_loss(metrics):
  """Returns the mean loss over the pictures that could be read, and their number, of the steps of an epoch."""
  num_read = [int(figures["num_read"]) for figures in metrics]
  total = sum(float(figures["loss"]) * count for figures, count in zip(metrics, num_read, strict=True))
  return total / max(sum(num_read), 1), sum(num_read)


def _judge(trunk: ResNet, variables: dict[str, Any], test: Pictures, num_classes: int, mesh: Mesh) -> dict[str, Any]:
  """Returns `top1`, `top5`, `num_test` (labelled pictures that could be read) and `num_broken_test`."""
  with Progress("judging", len(test)) as progress:
    found = extract_features(_forward_fn(trunk, num_classes), variables, test.test_batches(), mesh, progress.update)
  labelled = found.labels >= 0
  if not labelled.any():
    raise UserError(f"none of the {len(test)} test pictures has a label and can be read: {found.num_broken} are broken")
  ranks = classification.ranks(found.features[labelled], found.labels[labelled])
  return {"top1": float(np.mean(ranks < 1)), "top5": float(np.mean(ranks < 5)), "num_test": int(labelled.sum()),
          "num_broken_test": found.num_broken}


# Kept, so that the test pictures of every share go through one program.
@functools.cache
def _forward_fn(trunk, num_classes):
  classifier = Classifier(trunk, num_classes)
  return lambda variables, image: classifier.apply(variables, image, train=False)


def _share(fraction):
  return f"{100 * fraction:.4g} % of the labels"


def _check_recipe(recipe):
  def require(condition, field, range_text):
    if not condition:
      raise UserError(f"semi_supervised.{field}={getattr(recipe, field)} is not possible: {range_text}")

  for field in ("num_epochs", "batch_size"):
    require(getattr(recipe, field) >= 1, field, "a whole number from 1 is needed")
  require(0 < recipe.learning_rate < math.inf, "learning_rate", "a finite number above 0 is needed")
  require(all(milestone > 0 for milestone in recipe.milestones), "milestones", "epochs above 0 are needed")
  require(0 < recipe.decay_factor <= 1, "decay_factor", "it lies in (0, 1]")
  require(0 <= recipe.momentum < 1, "momentum", "it lies in [0, 1)")
  require(0 <= recipe.weight_decay < math.inf, "weight_decay", "a finite number from 0 is needed")
  scale = recipe.image_scale
  require(len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1, "image_scale", "it is (smallest, largest), within (0, 1]")


def _batch_size(asked, num_pictures, fraction, mesh):
  """Returns `asked`, or the largest power of two that a smaller subset fills."""
  if asked <= num_pictures:
    if asked % mesh.size:
      raise UserError(f"semi_supervised.batch_size={asked} does not divide among {mesh.size} devices; "
                      f"try {max(1, asked // mesh.size) * mesh.size}")
    return asked
  size = 1 << num_pictures.bit_length() - 1
  if size % mesh.size:
    raise UserError(f"a share of {fraction} is {num_pictures} pictures, in batches of {size}, which do not divide "
                    f"among {mesh.size} devices; use a power of two of devices up to {size}, or larger "
                    "semi_supervised.fractions")
  return size
