"""The folder of a run: which process may train in it, and how a run resumes from the folder."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pirl_jax import system
from pirl_jax.choosing.choices import recalled, with_values
from pirl_jax.data import contents
from pirl_jax.data.records import Source, same_images
from pirl_jax.errors import UserError
from pirl_jax.method.memory_bank import Layout
from pirl_jax.method.state import TrainState
from pirl_jax.runtime.environment import numeric_environment
from pirl_jax.storage.checkpoints import Checkpoints, Incomplete
from pirl_jax.storage.files import locked, read_json, read_object, write_file, write_json
from pirl_jax.storage.formats import FIRST_BITS, FIRST_RESUMED, upgrade_config
from pirl_jax.storage.logbook import METRICS
from pirl_jax.storage.reading import try_reading
from pirl_jax.storage.rows import read_rows
from pirl_jax.storage.settings import difference, flatten
from pirl_jax.training import growing
from pirl_jax.training.beginning import SAVED, check_new, note_saved, saved_step
from pirl_jax.training.parts import Parts, make_schedule

FREE_ON_RESUME = ("num_epochs", "dry_run", "data.root", "data.grown", "checkpoint.", "evaluate.", "log.", "report",
                  "export", "data.num_threads", "data.max_bad_fraction")
"""Fields that may change when a run resumes; a name that ends with a dot stands for its whole group."""

MOVABLE = ("folder", "webdataset")
"""Sources whose fingerprint does not depend on the place of the images: `data.root` and `data.split`."""

CHOSEN = "chosen.json"
"""The file with the fields that the program has chosen, and why."""

PARAMETERS = "parameters.txt"
"""The file with the table of the network's parameters."""

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


def check_beginning(parts: Parts) -> None:
  """Raises UserError if something in the folder shows that this run had checkpoints, see `beginning.check_new`."""
  # The interval and the number of epochs may be others now than when the rows were written.
  before = stored_config(parts.workdir) or parts.config.to_dict()
  check_new(parts.workdir, every_steps=before["checkpoint"]["every_steps"],
            total_steps=before["num_epochs"] * parts.steps_per_epoch)


def _chosen(workdir: Path) -> list[dict[str, Any]]:
  """Returns the choices that are stored with a run: field, value and why."""
  try:
    return json.loads((workdir / CHOSEN).read_bytes()) if _saved(workdir) else []
  except (OSError, ValueError):
    return []


def begin(parts: Parts, parameters: str, newest: int | None) -> None:
  """Writes the run's config, the list of its images and the table of its parameters into the run's folder.

  Args:
    parts: of the run.
    parameters: the table.
    newest: step of the checkpoint from which the run resumes, or None if it starts from the beginning.

  Raises:
    UserError: the folder cannot be written to.
  """
  if jax.process_index() != 0:
    return
  try:
    write_json(parts.workdir / "config.json", parts.config.to_dict())
    write_file(parts.workdir / PARAMETERS, f"{parameters}\n".encode())
    if parts.choices:
      made = [dataclasses.asdict(choice) for choice in parts.choices]
      anew = {choice.field for choice in parts.choices}
      write_json(parts.workdir / CHOSEN, [each for each in _chosen(parts.workdir) if each["field"] not in anew] + made)
    if newest is None:
      (parts.workdir / contents.FILE).unlink(missing_ok=True)  # of a run that has saved nothing, maybe on other images
    contents.remember(parts.train, parts.workdir)
    if parts.config.data.grown:
      contents.remember_grown(parts.train, parts.workdir)
    note_saved(parts.workdir, newest)
  except OSError as error:
    raise _unwritable(parts.workdir, error) from error


def with_stored_choices(config: ConfigDict, workdir: Path) -> ConfigDict:
  """Returns the config of a run in `workdir`: if there is a run already, its values fill the open fields.

  A run that has saved nothing yet, for example because memory ran out in its first step, may start with other
  settings.

  Raises:
    UserError: `workdir` holds a run whose config differs in a field that may not change.
  """
  stored = stored_config(workdir)
  if stored is None or not (_saved(workdir) or read_rows(workdir / METRICS)):
    return config
  # A set that has grown may have another number of negatives, if the program chooses it.
  chosen_anew = ("num_negatives",) if config.data.grown else ()
  config = recalled(config, {name: value for name, value in flatten(stored).items() if name not in chosen_anew})
  compare_configs(config, stored, workdir)
  return config


