"""A study from its config: pre-train every run, judge it, and set the figures side by side.

A run belongs to its config and not to a study: WORKDIR/runs/SYSTEM-DIGEST-SEED is trained once, whichever studies ask
for it, and holds the results of all its evaluations. WORKDIR/NAME holds the table and the figure of one study, made
anew from the runs' result files each time. One study at a time may work in a folder.
"""

import ast
import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import math
import re
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import configs
from configs import evaluate as evaluations
from pirl_jax.errors import UserError
from pirl_jax.evaluation import evaluate
from pirl_jax.evaluation.evaluate import READINGS
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.storage.files import read_json, write_file, write_json
from pirl_jax.studies import figures as study_figures
from pirl_jax.studies.figures import PAPER, Cell, Panel
from pirl_jax.training import pretrain
from pirl_jax.training.parts import build, check_config

PLOTS = ("lines", "bars", "layers", "distances")
NO_SYSTEMS = ("__init__", "base", "checkpoints", "data_sets", "evaluate", "study")
"""Files of configs/ that describe no pre-training."""

OWN_FIELDS = ("job", "name", "seed")
OWN_EVALUATION_FIELDS = ("job", "protocol", "name", "checkpoint", "step")
"""What a study sets itself, of a run and of an evaluation."""

MARK = "trained.json"
"""In a run's folder, written when its training has returned: the step of its last checkpoint."""

COMPILED_SECONDS = 0.3
"""Programs that took less to compile are not kept on disk."""


@dataclasses.dataclass(frozen=True)
class Point:
  """A place in the study: `series` and `x` name it, `system` and `settings` (FIELD=VALUE ...) say what is trained."""

  series: str
  x: str
  system: str
  settings: str

  @property
  def label(self) -> str:
    """Returns SERIES X."""
    return f"{self.series} {self.x}".strip()


@dataclasses.dataclass(frozen=True)
class Run:
  """One seed of a point, with its evaluation.

  Attributes:
    point: of the study.
    config: of the pre-training, with seed and name.
    evaluation: config of the evaluation.
    folder: of the run.
  """

  point: Point
  config: ConfigDict
  evaluation: ConfigDict
  folder: Path

  @property
  def step(self) -> int | None:
    """Returns the last step of the training, or None before it has ended."""
    return (read_json(self.folder / MARK) or {}).get("step")

  @property
  def trained(self) -> bool:
    """Returns whether the training has ended and its last checkpoint is there."""
    return self.step is not None and (self.folder / "checkpoints" / str(self.step)).is_dir()

  def result(self) -> dict[str, Any] | None:
    """Returns the result file of this very evaluation of the last checkpoint, or None."""
    protocol = self.evaluation.protocol
    asked = json.loads(json.dumps(self.evaluation[protocol].to_dict()))
    # Pictures other than the run's own give the file a longer name.
    for path in sorted((self.folder / "results").glob(f"{self.evaluation.name}*.json")):
      stored = read_json(path) or {}
      settings = stored.get("settings", {})
      if (stored.get("step"), settings.get(protocol), settings.get("seed")) == (self.step, asked, self.evaluation.seed):
        return stored
    return None


def run(config: ConfigDict, workdir: str) -> None:
  """Trains and judges what is not yet done of the study in `workdir`, and writes table and figure.

  Without a `workdir` ("") the folder is runs/study.

  Raises:
    UserError: the study or one of its runs is not possible (before anything is trained), or a run came to nothing.
  """
  root = Path(workdir or "runs/study")
  check_study(config, root)
  points = read_points(config)
  runs = [create_run(config, point, seed, root) for point in points for seed in config.seeds]
  # Read once: every process of several must come to the same list.
  waiting = {run.folder: run for run in runs if run.result() is None}
  check_runs(runs, waiting.values())
  print(format_plan(points, runs, waiting), flush=True)
  keep_compiled(root / "compiled")
  carry_out(list(waiting.values()))
  if jax.process_index() == 0:
    report(config, runs, root / config.name)


