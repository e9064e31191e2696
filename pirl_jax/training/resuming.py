"""The folder of a run: which process may train in it, and how a run resumes from the folder."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from pirl_jax.data import contents
from pirl_jax.errors import UserError
from pirl_jax.method.state import TrainState
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.storage.files import locked, read_json, write_json
from pirl_jax.storage.formats import FIRST_BITS, FIRST_RESUMED, upgrade_config
from pirl_jax.storage.logbook import METRICS, read_rows
from pirl_jax.storage.settings import difference
from pirl_jax.training.parts import Parts

FREE_ON_RESUME = ("num_epochs", "checkpoint.", "evaluate.", "log.", "report", "data.num_threads",
                  "data.max_bad_fraction")
"""Fields that may change when a run resumes; a name that ends with a dot stands for its whole group."""

HANDOVER_SECONDS = 20
"""How long to wait for another run in the same folder that is about to end."""


def hold(workdir: Path) -> contextlib.ExitStack:
  """Locks the folder for this run; returns a context that unlocks the folder when it is closed.

  Raises:
    UserError: another run holds the folder, or the folder cannot be created.
  """
  held = contextlib.ExitStack()
  if jax.process_index() == 0:
    try:
      held.enter_context(locked(workdir, patience=HANDOVER_SECONDS))
    except TimeoutError as error:
      raise UserError(f"another process is training in {workdir}; let it end, or choose another --workdir") from error
    except OSError as error:
      raise _unwritable(workdir, error) from error
  return held


def _unwritable(workdir: Path, error: OSError) -> UserError:
  return UserError(f"nothing can be written to {workdir} ({error.strerror}); make room, or choose another --workdir")


def check_new(parts: Parts) -> None:
  """Raises UserError if metrics.jsonl shows that this run had checkpoints but none are left.

  Starting over would erase its metrics as well.
  """
  rows, before = read_rows(parts.workdir / METRICS), read_json(parts.workdir / "config.json") or parts.config.to_dict()
  # A crash may come before the first checkpoint is complete. But the first checkpoint is complete before the second one
  # is started, so after twice the interval there must be one.
  if rows and rows[-1]["step"] > 2 * before["checkpoint"]["every_steps"]:
    raise UserError(f"{parts.workdir / METRICS} reaches step {rows[-1]['step']}, but {parts.workdir / 'checkpoints'} "
                    "holds no checkpoint; bring the checkpoints back, or choose another --workdir, or delete that file "
                    "to start from the beginning")


def begin(parts: Parts) -> None:
  """Writes the run's config and the list of its images into the run's folder.

  Raises:
    UserError: the folder cannot be written to.
  """
  if jax.process_index() != 0:
    return
  try:
    write_json(parts.workdir / "config.json", parts.config.to_dict())
    contents.remember(parts.train, parts.workdir)
  except OSError as error:
    raise _unwritable(parts.workdir, error) from error


def check_same_config(config: ConfigDict, workdir: Path) -> None:
  """Raises UserError if `workdir` holds a run whose config differs in a field that may not change."""
  path = workdir / "config.json"
  if not path.exists():
    return
  try:
    stored = upgrade_config(json.loads(path.read_text()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); delete it to resume the run, because the "
                    "checkpoints hold the config, too; or choose another --workdir") from error
  compare_configs(config, stored, workdir)


def compare_configs(config: ConfigDict, stored: dict[str, Any], workdir: Path) -> None:
  """Raises UserError if the config stored with the run in `workdir` differs in a field that may not change."""
  if found := difference(stored, json.loads(json.dumps(config.to_dict())), free=FREE_ON_RESUME):
    field, before, now = found
    raise UserError(f"{workdir} holds a run with {field}={before!r}, and now it is {now!r}; choose another --workdir, "
                    "or give the old value to resume the run")


def restore(parts: Parts, checkpoints: Checkpoints) -> TrainState:
  """Returns the state of the newest checkpoint of this run.

  Raises:
    UserError: the checkpoint belongs to another data set, network or bank, is past the end of the run, or no checkpoint
      can be read.
  """
  expected = run_meta(parts)

  def check(meta: Mapping[str, Any]) -> None:
    if meta["format"] < FIRST_RESUMED:
      raise UserError(f"the checkpoint in {parts.workdir} has format {meta['format']}, in which a part of the state is "
                      "missing: the run can be evaluated, but not resumed; choose another --workdir")
    if meta["format"] < FIRST_BITS and parts.config.bank.dtype == "bfloat16":
      raise UserError(f"the checkpoint in {parts.workdir} has format {meta['format']}, in which a bfloat16 bank is "
                      "stored in another way: the run can be evaluated, but not resumed; choose another --workdir")
    for name, now in expected.items():
      if meta.get(name) != now:
        if name == "data" and (changes := contents.changes_since(parts.train, parts.workdir)):
          raise UserError(f"the training images are not those with which the run in {parts.workdir} started; "
                          f"{changes}; restore them, or choose another --workdir")
        raise UserError(f"the checkpoint in {parts.workdir} has {name} {meta.get(name)!r}, and this run {now!r}; "
                        "choose another --workdir")
    compare_configs(parts.config, meta["config"], parts.workdir)
    if meta["step"] > parts.total_steps:
      raise UserError(f"{parts.workdir} has already done {meta['step']} steps, and num_epochs="
                      f"{parts.config.num_epochs} are {parts.total_steps} steps; raise num_epochs")

  return checkpoints.restore_newest(check, jax.eval_shape(parts.initial_state), parts.mesh, say=print)


def run_meta(parts: Parts) -> dict[str, Any]:
  """Returns the facts by which a checkpoint is recognised as belonging to this run, as JSON values."""
  return {
    "data": parts.train.fingerprint, "num_images": parts.layout.num_images, "num_strata": parts.layout.num_strata,
    "model": parts.config.model.to_dict(), "num_classes": len(parts.train.class_names)}


def save(parts: Parts, state: TrainState, checkpoints: Checkpoints, **options: Any) -> None:
  """Starts writing a checkpoint of the state, see `Checkpoints.save`."""
  step = int(state.step)
  checkpoints.save(step, state, {**run_meta(parts), "step": step, "config": parts.config.to_dict()}, **options)
