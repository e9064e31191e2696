"""Classifies images with a classifier that `linear` or `semi_supervised` has kept, and writes a CSV file.

Letters: B images of a batch, L classes.
"""

import contextlib
import csv
import dataclasses
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pirl_jax.data.reading import why_broken
from pirl_jax.errors import UserError
from pirl_jax.evaluation.features import stream_features
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.kept import ENDING, Kept, read_classifier
from pirl_jax.evaluation.outcome import Outcome
from pirl_jax.evaluation.protocol import Evaluation, Protocol, beside
from pirl_jax.evaluation.protocols.linear import linear_logits
from pirl_jax.evaluation.protocols.semi_supervised import fine_tuned_logits
from pirl_jax.models.network import Model
from pirl_jax.runtime.progress import Progress
from pirl_jax.storage.files import replacing

TOP = 5
"""Number of classes that are named for each image."""

MOST_COLUMNS = 100
"""If there are no more classes, each has a column with its probability."""

NAMES_SHOWN = 10
"""Number of images that cannot be read whose names are told."""


@dataclasses.dataclass(frozen=True)
class PredictSettings:
  """Which classifier predicts.

  Attributes:
    classifier: "linear" or "semi_supervised"; None takes the newest of both.

  Raises:
    UserError: another classifier.
  """

  classifier: str | None

  def __post_init__(self) -> None:
    if self.classifier not in (None, *_LOGITS):
      raise UserError(f"predict.classifier={self.classifier!r} is unknown; choose one of: {', '.join(_LOGITS)}")


def write_predictions(model: Model, images: Images, kept: Kept, *, mesh: Mesh, path: Path) -> Outcome:
  """Writes a line for each image that can be read, in the order of their index, and returns what was written.

  The columns: `name`; `class` and `probability` of the most likely class; `label`, if the images have labels;
  `class_2`, `probability_2` and so on for the next classes, up to `TOP`; and `p(CLASS)` for every class, if there are
  no more than `MOST_COLUMNS`. The probabilities are the softmax of the logits, so over all classes they sum to 1. Of
  equally likely classes the lower one comes first.

  The outcome's figures: `written`, `classifier` (path), `step`, `num_classes`, `num_images` (lines), `num_broken`,
  `broken` (names of the first images that cannot be read), `counts` (lines by predicted class), `mean_probability` of
  the predicted class and, for labelled images, `num_labelled` and `top1`.

  Args:
    model: the network on which the classifier was trained.
    images: with or without labels.
    kept: the classifier.
    mesh: the devices.
    path: the file.

  Raises:
    UserError: no image can be read.
  """
  classes, source = kept.about["class_names"], images.source
  forward_fn, variables = _LOGITS[kept.about["protocol"]](model, kept)
  labelled = bool(source.class_names)
  seen, sure, hits, counts = np.zeros(len(images), bool), [], [], np.zeros(len(classes), int)
  writing = replacing(path) if jax.process_index() == 0 else contextlib.nullcontext(io.BytesIO())
  with writing as file, Progress("predict", len(images)) as progress:
    text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
    lines = csv.writer(text)
    lines.writerow(_columns(classes, labelled))
    for part in stream_features(forward_fn, variables, images.test_batches(), mesh):
      seen[part.index] = True
      for index, label, share in zip(part.index.tolist(), part.labels.tolist(), _softmax(part.features), strict=True):
        order = np.argsort(-share, kind="stable")[:TOP].tolist()
        found = [cell for one in order for cell in (classes[one], f"{share[one]:.6g}")]
        name = [source.class_names[label] if label >= 0 else ""] if labelled else []
        every = [f"{value:.6g}" for value in share] if len(classes) <= MOST_COLUMNS else []
        lines.writerow([source.image_name(index), *found[:2], *name, *found[2:], *every])
        counts[order[0]] += 1
        sure.append(share[order[0]])
        if label >= 0:
          hits.append(source.class_names[label] == classes[order[0]])
      progress.update(len(part.index) + part.num_broken)
    if not seen.any():
      raise UserError(f"nothing to predict: none of the {len(images)} images can be read")
    text.detach()
  broken = np.flatnonzero(~seen)
  for index in broken[:NAMES_SHOWN].tolist():
    print(f"left out, cannot be read: {source.image_name(index)} ({why_broken(source, index)})")
  accuracy = {"num_labelled": len(hits), "top1": float(np.mean(hits))} if hits else {}
  return Outcome(
    figures={
      "written": [str(path)], "classifier": str(kept.path), "step": kept.about["step"], "num_classes": len(classes),
      "num_images": int(seen.sum()), "num_broken": len(broken),
      "broken": [source.image_name(i) for i in broken[:NAMES_SHOWN].tolist()],
      "counts": {name: int(count) for name, count in zip(classes, counts, strict=True) if count},
      "mean_probability": float(np.mean(sure)), **accuracy},
    table={"mean probability": float(np.mean(sure)), **({"top-1": accuracy["top1"]} if accuracy else {})})