def check_study(config: ConfigDict, root: Path) -> None:
  """Raises UserError for a value that no study could have."""
  def require(holds, field, rule):
    if not holds:
      raise UserError(f"{field}={config[field]!r} is not possible: {rule}")

  whole = all(type(seed) is int for seed in config.seeds)
  require(config.seeds and whole and len(set(config.seeds)) == len(config.seeds), "seeds",
          "one or more whole numbers are needed, each once")
  require(re.fullmatch(r"[A-Za-z0-9_.\-]+", config.name) and config.name.strip(".") and
          config.name not in ("runs", "compiled"), "name",
          "it becomes a folder: letters, digits, _ . - only, and neither runs nor compiled")
  require(config.plot in PLOTS, "plot", f"choose from {', '.join(PLOTS)}")
  require(config.evaluation in evaluations.VARIANTS, "evaluation", f"choose from {', '.join(evaluations.VARIANTS)}")
  protocol = evaluations.get_config(config.evaluation).protocol
  require(protocol in READINGS, "evaluation", "it gives no figure to compare")
  require(config.plot != "layers" or READINGS[protocol].by_layer, "plot",
          f"{protocol} has no figure for each layer; linear and svm do")
  require(config.plot != "distances" or protocol == "invariance", "plot",
          f"{protocol} has no distances; invariance does")
  if "," in str(root):
    raise UserError(f"--workdir={root} has a comma, which stands between runs in an evaluation; choose another")


def read_points(config: ConfigDict) -> list[Point]:
  """Returns the points of the study.

  Raises:
    UserError: none, one that is not written as a point, two of the same name, an x that is not a number where it has to
      be, or a reference that is none of them.
  """
  points = []
  for text in filter(str.strip, re.split(r"[;\n]", f"{config.points}\n{config.more_points}")):
    parts = [part.strip() for part in text.split("|")]
    if len(parts) != 3 or not parts[0] or not parts[2]:
      raise UserError(f"the point {text.strip()!r} is not written as SERIES | X | SYSTEM FIELD=VALUE ... (X may be "
                      "empty; between points stands a semicolon)")
    system, _, settings = parts[2].partition(" ")
    points.append(Point(parts[0], parts[1], system, settings.strip()))
  if not points:
    raise UserError("the study has no points; --config.points='PIRL | 0.5 | pirl pretext_weight=0.5; ...'")
  labels = [point.label for point in points]
  for label in labels:
    if labels.count(label) > 1:
      raise UserError(f"two points are called {label!r}; give one another SERIES or X")
  if config.plot == "lines":
    for point in points:
      if not _is_number(point.x) or (config.log_x and float(point.x) <= 0):
        raise UserError(f"the point {point.label!r} has x={point.x!r}; plot=lines needs a number"
                        f"{' above 0' if config.log_x else ''} there")
  if config.reference and config.reference not in labels:
    raise UserError(f"reference={config.reference!r} is no point of the study; choose from {', '.join(labels)}, or "
                    "--config.reference= for none")
  return points


def _is_number(text):
  try:
    return math.isfinite(float(text))
  except ValueError:
    return False


def create_run(config: ConfigDict, point: Point, seed: int, root: Path) -> Run:
  """Returns the run of a point with one seed: the configs of its training and of its evaluation, and its folder.

  Raises:
    UserError: an unknown system or variant, or a setting that its config does not take.
  """
  run_config = system_config(point.system, config.variant)
  evaluation = evaluations.get_config(config.evaluation)
  if not config.variant:
    set_fields(run_config, config.embedded.settings, where="embedded.settings", fixed=OWN_FIELDS, system=point.system)
    set_fields(evaluation, config.embedded.evaluation_settings, where="embedded.evaluation_settings",
               fixed=OWN_EVALUATION_FIELDS)
  set_fields(run_config, config.settings, where="settings", fixed=OWN_FIELDS, system=point.system)
  set_fields(run_config, point.settings, where=f"the point {point.label!r}", fixed=OWN_FIELDS)
  set_fields(evaluation, config.evaluation_settings, where="evaluation_settings", fixed=OWN_EVALUATION_FIELDS)
  run_config.seed = seed
  run_config.name = f"{point.system}-{digest(run_config, ('name', 'seed'))}-{seed}"
  folder = root / "runs" / run_config.name
  evaluation.name = f"{config.evaluation}-{digest(evaluation, OWN_EVALUATION_FIELDS)}"
  evaluation.checkpoint = str(folder)
  return Run(point, run_config, evaluation, folder)


