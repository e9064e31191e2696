"""Linear SVMs on frozen features, each class against the rest: the paper's protocol for VOC07, on any labels.

After vissl (vissl/utils/svm_utils/svm_trainer.py) and the benchmark that the paper used (arXiv 1905.01235, appendix).
Letters: N training images, M held-out images, D numbers of a feature, C classes, G costs.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import joblib
import numpy as np
from jax.sharding import Mesh
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from pirl_jax.errors import UserError
from pirl_jax.evaluation.features import extract_features
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.layers import layer_features, layer_names, named_layers
from pirl_jax.evaluation.outcome import Outcome
from pirl_jax.evaluation.protocol import Evaluation, Protocol, Reading
from pirl_jax.figures.curves import Curve
from pirl_jax.models.network import Model
from pirl_jax.runtime.progress import Progress

PAPER_COSTS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, *(2.0**-power for power in range(4, 20)))
"""The grid of fair_self_supervision_benchmark, which the paper used."""

VISSL_COSTS = (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)

GRIDS = {"paper": PAPER_COSTS, "vissl": VISSL_COSTS}

SMALL_IMAGES = 96
"""Pixels up to which SVMs are fitted on the pooled features alone, if no layer is named."""

MAX_ITER = 2_000
"""Iterations after which a fit ends without having converged."""

MEMORY = 2**34
"""Bytes that the fits at work at the same time may take together; at least one always runs."""


@dataclasses.dataclass(frozen=True)
class SvmSettings:
  """What the SVMs are fitted on, and how their cost is chosen.

  Attributes:
    layers: names with commas between them, see `svm_layers`.
    costs: the name of the grid, of `GRIDS`.
    num_folds: of the cross-validation, >= 2 (vissl: 3).

  Raises:
    UserError: an unknown grid, or too few folds.
  """

  layers: str
  costs: str
  num_folds: int

  def __post_init__(self) -> None:
    check_grid(self.costs, field="svm.costs")
    if self.num_folds < 2:
      raise UserError(f"svm.num_folds={self.num_folds}; cross-validation needs 2 or more (vissl: 3)")


class Examples(NamedTuple):
  """The images of one split that can be read and have a label.

  Attributes:
    features: f32[N, D] by layer.
    targets: i8[N, C], see `Source.targets`.
    index: i32[N], the records' numbers, rising.
    num_broken: images left out because they could not be read.
  """

  features: dict[str, np.ndarray]
  targets: np.ndarray
  index: np.ndarray
  num_broken: int


class Classes(NamedTuple):
  """What `choose_classes` returns.

  Attributes:
    fitted: the labels with enough examples to fit on, rising.
    judged: those of them that a held-out image shows.
    left_out: the reason why the other classes are not judged, by name.
  """

  fitted: list[int]
  judged: list[int]
  left_out: dict[str, str]


class Machines(NamedTuple):
  """One class against the rest, once for each cost.

  Attributes:
    weight: f64[D, G].
    bias: f64[G].
    num_unfinished: of the G, those that did not converge.
  """

  weight: np.ndarray
  bias: np.ndarray
  num_unfinished: int

  def decide(self, features: np.ndarray) -> np.ndarray:
    """Returns f64[G, n] of features f64[n, D]: above 0 where the class is said to be present."""
    return (features @ self.weight + self.bias[None, :]).T


def measure_svm(model: Model, train: Images, test: Images, settings: SvmSettings, *, mesh: Mesh, seed: int) -> Outcome:
  """Returns the mean average precision of linear SVMs on the features of each layer.

  Whole images, squashed to a square (`crops.squash_resize`, with the images' crop fraction). The cost of a class is
  chosen by cross-validation (stratified, not shuffled): that of the highest mean of scikit-learn's average precision,
  the first in the grid of equals. With it the SVM is fitted on all training images. What is there as a difficult
  object alone counts as absent in training, and in the end such images are left out of the class's average precision,
  which is that of `average_precision`.

  The figures: for each of `layers` `mean_average_precision`, `average_precision` and `costs` by class name, `dim`,
  `num_not_converged` (of the fits, see `MAX_ITER`) and, with one label an image, `top1` (the class with the largest
  decision value); those of `best_layer` again (`mean_average_precision`, `top1`); `classes_left_out` with the reason;
  `grid`, `num_folds`, `num_train`, `num_test`, `num_broken_train`, `num_broken_test`. Nothing is random; the number of
  devices and threads and the batch size change nothing but the rounding of features.

  The features of all layers stand in the host's memory: 1.8 GB for the five maps of a ResNet-50 and VOC07.

  Args:
    model: the frozen network.
    train: the images that the SVMs are fitted on.
    test: the images that they are judged on.
    settings: layers, grid and folds.
    mesh: the devices.
    seed: LinearSVC's random_state; the solver used draws nothing.

  Raises:
    UserError: unknown layer, no labels, or no class with images enough.
  """
  layers = svm_layers(model, settings.layers, image_size=train.image_size, field="svm.layers")
  costs, num_folds = GRIDS[settings.costs], settings.num_folds
  names = check_labels(train, test)
  choose_classes(names, train.targets(), test.targets(), least=num_folds)  # before all that takes long
  fit_on = read_examples(model, train, mesh=mesh, layers=layers, title="SVM: features of training images")
  judge_on = read_examples(model, test, mesh=mesh, layers=layers, title="SVM: features of held-out images")
  classes = choose_classes(names, fit_on.targets, judge_on.targets, least=num_folds)

  found: dict[str, dict[str, Any]] = {}
  num_fits = len(classes.fitted) * (num_folds * len(costs) + 1)
  with Progress("SVM", num_fits * len(layers), unit="fits") as progress:
    for layer in layers:
      chosen, scores, num_unfinished = _fit_layer(
        unit_rows(fit_on.features[layer]), fit_on.targets, unit_rows(judge_on.features[layer]), classes.fitted,
        costs=costs, num_folds=num_folds, seed=seed, on_fits=progress.update)
      precision = {names[label]: average_precision(judge_on.targets[:, label], scores[label])
                   for label in classes.judged}
      found[layer] = {
        "mean_average_precision": float(np.mean(list(precision.values()))),
        **({} if train.source.multi_label else {"top1": _top1(scores, judge_on.targets)}),
        "average_precision": precision,
        "costs": {names[label]: float(costs[choice]) for label, choice in chosen.items()},
        "dim": fit_on.features[layer].shape[1],
        "num_not_converged": num_unfinished,
      }
  best = max(layers, key=lambda layer: found[layer]["mean_average_precision"])  # of equals the first
  summary = {name: found[best][name] for name in ("mean_average_precision", "top1") if name in found[best]}
  figures = {
    **summary,
    "best_layer": best,
    "layers": found,
    "classes_left_out": classes.left_out,
    "grid": [float(cost) for cost in costs],
    "num_folds": num_folds,
    "num_train": len(fit_on.index),
    "num_test": len(judge_on.index),
    "num_broken_train": fit_on.num_broken,
    "num_broken_test": judge_on.num_broken,
  }
  return Outcome(figures, *_table_and_curve(found))


def _table_and_curve(found: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, float], Curve]:
  """Returns them for the figures of each layer: over the layers, or of a single one over the classes."""
  if len(found) > 1:
    by_layer = {layer: figures["mean_average_precision"] for layer, figures in found.items()}
    return ({f"mean average precision, {layer}": value for layer, value in by_layer.items()},
            Curve("layer", "mean average precision", list(by_layer), list(by_layer.values())))
  figures, = found.values()
  shown = {"mean average precision": "mean_average_precision", "top-1": "top1"}
  precision = figures["average_precision"]
  return ({row: figures[name] for row, name in shown.items() if name in figures},
          Curve("class", "average precision", list(precision), list(precision.values())))


def check_grid(name: str, *, field: str) -> None:
  """Raises UserError, naming the config field, for an unknown grid of costs."""
  if name not in GRIDS:
    raise UserError(f"{field}={name!r} is unknown; choose from {', '.join(GRIDS)}")


def svm_layers(model: Model, names: str, *, image_size: int, field: str) -> tuple[str, ...]:
  """Returns the layers that SVMs are fitted on: those named; else the pooled features of small images, or every map.

  Raises:
    UserError: see `layers.named_layers`, as are the arguments.
  """
  otherwise = ("pooled",) if image_size <= SMALL_IMAGES else layer_names(model.network)[:-1]
  return named_layers(model, names, otherwise=otherwise, image_size=image_size, field=field)


def check_labels(train: Images, test: Images) -> tuple[str, ...]:
  """Returns the names of the classes.

  Raises:
    UserError: there are none, or others among the held-out images.
  """
  for name, images in (("training", train), ("held-out", test)):
    if not images.source.class_names:
      raise UserError(f"SVMs need labels, and the {name} images have none "
                      "(for folders of classes: --config.data.labels=folder)")
  if train.source.class_names != test.source.class_names:
    raise UserError("SVMs are judged on the classes they were fitted on, and the held-out images have others: "
                    f"{', '.join(test.source.class_names[:5])}, ...; the training images have "
                    f"{', '.join(train.source.class_names[:5])}, ...")
  return train.source.class_names


def choose_classes(names: Sequence[str], train: np.ndarray, test: np.ndarray, *, least: int) -> Classes:
  """Returns the classes that can be fitted, and judged.

  Args:
    names: of the classes.
    train: i8[N, C], targets.
    test: i8[M, C], targets.
    least: images with the class, and images without, that a fit needs.

  Raises:
    UserError: none can be judged.
  """
  present = np.count_nonzero(train == 1, axis=0)
  shown = np.any(test == 1, axis=0)
  fitted, left_out = [], {}
  for label, name in enumerate(names):
    if present[label] < least:
      left_out[name] = f"{present[label]} training images show it, and {least} are needed"
    elif len(train) - present[label] < least:
      left_out[name] = f"{len(train) - present[label]} training images are without it, and {least} are needed"
    else:
      fitted.append(label)
      if not shown[label]:
        left_out[name] = "no held-out image shows it"
  judged = [label for label in fitted if shown[label]]
  if not judged:
    reasons = "; ".join(f"{name}: {why}" for name, why in list(left_out.items())[:3])
    raise UserError(f"SVMs need labels, and none of the {len(names)} classes has enough of them ({reasons})")
  return Classes(fitted, judged, left_out)


def read_examples(model: Model, images: Images, *, mesh: Mesh, layers: Sequence[str], title: str) -> Examples:
  """Returns the features of whole images, squashed to a square, and their targets; `title` is the progress line's.

  Raises:
    UserError: no image can be read.
  """
  with Progress(title, len(images)) as progress:
    found = extract_features(layer_features(model.network, tuple(layers)), model.variables,
                             images.test_batches(squash=True), mesh, on_batch=progress.update)
  known = np.full(len(found.index), True) if images.source.multi_label else found.labels >= 0
  return Examples({layer: rows[known] for layer, rows in found.features.items()},
                  images.targets()[found.index[known]], found.index[known], found.num_broken)


def unit_rows(features: np.ndarray) -> np.ndarray:
  """Returns f64[N, D], each row over its length plus 1e-5, as vissl's SVMs take it."""
  features = features.astype(np.float64)
  return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-5)


