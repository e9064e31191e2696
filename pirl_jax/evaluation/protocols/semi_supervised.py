"""Semi-supervised learning: the whole network is fine-tuned on a share of the labels (PIRL section 3.3).

The paper follows the procedure of NPID (arXiv 1805.01978, section 4.3): a new linear layer on the pooled features, and
SGD with momentum on all parameters for 70 epochs. The learning rate starts at 0.01 and is divided by ten every 30
epochs. vissl (configs/config/benchmark/semi_supervised/imagenet1k/) has other milestones and Nesterov momentum. The
augmentation is random crop and flip.

Batch norm is in training mode. It uses the statistics of the batch over all devices, so the number of devices does not
matter (in vissl each GPU uses the statistics of its own part). Its running statistics are updated, and they are used
for the test images. An image that cannot be read has no weight in the loss. It is replaced by a black image, which does
take part in the statistics of the batch, as in pre-training.

Letters: B batch of all devices, b this device's part of the batch, N images, L classes, H W sides in pixels.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from pirl_jax.data import batches
from pirl_jax.data.subsets import draw_subset, subset_digest
from pirl_jax.errors import UserError
from pirl_jax.evaluation import classification, training
from pirl_jax.evaluation.features import extract_features
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.kept import keeping
from pirl_jax.evaluation.outcome import Outcome
from pirl_jax.evaluation.protocol import Evaluation, Protocol, Reading
from pirl_jax.figures.curves import Curve
from pirl_jax.method.optimizer import create_optimizer
from pirl_jax.models.classifier import Classifier, on_trunk
from pirl_jax.models.network import Model
from pirl_jax.models.resnet import ResNet
from pirl_jax.runtime.mesh import AXIS, whole
from pirl_jax.runtime.progress import Progress
from pirl_jax.storage.files import read_json, write_json
from pirl_jax.views.normalisation import normalise_image


@dataclasses.dataclass(frozen=True, kw_only=True)
class SemiSupervisedSettings(training.TrainingSettings):
  """How the network is fine-tuned (see `TrainingSettings`), and on which labels.

  Attributes:
    fractions: shares of the labels, each in (0, 1]; a smaller subset is part of a larger one.
    balanced: True draws the same share of every class; False draws from all images alike.
  """

  group: ClassVar[str] = "semi_supervised"
  fractions: tuple[float, ...]
  balanced: bool

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.fractions:
      raise UserError("semi_supervised.fractions is empty; name shares of the labels, (0.01, 0.1) for example")

  def as_used(self, seed: int) -> dict[str, Any]:
    """Returns the settings and the seed for a result file."""
    used = super().as_used(seed)
    del used["fractions"]  # the figures themselves name the shares
    return used


def measure_semi_supervised(model: Model, train: Images, test: Images, settings: SemiSupervisedSettings, *,
                            mesh: Mesh, seed: int, snapshot_folder: str | os.PathLike,
                            keep: Callable[..., Any] = lambda *_: None) -> Outcome:
  """Returns top-1 and top-5 accuracy on the test images after fine-tuning on each share of the labels.

  Every share starts from `model`, which is not changed. The network after the last epoch is tested; nothing is chosen
  on the test images. If the call was interrupted, the same call resumes from its last snapshot. A share that was
  finished is not trained again.

  The outcome's figures are `num_test`, `num_broken_test`, `num_labelled`, `num_classes`, `settings` and `fractions`.
  `fractions` holds for each share:

  - `top1` and `top5` in [0, 1]; `num_images`; `num_classes_seen` (classes with an image in the subset).
  - `batch_size` and `learning_rate` as used. If the subset is smaller than a batch, the batch size is the largest power
    of two that the subset fills.
  - `steps`; `train_loss` (mean of the last epoch, in nats); `num_broken` (images of the last epoch that could not be
    read).
  - `digest`, `indices` and `files` of the subset; `indices` and `files` are None for a share of 1, which is every
    labelled image.

  Args:
    model: the pre-trained network; its heads are dropped.
    train: labelled images, from which the subsets are drawn, see `draw_subset`.
    test: labelled images of the same classes; their centre crops are classified.
    settings: of the subsets and the training; weight decay acts on kernels, not on batch norm and biases.
    mesh: the devices; their number must divide every batch size.
    seed: of the subsets, the new layer's initial values, the order of the images and the crops.
    snapshot_folder: holds unfinished work. No call with other arguments may use it; the caller deletes it.
    keep: called as keep({"params", "batch_stats"}, {"fraction", "top1"}) with the whole network that was fine-tuned on
      the largest share, unless that share was finished by an earlier call.

  Raises:
    UserError: labels are missing or of other classes, a share leaves no image, the devices cannot share a batch (all
      before anything compiles), no image of a subset can be read, or the loss is not finite.
  """
  labels = classification.read_labels(train, test, protocol="semi_supervised")
  fractions = sorted(set(map(float, settings.fractions)))
  subsets = {fraction: draw_subset(labels, fraction, seed=seed, balanced=settings.balanced) for fraction in fractions}
  own = {fraction: _with_batches(settings, len(indices), fraction, mesh) for fraction, indices in subsets.items()}

  num_classes = len(train.source.class_names)
  found = {}
  for fraction, indices in subsets.items():
    folder = Path(snapshot_folder) / f"fraction-{fraction}"
    finished = folder.with_name(f"{folder.name}.json")
    if (done := read_json(finished)) is not None:
      found[str(fraction)] = done
      continue
    num_seen = len(np.unique(labels[indices]))
    print(f"{_share(fraction)}: {len(indices):,} images, {num_seen:,} of {num_classes:,} classes")
    variables, figures = _fine_tune(
      model, train, indices, own[fraction], mesh=mesh, seed=seed, folder=folder,
      title=f"fine-tuning on {_share(fraction)}")
    judged = _judge(model.single.trunk, variables, test, num_classes, mesh)
    if fraction == fractions[-1]:
      keep(variables, {"fraction": fraction, "top1": judged["top1"]})
    found[str(fraction)] = {
      **judged,
      "num_images": len(indices), "num_classes_seen": num_seen, **figures, "digest": subset_digest(indices),
      "indices": indices.tolist() if fraction < 1 else None,
      "files": [train.source.image_name(i) for i in indices.tolist()] if fraction < 1 else None}
    if jax.process_index() == 0:
      write_json(finished, found[str(fraction)])

  # These two counts are the same for every share, because the test images are the same.
  counts = [{name: figures.pop(name) for name in ("num_test", "num_broken_test")} for figures in found.values()][0]
  table = {f"{_share(fraction)}, {top}": found[str(fraction)][top.replace("-", "")]
           for fraction in fractions for top in ("top-1", "top-5")}
  return Outcome(
    figures={"fractions": found, **counts, "num_labelled": int(np.count_nonzero(labels >= 0)),
             "num_classes": num_classes, "settings": settings.as_used(seed)},
    table=table,
    curve=Curve("share of the labels", "top-1", fractions, [found[str(fraction)]["top1"] for fraction in fractions],
                log_x=True))


def fine_tuning_step(classifier: Classifier, optimizer: optax.GradientTransformation) -> Callable:
  """Returns device_step(state, frozen, batch) -> (state, losses, num_read), for `training.make_classifier_step`.

  The step trains the whole network; `frozen` is not used. `state` is {"params", "batch_stats", "opt_state"}. `batch`
  holds image u8[b, H, W, 3], label i32[b] and valid bool[b]. The only loss, {"": f32[]}, is the mean cross-entropy in
  nats.

  Args:
    classifier: the network; its batch norm works over the mesh axis.
    optimizer: of all parameters.
  """
  def device_step(state: dict[str, Any], frozen: None,
                  batch: Mapping[str, jax.Array]) -> tuple[dict[str, Any], dict[str, jax.Array], jax.Array]:
    del frozen
    def objective(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
      logits, updated = classifier.apply(
        {"params": params, "batch_stats": state["batch_stats"]}, normalise_image(batch["image"]), train=True,
        mutable=["batch_stats"])
      weight = batch["valid"].astype(jnp.float32)  # [b]
      # An image that cannot be read may have the label -1. Its weight is 0; any valid label will do.
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["label"], 0))
      # Both sums are over all devices. So the mean and its gradient are those of the whole batch, however it is split.
      total, num_read = jax.lax.psum((jnp.sum(losses * weight), jnp.sum(weight)), AXIS)
      return total / jnp.maximum(num_read, 1), (num_read, updated["batch_stats"])

    (loss, (num_read, batch_stats)), grads = jax.value_and_grad(objective, has_aux=True)(state["params"])
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "batch_stats": batch_stats, "opt_state": opt_state}, {"": loss}, num_read

  return device_step


def _fine_tune(model: Model, train: Images, indices: np.ndarray, settings: SemiSupervisedSettings, *, mesh: Mesh,
               seed: int, folder: Path, title: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (the classifier's variables after the last step, figures of the training)."""
  steps_per_epoch = batches.steps_per_epoch(len(indices), settings.batch_size)
  optimizer = create_optimizer(training.falling_rate(settings, steps_per_epoch), momentum=settings.momentum,
                               weight_decay=settings.weight_decay, nesterov=settings.nesterov)
  trunk, num_classes = model.single.trunk, len(train.source.class_names)

  def create_state(variables: Mapping[str, Any]) -> dict[str, Any]:
    variables = on_trunk(Classifier(trunk, num_classes), jax.random.key(seed), variables)
    return training.begin_training({**variables, "opt_state": optimizer.init(variables["params"])}, ("",))

  variables = jax.device_put({name: model.variables[name] for name in ("params", "batch_stats")}, whole(mesh))
  state = jax.jit(create_state, out_shardings=whole(mesh))(variables)
  step = fine_tuning_step(Classifier(trunk.clone(batch_norm_axis=AXIS), num_classes), optimizer)
  train_step = training.make_classifier_step(step, mesh, steps_per_epoch=steps_per_epoch)
  open_stream = functools.partial(
    batches.labelled_batches, train.source, indices=indices, batch_size=settings.batch_size,
    crop=(train.image_size, settings.image_scale), seed=seed,
    process=(jax.process_index(), jax.process_count()), num_threads=train.num_threads)
  unreadable = (f"none of the {len(indices)} images can be read, for example "
                f"{train.source.image_name(int(indices[0]))}; check the files")
  state = training.train_classifier(
    lambda state, batch: train_step(state, {}, batch), state, open_stream, settings=settings,
    steps_per_epoch=steps_per_epoch, mesh=mesh, folder=folder, words=training.Words(title, ("",), unreadable))
  losses, num_read = training.epoch_means(state)
  return {name: state[name] for name in ("params", "batch_stats")}, {
    "batch_size": settings.batch_size, "learning_rate": settings.first_rate,
    "steps": settings.num_epochs * steps_per_epoch, "train_loss": losses[""],
    "num_broken": steps_per_epoch * settings.batch_size - num_read}