def system_config(system: str, variant: str) -> ConfigDict:
  """Returns the config of configs/SYSTEM.py:VARIANT.

  Raises:
    UserError: there is no such file or variant.
  """
  if system not in systems():
    raise UserError(f"configs/ has no system {system!r}; choose from {', '.join(systems())}")
  return importlib.import_module(f"configs.{system}").get_config(variant)


@functools.cache
def systems() -> list[str]:
  """Returns the names of the files of configs/ that describe a pre-training."""
  return sorted(path.stem for folder in configs.__path__ for path in Path(folder).glob("*.py")
                if path.stem not in NO_SYSTEMS)


def set_fields(config: ConfigDict, text: str, *, where: str, fixed: Iterable[str] = (), system: str = "") -> None:
  """Sets fields of `config` in place, each with a value of the type that the field has.

  Args:
    config: any.
    text: FIELD=VALUE ..., with blanks between them; groups as GROUP.FIELD. Numbers and texts as they are, true or
      false, tuples in parentheses; what holds blanks in quotes.
    where: named in an error.
    fixed: fields that may not be set.
    system: whose config it is; SYSTEM:FIELD=VALUE of any other is passed over.

  Raises:
    UserError: the text is not so written, there is no such field, or the value is of another type.
  """
  try:
    parts = shlex.split(text)
  except ValueError as error:
    raise UserError(f"{where}: {text!r} cannot be read ({error})") from error
  for assignment in parts:
    field, equals, value = assignment.partition("=")
    if not equals:
      raise UserError(f"{where}: {assignment!r} is not FIELD=VALUE; a value with blanks needs quotes")
    owner, colon, own_field = field.partition(":")
    if colon and owner not in systems():
      raise UserError(f"{where}: there is no system {owner!r}; choose from {', '.join(systems())}")
    if colon and owner != system:
      continue
    field = own_field if colon else field
    if field in fixed:
      raise UserError(f"{where}: {field} cannot be set here, the study does it")
    *groups, name = field.split(".")
    group = config
    for part in groups:
      group = group.get(part) if isinstance(group, ConfigDict) else None
    if not isinstance(group, ConfigDict) or name not in group or isinstance(group[name], ConfigDict):
      raise UserError(f"{where}: there is no config field {field}")
    kind = group.get_type(name)  # known of a field without a value too
    try:
      group[name] = PARSERS[kind](value)
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
      raise UserError(f"{where}: {field}={value} is not possible: it is of type {kind.__name__}") from error


def _tuple(text):
  value = ast.literal_eval(text)
  if not isinstance(value, tuple):
    raise ValueError
  return value


PARSERS = {str: str, int: int, float: float, bool: lambda text: {"true": True, "false": False}[text.lower()],
           tuple: _tuple}


def digest(config: ConfigDict, without: Iterable[str]) -> str:
  """Returns eight hexadecimal digits of all fields but those named."""
  fields = {name: value for name, value in config.to_dict().items() if name not in without}
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]


def check_runs(runs: Iterable[Run], waiting: Iterable[Run]) -> None:
  """Raises UserError for a run that its config or its data makes impossible.

  Args:
    runs: all of them; their configs are looked at.
    waiting: those that have no result yet; of the points not yet trained the data are opened too.
  """
  first = {}
  for run in waiting:
    if not run.trained:
      first.setdefault(run.point, run)
  for run in runs:
    with _named(run):
      check_config(run.config)
      if first.get(run.point) is run:
        with contextlib.redirect_stdout(io.StringIO()):  # the pictures found are told when the run begins
          parts = build(run.config, run.folder)
        _check_labels(run, parts)


