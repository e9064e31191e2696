"""Judges trained classifiers: on the test images, and on further sets, such as ImageNet-A, -R, -V2 and -Sketch.

A further set is a folder whose sub-folders are classes of the training images, under the same names. As in the
publications of these sets, a prediction is the most probable of the classes that the set has.

Letters: N images, L classes of the training images.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from pirl_jax.data import sources
from pirl_jax.errors import UserError
from pirl_jax.evaluation import classification
from pirl_jax.evaluation.features import stream_features
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.protocol import Evaluation
from pirl_jax.runtime.progress import Progress


def ranks_by_layer(forward_fn: Callable, variables: Mapping[str, Any], test: Images, mesh: Mesh, *,
                   among: np.ndarray | None = None) -> tuple[dict[str, np.ndarray], int]:
  """Returns ({layer: i[N]}, number of test images that cannot be read).

  The arrays hold the rank of the true class (`classification.true_ranks`) for the labelled test images that can be
  read.

  Args:
    forward_fn: see `linear.linear_logits`.
    variables: of `forward_fn`; "params" has the layers.
    test: labelled images.
    mesh: the devices.
    among: bool[L], the classes that can be predicted; None for all.

  Raises:
    UserError: no image has a label and can be read.
  """
  ranks, num_broken = {layer: [] for layer in variables["params"]}, 0
  with Progress("linear: test images", len(test)) as progress:
    for part in stream_features(forward_fn, variables, test.test_batches(), mesh):
      labelled = part.labels >= 0
      num_broken += part.num_broken
      for layer, logits in part.features.items():
        own = logits[labelled] if among is None else np.where(among[None], logits[labelled], -np.inf)
        ranks[layer].append(classification.true_ranks(own, part.labels[labelled]))
      progress.update(len(part.index) + part.num_broken)
  ranks = {layer: np.concatenate(parts) for layer, parts in ranks.items()}
  if not all(map(len, ranks.values())):
    raise UserError(f"none of the {len(test)} test images has a label and can be read: {num_broken} are broken")
  return ranks, num_broken


def open_sets(evaluation: Evaluation, folders: str) -> dict[str, Images]:
  """Returns the further sets by the names of their folders, with the labels of the training images.

  Args:
    evaluation: whose training images have classes, and whose sizes the further images get.
    folders: paths separated by commas.

  Raises:
    UserError: a folder is missing, two have the same name, or a sub-folder is no class of the training images.
  """
  train, found = evaluation.train, {}
  for root in (part.strip() for part in folders.split(",") if part.strip()):
    decoding = train.source.decoding
    settings = sources.DataSettings(
      source="folder", root=root, split="", labels="folder", formats="all", image_size=train.image_size,
      reduced_decoding=decoding.reduced, full_range=decoding.full_range, upright=decoding.upright,
      strict=decoding.strict)
    name = Path(root).expanduser().absolute().name
    if name in found:
      raise UserError(f"linear.further={folders}: two folders are called {name}; rename one of them")
    if not train.source.class_names:
      raise UserError(f"linear.further={folders} needs training images with classes")
    found[name] = dataclasses.replace(train, source=_open(settings, train.source.class_names))
  return found


@functools.cache  # the sets are opened for the check and for the measurement
def _open(settings: sources.DataSettings, class_names: tuple[str, ...]) -> sources.Source:
  try:
    return sources.open_source(settings, class_names=class_names)
  except UserError as error:
    raise UserError(f"linear.further: {error}") from error


def judge_sets(sets: Mapping[str, Images], forward_fn: Callable, variables: Mapping[str, Any],
               mesh: Mesh) -> dict[str, dict[str, Any]]:
  """Returns the figures of a classifier on each of the further sets, by name.

  The figures are `top1` and `top5` in [0, 1], `num_classes` of the set, `num_test` and `num_broken_test`.

  Args:
    sets: see `open_sets`.
    forward_fn, variables: see `ranks_by_layer`, of a single layer.
    mesh: the devices.
  """
  judged = {}
  for name, images in sets.items():
    among = np.isin(np.arange(len(images.source.class_names)), images.labels())
    by_layer, num_broken = ranks_by_layer(forward_fn, variables, images, mesh, among=among)
    ranks, = by_layer.values()
    judged[name] = {"top1": float(np.mean(ranks < 1)), "top5": float(np.mean(ranks < 5)),
                    "num_classes": int(among.sum()), "num_test": len(ranks), "num_broken_test": num_broken}
  return judged
