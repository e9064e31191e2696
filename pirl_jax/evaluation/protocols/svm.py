"""Linear one-vs-rest SVMs on frozen features: the paper's protocol for VOC07, for any labelled images.

The procedure follows vissl (vissl/utils/svm_utils/svm_trainer.py) and the benchmark that the paper used (arXiv
1905.01235, appendix).

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
"""The costs C of fair_self_supervision_benchmark, which the paper used."""

VISSL_COSTS = (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)

GRIDS = {"paper": PAPER_COSTS, "vissl": VISSL_COSTS}

SMALL_IMAGES = 96
"""If no layer is named, SVMs of images up to this size in pixels are fitted on the pooled features alone."""

MAX_ITER = 2_000
"""Largest number of iterations of a fit; a fit that needs more has not converged."""

MEMORY = 2**34
"""Bytes that all fits running at the same time may take together; one fit always runs."""


@dataclasses.dataclass(frozen=True)
class SvmSettings:
  """Which layers the SVMs are fitted on, and how their cost is chosen.

  Attributes:
    layers: names separated by commas, see `svm_layers`.
    costs: name of the grid of costs, one of `GRIDS`.
    num_folds: number of folds of the cross-validation, >= 2 (vissl: 3).

  Raises:
    UserError: the grid is unknown, or there are too few folds.
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
    index: i32[N], the indices of the records, in ascending order.
    num_broken: number of images that were left out because they could not be read.
  """

  features: dict[str, np.ndarray]
  targets: np.ndarray
  index: np.ndarray
  num_broken: int


class Classes(NamedTuple):
  """The classes that can be used, from `choose_classes`.

  Attributes:
    fitted: the labels with enough training examples for a fit, in ascending order.
    judged: the labels of `fitted` that at least one held-out image shows; only these get an average precision.
    left_out: for every other class, by its name, the reason why it gets no average precision.
  """

  fitted: list[int]
  judged: list[int]
  left_out: dict[str, str]


class Machines(NamedTuple):
  """The fitted SVMs of one class against the rest, one for each cost.

  Attributes:
    weight: f64[D, G].
    bias: f64[G].
    num_unfinished: number of the G fits that did not converge.
  """

  weight: np.ndarray
  bias: np.ndarray
  num_unfinished: int

  def decide(self, features: np.ndarray) -> np.ndarray:
    """Returns the decision values f64[G, n] of features f64[n, D]; above 0 means that the class is present."""
    return (features @ self.weight + self.bias[None, :]).T


def measure_svm(model: Model, train: Images, test: Images, settings: SvmSettings, *, mesh: Mesh, seed: int) -> Outcome:
  """Returns the mean average precision of linear SVMs on the features of each layer.

  The features are those of whole images, stretched to a square (`crops.squash_resize`, with the images' crop fraction).
  The cost of a class is chosen by cross-validation, stratified and not shuffled: the cost with the highest mean of
  scikit-learn's average precision, the first in the grid of equals. With this cost the SVM is fitted on all training
  images. In training, an image that shows a class only as a difficult object counts as an image without the class. In
  the test, such an image is left out of the average precision of the class (see `average_precision`).

  The outcome's figures:

  - `layers`: for each layer `mean_average_precision`, `average_precision` and `costs` by class name, `dim` (D),
    `num_not_converged` (number of fits, see `MAX_ITER`) and, if each image has one label, `top1` (the predicted class
    is the one with the largest decision value).
  - `best_layer`, with its `mean_average_precision` and `top1` once more.
  - `classes_left_out` with the reasons; `grid`, `num_folds`, `num_train`, `num_test`, `num_broken_train`,
    `num_broken_test`.

  Nothing is random. The number of devices, the number of threads and the batch size change only the rounding of the
  features.

  The features of all layers are in the host's memory: 1.8 GB for the five maps of a ResNet-50 and VOC07.

  Args:
    model: the frozen network.
    train: the images that the SVMs are fitted on.
    test: the images that the SVMs are tested on.
    settings: layers, grid and folds.
    mesh: the devices.
    seed: LinearSVC's random_state; the solver that is used draws no random numbers.

  Raises:
    UserError: a layer is unknown, there are no labels, or no class has enough images.
  """
  layers = svm_layers(model, settings.layers, image_size=train.image_size, field="svm.layers")
  costs, num_folds = GRIDS[settings.costs], settings.num_folds
  names = check_labels(train, test)
  choose_classes(names, train.targets(), test.targets(), least=num_folds)  # fails before the long work
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
  best = max(layers, key=lambda layer: found[layer]["mean_average_precision"])  # the first of equals
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
  """Returns (table, curve) of the figures of each layer; with a single layer the curve is over the classes."""
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
  """Returns the layers that SVMs are fitted on.

  These are the layers in `names`. If `names` is empty, they are the pooled features for images of up to `SMALL_IMAGES`
  pixels, and all maps of the trunk for larger images. For the arguments see `layers.named_layers`.

  Raises:
    UserError: see `layers.named_layers`.
  """
  otherwise = ("pooled",) if image_size <= SMALL_IMAGES else layer_names(model.network)[:-1]
  return named_layers(model, names, otherwise=otherwise, image_size=image_size, field=field)


def check_labels(train: Images, test: Images) -> tuple[str, ...]:
  """Returns the names of the classes.

  Raises:
    UserError: there are no classes, or the held-out images have other classes than the training images.
  """
  for name, images in (("training", train), ("held-out", test)):
    if not images.source.class_names:
      raise UserError(f"SVMs need labels, and the {name} images have none "
                      "(for folders of classes: --config.data.labels=folder)")
  if train.source.class_names != test.source.class_names:
    raise UserError("SVMs are tested on the classes that they were fitted on, but the held-out images have others: "
                    f"{', '.join(test.source.class_names[:5])}, ...; the training images have "
                    f"{', '.join(train.source.class_names[:5])}, ...")
  return train.source.class_names


def choose_classes(names: Sequence[str], train: np.ndarray, test: np.ndarray, *, least: int) -> Classes:
  """Returns the classes that can be fitted and tested.

  Args:
    names: of the classes.
    train: i8[N, C], targets of the training images.
    test: i8[M, C], targets of the held-out images.
    least: a fit needs this many images that show the class, and this many that do not.

  Raises:
    UserError: no class can be fitted and tested.
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
  """Returns features and targets of whole images, stretched to a square; `title` is shown in the progress line.

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
  """Returns f64[N, D]: each row of `features` divided by (its length + 1e-5), as for vissl's SVMs."""
  features = features.astype(np.float64)
  return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-5)


