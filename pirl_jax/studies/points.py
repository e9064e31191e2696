"""The points of a study, and a trial for each seed of a point."""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pirl_jax.configs import evaluate as evaluations
from pirl_jax.configs.base import get_base
from pirl_jax.configs.study import OWN_EVALUATION_FIELDS, OWN_FIELDS, systems
from pirl_jax.errors import UserError
from pirl_jax.storage.checksums import json_checksum
from pirl_jax.storage.files import read_json
from pirl_jax.storage.formats import YOUNGER_FIELDS, upgrade_config
from pirl_jax.storage.settings import difference, flatten

MARK = "trained.json"
"""A file in a run's folder, written when its training has ended; the file holds the step of the last checkpoint."""

EXAMPLE = '''--config.points='[("PIRL", 0.5, "pirl", {"pretext_weight": 0.5}), ...]\''''


YOUNGER_OF_EVALUATIONS = {**dict.fromkeys(YOUNGER_FIELDS), "linear.further": "", "linear.init": "normal",
                           "invariance.centred": False, "invariance.augmented": False}
"""What `YOUNGER_FIELDS` are for the config of an evaluation: the values with which a digest leaves a field out."""


@dataclasses.dataclass(frozen=True)
class Point:
  """A point of the study: one setting of one system.

  Attributes:
    series: name of the line to which the point belongs.
    x: position of the point on the line, a number or a text; "" if the series has a single point.
    system: the system that is trained: the name of a file of configs/ without its ending.
    fields: fields of the system's config that are set, {"group.field": value}.
  """

  series: str
  x: float | str
  system: str
  fields: Mapping[str, Any] = dataclasses.field(hash=False)

  @property
  def label(self) -> str:
    """Returns SERIES X."""
    return f"{self.series} {self.x}".strip()


@dataclasses.dataclass(frozen=True)
class Trial:
  """The run of one seed of a point, and its evaluation.

  Attributes:
    point: of the study.
    config: of the pre-training, with seed and name.
    evaluation: config of the evaluation.
    folder: the folder of the run.
  """

  point: Point
  config: ConfigDict
  evaluation: ConfigDict
  folder: Path

  @property
  def step(self) -> int | None:
    """Returns the last step of the training, or None if the training has not ended."""
    return (read_json(self.folder / MARK) or {}).get("step")

  @property
  def weights(self) -> str | None:
    """Returns what `Run.weights` is for the last checkpoint; None if the checkpoint has no checksums."""
    meta = read_json(self.folder / "checkpoints" / str(self.step) / "meta" / "metadata") or {}
    model = meta.get("checksums", {}).get("model")
    return json_checksum(model) if model else None

  @property
  def trained(self) -> bool:
    """Returns whether the training has ended and its last checkpoint is on disk."""
    return self.step is not None and (self.folder / "checkpoints" / str(self.step)).is_dir()

  def result(self) -> dict[str, Any] | None:
    """Returns the content of the result file of this evaluation of the last checkpoint, or None."""
    protocol = self.evaluation.protocol
    asked, weights = json.loads(json.dumps(self.evaluation[protocol].to_dict())), self.weights
    # If the evaluation uses images other than the run's own, the file has a longer name.
    for path in sorted((self.folder / "results").glob(f"{self.evaluation.name}*.json")):
      stored = read_json(path) or {}
      settings = stored.get("settings", {})
      # A result that is older than the field `weights`, or than checksums, is taken as it is.
      same_weights = settings.get("weights") is None or weights in (None, settings["weights"])
      if same_weights and (stored.get("step"), settings.get(protocol), settings.get("seed")) == (
          self.step, asked, self.evaluation.seed):
        return stored
    return None


def read_points(config: ConfigDict) -> list[Point]:
  """Returns the points of the study.

  Raises:
    UserError: there are no points, a point has the wrong form, two points have the same name, an x must be a number and
      is not, or the reference is not one of the points.
  """
  points = [read_point(point) for point in (*config.points, *config.more_points)]
  if not points:
    raise UserError(f"the study has no points; {EXAMPLE}")
  check_points(points, plot=config.plot, log_x=config.log_x, reference=config.reference)
  return points


def read_point(point: Any) -> Point:
  """Returns the point that (SERIES, X, SYSTEM, {FIELD: VALUE, ...}) describes.

  Raises:
    UserError: `point` has another form.
  """
  if isinstance(point, (tuple, list)) and len(point) == 4:
    series, x, system, fields = point
    texts = isinstance(series, str) and isinstance(system, str) and series
    if texts and isinstance(x, (int, float, str)) and not isinstance(x, bool) and isinstance(fields, Mapping):
      return Point(series, x, system, fields)
  raise UserError(f"the point {point!r} is not (SERIES, X, SYSTEM, {{FIELD: VALUE, ...}}), as in {EXAMPLE}; X is a "
                  "number or a text, which may be empty")


def check_points(points: Sequence[Point], *, plot: str, log_x: bool, reference: str) -> None:
  """Raises UserError if two points have the same label, or if the points cannot be plotted or compared."""
  labels = [point.label for point in points]
  for label in labels:
    if labels.count(label) > 1:
      raise UserError(f"two points are called {label!r}; give one another SERIES or X")
  for point in points:
    if plot == "lines" and (isinstance(point.x, str) or not math.isfinite(point.x) or (log_x and point.x <= 0)):
      raise UserError(f"the point {point.label!r} has x={point.x!r}; plot=lines needs a number"
                      f"{' above 0' if log_x else ''} there")
  if reference and reference not in labels:
    raise UserError(f"reference={reference!r} is no point of the study; choose from {', '.join(labels)}, or "
                    "--config.reference= for none")


