"""Linear SVMs on a handful of examples a class, drawn several times: vissl's low-shot VOC07, on any labels.

After vissl: extra_scripts/create_low_shot_samples.py and vissl/utils/svm_utils/svm_low_shot_trainer.py.
Letters: N training images, M held-out images, D numbers of a feature, C classes, G costs, k examples of a class.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from pirl_jax.errors import UserError
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.outcome import Outcome
from pirl_jax.evaluation.protocol import Evaluation, Protocol, Reading
from pirl_jax.evaluation.protocols.svm import (
  GRIDS,
  Classes,
  Examples,
  average_precision,
  check_grid,
  check_labels,
  choose_classes,
  fit,
  read_examples,
  run_fits,
  svm_layers,
  unit_rows,
)
from pirl_jax.figures.curves import Curve
from pirl_jax.models.network import Model
from pirl_jax.runtime.progress import Progress


@dataclasses.dataclass(frozen=True)
class LowShotSettings:
  """What the SVMs are fitted on, and how many.

  Attributes:
    layers: names with commas between them, see `svm.svm_layers`.
    costs: the name of the grid, of `svm.GRIDS`.
    shots: all k, >= 1 (vissl: 1, 2, 4, 8, 16, 32, 64, 96).
    num_draws: of the examples, for each k, >= 1 (vissl: 5).

  Raises:
    UserError: an unknown grid, or a number out of range.
  """

  layers: str
  costs: str
  shots: tuple[int, ...]
  num_draws: int

  def __post_init__(self) -> None:
    check_grid(self.costs, field="low_shot.costs")
    if not self.shots or min(self.shots) < 1:
      raise UserError(f"low_shot.shots={tuple(self.shots)}: numbers of examples from 1 are needed")
    if self.num_draws < 1:
      raise UserError(f"low_shot.num_draws={self.num_draws}; choose 1 or more (vissl: 5)")


class Plan(NamedTuple):
  """What `plan_fits` returns.

  Attributes:
    classes: those that are judged.
    shots: each k for which every class has examples enough.
    left_out: the reason why another k is not, by its name.
  """

  classes: Classes
  shots: list[int]
  left_out: dict[str, str]


def measure_low_shot(model: Model, train: Images, test: Images, settings: LowShotSettings, *, mesh: Mesh,
                     seed: int) -> Outcome:
  """Returns the mean average precision of linear SVMs fitted on k images of a class and (C - 1) k others.

  Whole images, straight to a square. For each k, draw and class, images with it and without are drawn, those that
  show it only as a difficult object never; other draws for each k, so that the examples for k = 1 need not be among
  those for k = 2. There is no cross-validation: of each k the one cost is taken whose mean over classes and draws is
  the highest on the held-out images, the first in the grid of equals. That is how vissl does it, and makes the
  figures a little too good.

  The figures: for each of `layers` `dim`, `num_not_converged` and `shots`, by k `mean`, `min`, `max` and `std` (over
  the draws, with divisor their number) of the mean average precision, `draws` (each), `cost`; `best_layer`, that of
  the highest mean over all k, and its `shots` again; `shots_left_out` and `classes_left_out` with the reason;
  `cost_choice`, `grid`, `num_draws`, `seed`, `num_train`, `num_test`, `num_broken_train`, `num_broken_test`. Draws
  follow from (seed, draw, class, k) and the number of training images alone.

  Args:
    model: the frozen network.
    train: the images that examples are drawn from.
    test: the images that the SVMs are judged on.
    settings: layers, grid, and how many examples.
    mesh: the devices.
    seed: any integer.

  Raises:
    UserError: unknown layer, no labels, fewer than two classes, or too few images for every k.
  """
  layers = svm_layers(model, settings.layers, image_size=train.image_size, field="low_shot.layers")
  shots = sorted(set(settings.shots))
  names = check_labels(train, test)
  plan_fits(names, train.targets(), test.targets(), shots)  # before all that takes long
  # A crop fraction of 1 leaves out the step between the image and the square.
  fit_on, judge_on = (
    read_examples(model, dataclasses.replace(images, crop_fraction=1.0), mesh=mesh, layers=layers,
                  title=f"low-shot: features of {name} images")
    for name, images in (("training", train), ("held-out", test)))
  plan = plan_fits(names, fit_on.targets, judge_on.targets, shots)

  found, costs = {}, GRIDS[settings.costs]
  num_fits = len(plan.shots) * settings.num_draws * len(plan.classes.judged) * len(costs)
  with Progress("low-shot", num_fits * len(layers), unit="fits") as progress:
    for layer in layers:
      found[layer] = _judge_layer(fit_on, judge_on, layer, plan, settings, num_images=len(train), seed=seed,
                                  on_fits=progress.update)

  best = max(layers, key=lambda layer: np.mean([of_k["mean"] for of_k in found[layer]["shots"].values()]))
  shown = found[best]["shots"].values()
  figures = {
    "best_layer": best,
    "shots": found[best]["shots"],
    "layers": found,
    "shots_left_out": plan.left_out,
    "classes_left_out": plan.classes.left_out,
    "cost_choice": "one for each k, chosen on the held-out images, as vissl does",
    "grid": [float(cost) for cost in costs],
    "num_draws": settings.num_draws,
    "seed": seed,
    "num_train": len(fit_on.index),
    "num_test": len(judge_on.index),
    "num_broken_train": fit_on.num_broken,
    "num_broken_test": judge_on.num_broken,
  }
  table = {f"k={k}" if len(layers) == 1 else f"{layer}, k={k}": of_k["mean"]
           for layer in layers for k, of_k in found[layer]["shots"].items()}
  curve = Curve("examples of a class", "mean average precision", plan.shots,
                *([of_k[name] for of_k in shown] for name in ("mean", "min", "max")), log_x=True)
  return Outcome(figures, table, curve)


def draw_examples(targets: np.ndarray, index: np.ndarray, num_images: int, entropy: tuple[int, ...], *,
                  num_present: int, num_absent: int) -> np.ndarray:
  """Returns i64[num_present + num_absent], rows of the images drawn.

  Every image of the set has a number by `entropy` alone (PCG64's stream, which numpy keeps the same for ever), and
  those with the lowest are drawn: without one that cannot be read, the draw is the same but for it.

  Args:
    targets: i8[N] of one class; 1 and 0 are drawn from, -1 never.
    index: i32[N], the images' places in the set.
    num_images: of the set.
    entropy: whole numbers.
    num_present: drawn of the images that show the class, at most as many as there are.
    num_absent: of those that do not.
  """
  numbers = np.random.PCG64([number % 2**64 for number in entropy]).random_raw(num_images)[index]
  drawn = []
  for target, count in ((1, num_present), (0, num_absent)):
    rows = np.flatnonzero(targets == target)
    drawn.append(rows[np.argsort(numbers[rows], kind="stable")[:count]])
  return np.concatenate(drawn)


def plan_fits(names: Sequence[str], train: np.ndarray, test: np.ndarray, shots: Sequence[int]) -> Plan:
  """Returns for which classes and numbers of examples there are images enough.

  Args:
    names: of the classes.
    train: i8[N, C], targets.
    test: i8[M, C], targets.
    shots: each k that is asked for.

  Raises:
    UserError: fewer than two classes, or no k is left.
  """
  classes = choose_classes(names, train, test, least=1)
  if len(classes.judged) < 2:
    raise UserError(f"low-shot SVMs need two classes or more, and only {names[classes.judged[0]]} can be judged")
  possible, left_out = [], {}
  for k in shots:
    for target, needed, words in ((1, k, "show"), (0, (len(classes.judged) - 1) * k, "are without")):
      counts = {label: np.count_nonzero(train[:, label] == target) for label in classes.judged}
      scarce = min(counts, key=lambda label: counts[label])
      if counts[scarce] < needed and str(k) not in left_out:
        left_out[str(k)] = f"{counts[scarce]} training images {words} {names[scarce]}, and {needed} are needed"
    if str(k) not in left_out:
      possible.append(k)
  if not possible:
    raise UserError(f"low_shot.shots={tuple(shots)} are too many examples: {left_out[str(shots[0])]}")
  return Plan(classes, possible, left_out)


def _judge_layer(fit_on: Examples, judge_on: Examples, layer: str, plan: Plan, settings: LowShotSettings, *,
                 num_images: int, seed: int, on_fits: Callable[[int], None]) -> dict[str, Any]:
  """Returns the figures of a layer: `dim`, `num_not_converged` and, by k, `shots`.

  Args:
    fit_on: the images that examples are drawn from.
    judge_on: the images that the SVMs are judged on.
    layer: of their features.
    plan: which classes are judged, and each k.
    settings: the grid, and how many draws.
    num_images: of the set that `fit_on` is of.
    seed: of the draws.
    on_fits: called with the number of fits that have been done since.
  """
  costs, labels, possible = GRIDS[settings.costs], plan.classes.judged, plan.shots
  features, judged_features = (unit_rows(part.features[layer]) for part in (fit_on, judge_on))

  def judge(k: int, draw: int, label: int) -> tuple[list[float], int]:
    rows = draw_examples(fit_on.targets[:, label], fit_on.index, num_images, (seed, draw, label, k),
                         num_present=k, num_absent=(len(labels) - 1) * k)
    machines = fit(features[rows], fit_on.targets[rows, label] == 1, costs, seed=seed)
    return [average_precision(judge_on.targets[:, label], score) for score in machines.decide(judged_features)
            ], machines.num_unfinished

  tasks = [(k, draw, label) for k in possible for draw in range(settings.num_draws) for label in labels]
  num_numbers = fit_on.targets.shape[1] * possible[-1] * features.shape[1]
  precision, num_unfinished = [], 0
  for of_task, unfinished in run_fits(judge, tasks, num_numbers=num_numbers):
    precision.append(of_task)
    num_unfinished += unfinished
    on_fits(len(costs))
  precision = np.reshape(precision, (len(possible), settings.num_draws, len(labels), len(costs))).mean(axis=2)
  return {"dim": features.shape[1], "num_not_converged": num_unfinished,
          "shots": {str(k): _summary(of_k, costs) for k, of_k in zip(possible, precision, strict=True)}}


def _summary(precision: np.ndarray, costs: Sequence[float]) -> dict:
  """Returns the figures of one k by f64[draws, G], means over the classes, at the cost of the highest mean."""
  choice = int(precision.mean(axis=0).argmax())
  draws = precision[:, choice]
  return {"mean": float(draws.mean()), "min": float(draws.min()), "max": float(draws.max()), "std": float(draws.std()),
          "cost": float(costs[choice]), "draws": draws.tolist()}


def _measure(evaluation: Evaluation) -> Outcome:
  return measure_low_shot(evaluation.subject.model, evaluation.train, evaluation.labelled_test(), evaluation.settings,
                          mesh=evaluation.mesh, seed=evaluation.config.seed)


def _check(evaluation: Evaluation) -> None:
  svm_layers(evaluation.subject.model, evaluation.settings.layers, image_size=evaluation.train.image_size,
             field="low_shot.layers")


PROTOCOL = Protocol(
  LowShotSettings, _measure, _check,
  reading=Reading(lambda found: {f"low-shot mAP at {shots}": by["mean"] for shots, by in found["shots"].items()}))