def fit(features: np.ndarray, present: np.ndarray, costs: Sequence[float], *, seed: int) -> Machines:
  """Returns the fitted SVMs of one class: LinearSVC with vissl's settings, except for the solver.

  vissl solves the dual problem; here the primal problem is solved. Both have the same optimum. The primal solver
  reaches the optimum at every cost. The dual solver stops after `MAX_ITER` iterations from about C = 100 on, and then
  the average precision differs by up to 0.003. On textures the primal solver took a fifth of the time with more images
  than features, and up to 1.6 times as long with fewer. The deciding reason: the dual solver draws from one random
  generator that all of liblinear's threads share, so its results cannot be repeated.

  Args:
    features: f64[N, D].
    present: bool[N], whether the image shows the class; both values must occur.
    costs: the G costs.
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
  """Yields fit_fn(*task) for each task, in the order of the tasks. Threads run several tasks at a time.

  Threads suffice, because liblinear releases Python's global lock.

  Args:
    fit_fn: the function to run; it calls `fit`.
    tasks: the arguments of `fit_fn` for each task.
    num_numbers: N * D of the largest fit.
  """
  # A fit needs a selection of the images, with 8 bytes a number, and liblinear's own copy, with 16 bytes a number.
  num_threads = max(1, min(joblib.cpu_count(), MEMORY // (24 * num_numbers)))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConvergenceWarning)  # `Machines.num_unfinished` counts these fits
    yield from joblib.Parallel(num_threads, backend="threading", return_as="generator")(
      joblib.delayed(fit_fn)(*task) for task in tasks)


def _fit_layer(features: np.ndarray, targets: np.ndarray, judged_features: np.ndarray, labels: Sequence[int], *,
               costs: Sequence[float], num_folds: int, seed: int,
               on_fits: Callable[[int], None]) -> tuple[dict[int, int], dict[int, np.ndarray], int]:
  """Returns ({label: position of its cost in the grid}, {label: f64[M] decision values}, number of failed fits).

  A fit that does not converge counts as failed.
  """
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
  """Returns the share of images, in [0, 1], whose class has the largest decision value; of equals the first counts."""
  labels = np.array(list(scores))
  said = labels[np.argmax(np.stack(list(scores.values())), axis=0)]
  return float(np.mean(targets[np.arange(len(targets)), said] == 1))


def average_precision(targets: np.ndarray, scores: np.ndarray) -> float:
  """Returns the average precision of one class in (0, 1], by the definition of VOC's devkit (from 2010 on) and vissl.

  The average precision is the area under the curve of precision over recall. The precision at each recall is first
  replaced by the highest precision at this or a higher recall, so the curve never rises. The area is then summed over
  all changes of recall (vissl: vissl/utils/svm_utils/evaluate.py). Images of equal score are taken together, as in
  scikit-learn's `precision_recall_curve`, so their order does not matter. scikit-learn's own `average_precision_score`
  uses the precision without this replacement and is therefore never higher.

  Args:
    targets: i[N]: 1 the class is present, 0 absent, -1 only as a difficult object (such images are left out). At least
      one value is 1.
    scores: f[N], finite; a higher score means that the class is more surely present.
  """
  judged = targets >= 0
  present, scores = targets[judged] == 1, scores[judged]
  order = np.argsort(-scores, kind="stable")
  last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # the last image of each group of equal scores
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
