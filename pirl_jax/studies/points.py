"""The points of a study, and a run for each seed of a point."""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import math
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import configs
from configs import evaluate as evaluations
from pirl_jax.errors import UserError
from pirl_jax.storage.files import read_json
from pirl_jax.storage.formats import upgrade_config
from pirl_jax.storage.settings import difference

NO_SYSTEMS = ("__init__", "base", "checkpoints", "data_sets", "evaluate", "study")
"""Files of configs/ that describe no pre-training."""

OWN_FIELDS = ("job", "name", "seed")
OWN_EVALUATION_FIELDS = ("job", "protocol", "name", "checkpoint", "step")
"""What a study sets itself, of a run and of an evaluation."""

MARK = "trained.json"
"""In a run's folder, written when its training has returned: the step of its last checkpoint."""


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
  if not folder.is_dir() and (older := older_folder(root / "runs", f"{point.system}-*-{seed}", run_config)):
    folder, run_config.name = older, older.name
  evaluation.name = f"{config.evaluation}-{digest(evaluation, OWN_EVALUATION_FIELDS)}"
  evaluation.checkpoint = str(folder)
  return Run(point, run_config, evaluation, folder)


def older_folder(runs: Path, pattern: str, config: ConfigDict) -> Path | None:
  """Returns the folder of a run of this very config that a program with fewer fields named by another digest, or None.

  Args:
    runs: where to look.
    pattern: of the folder's name.
    config: of the run; its name does not count.
  """
  now = json.loads(json.dumps(config.to_dict()))
  for path in sorted(runs.glob(f"{pattern}/config.json")):
    try:
      stored = upgrade_config(read_json(path) or {})
    except (KeyError, TypeError, AttributeError):  # it is damaged, which matters to whoever trains there
      continue
    if difference(stored, now, free=("name",)) is None:
      return path.parent
  return None


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


@contextlib.contextmanager
def named(run):
  """Puts the name of the run before what a UserError says."""
  try:
    yield
  except UserError as error:
    raise UserError(f"{run.point.label}, seed {run.config.seed}: {error}") from error
