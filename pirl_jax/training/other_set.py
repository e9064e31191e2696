"""Another, labelled set of images on which a run is judged while it trains on images without labels."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from pirl_jax.choosing.arranging import HOLDOUT
from pirl_jax.configs import evaluate as evaluate_configs
from pirl_jax.data import arrangement, sources
from pirl_jax.errors import UserError
from pirl_jax.evaluation.protocols import knn, linear
from pirl_jax.method.state import TrainState
from pirl_jax.models.network import Model
from pirl_jax.training.parts import Parts, test_images

KNN, LINEAR = "other_knn_top1", "other_linear_top1"
"""Names of the figures: top-1 accuracy in [0, 1] on the other set."""


def make_other_evaluation(parts: Parts) -> Callable[[TrainState], dict[str, float]] | None:
  """Returns evaluate(state) -> {`KNN`: ..., `LINEAR`: ...}, or None if the config names no other set.

  Both use the pooled features of the trunk. The linear classifier is trained on features that are computed once, with
  the settings of configs/evaluate.py:linear_small.

  Raises:
    UserError: the set cannot be opened, or has no labels.
  """
  opened = open_other_set(parts)
  if opened is None:
    return None
  train, test = (test_images(parts, source) for source in opened)
  config, folder = parts.config, parts.workdir / "unfinished-other"
  own = evaluate_configs.get_config("linear_small").linear
  size = parts.mesh.size
  own.update(layers="pooled", cached=True, batch_size=max(1, own.batch_size // size) * size)
  settings = linear.with_batches_that_fill(linear.LinearSettings(**own), len(train), parts.mesh)

  def evaluate(state: TrainState) -> dict[str, float]:
    model = Model(parts.network, {"params": state.params, "batch_stats": state.batch_stats})
    voting = knn.KnnSettings("pooled", config.evaluate.k, config.evaluate.temperature)
    found = {KNN: knn.measure_knn(model, train, test, voting, mesh=parts.mesh).figures["top1"]}
    # Unfinished work of another step must not be taken for that of this one.
    _remove(folder)
    outcome = linear.measure_linear(model, train, test, settings, mesh=parts.mesh,
                                    seed=config.seed, snapshot_folder=folder)
    _remove(folder)
    return found | {LINEAR: outcome.figures["top1"]}

  return evaluate


def _remove(folder: Path) -> None:
  if jax.process_index() == 0:
    shutil.rmtree(folder, ignore_errors=True)


def open_other_set(parts: Parts) -> tuple[sources.Source, sources.Source] | None:
  """Returns (training images, held-out images) of the set that `evaluate.source` and `evaluate.root` name, or None.

  Raises:
    UserError: the set cannot be opened, or does not have one label for each image.
  """
  kind, root, name = (parts.config.evaluate[field] for field in ("source", "root", "name"))
  if not kind and not root:
    return None
  kind = kind or "folder"
  settings = dataclasses.replace(
    sources.DataSettings.of(parts.config.data), source=kind, name=name, root=root, labels="folder",
    formats="all", num_images=0, split="train", holdout=0.0)
  test_split = "test"
  if kind == "folder":
    found = arrangement.arrangement_of(root)
    test_split = found.test_split
    settings = dataclasses.replace(settings, split=found.split, holdout=0.0 if test_split else HOLDOUT)
  elif sources.kind_of(kind).draws:
    settings = dataclasses.replace(settings, num_images=4_096)
  train, test = sources.open_both(settings, split=test_split, num_images=1_024 if settings.num_images else 0)
  assert test is not None  # there is a split or a share for it
  if not train.class_names or train.multi_label:
    raise UserError(f"evaluate.root={root}: kNN and linear classifiers need one label for each image; sort the "
                    "images into one sub-folder a class")
  print(f"judged on: {train.description}")
  return train, test