def _check_labels(run, parts):
  """Raises UserError if the evaluation is of the run's own pictures and they lack what it needs."""
  protocol = run.evaluation.protocol
  if protocol == "invariance" or any(value is not None for value in run.evaluation.data.to_dict().values()):
    return
  if parts.test is None and protocol != "retrieval":
    raise UserError(f"{protocol} needs held-out pictures; name them with --config.settings='evaluate.split=...'")
  if not parts.train.class_names:
    raise UserError(f"{protocol} needs labels, and the training pictures have none; for folders of classes: "
                    "--config.settings='data.labels=folder'")


@contextlib.contextmanager
def _named(run):
  """Puts the name of the run before what a UserError says."""
  try:
    yield
  except UserError as error:
    raise UserError(f"{run.point.label}, seed {run.config.seed}: {error}") from error


def format_plan(points: Sequence[Point], runs: Sequence[Run], waiting: dict[Path, Run]) -> str:
  """Returns lines of text: what is done already, and what is to do."""
  folders = {run.folder for run in runs}
  lines = [f"{len(points)} points, {len(folders)} runs, {len(folders) - len(waiting)} of them done"]
  width = max(len(point.label) for point in points)
  for point in points:
    seeds = {True: [], False: []}
    for run in runs:
      if run.point == point:
        seeds[run.folder in waiting].append(str(run.config.seed))
    parts = [f"{word}: seed{'s' if len(found) > 1 else ''} {', '.join(found)}"
             for word, found in (("done", seeds[False]), ("to do", seeds[True])) if found]
    lines.append(f"  {point.label:<{width}}  {'; '.join(parts)}")
  return "\n".join(lines)


def keep_compiled(folder: Path) -> None:
  """Lets JAX keep its compiled programs in `folder`, so that runs of one program compile it once.

  A folder that was chosen already (JAX_COMPILATION_CACHE_DIR) stays.
  """
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", COMPILED_SECONDS)


def carry_out(waiting: Sequence[Run]) -> None:
  """Trains the runs that are not trained, and judges all of them.

  Raises:
    UserError: a run came to nothing.
  """
  started = time.perf_counter()
  for number, run in enumerate(waiting, 1):
    done = number - 1
    each = (time.perf_counter() - started) / done if done else None
    left = f", about {math.ceil(each * (len(waiting) - done) / 60)} min left" if done else ""
    print(f"\nrun {number} of {len(waiting)}: {run.point.label}, seed {run.config.seed}, in {run.folder}{left}",
          flush=True)
    with _named(run):
      if not run.trained:
        train(run)
      evaluate.run(run.evaluation, "")


def train(run: Run) -> None:
  """Pre-trains the run, or goes on with it, and marks it as trained."""
  started = time.perf_counter()
  pretrain.run(run.config, str(run.folder))
  with Checkpoints(run.folder / "checkpoints", keep=run.config.checkpoint.keep) as checkpoints:
    step = checkpoints.steps()[-1]
  if jax.process_index() == 0:
    write_json(run.folder / MARK, {"step": step, "seconds": round(time.perf_counter() - started, 1)})


def report(config: ConfigDict, runs: Sequence[Run], folder: Path) -> None:
  """Writes study.csv, study.json and study.png into `folder`, and prints the table.

  Raises:
    UserError: a result lacks a figure that the study needs.
  """
  results = {run.folder: run.result() for run in runs}
  cells = create_cells(runs, results, config.reference)
  shown = [cell for cell in cells if bool(cell.layer) == (config.plot == "layers")]
  share = evaluate.PROTOCOLS[runs[0].evaluation.protocol].share
  write_rows(folder / "study.csv", config.study, runs, cells)
  write_json(folder / "study.json", {
    "study": config.study, "evaluation": config.evaluation, "seeds": config.seeds, "reference": config.reference,
    "std": "over the seeds, with divisor their number less one",
    "difference": "to the reference, seed by seed: the mean, and its 95 % interval by Student's t, each for itself",
    "cells": [cell.to_json() for cell in cells],
    "runs": [{"point": run.point.label, "seed": run.config.seed, "folder": str(run.folder)} for run in runs],
    "config": config.to_dict()})
  title = f"{config.name}: {config.evaluation}"
  study_figures.save_panels(folder / "study.png", title, create_panels(config, runs, results, shown, share=share))
  title += f", seed{'s' if len(config.seeds) > 1 else ''} {', '.join(map(str, config.seeds))}"
  print("\n" + study_figures.format_table(title, shown, reference=config.reference, share=share))
  print("written: " + ", ".join(str(folder / f"study.{ending}") for ending in ("csv", "json", "png")))