def fit(features: np.ndarray, present: np.ndarray, costs: Sequence[float], *, seed: int) -> Machines:
  """Returns LinearSVC with vissl's settings but for the solver.

  vissl solves the dual, here it is the primal: the same optimum, which it reaches at every cost, while the dual gives
  up after `MAX_ITER` from about C = 100 on (average precision then differs by up to 0.003). Measured on textures the
  primal takes a fifth of the time where images outnumber features, and up to 1.6 times as long where they do not.
  What decides: the dual draws from the one generator that all of liblinear's threads share, so it does not repeat.

  Args:
    features: f64[N, D].
    present: bool[N], of both kinds.
    costs: G of them.
    seed: see `measure_svm`.
  """
  targets = np.where(present, 1, -1)
  found = [
    LinearSVC(C=cost, penalty="l2", loss="squared_hinge", dual=False, tol=1e-4, max_iter=MAX_ITER,
              class_weight={1: 2, -1: 1}, intercept_scaling=1, random_state=seed % 2**32).fit(features, targets)
    for cost in costs]
  return Machines(np.concatenate([machine.coef_ for machine in found]).T,
                  np.concatenate([machine.intercept_ for machine in found]),
                  sum(int(machine.n_iter_ >= MAX_ITER) for machine in found))


def run_fits(fit_fn: Callable[..., Any], tasks: Iterable[tuple], *, num_numbers: int) -> Iterator[Any]:
  """Yields fit_fn(*task) of each task, in their order; threads work on several (liblinear leaves the lock to others).

  Args:
    fit_fn: what to do, by calls of `fit`.
    tasks: its arguments.
    num_numbers: N * D of the largest fit.
  """
  # A selection of the images, 8 bytes a number, and liblinear's own copy, 16 bytes.
  num_threads = max(1, min(joblib.cpu_count(), MEMORY // (24 * num_numbers)))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConvergenceWarning)  # `Machines` counts
    yield from joblib.Parallel(num_threads, backend="threading", return_as="generator")(
      joblib.delayed(fit_fn)(*task) for task in tasks)


def _fit_layer(features: np.ndarray, targets: np.ndarray, judged_features: np.ndarray, labels: Sequence[int], *,
               costs: Sequence[float], num_folds: int, seed: int,
               on_fits: Callable[[int], None]) -> tuple[dict[int, int], dict[int, np.ndarray], int]:
  """Returns ({label: place of its cost in the grid}, {label: f64[M] decision values}, fits that did not converge)."""
  def validate(label: int, kept: np.ndarray, held_out: np.ndarray) -> tuple[list[float], int]:
    present = targets[:, label] == 1
    machines = fit(features[kept], present[kept], costs, seed=seed)
    scores = machines.decide(features[held_out])
    return [average_precision_score(present[held_out], score) for score in scores], machines.num_unfinished

  def refit(label: int, cost: float) -> tuple[np.ndarray, int]:
    machines = fit(features, targets[:, label] == 1, (cost,), seed=seed)
    return machines.decide(judged_features)[0], machines.num_unfinished

  folds = StratifiedKFold(num_folds)
  tasks = ((label, *fold) for label in labels for fold in folds.split(features, targets[:, label] == 1))
  precision, num_unfinished = [], 0
  for of_fold, unfinished in run_fits(validate, tasks, num_numbers=features.size):
    precision.append(of_fold)
    num_unfinished += unfinished
    on_fits(len(costs))
  choice = np.reshape(precision, (len(labels), num_folds, len(costs))).mean(axis=1).argmax(axis=1)  # [classes]
  chosen = dict(zip(labels, choice.tolist(), strict=True))
  scores = {}
  tasks = [(label, costs[chosen[label]]) for label in labels]
  for label, (score, unfinished) in zip(labels, run_fits(refit, tasks, num_numbers=features.size), strict=True):
    scores[label] = score
    num_unfinished += unfinished
    on_fits(1)
  return chosen, scores, num_unfinished


def _top1(scores: dict[int, np.ndarray], targets: np.ndarray) -> float:
  """Returns the share of images whose class has the largest decision value, in [0, 1]; of equals the first counts."""
  labels = np.array(list(scores))
  said = labels[np.argmax(np.stack(list(scores.values())), axis=0)]
  return float(np.mean(targets[np.arange(len(targets)), said] == 1))


def average_precision(targets: np.ndarray, scores: np.ndarray) -> float:
  """Returns the average precision of one class as VOC's devkit (from 2010 on) and vissl take it, in (0, 1].

  It is the area under the curve of precision over recall. Precision is first made to rise nowhere along the curve: at
  each recall it is the highest at that recall or a higher one; the area then is summed at every change of recall
  (vissl: vissl/utils/svm_utils/evaluate.py). Images of equal score are taken together, as scikit-learn's
  `precision_recall_curve` does, so that their order does not matter; scikit-learn's own `average_precision_score`
  leaves precision as it is, and so is never higher.

  Args:
    targets: i[N]: 1 present, 0 absent, -1 neither ("difficult"), left out. At least one is 1.
    scores: f[N], finite; higher means more surely present.
  """
  judged = targets >= 0
  present, scores = targets[judged] == 1, scores[judged]
  order = np.argsort(-scores, kind="stable")
  last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # of its equals
  hits = np.cumsum(present[order])[last]
  precision = np.maximum.accumulate((hits / (last + 1))[::-1])[::-1]
  recall = hits / hits[-1]
  return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def _measure(evaluation: Evaluation) -> Outcome:
  return measure_svm(evaluation.subject.model, evaluation.train, evaluation.labelled_test(), evaluation.settings,
                     mesh=evaluation.mesh, seed=evaluation.config.seed)


def _check(evaluation: Evaluation) -> None:
  svm_layers(evaluation.subject.model, evaluation.settings.layers, image_size=evaluation.train.image_size,
             field="svm.layers")


PROTOCOL = Protocol(
  SvmSettings, _measure, _check,
  reading=Reading(lambda found: {"SVM mAP of the best layer": found["mean_average_precision"]},
                  ("SVM mAP", "mean_average_precision")))