def _saved(workdir: Path) -> bool:
  """Returns whether there is a checkpoint in the folder of a run, whole or not."""
  folder = workdir / "checkpoints"
  try:
    return saved_step(workdir) is not None or folder.is_dir() and any(path.is_dir() for path in folder.iterdir())
  except OSError:
    return True  # not known; who lists the checkpoints names the error


def other_root(config: ConfigDict, workdir: Path) -> str:
  """Returns the root of the images of the run in `workdir`, if it is not that of the config, else ""."""
  stored = read_json(workdir / "config.json") or {}
  root = flatten(stored).get("data.root")
  if not isinstance(root, str):
    return ""
  same = os.path.abspath(os.path.expanduser(root)) == os.path.abspath(os.path.expanduser(config.data.root))
  return "" if same or not root or not _saved(workdir) else root


def moved(config: ConfigDict, workdir: Path) -> bool:
  """Returns whether there is a run in `workdir`, and no longer a folder at the place of its images."""
  return _saved(workdir) and bool(config.data.root) and not os.path.exists(os.path.expanduser(config.data.root))


def stored_config(workdir: Path) -> dict[str, Any] | None:
  """Returns the config of the run in `workdir` in the current format, or None if there is none.

  Raises:
    UserError: its config.json is damaged or cannot be read.
  """
  path = workdir / "config.json"
  if os.path.lexists(path):
    stored, damage = try_reading(str(path), lambda: _config_of(read_object(path)), folder=path)
    if damage:
      raise UserError(f"{path} is damaged ({damage}); delete it to resume the run, because the checkpoints hold the "
                      "config, too; or choose another --workdir")
    return stored
  if (workdir / "checkpoints").is_dir():
    with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
      for step in reversed(checkpoints.steps()):
        with contextlib.suppress(Exception):  # a damaged one; the restore says so
          return upgrade_config(checkpoints.read_meta(step)["config"])
  return None


def _config_of(stored: dict[str, Any]) -> dict[str, Any]:
  """Returns a stored config in the current format.

  Raises:
    Exception: it is not a config, or a field that is used before the configs are compared is of another type.
  """
  config = upgrade_config(stored)
  for value, kind in ((config["num_epochs"], int), (config["checkpoint"]["every_steps"], int),
                      (config["data"]["root"], str)):
    if type(value) is not kind:
      raise TypeError(f"{value!r} is not a value of its field")
  return config


def compare_configs(config: ConfigDict, stored: dict[str, Any], workdir: Path) -> None:
  """Raises UserError if the config stored with the run in `workdir` differs in a field that may not change."""
  free = (*FREE_ON_RESUME, *(["num_negatives"] if config.data.grown else []))
  if config.data.source in MOVABLE and stored["data"]["source"] == config.data.source:
    free = (*free, "data.split")  # the same images may lie under another name now; their fingerprints are compared
  if found := difference(stored, json.loads(json.dumps(config.to_dict())), free=free):
    field, before, now = found
    raise UserError(f"{workdir} holds a run with {field}={before!r}, and now it is {now!r}; choose another --workdir, "
                    "or give the old value to resume the run")


def compare_environment(meta: Mapping[str, Any], workdir: Path) -> None:
  """Prints a warning if the environment rounds in another way than when the checkpoint with this `meta` was saved.

  Raises:
    UserError: the environment draws other random numbers, or computes in other types.
  """
  before, now = meta.get("environment"), numeric_environment()
  if before is None:  # the checkpoint was saved before the environment was recorded
    return
  if found := difference(before["draws"], now["draws"]):
    name, was, given = found
    raise UserError(f"the run in {workdir} started with {name}={was!r}, and now it is {given!r}: views and negatives "
                    f"would be others; set {name.upper()}={was} in the environment, or choose another --workdir")
  if found := difference(before["rounding"], now["rounding"]):
    name, was, given = found
    print(f"WARNING: {name} was {was!r} when the newest checkpoint was saved, and now it is {given!r}; from here on "
          "last bits may differ from those of a run that was not interrupted")


def check_images(train: Source, workdir: Path) -> None:
  """Raises UserError if the images are not those of the newest checkpoint in `workdir`, and says what has changed.

  A set without a list of its images passes: `restore` compares the fingerprints.
  """
  if not (workdir / "checkpoints").is_dir():
    return
  with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
    for step in reversed(checkpoints.steps()):
      with contextlib.suppress(Exception):  # a damaged one; the restore says so
        before = checkpoints.read_meta(step)["data"]
        break
    else:
      return
  if before != train.fingerprint and (changes := contents.changes_since(train, workdir, before)):
    raise UserError(f"the training images are not those with which the run in {workdir} started; {changes}; restore "
                    "them, or go on with these images, --config.data.grown=True, or choose another --workdir")