def _columns(classes: list[str], labelled: bool) -> list[str]:
  following = [f"{what}_{rank}" for rank in range(2, min(TOP, len(classes)) + 1) for what in ("class", "probability")]
  every = [f"p({name})" for name in classes] if len(classes) <= MOST_COLUMNS else []
  return ["name", "class", "probability", *(["label"] if labelled else []), *following, *every]


def _softmax(logits: np.ndarray) -> np.ndarray:
  """Returns f64[B, L], the softmax over the classes."""
  exp = np.exp(np.float64(logits) - logits.max(axis=1, keepdims=True))
  return exp / exp.sum(axis=1, keepdims=True)


def _linear_logits(model: Model, kept: Kept) -> tuple[Callable, dict[str, Any]]:
  layer = kept.about["layer"]
  forward_fn = linear_logits(model.network, (layer,))
  own = {name: {layer: kept.variables.get(name, {})} for name in ("params", "stats")}
  return lambda variables, image: forward_fn(variables, image)[layer], {"frozen": model.variables, **own}


def _fine_tuned_logits(model: Model, kept: Kept) -> tuple[Callable, dict[str, Any]]:
  return fine_tuned_logits(model.single.trunk, len(kept.about["class_names"])), kept.variables


_LOGITS: Mapping[str, Callable[[Model, Kept], tuple[Callable, dict[str, Any]]]] = {
  "linear": _linear_logits, "semi_supervised": _fine_tuned_logits}
"""For each protocol that keeps a classifier: (forward_fn(variables, image) -> logits f32[B, L], variables)."""


def _chosen(evaluation: Evaluation) -> Kept:
  """Returns the classifier that the settings choose.

  Raises:
    UserError: there is none, or it does not fit the run's step, the network, the size of the images or their classes.
  """
  settings, subject, images = evaluation.settings, evaluation.subject, evaluation.train
  several = "," in evaluation.config.checkpoint.strip(", ")  # then the results are not in the folders of the runs
  folder = subject.folder / "results" if several else evaluation.output.parent
  paths = sorted(folder.glob(f"*-{ENDING}"), key=lambda path: path.stat().st_mtime, reverse=True)
  found = [kept for kept in map(read_classifier, paths)
           if settings.classifier in (None, kept.about["protocol"])]
  train = (f"python launch.py --config=configs/evaluate.py:{settings.classifier or 'linear'} "
           f"--config.checkpoint={subject.checkpoint}")
  if not found:
    raise UserError(f"there is no classifier in {folder}; train one, with labelled images: {train}")
  fitting = [kept for kept in found if kept.about["step"] == subject.step]
  own = [kept for kept in fitting if kept.about.get("weights", subject.weights) == subject.weights]
  if fitting and not own:
    raise UserError(f"{fitting[0].path} was trained on other weights than those of {subject.label}, although its step "
                    f"is the same; train one again: {train}")
  if not fitting:
    raise UserError(f"{found[0].path} was trained on step {found[0].about['step']}, and the run is opened at step "
                    f"{subject.step}; choose --config.step={found[0].about['step']}, or train one again: {train}")
  kept = own[0]
  if kept.about["image_size"] != images.image_size:
    raise UserError(f"{kept.path} was trained on images of {kept.about['image_size']} pixels, and here they have "
                    f"{images.image_size}; add --config.data.image_size={kept.about['image_size']}")
  unknown = sorted({*images.source.class_names} - {*kept.about["class_names"]})
  if unknown:
    raise UserError(f"the images have {len(unknown)} classes that {kept.path} does not know ({', '.join(unknown[:3])}"
                    f"{', ...' if len(unknown) > 3 else ''}); --config.data.labels=none leaves the labels out")
  try:
    forward_fn, variables = _LOGITS[kept.about["protocol"]](subject.model, kept)
    like = jax.ShapeDtypeStruct((1, images.image_size, images.image_size, 3), jnp.float32)
    logits = jax.eval_shape(forward_fn, variables, like)
    assert logits.shape == (1, len(kept.about["class_names"]))
  except Exception as error:  # Flax and NumPy raise errors of many types for arrays of other names or shapes
    raise UserError(f"{kept.path} does not fit the network of {subject.label}; train the classifier again: "
                    f"{train}") from error
  return kept


def _measure(evaluation: Evaluation) -> Outcome:
  kept = _chosen(evaluation)
  print(f"classifier: {kept.path}, {len(kept.about['class_names'])} classes, "
        f"right for {kept.about['top1']:.1%} of its held-out images")
  path = beside(evaluation, "classes", "csv")
  return write_predictions(evaluation.subject.model, evaluation.train, kept, mesh=evaluation.mesh, path=path)


PROTOCOL = Protocol(PredictSettings, _measure, _chosen)
