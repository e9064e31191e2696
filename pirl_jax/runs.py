"""Pre-training runs that are there already, with the network of one of their checkpoints."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pirl_jax import system
from pirl_jax.checkpoints import Checkpoints
from pirl_jax.errors import UserError
from pirl_jax.evaluation.inputs import Model


@dataclasses.dataclass(frozen=True)
class Run:
  """A pre-training run and the checkpoint of it that is judged.

  Attributes:
    label: short name in tables and plots.
    folder: the run's folder.
    step: of the checkpoint.
    newest: whether it is the newest of the run.
    meta: of the checkpoint; its "config" is the run's whole config.
    model: the restored network.
  """

  label: str
  folder: Path
  step: int
  newest: bool
  meta: dict[str, Any]
  model: Model


def open_runs(names: str, step: int, mesh: jax.sharding.Mesh) -> list[Run]:
  """Returns the runs named in `names`, with commas between them, each with its checkpoint `step` (0: the newest).

  Raises:
    UserError: none is named, one is named twice, or one of them is not a run of ours whose parameters fit.
  """
  folders = [run_folder(name.strip()) for name in names.split(",") if name.strip()]
  if not folders:
    raise UserError("config.checkpoint is empty; give the folder of a run, --config.checkpoint=runs/pirl")
  if len(set(folders)) < len(folders):
    raise UserError(f"--config.checkpoint={names} names a run twice")
  return [open_run(folder, label, step, mesh) for folder, label in zip(folders, labels(folders), strict=True)]


def run_folder(name: str) -> Path:
  """Returns the absolute folder of the run that a user means: the run's own, or its folder of checkpoints.

  Raises:
    UserError: there is nothing of the kind.
  """
  given = Path(name).expanduser().absolute()
  folder = given.parent if given.name == "checkpoints" else given
  if not folder.is_dir():
    raise UserError(f"--config.checkpoint={name}: there is no such folder; give the folder of a run")
  if not (folder / "checkpoints").is_dir():
    if given.name.isdigit() and given.parent.name == "checkpoints":
      raise UserError(f"--config.checkpoint={name} is a single checkpoint; give the run and the step: "
                      f"--config.checkpoint={given.parent.parent} --config.step={given.name}")
    found = ", ".join(sorted(child.name for child in folder.iterdir())[:5]) or "nothing"
    raise UserError(f"--config.checkpoint={name} is not the folder of a run: it has no folder checkpoints (found: "
                    f"{found})")
  return folder


def labels(folders: Sequence[Path]) -> list[str]:
  """Returns a short name for each folder: as many of its last parts as tell it from the others."""
  for count in range(1, max(len(folder.parts) for folder in folders) + 1):
    names = ["/".join(folder.parts[-count:]) for folder in folders]
    if len(set(names)) == len(names):
      return names
  return [str(folder) for folder in folders]


def open_run(folder: Path, label: str, step: int, mesh: jax.sharding.Mesh) -> Run:
  """Returns the run with the model of its checkpoint `step` (0: the newest), whole on every device of `mesh`.

  Raises:
    UserError: no such checkpoint, not one of ours, or parameters that do not fit the network of their config.
  """
  with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
    steps = checkpoints.steps()
    if not steps:
      raise UserError(f"{folder / 'checkpoints'} holds no finished checkpoint")
    if step and step not in steps:
      raise UserError(f"{folder} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    step = step or steps[-1]
    try:
      meta = checkpoints.read_meta(step)
      stored = meta["config"]
      network = system.network_of(stored, num_classes=meta["num_classes"])
      inputs = system.network_inputs(stored)
    except UserError:
      raise
    except Exception as error:  # Orbax's are of many types; a meta of another program may lack anything
      raise UserError(f"{folder / 'checkpoints' / str(step)} is not a checkpoint of this program, or damaged "
                      f"({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error
    like = jax.eval_shape(lambda: network.init(jax.random.key(0), *inputs, train=False))
    variables = checkpoints.restore_model(step, like, mesh)
  for path, value in jax.tree_util.tree_leaves_with_path(variables):
    if not np.isfinite(value).all():
      raise UserError(f"checkpoint {folder / 'checkpoints' / str(step)} holds values that are not finite, in "
                      f"{jax.tree_util.keystr(path, simple=True, separator='/')}; choose another with --config.step")
  return Run(label, folder, step, step == steps[-1], meta, Model(network, variables))
