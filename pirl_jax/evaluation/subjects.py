"""Subjects of an evaluation: a subject is a run or an ensemble of runs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from pirl_jax.errors import UserError
from pirl_jax.evaluation.layers import layer_names
from pirl_jax.models.network import Ensemble, Model
from pirl_jax.runs import Run, require_checkpoint
from pirl_jax.weights.opening import is_exported, locate_weights, open_any


@dataclasses.dataclass(frozen=True)
class Subject:
  """A run, or an ensemble of several runs. The texts of an ensemble are those of its runs, joined by "+".

  Attributes:
    runs: the single run, or the runs of the ensemble.
  """

  runs: tuple[Run, ...]

  @property
  def is_ensemble(self) -> bool:
    """Returns whether there are several runs."""
    return len(self.runs) > 1

  @property
  def label(self) -> str:
    """Returns the short name that tables and plots show."""
    return "+".join(run.label for run in self.runs)

  @property
  def checkpoint(self) -> str:
    """Returns the run's folder, or the folders joined by "+", in the notation of `open_subjects`."""
    return "+".join(str(run.folder) for run in self.runs)

  @property
  def folder(self) -> Path:
    """Returns the folder for results: the run's folder, or runs/LABEL for an ensemble or a file of weights."""
    first = self.runs[0].folder
    return Path("runs", self.label.replace("/", "_")) if self.is_ensemble or first.is_file() else first

  @property
  def step(self) -> int | str:
    """Returns the step of the checkpoint; for an ensemble the steps joined by "+"."""
    return "+".join(str(run.step) for run in self.runs) if self.is_ensemble else self.runs[0].step

  @property
  def weights(self) -> str:
    """Returns the checksum of the network's weights, see `Run.weights`; of an ensemble those of its runs."""
    return "+".join(run.weights for run in self.runs)

  @property
  def newest(self) -> bool:
    """Returns whether every checkpoint is the newest of its run."""
    return all(run.newest for run in self.runs)

  @property
  def config(self) -> dict[str, Any]:
    """Returns the run's whole config; for an ensemble {label of the run: config}."""
    configs = {run.label: run.meta["config"] for run in self.runs}
    return configs if self.is_ensemble else configs[self.label]

  @property
  def model(self) -> Model:
    """Returns the restored network, or the ensemble of the restored networks."""
    if not self.is_ensemble:
      return self.runs[0].model
    return Model(Ensemble(tuple(run.model.single for run in self.runs)),
                 tuple(run.model.variables for run in self.runs))


def open_subjects(names: str, step: int, mesh: jax.sharding.Mesh) -> list[Subject]:
  """Returns the subjects that `names` lists, separated by commas: runs, exported folders, files, or ensembles A+B.

  Every run is opened once, at its checkpoint `step` (0: the newest).

  Raises:
    UserError: nothing is named, a run is named twice, a folder holds no run whose parameters fit its config, or the
      networks of an ensemble do not have the same layers.
  """
  require_checkpoint(names)
  wanted = [[locate_weights(part) for part in run_names(name.strip())] for name in names.split(",") if name.strip()]
  folders = list(dict.fromkeys(folder for group in wanted for folder in group))
  short = dict(zip(folders, labels(folders), strict=True))
  subject_labels = ["+".join(short[folder] for folder in group) for group in wanted]
  if len(set(subject_labels)) < len(wanted) or any(len(set(group)) < len(group) for group in wanted):
    raise UserError(f"--config.checkpoint={names} names a run twice")
  runs = {folder: open_any(folder, label, step, mesh) for folder, label in short.items()}
  subjects = [Subject(tuple(runs[folder] for folder in group)) for group in wanted]
  for subject in subjects:
    check_same_layers(subject)
  return subjects


def run_names(name: str) -> list[str]:
  """Returns the names of the runs in A+B.

  A name may contain a plus: if the whole `name` is a run, an exported folder or a file, it is returned as it is.

  Raises:
    UserError: a name is missing before or after a plus.
  """
  whole = Path(name).expanduser()
  if (whole / "checkpoints").is_dir() or whole.is_file() or is_exported(whole) or (
      whole.name == "checkpoints" and whole.is_dir()):
    return [name]
  parts = [part.strip() for part in name.split("+")]
  if not all(parts):
    raise UserError(f"--config.checkpoint={name} has nothing on one side of a plus; an ensemble is RUN+RUN")
  return parts


def check_same_layers(subject: Subject) -> None:
  """Raises UserError unless all networks of an ensemble have layers of the same names."""
  first, *others = subject.runs
  for other in others:
    names = [layer_names(run.model.network) for run in (first, other)]
    if names[0] != names[1]:
      raise UserError(f"{subject.label}: the networks of an ensemble need the same layers, and {first.label} has "
                      f"{', '.join(names[0])}, {other.label} {', '.join(names[1])}")


def labels(folders: Sequence[Path]) -> list[str]:
  """Returns a short name for each folder: as many of the path's last parts as needed to make all names different."""
  for count in range(1, max(len(folder.parts) for folder in folders) + 1):
    names = ["/".join(folder.parts[-count:]) for folder in folders]
    if len(set(names)) == len(names):
      return names
  return [str(folder) for folder in folders]
