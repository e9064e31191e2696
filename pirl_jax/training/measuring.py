"""Measurements of a run during training and at its end, by the protocols of the evaluations and by `view_figures`."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from pirl_jax import system
from pirl_jax.data.batches import Batches
from pirl_jax.evaluation import features
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.protocols import knn, learning
from pirl_jax.method import memory_bank
from pirl_jax.method.state import TrainState
from pirl_jax.models import batch_norm
from pirl_jax.models.network import Model
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.logbook import Logbook
from pirl_jax.training import other_set
from pirl_jax.training.parts import Parts, test_images
from pirl_jax.training.stopping import Stopping
from pirl_jax.training.view_figures import ViewFigures


def calibrate(parts: Parts, state: TrainState, images: Iterable[Mapping[str, np.ndarray]]) -> TrainState:
  """Returns the randomly initialised state with the trunk's batch statistics measured on images.

  Args:
    parts: of the run.
    state: see `Parts.initial_state`.
    images: batches of image u8[B, H, W, 3] and valid bool[B].
  """
  variables = features.calibrate_batch_stats(
    batch_stats_fn(parts), {"params": state.params, "batch_stats": state.batch_stats},
    images, parts.mesh, momentum=batch_norm.MOMENTUM)
  trunk = jax.device_put(variables["batch_stats"]["trunk"], mesh_lib.whole(parts.mesh))
  return state.replace(batch_stats={**state.batch_stats, "trunk": trunk})


def unlabelled(parts: Parts) -> str:
  """Returns in words why the images have no labels for kNN, or "" if kNN can be measured."""
  for name, source in (("training", parts.train), ("held-out", parts.test)):
    if source is None:
      return f"there are no {name} images (--config.evaluate.split)"
    if not source.class_names:
      return f"the {name} images have no labels (for folders of classes: --config.data.labels=folder)"
    if source.multi_label:
      return f"the {name} images may show several classes each"
  return ""


@dataclasses.dataclass(frozen=True)
class StoppableImages(Images):
  """Images whose reading ends when the run is asked to stop, in all processes after the same batch."""

  stopping: Stopping

  def test_batches(self, *, squash: bool = False) -> Batches:
    """Yields every image once, see `Images.test_batches`; raises Stopped between batches if asked to stop."""
    with contextlib.closing(super().test_batches(squash=squash)) as test_batches:
      for batch in test_batches:
        if self.stopping.requested():
          self.stopping.stop()
        yield batch


def make_evaluation(parts: Parts, book: Logbook, stopping: Stopping) -> Callable | None:
  """Returns evaluate(state) -> kNN figures of the held-out images, or None if kNN is switched off or not possible.

  The neighbours are the rows of the bank or, for a run without a bank, the trunk features of the training images.
  `evaluate` raises Stopped if the run is asked to stop.
  """
  config = parts.config
  if not config.evaluate.every_epochs:
    return None
  if missing := unlabelled(parts):
    book.say(f"no kNN during the run: {missing}")
    return None
  train_set, test_set = (StoppableImages(**vars(images), stopping=stopping) for images in both_images(parts))

  def evaluate_features(state: TrainState) -> dict[str, float]:
    model = Model(parts.network, {"params": state.params, "batch_stats": state.batch_stats})
    settings = knn.KnnSettings("pooled", config.evaluate.k, config.evaluate.temperature)
    return knn.measure_knn(model, train_set, test_set, settings, mesh=parts.mesh).figures

  if not system.has_bank(config):
    return evaluate_features
  on_every_device = jax.jit(lambda x: x, out_shardings=mesh_lib.whole(parts.mesh))

  @functools.cache  # labels are read at the first evaluation only: reading them may take long
  def row_labels() -> np.ndarray:
    if parts.train.slow_labels:
      book.say(f"reading the labels of {len(parts.train):,} images, once")
    labels = train_set.labels()
    by_row = np.full(parts.layout.num_rows, -1, np.int32)
    by_row[parts.layout.row_of(np.arange(len(labels)))] = labels
    return by_row

  def embed(variables: Any, image: jax.Array) -> jax.Array:
    emb: Any = parts.network.apply(variables, image, method="embed_image")
    return memory_bank.normalise(emb)

  def evaluate(state: TrainState) -> dict[str, float]:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    test = features.extract_features(embed, variables, test_set.test_batches(), parts.mesh)
    voting = np.where(np.asarray(on_every_device(state.usable)), row_labels(), -1)
    return knn.accuracy(state.bank, voting, test.features, test.labels, mesh=parts.mesh, k=config.evaluate.k,
                        temperature=config.evaluate.temperature)

  return evaluate


@dataclasses.dataclass(frozen=True)
class Evaluations:
  """The evaluations of a run while it trains: every `evaluate.every_epochs`, and after the last step.

  Attributes:
    parts: of the run.
    book: the log, which gets the figures.
    knn: evaluate(state) -> kNN figures, see `make_evaluation`, or None.
    views: evaluate(state) -> figures without labels, see `ViewFigures`, or None.
    other: evaluate(state) -> figures of another set, see `make_other_evaluation`, or None.
  """

  parts: Parts
  book: Logbook
  knn: Callable | None
  views: ViewFigures | None
  other: Callable | None

  def due(self, step: int) -> bool:
    """Returns whether to evaluate after a step."""
    every_steps = self.parts.config.evaluate.every_epochs * self.parts.steps_per_epoch
    return bool(self.knn or self.views or self.other) and (
      step == self.parts.total_steps or (every_steps > 0 and step % every_steps == 0))

  def missing(self, step: int) -> bool:
    """Returns whether the evaluation after a step was interrupted, or has not been made for another reason."""
    last = other_set.KNN if self.other else "nearest_view" if self.views else "knn_top1"
    return self.due(step) and not self.book.has(step, last)

  def measure(self, step: int, state: TrainState) -> float | None:
    """Adds the figures to the row of the step; returns the kNN accuracy in [0, 1], None if it is not measured.

    If the run's own images have no labels, the accuracy is that on the other set.

    Raises:
      Stopped: the run is asked to stop.
    """
    knn = {} if self.knn is None else {"knn_top1": self.knn(state)["top1"]}
    self.book.record(step, knn | ({} if self.views is None else self.views(state)))
    if self.other is None:
      return knn.get("knn_top1")
    other = self.other(state)
    self.book.record(step, other)
    return knn.get("knn_top1", other[other_set.KNN])


def learning_of(parts: Parts, state: TrainState) -> dict[str, Any]:
  """Returns the kNN accuracy on raw pixels, the untrained and the trained network, see `learning.measure_learning`."""
  config = parts.config
  train_set, test_set = both_images(parts)

  def pooled(variables: Any, image: jax.Array) -> jax.Array:
    found: Any = parts.network.apply(variables, image, method="features")
    return found["pooled"]

  untrained, trained = ({"params": s.params, "batch_stats": s.batch_stats}
                        for s in (calibrate(parts, parts.initial_state(), train_set.test_batches()), state))
  return learning.measure_learning(
    train_set.test_batches(), test_set.test_batches(), forward_fn=pooled, untrained=untrained, trained=trained,
    mesh=parts.mesh, settings=learning.LearningSettings(config.evaluate.k, config.evaluate.temperature),
    about={"seed": config.seed, "step": int(state.step), "image_size": config.data.image_size,
           "crop_fraction": config.evaluate.crop_fraction, "train": train_set.source.description,
           "test": test_set.source.description, "train_fingerprint": train_set.source.fingerprint,
           "test_fingerprint": test_set.source.fingerprint})


def both_images(parts: Parts) -> tuple[Images, Images]:
  """Returns (training images, held-out images) under the test transform; the run must not be `unlabelled`."""
  assert parts.test is not None
  return test_images(parts, parts.train), test_images(parts, parts.test)


def batch_stats_fn(parts: Parts) -> Callable:
  """Returns stats_fn(variables, image f32[b, H, W, 3]) -> batch statistics, for `calibrate_batch_stats`."""
  def batch_stats(variables: Any, image: jax.Array) -> dict[str, Any]:
    _, updated = parts.parallel_network.apply(variables, image, train=True, method="features",
                                              mutable=["batch_stats"])
    # The statistics of the heads stay as they are, because features do not use the heads.
    return {**variables["batch_stats"], **updated["batch_stats"]}
  return batch_stats