def _judge(trunk: ResNet, variables: dict[str, Any], test: Images, num_classes: int, mesh: Mesh) -> dict[str, Any]:
  """Returns `top1`, `top5`, `num_test` (labelled images that could be read) and `num_broken_test`."""
  with Progress("judging", len(test)) as progress:
    found = extract_features(fine_tuned_logits(trunk, num_classes), variables, test.test_batches(), mesh,
                             progress.update)
  labelled = found.labels >= 0
  if not labelled.any():
    raise UserError(f"none of the {len(test)} test images has a label and can be read: {found.num_broken} are broken")
  ranks = classification.true_ranks(found.features[labelled], found.labels[labelled])
  return {"top1": float(np.mean(ranks < 1)), "top5": float(np.mean(ranks < 5)), "num_test": int(labelled.sum()),
          "num_broken_test": found.num_broken}


# Cached, so that all shares use one compiled program for the test images.
@functools.cache
def fine_tuned_logits(trunk: ResNet, num_classes: int) -> Callable[[Any, jax.Array], Any]:
  """Returns forward_fn({"params", "batch_stats"} of a `Classifier`, image) -> f32[B, L], see `stream_features`."""
  classifier = Classifier(trunk, num_classes)
  return lambda variables, image: classifier.apply(variables, image, train=False)