def create_cells(runs: Sequence[Run], results: Mapping[Path, dict[str, Any]], reference: str) -> list[Cell]:
  """Returns every figure of every point, with its difference to the reference point.

  Args:
    runs: in the order of points and seeds.
    results: the result of each, by the run's folder.
    reference: label of a point, or "": none.

  Raises:
    UserError: a result lacks a figure.
  """
  values = {}  # of (point, figure, layer), in the order of the seeds
  for run in runs:
    with _named(run):
      for (figure, layer), value in read_figures(run.evaluation.protocol, results[run.folder]["figures"]).items():
        values.setdefault((run.point, figure, layer), []).append(value)
  base = {figure: found for (point, figure, _), found in values.items() if point.label == reference}
  cells = []
  for (point, figure, layer), found in values.items():
    # A layer that the reference's network does not have is compared with nothing.
    compared = point.label != reference and figure in base
    difference = study_figures.paired_difference(found, base[figure]) if compared else None
    cells.append(Cell(point.series, point.x, figure, layer, tuple(found), difference))
  return cells


def read_figures(protocol: str, figures: dict[str, Any]) -> dict[tuple[str, str], float]:
  """Returns the figures that a study takes, by name and layer ("" where it is of none); the one to draw comes first.

  Raises:
    UserError: one is not there.
  """
  reading = READINGS[protocol]
  try:
    found = {(name, ""): value for name, value in reading.figures(figures).items()}
    if reading.by_layer:
      name, stored = reading.by_layer
      found |= {(f"{name} of {layer}", layer): by[stored] for layer, by in figures["layers"].items()}
  except KeyError as error:
    raise UserError(f"the result of {protocol} has no {error.args[0]}; it may need labels") from error
  return found


def write_rows(path: Path, study: str, runs: Sequence[Run], cells: Sequence[Cell]) -> None:
  """Writes the long table: a row for each figure of each run, an accuracy as a share in [0, 1]."""
  of_point = {}
  for run in runs:
    of_point.setdefault(run.point.label, []).append(run)
  table = io.StringIO(newline="")
  writer = csv.writer(table)
  writer.writerow(["study", "series", "x", "seed", "figure", "layer", "value", "run"])
  for cell in cells:
    for run, value in zip(of_point[cell.label], cell.values, strict=True):
      writer.writerow([study, cell.series, cell.x, run.config.seed, cell.figure, cell.layer, value, run.folder])
  write_file(path, table.getvalue().encode())


def create_panels(config: ConfigDict, runs: Sequence[Run], results: Mapping[Path, dict[str, Any]],
                  cells: Sequence[Cell], *, share: bool) -> list[Panel]:
  """Returns the panels of the study's figure: its own, and the paper's where its numbers are known.

  Args:
    config: of the study.
    runs: all of them.
    results: by the run's folder.
    cells: those that the table shows.
    share: whether their figures are shares.
  """
  title = f"here, {config.variant or 'embedded textures'}, {runs[0].config.model.arch}"
  first = [cell for cell in cells if cell.figure == cells[0].figure]
  if config.plot in ("lines", "layers"):
    drawn, figure = (first, first[0].figure) if config.plot == "lines" else (
      cells, READINGS[runs[0].evaluation.protocol].by_layer[0])
    panels = [study_figures.lines_panel(drawn, title=title, figure=figure, x_label=config.x_label, log_x=config.log_x,
                                        share=share)]
  elif config.plot == "bars":
    panels = study_figures.bars_panels(first, title=title, reference=config.reference, share=share)
  else:
    matched = {}
    for run in runs:
      matched.setdefault(run.point.label, []).append(results[run.folder]["figures"]["matched"])
    panels = [study_figures.distances_panel(matched, title=title, x_label=config.x_label)]
  return [*panels, PAPER[config.study]] if config.study in PAPER else panels
