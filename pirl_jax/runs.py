"""Opens existing pre-training runs with the network of one of their checkpoints, and verifies checkpoints.

The job `checkpoints` lists the checkpoints of a run and verifies them: it reads each checkpoint completely and compares
the checksums.
"""

import contextlib
import dataclasses
import functools
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pirl_jax import system
from pirl_jax.errors import UserError
from pirl_jax.models.network import Model, variable_shapes
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.checkpoints import ASIDE, Checkpoints
from pirl_jax.storage.checksums import checksums, json_checksum
from pirl_jax.storage.formats import FIRST_CHECKED


@dataclasses.dataclass(frozen=True)
class Run:
  """A pre-training run, opened at one of its checkpoints.

  Attributes:
    label: short name in tables and plots.
    folder: the run's folder.
    step: of the checkpoint.
    newest: True if the checkpoint is the newest of the run.
    meta: of the checkpoint; its "config" is the run's whole config.
    model: the restored network.
  """

  label: str
  folder: Path
  step: int
  newest: bool
  meta: dict[str, Any]
  model: Model

  @functools.cached_property
  def weights(self) -> str:
    """Returns 16 hexadecimal digits, a checksum of the network's parameters and batch statistics."""
    return json_checksum(self.meta.get("checksums", {}).get("model") or checksums(dict(self.model.variables)))


def run_folder(name: str, *, field: str = "--config.checkpoint") -> Path:
  """Returns the absolute folder of a run. `name` may be the run's folder, or the folder `checkpoints` in it.

  Args:
    name: the path that the user gave.
    field: name of the flag or argument, for the error message.

  Raises:
    UserError: `name` is not the folder of a run.
  """
  given = Path(name).expanduser().absolute()
  folder = given.parent if given.name == "checkpoints" else given
  if not folder.is_dir():
    raise UserError(f"{field}={name}: there is no such folder; give the folder of a run")
  if not (folder / "checkpoints").is_dir():
    if given.name.isdigit() and given.parent.name == "checkpoints":
      raise UserError(f"{field}={name} is a single checkpoint; give the folder of its run, {given.parent.parent}, and "
                      f"step={given.name}")
    found = ", ".join(sorted(child.name for child in folder.iterdir())[:5]) or "nothing"
    raise UserError(f"{field}={name} is not the folder of a run: it has no folder checkpoints (found: {found})")
  return folder


def require_checkpoint(names: str) -> None:
  """Raises UserError if the field `checkpoint` of a job names nothing; its names are separated by commas."""
  if not names.strip(", "):
    raise UserError("config.checkpoint is empty; give the folder of a run, --config.checkpoint=runs/pirl")


def open_run(folder: Path, label: str, step: int, mesh: jax.sharding.Mesh) -> Run:
  """Returns the run with the model of its checkpoint `step` (0: the newest), replicated on every device of `mesh`.

  Raises:
    UserError: there is no such checkpoint, it is not a checkpoint of this program, it is damaged, or its parameters do
      not fit the network of its config or are not finite.
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
    except Exception as error:  # Orbax raises errors of many types; a meta of another program may lack any field
      raise UserError(f"{folder / 'checkpoints' / str(step)} is not a checkpoint of this program, or damaged "
                      f"({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error
    like = variable_shapes(network, *inputs)
    variables = checkpoints.restore_model(step, like, mesh)
  for path, value in jax.tree_util.tree_leaves_with_path(variables):
    if not np.isfinite(value).all():
      raise UserError(f"checkpoint {folder / 'checkpoints' / str(step)} holds values that are not finite, in "
                      f"{jax.tree_util.keystr(path, simple=True, separator='/')}; choose another step")
  return Run(label, folder, step, step == steps[-1], meta, Model(network, variables))


def _facts(folder: Path) -> list[os.stat_result]:
  """Returns the facts about the files in a folder, of which some may be removed meanwhile."""
  found = []
  for place, _, names in os.walk(folder):
    for name in names:
      with contextlib.suppress(OSError):
        found.append(os.stat(os.path.join(place, name)))
  return found


def run(config: ConfigDict, workdir: str) -> None:
  """Prints a line for each checkpoint: step, size, date, kNN, and whether the checkpoint is whole.

  Nothing on disk changes; `workdir` is not used.

  Raises:
    UserError: there is no such run, it has no checkpoint, or a checkpoint is damaged.
  """
  del workdir
  require_checkpoint(config.checkpoint)
  folder = run_folder(config.checkpoint) / "checkpoints"
  damaged, not_read = [], []
  with Checkpoints(folder, keep=1) as checkpoints:
    steps = checkpoints.steps()
    print(f"{folder}: {len(steps)} checkpoint(s)")
    print(f"{'step':>12} {'MB':>10}  {'written':16}  {'kNN':>6}")
    for step in steps:
      try:
        reason, unread = checkpoints.check(step, mesh_lib.create_mesh()), ""
      except UserError as error:  # the disk does not allow reading now, which says nothing about the checkpoint
        reason, unread = "", str(error)
      if not checkpoints.has(step):
        print(f"{step:>12,}  was removed meanwhile, by the run that is going on")
        continue
      state = f"DAMAGED: {reason}" if reason else f"NOT READ: {unread}" if unread else "whole"
      if not reason and not unread and (version := checkpoints.read_meta(step)["format"]) < FIRST_CHECKED:
        state = f"can be read (format {version} has no checksums)"
      knn_top1 = checkpoints.best_metric(step)
      files = _facts(folder / str(step))
      size = sum(file.st_size for file in files) / 1e6
      written = datetime.fromtimestamp(max((file.st_mtime for file in files), default=0)).isoformat(" ", "minutes")
      accuracy = "" if knn_top1 is None else f"{knn_top1:.1%}"
      print(f"{step:>12,} {size:>10,.1f}  {written}  {accuracy:>6}  {state}")
      damaged += [str(step)] if reason else []
      not_read += [str(step)] if unread else []
  aside = sorted(path.name for path in folder.glob(f"{ASIDE}*"))
  if aside:
    print(f"set aside because they could not be read: {', '.join(aside)}")
  if not steps:
    raise UserError(f"{folder} holds no finished checkpoint")
  if not_read:
    raise UserError(f"of {len(steps)} checkpoint(s) in {folder}, the disk did not allow reading: {', '.join(not_read)}"
                    + (f"; damaged: {', '.join(damaged)}" if damaged else "; try again"))
  if damaged:
    raise UserError(f"of {len(steps)} checkpoint(s) in {folder}, damaged: {', '.join(damaged)}; a run that resumes "
                    "takes the newest whole checkpoint and moves the newer ones aside")