def create_trial(config: ConfigDict, point: Point, seed: int, root: Path) -> Trial:
  """Returns one seed of a point: the configs of its training and of its evaluation, and its folder.

  Raises:
    UserError: the system or the variant is unknown, or the config does not accept a field or a value.
  """
  run_config = system_config(point.system, config.variant)
  # A study measures its runs itself. A variant's report, export and verdict would only take time, and change the
  # digest.
  run_config.update_from_flattened_dict({"report": False, "export": False, "evaluate.views": 0})
  evaluation = evaluations.get_config(config.evaluation)
  embedded = [] if config.variant else [("embedded.", config.embedded)]
  for where, groups in [*embedded, ("", config)]:
    of_system = groups.system_settings.get(point.system, ConfigDict())
    set_fields(run_config, given(groups.settings), where=f"{where}settings", fixed=OWN_FIELDS)
    set_fields(run_config, given(of_system), where=f"{where}system_settings.{point.system}", fixed=OWN_FIELDS)
    set_fields(evaluation, given(groups.evaluation_settings), where=f"{where}evaluation_settings",
               fixed=OWN_EVALUATION_FIELDS)
  set_fields(run_config, point.fields, where=f"the point {point.label!r}", fixed=OWN_FIELDS)
  run_config.seed = seed
  run_config.name = f"{point.system}-{digest(run_config, ('name', 'seed'), younger_fields())}-{seed}"
  folder = root / "runs" / run_config.name
  if not folder.is_dir() and (older := older_folder(root / "runs", f"{point.system}-*-{seed}", run_config)):
    folder, run_config.name = older, older.name
  evaluation.name = f"{config.evaluation}-{digest(evaluation, OWN_EVALUATION_FIELDS, YOUNGER_OF_EVALUATIONS)}"
  evaluation.checkpoint = str(folder)
  return Trial(point, run_config, evaluation, folder)


def older_folder(runs: Path, pattern: str, config: ConfigDict) -> Path | None:
  """Returns the folder of an older run with the same config, or None.

  If a version of the program adds config fields, the digest in the folder's name changes. Runs of older versions are
  found here by comparing the configs.

  Args:
    runs: the folder that holds the folders of runs.
    pattern: glob pattern for the folder's name.
    config: of the run; its field `name` is not compared.
  """
  now = json.loads(json.dumps(config.to_dict()))
  for path in sorted(runs.glob(f"{pattern}/config.json")):
    try:
      stored = upgrade_config(read_json(path) or {})
    except (KeyError, TypeError, AttributeError):  # a damaged config; only a run in that folder needs to report it
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
  return importlib.import_module(f"pirl_jax.configs.{system}").get_config(variant)


def given(config: ConfigDict) -> dict[str, Any]:
  """Returns the fields that have a value, as {"group.field": value}."""
  return {name: value for name, value in flatten(config.to_dict()).items() if value is not None}


def set_fields(config: ConfigDict, fields: Mapping[str, Any], *, where: str, fixed: Iterable[str]) -> None:
  """Sets fields of `config` in place.

  Args:
    config: any config.
    fields: {"group.field": value}; a value must have the type of its field; a float field also takes a whole number.
    where: where the fields were given; the error message names it.
    fixed: fields that may not be set.

  Raises:
    UserError: there is no such field, or the value has another type.
  """
  for field, value in fields.items():
    if field in fixed:
      raise UserError(f"{where}: {field} cannot be set here, the study does it")
    *groups, name = str(field).split(".")
    group = config
    for part in groups:
      group = group.get(part) if isinstance(group, ConfigDict) else None
    if not isinstance(group, ConfigDict) or name not in group or isinstance(group[name], ConfigDict):
      raise UserError(f"{where}: there is no config field {field}")
    kind = group.get_type(name)  # a field without a value has a type, too
    accepted = {float: (int, float), tuple: (tuple, list)}.get(kind, kind)
    # bool is a subclass of int in Python, so isinstance alone would accept True as a number.
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
      raise UserError(f"{where}: {field}={value!r} is not possible: it is of type {kind.__name__}")
    group[name] = value


def younger_fields() -> dict[str, Any]:
  """Returns {"group.field": value in configs/base.py} of `YOUNGER_FIELDS`."""
  base = flatten(get_base().to_dict())
  return {name: base[name] for name in YOUNGER_FIELDS}


def digest(config: ConfigDict, without: Iterable[str], younger: Mapping[str, Any]) -> str:
  """Returns eight hexadecimal digits, a hash of all fields except those in `without`.

  Args:
    config: of a run or an evaluation.
    without: fields that are left out.
    younger: {"group.field": value}; such a field is left out if it has this value.
  """
  fields = {name: value for name, value in config.to_dict().items() if name not in without}
  for name, value in younger.items():
    group, _, field = name.rpartition(".")
    holder = fields.get(group, {}) if group else fields
    if field in holder and holder[field] == value:
      del holder[field]
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]


@contextlib.contextmanager
def named(trial: Trial) -> Iterator[None]:
  """Puts the name of the trial before the message of a UserError."""
  try:
    yield
  except UserError as error:
    raise UserError(f"{trial.point.label}, seed {trial.config.seed}: {error}") from error