def _share(fraction: float) -> str:
  return f"{100 * fraction:.4g} % of the labels"


def _with_batches(settings: SemiSupervisedSettings, num_images: int, fraction: float,
                  mesh: Mesh) -> SemiSupervisedSettings:
  """Returns the settings with the batch size to use.

  The batch size stays as it is if the subset fills a batch. Otherwise it is the largest power of two that the subset
  fills.
  """
  if settings.batch_size <= num_images:
    training.check_divides(settings, mesh)
    return settings
  size = 1 << num_images.bit_length() - 1
  if size % mesh.size:
    raise UserError(f"a share of {fraction} is {num_images} images, in batches of {size}, which do not divide "
                    f"among {mesh.size} devices; use a power of two of devices up to {size}, or larger "
                    "semi_supervised.fractions")
  return dataclasses.replace(settings, batch_size=size)


def _measure(evaluation: Evaluation) -> Outcome:
  return keeping(evaluation, functools.partial(
    measure_semi_supervised, evaluation.single_run().model, evaluation.train, evaluation.labelled_test(),
    evaluation.settings, mesh=evaluation.mesh, seed=evaluation.config.seed, snapshot_folder=evaluation.snapshots))


PROTOCOL = Protocol(
  SemiSupervisedSettings, _measure, Evaluation.single_run,
  reading=Reading(lambda found: {
    f"fine-tuned top-1 at {fraction}": by["top1"] for fraction, by in found["fractions"].items()}))
