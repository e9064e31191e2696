"""Checkpoints of a run. Only this file and snapshots.py use Orbax.

A checkpoint is a folder STEP with several items, so that an evaluation can read the model alone: `model` (params,
batch_stats), `train` (opt_state, step, seed, normaliser, momentum_encoder), `bank` (bank, usable, written) and `meta`
(JSON). If a system does not have a field, for example a bank, the field is missing from its item. `meta` holds the
checksums of all arrays and its own checksum.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from orbax.checkpoint import CheckpointManager, CheckpointManagerOptions, StandardCheckpointer, args

from pirl_jax.errors import UserError
from pirl_jax.method.memory_bank import Layout, vectors
from pirl_jax.method.state import TrainState, state_shardings
from pirl_jax.runtime.mesh import split, whole
from pirl_jax.runtime.processes import first_failure
from pirl_jax.storage.checksums import checksums, json_checksum
from pirl_jax.storage.files import read_object
from pirl_jax.storage.formats import FIRST_CHECKED, FORMAT, upgrade
from pirl_jax.storage.reading import reason_of, try_reading
from pirl_jax.storage.retention import Retention, steps_in

ITEMS = {"model": ("params", "batch_stats"), "train": ("opt_state", "step", "seed", "normaliser", "momentum_encoder"),
         "bank": ("bank", "usable", "written")}
BEST_METRIC = "knn_top1"
ASIDE = "unreadable-"
"""Start of the name of a folder into which a damaged checkpoint has been moved."""

RETRY_SECONDS = 20
PATIENCE_SECONDS = 600
"""If the last checkpoint of a run cannot be written, it is tried again every RETRY_SECONDS for PATIENCE_SECONDS."""


def _sleep(seconds: float) -> bool:
  time.sleep(seconds)
  return False


class Incomplete(ValueError):
  """The `meta` of a checkpoint lacks a field; raised by `expect`, see `Checkpoints.restore_newest`."""


class Checkpoints:
  """The checkpoints of one run; a context manager that waits until the last save is on disk.

  The newest checkpoints and the one with the best kNN are kept. A policy that keeps only the best would delete the
  newest checkpoint whenever it is not the best; then the run could not resume.
  """

  def __init__(self, folder: str | os.PathLike, *, keep: int, note: Callable[[int], None] = lambda _: None) -> None:
    """Opens `folder`; if it does not exist, the first save creates it.

    Args:
      folder: of the checkpoints.
      keep: number of newest checkpoints to keep, >= 1.
      note: note(step) is called in process 0 once a checkpoint is on disk, maybe by another thread.
    """
    self._folder = Path(folder).absolute()
    self._manager: CheckpointManager | None = None
    self._writing = False
    self._checksum = ""  # of the meta that was last to be saved
    self._knn_top1: dict[int, float | None] = {}  # by step, for the checkpoints that this program has saved
    self._retention = Retention(self._folder, keep=keep, metric_of=self._metric, note=note)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()

  def steps(self) -> list[int]:
    """Returns the steps of the finished checkpoints on disk, the oldest first.

    Raises:
      UserError: the folder cannot be read.
    """
    return steps_in(self._folder)

  def has(self, step: int) -> bool:
    """Returns whether there is a finished checkpoint of this step, whole or damaged."""
    return (self._folder / str(step)).is_dir()

  def read_meta(self, step: int) -> dict[str, Any]:
    """Returns the `meta` of a checkpoint; an older format is converted to the current one.

    Raises:
      UserError: a later version of the program wrote the checkpoint, in a format that this version does not know; or
        the disk does not allow reading now.
      ValueError: the file is missing or damaged: its content does not have its checksum, or is of another step.
    """
    meta, damage = try_reading(f"checkpoint {self._folder / str(step)}", lambda: self._read_meta(step),
                               folder=self._folder / str(step))
    if damage:
      raise ValueError(damage)
    return meta

  def _read_meta(self, step: int) -> dict[str, Any]:
    meta = read_object(self._folder / str(step) / "meta" / "metadata")
    checksum, version = meta.pop("checksum", None), meta.get("format")
    if type(version) is not int or version < 1 or type(meta.get("step", step)) is not int:
      raise ValueError("meta is not one of a checkpoint")
    if version > FORMAT:
      raise UserError(f"checkpoint {self._folder / str(step)} has format {version}, and this program reads formats 1 "
                      f"to {FORMAT}; use the version of the program that wrote it, or a later one")
    if checksum not in (None, json_checksum(meta)) or version >= FIRST_CHECKED and None in (
        checksum, meta.get("checksums")):
      raise ValueError("meta is not as it was written")
    if meta.get("step", step) != step:
      raise ValueError(f"the folder holds a checkpoint of step {meta['step']}")
    return upgrade(meta)

  def restore(self, step: int, like: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the state of a checkpoint, laid out for `mesh`; it may have been saved from another mesh.

    The checksums are not compared here, see `restore_newest`.

    Args:
      step: of the checkpoint.
      like: a state of the same shapes; its arrays are not read.
      mesh: the devices for the state.

    Raises:
      Exception: files are missing or damaged; Orbax raises errors of many types.
    """
    shardings = state_shardings(mesh, with_bank=like.bank is not None)
    items = {
      item: args.StandardRestore({field: template_of(value, getattr(shardings, field))
                                  for field, value in fields.items()})
      for item, fields in _items(like).items()}
    restored = self._open().restore(step, args=args.Composite(**items))
    return like.replace(**{field: restored[item][field] for item, fields in _items(like).items() for field in fields})

  def restore_model(self, step: int, like: Mapping[str, Any], mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Returns {"params", "batch_stats"} of a checkpoint, replicated on every device of `mesh`; nothing else is read.

    Args:
      step: of the checkpoint.
      like: the variables of the network for which they are restored; the arrays are not read.
      mesh: the devices for the variables.

    Raises:
      UserError: a parameter or statistic is missing, is not in the network or has another shape (all names are compared
        before anything is read), or the files cannot be read or do not have their checksums.
    """
    where = self._folder / str(step)
    as_stored = self._stored(step, "model")
    wanted, stored = _shapes(dict(like)), _shapes(as_stored)
    wrong = ([f"{name} is missing" for name in sorted(wanted.keys() - stored.keys())]
             + [f"{name} is one too many" for name in sorted(stored.keys() - wanted.keys())]
             + [f"{name} has shape {stored[name]}, not {wanted[name]}" for name in sorted(wanted.keys() & stored.keys())
                if stored[name] != wanted[name]])
    if wrong:
      raise UserError(f"the parameters in {where} do not fit the network of their config: "
                      f"{'; '.join(wrong[:3])}{f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''}")
    found = self._read_item(step, "model", as_stored, lambda _: whole(mesh))
    return jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), found, dict(like))

  def restore_bank(self, step: int, layout: Layout) -> np.ndarray:
    """Returns the memory bank in the order of the images, f32[N, D], on the host; rows of broken images are zero.

    N is the number of images, D the number of dimensions of an embedding.

    Args:
      step: of the checkpoint.
      layout: the bank's layout in the run that wrote the checkpoint.

    Raises:
      UserError: there is no bank, the bank has another layout, or the files cannot be read or do not have their
        checksums.
    """
    shapes = self._stored(step, "bank")
    if "bank" not in shapes:
      raise UserError(f"{self._folder / str(step)} is of a system without a memory bank")
    if shapes["bank"].shape[0] != layout.num_rows:
      raise UserError(f"the bank in {self._folder / str(step)} has {shapes['bank'].shape[0]} rows, and the config asks "
                      f"for {layout.num_rows}")
    here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    found = self._read_item(step, "bank", shapes, lambda _: here)
    rows = np.asarray(vectors(found["bank"]), np.float32)
    bank = np.where(np.asarray(found["usable"])[:, None], rows, 0)
    return bank[layout.row_of(np.arange(layout.num_images))]

  def _stored(self, step: int, item: str) -> dict[str, Any]:
    """Returns the tree of an item, from Orbax's metadata, with shapes and types in the place of arrays."""
    def read() -> dict[str, Any]:
      with StandardCheckpointer() as reader:
        return reader.metadata(self._folder / str(step) / item).item_metadata.tree
    return self._tried(step, read)

  def _read_item(self, step: int, item: str, as_stored: Mapping[str, Any],
                 sharding_of: Callable[[Any], jax.sharding.Sharding]) -> dict[str, Any]:
    """Returns an item with the types in which it was saved, after comparing its checksums."""
    def read() -> dict[str, Any]:
      tree, changed = self._read_and_compare(step, self._read_meta(step), item, as_stored, sharding_of)
      if changed:
        raise ValueError(changed)
      return tree
    return self._tried(step, read)

  def _tried(self, step: int, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    found, damage = try_reading(f"checkpoint {self._folder / str(step)}", read, folder=self._folder / str(step))
    if damage:
      others = ", ".join(str(other) for other in self.steps() if other != step)
      raise UserError(f"checkpoint {self._folder / str(step)} cannot be read ({damage})"
                      + (f"; choose another step, there are {others}" if others else ""))
    return found

  def _read_and_compare(self, step: int, meta: Mapping[str, Any], item: str, as_stored: Mapping[str, Any],
                        sharding_of: Callable[[Any], jax.sharding.Sharding]) -> tuple[dict[str, Any], str]:
    if not jax.config.values["jax_enable_x64"] and any(x.dtype == np.float64 for x in jax.tree.leaves(as_stored)):
      raise ValueError("it holds float64, which JAX reads with JAX_ENABLE_X64=1 in the environment alone")
    template = {field: template_of(tree, sharding_of(tree)) for field, tree in as_stored.items()}
    tree = self._open().restore(step, args=args.Composite(**{item: args.StandardRestore(template)}))[item]
    return tree, _changed(meta, {item: tree})

  def check(self, step: int, mesh: jax.sharding.Mesh) -> str:
    """Reads everything in a checkpoint and compares the checksums. Returns what is wrong, or "" if nothing is.

    Args:
      step: of the checkpoint.
      mesh: the devices that hold the arrays during the check.

    Raises:
      UserError: the disk does not allow reading now.
    """
    def read() -> None:
      meta = self._read_meta(step)
      # A checkpoint without checksums has no list of its items; then the items on disk are read.
      on_disk = [name for name in ITEMS if (self._folder / str(step) / name).is_dir()]
      for item in dict.fromkeys([*meta.get("checksums", ()), *on_disk]):
        with StandardCheckpointer() as reader:
          stored = reader.metadata(self._folder / str(step) / item).item_metadata.tree
        _, changed = self._read_and_compare(
          step, meta, item, stored,
          lambda tree, item=item: split(mesh) if item == "bank" and _divides(tree, mesh) else whole(mesh))
        if changed:
          raise ValueError(changed)
    return try_reading(f"checkpoint {self._folder / str(step)}", read, folder=self._folder / str(step))[1]

  def best_metric(self, step: int) -> float | None:
    """Returns the kNN accuracy by which the best checkpoint is chosen, in [0, 1].

    The result is None if the accuracy was not measured or cannot be read.
    """
    try:
      return self._metric(step)
    except (OSError, ValueError):
      return None

  def _metric(self, step: int) -> float | None:
    """Returns what `best_metric` does, but raises OSError or ValueError if the accuracy cannot be read."""
    if step in self._knn_top1:
      return self._knn_top1[step]
    meta = read_object(self._folder / str(step) / "meta" / "metadata")
    checksum = meta.pop("checksum", None)
    if BEST_METRIC in meta:
      if checksum != json_checksum(meta) or meta.get("step", step) != step:
        raise ValueError("meta is not as it was written")
      return meta[BEST_METRIC]
    legacy = self._folder / str(step) / "metrics" / "metrics"  # where Orbax kept the accuracy of older formats
    return read_object(legacy).get(BEST_METRIC) if legacy.exists() else None

  def restore_newest(self, expect: Callable[[dict[str, Any]], TrainState], mesh: jax.sharding.Mesh, *,
                     say: Callable[[str], None]) -> TrainState:
    """Returns the state of the newest checkpoint that can be read and whose checksums are right.

    Newer checkpoints are damaged. They are named and moved to `unreadable-STEP` in the same folder. If they stayed in
    place, Orbax would silently skip every later save up to their step.

    Args:
      expect: expect(meta) returns the argument `like` of `restore` for the checkpoint with this `meta`. It raises a
        UserError if the checkpoint belongs to another run, `Incomplete` if the checkpoint is damaged.
      mesh: see `restore`.
      say: prints a line.

    Raises:
      UserError: from `expect`, or because no checkpoint can be read. In both cases nothing on disk has changed.
    """
    unreadable = {}
    for step in reversed(self.steps()):
      state, damage = self._restore_whole(step, expect, mesh, say)
      if damage:
        unreadable[step] = damage
        continue
      self.close()
      for bad_step, reason in unreadable.items():
        self._set_aside(bad_step, f"cannot be read ({reason})", say)
      return state
    raise UserError(f"none of the checkpoints in {self._folder} can be read ({unreadable}); "
                    "move the folder away to start from the beginning, or choose another --workdir")

  def _restore_whole(self, step: int, expect: Callable[[dict[str, Any]], TrainState], mesh: jax.sharding.Mesh,
                     say: Callable[[str], None]) -> tuple[Any, str]:
    """Returns (state, "") or (None, what is damaged), the same in all processes."""
    at = dict(folder=self._folder / str(step), agree=first_failure, say=say)
    meta, damage = try_reading(f"checkpoint {step}", lambda: self._read_meta(step), **at)
    if damage:
      return None, damage
    try:
      like = expect(meta)
    except Incomplete as error:
      return None, str(error)
    for _ in range(2):
      state, damage = try_reading(f"checkpoint {step}", lambda: self.restore(step, like, mesh), **at)
      # All processes compute the checksums together. So first every process must have read its part.
      if damage or not (damage := _changed(meta, _items(state))):
        break
    return (None, damage) if damage else (state, "")

  def _set_aside(self, step: int, why: str, say: Callable[[str], None]) -> None:
    """Moves a checkpoint to a new name; all processes call this together, and none looks at the folder before the end.

    Raises:
      UserError: it cannot be moved.
    """
    failure, target = "", self._aside(step)
    say(f"checkpoint {step} {why}, moved to {target.name}")
    if jax.process_index() == 0:
      try:
        (self._folder / str(step)).rename(target)
      except FileNotFoundError:  # somebody has removed it
        pass
      except OSError as error:
        failure = f"{self._folder / str(step)} {why}, and cannot be moved to {target.name} ({error.strerror or error})"
    if failure := first_failure(failure):
      raise UserError(f"{failure}; move it by hand")

  def _aside(self, step: int) -> Path:
    """Returns a new path for a damaged checkpoint; an earlier one of the same step is never overwritten."""
    names = itertools.chain([f"{ASIDE}{step}"], (f"{ASIDE}{step}-{number}" for number in itertools.count(2)))
    return next(path for path in map(self._folder.joinpath, names) if not path.exists())

  def save(self, step: int, state: TrainState, meta: Mapping[str, Any], *, knn_top1: float | None,
           surely: bool = False, say: Callable[[str], None] = print, pause: Callable[[float], bool] = _sleep) -> None:
    """Starts writing a checkpoint and returns before it is on disk; the state may be donated at once.

    If the disk cannot take the checkpoint, the run continues: a warning is printed, the unfinished files are removed,
    and writing is tried once more at once. If this fails, too, the next save is the next try. With several processes an
    error ends all of them, because a process does not know of errors of another process's disk.

    Args:
      step: number of steps taken.
      state: the whole state.
      meta: JSON values; the format and the checksums are added.
      knn_top1: kNN accuracy in [0, 1], or None if it was not measured at this step; the best checkpoint is kept.
      surely: True returns only when the checkpoint is on disk, and tries for `PATIENCE_SECONDS`.
      say: prints a line.
      pause: pause(seconds) waits and returns whether to give up.

    Raises:
      UserError: with `surely`, if the checkpoint could not be written.
    """
    begun = time.monotonic()
    for attempt in itertools.count():
      try:
        self._start_save(step, state, meta, knn_top1, say)
        if surely:
          self._open(writing=True).wait_until_finished()
          self._retention.settle()
        break
      except Exception as error:  # of many types, see restore; it may come from an earlier save that ended meanwhile
        if jax.process_count() > 1:
          raise
        self._abandon()
        if self._is_on_disk(step):
          break
        say(f"WARNING: a checkpoint could not be written, at step {step} ({reason_of(error)})")
        if not surely and attempt:
          break
        if surely and time.monotonic() - begun > PATIENCE_SECONDS:
          raise self._not_saved(step, reason_of(error), "make room") from error
        if attempt:
          say(f"trying again in {RETRY_SECONDS} s")
          if pause(RETRY_SECONDS):
            raise self._not_saved(step, reason_of(error), "ended by a signal; make room") from error
    for line in self._retention.words():
      say(line)

  def _not_saved(self, step: int, reason: str, advice: str) -> UserError:
    return UserError(f"the checkpoint of step {step} could not be written to {self._folder} ({reason}); on disk are "
                     f"{self.steps()}; {advice}, and the same command resumes from there")

  def _start_save(self, step: int, state: TrainState, meta: Mapping[str, Any], knn_top1: float | None,
                  say: Callable[[str], None]) -> None:
    if first_failure("there" if self.has(step) else ""):
      self.close()
      self._set_aside(step, "is not of this run, which comes to this step only now", say)
    items = _items(state)
    self._knn_top1[step] = knn_top1
    meta = {**meta, "step": step, "format": FORMAT, BEST_METRIC: knn_top1,
            "checksums": {item: checksums(fields) for item, fields in items.items()}}
    self._checksum = json_checksum(meta)
    # Without `force` Orbax would silently skip the checkpoint if there is one of a higher step.
    self._open(writing=True).save(
      step, force=True,
      args=args.Composite(**{item: args.StandardSave(fields) for item, fields in items.items()},
                          meta=args.JsonSave({**meta, "checksum": self._checksum})))
    if jax.process_index() == 0:
      self._retention.expect(step)

  def _is_on_disk(self, step: int) -> bool:
    """Returns whether the checkpoint that was last to be saved is on disk, although an error has come."""
    try:
      return read_object(self._folder / str(step) / "meta" / "metadata").get("checksum") == self._checksum
    except (OSError, ValueError):
      return False

  def _abandon(self) -> None:
    """Gives up the save in progress; the next save removes its files."""
    manager, self._manager, self._writing = self._manager, None, False
    with contextlib.suppress(Exception):  # closing raises the error of the save once more
      if manager is not None:
        manager.close()
    self._retention.settle()
    self._retention.give_up()

  def close(self) -> None:
    """Waits until everything is on disk. A later call of another method opens the folder again."""
    if self._manager is not None:
      self._manager.close()
      self._manager = None
      self._retention.settle()

  def _open(self, *, writing: bool = False) -> CheckpointManager:
    """Returns Orbax's manager.

    Unfinished files of a killed run are removed only when this run saves (`writing`). A run that is refused must not
    change the folder.
    """
    if writing and not self._writing:
      self.close()
    if self._manager is None:
      self._manager = CheckpointManager(self._folder, options=CheckpointManagerOptions(
        lightweight_initialize=True, cleanup_tmp_directories=writing))
      self._writing = writing
    return self._manager


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
  """Returns {item: {field: value}} of the fields that this state has."""
  return {item: {field: getattr(state, field) for field in fields if getattr(state, field) is not None}
          for item, fields in ITEMS.items()}


def _changed(meta: Mapping[str, Any], items: Mapping[str, Any]) -> str:
  """Returns in words which arrays of {item: tree} do not have their checksums.

  The result is "" if all arrays have theirs, or if the checkpoint has no checksums.
  """
  if "checksums" not in meta:
    return ""
  wrong = []
  for item, tree in items.items():
    saved, found = meta["checksums"].get(item, {}), checksums(tree)
    wrong += [f"{item}/{name}" for name in sorted(saved.keys() | found.keys()) if saved.get(name) != found.get(name)]
  more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
  return f"not as it was saved: {', '.join(wrong[:3])}{more}" if wrong else ""


def _divides(tree: Any, mesh: jax.sharding.Mesh) -> bool:
  return all(x.shape and x.shape[0] % mesh.size == 0 for x in jax.tree.leaves(tree))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Returns {"params/trunk/conv1/kernel": shape, ...}."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape)
          for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def template_of(tree: Any, sharding: jax.sharding.Sharding) -> Any:
  """Returns a tree of shapes and types for restoring `tree` with this sharding."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