def restore(parts: Parts, checkpoints: Checkpoints) -> TrainState:
  """Returns the state of the newest checkpoint of this run.

  Raises:
    UserError: the checkpoint belongs to another data set, network or bank, is past the end of the run, or no checkpoint
      can be read.
  """
  expected, grown_from = run_meta(parts), None
  grown = parts.config.data.grown

  def expect(meta: Mapping[str, Any]) -> TrainState:
    nonlocal grown_from
    if missing := {"config", "step", *expected} - meta.keys():
      raise Incomplete(f"meta has no {min(missing)}")
    if meta["format"] < FIRST_RESUMED:
      raise UserError(f"the checkpoint in {parts.workdir} has format {meta['format']}, in which a part of the state is "
                      "missing: the run can be evaluated, but not resumed; choose another --workdir")
    if meta["format"] < FIRST_BITS and parts.config.bank.dtype == "bfloat16":
      raise UserError(f"the checkpoint in {parts.workdir} has format {meta['format']}, in which a bfloat16 bank is "
                      "stored in another way: the run can be evaluated, but not resumed; choose another --workdir")
    same = same_images(meta.get("data", ""), expected["data"])
    grown_from = meta if grown and not same else None
    # Only a supervised network depends on the number of classes.
    free = ("data", "num_images", "num_strata", *(["num_classes"] if system.has_bank(parts.config) else []))
    for name, now in expected.items():
      if meta.get(name) != now and not (grown_from and name in free) and not (name == "data" and same):
        raise UserError(f"the checkpoint in {parts.workdir} has {name} {meta.get(name)!r}, and this run {now!r}; "
                        "choose another --workdir")
    compare_configs(parts.config, meta["config"], parts.workdir)
    compare_environment(meta, parts.workdir)
    if meta["step"] > parts.total_steps:
      raise UserError(f"{parts.workdir} has already done {meta['step']} steps, and num_epochs="
                      f"{parts.config.num_epochs} are {parts.total_steps} steps; raise num_epochs")
    layout = Layout(meta["num_images"], meta["num_strata"])
    return jax.eval_shape(dataclasses.replace(parts, layout=layout).initial_state)

  state = checkpoints.restore_newest(expect, parts.mesh, say=print)
  lost = saved_step(parts.workdir)
  if lost is not None and lost > int(state.step):
    print(f"WARNING: the checkpoint of step {lost}, which was saved as {parts.workdir / SAVED} says, is gone or cannot "
          f"be used; the run goes on from step {int(state.step)}")
  return growing.carry_over(parts, state, grown_from) if grown_from else state


def changed_schedule(parts: Parts, step: int) -> str:
  """Returns in words what another `num_epochs` than before does to the learning rate; "" if it is the same.

  Args:
    parts: of the run.
    step: number of steps done.
  """
  before = stored_config(parts.workdir)
  if before is None or before["num_epochs"] == parts.config.num_epochs or not before["num_epochs"]:
    return ""
  older = with_values(parts.config, {"num_epochs": before["num_epochs"]})
  was, now = (np.asarray(make_schedule(config, parts.steps_per_epoch)(step)) for config in (older, parts.config))
  return (f"num_epochs is {parts.config.num_epochs}, and was {before['num_epochs']}: the schedule of the learning rate "
          f"({parts.config.optimizer.schedule}) is laid over the new length, so at step {step:,} the rate is {now:.3g} "
          f"instead of {was:.3g}")


def run_meta(parts: Parts) -> dict[str, Any]:
  """Returns the facts by which a checkpoint is recognised as belonging to this run, as JSON values."""
  return {
    "data": parts.train.fingerprint, "num_images": parts.layout.num_images, "num_strata": parts.layout.num_strata,
    "model": parts.config.model.to_dict(), "num_classes": len(parts.train.class_names)}


def save(parts: Parts, state: TrainState, checkpoints: Checkpoints, **options: Any) -> None:
  """Starts writing a checkpoint of the state, see `Checkpoints.save`."""
  step = int(state.step)
  checkpoints.save(step, state, {
    **run_meta(parts), "environment": numeric_environment(), "config": parts.config.to_dict()}, **options)
