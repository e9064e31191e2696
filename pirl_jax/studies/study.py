"""A study from its config: pre-train every run, evaluate it, and compare the figures.

A run is identified by its config, not by a study. The run in WORKDIR/runs/SYSTEM-DIGEST-SEED is trained once, even if
several studies need it, and its folder holds the results of all its evaluations. WORKDIR/NAME holds the table and the
figure of one study, which are written again from the runs' result files each time. Only one study at a time may work in
a folder.
"""

import contextlib
import io
import math
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from pirl_jax.configs import evaluate as evaluations
from pirl_jax.configs.study import systems
from pirl_jax.errors import UserError
from pirl_jax.evaluation import evaluate
from pirl_jax.evaluation.protocols import protocol_of, reading_of
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.storage.files import write_json
from pirl_jax.storage.logbook import METRICS
from pirl_jax.storage.rows import read_rows, training_seconds
from pirl_jax.studies.points import MARK, Point, Trial, create_trial, named, read_points
from pirl_jax.studies.report import report
from pirl_jax.training import pretrain
from pirl_jax.training.parts import Parts, build, check_config

TRAINS = True
"""If this job is asked to stop, it saves the state of its run and ends with exit code 0, see `launching.jobs`."""

PLOTS = ("lines", "bars", "layers", "distances")


def run(config: ConfigDict, workdir: str) -> None:
  """Trains and evaluates those runs of the study in `workdir` that are not done yet; writes the table and the figure.

  If `workdir` is "", the folder is runs/study.

  Raises:
    UserError: the study or one of its runs is not possible (raised before anything is trained), or a run failed.
  """
  root = Path(workdir or "runs/study")
  check_study(config, root)
  points = read_points(config)
  trials = [create_trial(config, point, seed, root) for point in points for seed in config.seeds]
  # The results are read once: if there are several processes, all of them must get the same list.
  waiting = {trial.folder: trial for trial in trials if trial.result() is None}
  check_trials(trials, waiting.values())
  print(format_plan(points, trials, waiting), flush=True)
  run_trials(list(waiting.values()))
  if jax.process_index() == 0:
    report(config, trials, root / config.name)


def check_study(config: ConfigDict, root: Path) -> None:
  """Raises UserError for a value that is wrong in every study."""
  def require(holds: Any, field: str, rule: str) -> None:
    if not holds:
      raise UserError(f"{field}={config[field]!r} is not possible: {rule}")

  whole = all(type(seed) is int for seed in config.seeds)
  require(config.seeds and whole and len(set(config.seeds)) == len(config.seeds), "seeds",
          "one or more whole numbers are needed, each once")
  require(re.fullmatch(r"[A-Za-z0-9_.\-]+", config.name) and config.name.strip(".") and
          config.name != "runs", "name", "it becomes a folder: letters, digits, _ . - only, and not runs")
  require(config.plot in PLOTS, "plot", f"choose from {', '.join(PLOTS)}")
  require(config.evaluation in evaluations.VARIANTS, "evaluation", f"choose from {', '.join(evaluations.VARIANTS)}")
  protocol = evaluations.get_config(config.evaluation).protocol
  reading = protocol_of(protocol).reading
  if reading is None:
    raise UserError(f"evaluation={config.evaluation!r} is not possible: it gives no figure to compare")
  require(config.plot != "layers" or reading.by_layer, "plot",
          f"{protocol} has no figure for each layer; linear and svm do")
  require(config.plot != "distances" or reading.distances, "plot", f"{protocol} has no distances; invariance does")
  unknown = {*config.system_settings, *config.embedded.system_settings}.difference(systems())
  if unknown:
    raise UserError(f"system_settings: configs/ has no system {min(unknown)!r}; choose from {', '.join(systems())}")
  if "," in str(root):
    raise UserError(f"--workdir={root} has a comma, which stands between runs in an evaluation; choose another")


def check_trials(trials: Iterable[Trial], waiting: Iterable[Trial]) -> None:
  """Raises UserError for a trial that its config or its data makes impossible.

  Args:
    trials: all trials; their configs are checked.
    waiting: the trials without a result. For each point that has an untrained trial the data are opened, too.
  """
  first = {}
  for trial in waiting:
    if not trial.trained:
      first.setdefault(trial.point, trial)
  for trial in trials:
    with named(trial):
      check_config(trial.config)
      if first.get(trial.point) is trial:
        with contextlib.redirect_stdout(io.StringIO()):  # the description of the images is printed when the run starts
          parts = build(trial.config, trial.folder)
        _check_labels(trial, parts)


def _check_labels(trial: Trial, parts: Parts) -> None:
  """Raises UserError if the evaluation uses the run's own images and these lack held-out images or labels."""
  protocol = trial.evaluation.protocol
  reading = reading_of(protocol)
  if any(value is not None for value in trial.evaluation.data.to_dict().values()):
    return
  if parts.test is None and reading.needs_test:
    raise UserError(f"{protocol} needs held-out images; name them with --config.settings.evaluate.split=...")
  if not parts.train.class_names and reading.needs_labels:
    raise UserError(f"{protocol} needs labels, and the training images have none; for folders of classes: "
                    "--config.settings.data.labels=folder")


def format_plan(points: Sequence[Point], trials: Sequence[Trial], waiting: dict[Path, Trial]) -> str:
  """Returns lines of text: for each point the seeds that are done and the seeds that are to do."""
  folders = {trial.folder for trial in trials}
  lines = [f"{len(points)} points, {len(folders)} runs, {len(folders) - len(waiting)} of them done"]
  width = max(len(point.label) for point in points)
  for point in points:
    seeds = {True: [], False: []}
    for trial in trials:
      if trial.point == point:
        seeds[trial.folder in waiting].append(str(trial.config.seed))
    parts = [f"{word}: seed{'s' if len(found) > 1 else ''} {', '.join(found)}"
             for word, found in (("done", seeds[False]), ("to do", seeds[True])) if found]
    lines.append(f"  {point.label:<{width}}  {'; '.join(parts)}")
  return "\n".join(lines)


def run_trials(waiting: Sequence[Trial]) -> None:
  """Trains the trials that are not trained yet, and evaluates all trials in `waiting`.

  Raises:
    UserError: a run failed.
  """
  started = time.perf_counter()
  for number, trial in enumerate(waiting, 1):
    done = number - 1
    seconds = time.perf_counter() - started
    left = f", about {math.ceil(seconds / done * (len(waiting) - done) / 60)} min left" if done else ""
    print(f"\nrun {number} of {len(waiting)}: {trial.point.label}, seed {trial.config.seed}, in {trial.folder}{left}",
          flush=True)
    with named(trial):
      if not trial.trained:
        train_trial(trial)
      evaluate.run(trial.evaluation, "")


def train_trial(trial: Trial) -> None:
  """Pre-trains the run of a trial, or resumes it, and marks it as trained."""
  pretrain.run(trial.config, str(trial.folder))
  with Checkpoints(trial.folder / "checkpoints", keep=trial.config.checkpoint.keep) as checkpoints:
    step = checkpoints.steps()[-1]
  if jax.process_index() == 0:
    seconds = training_seconds(read_rows(trial.folder / METRICS), trial.config.batch_size)
    write_json(trial.folder / MARK, {"step": step, "seconds": round(seconds, 1)})
