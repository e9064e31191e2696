"""Checkpoints of a run. Only this file and snapshots.py use Orbax.

A checkpoint is a folder STEP with several items, so that an evaluation can read the model alone: `model` (params,
batch_stats), `train` (opt_state, step, seed, normaliser), `bank` (bank, usable) and `meta` (JSON). If a system does not
have a field, for example a bank, the field is missing from its item. `meta` holds the checksums of all arrays and its
own checksum.
"""

import contextlib
import itertools
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from orbax.checkpoint import CheckpointManager, CheckpointManagerOptions, StandardCheckpointer, args
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN, PreservationPolicy

from pirl_jax.errors import UserError
from pirl_jax.method.memory_bank import Layout, vectors
from pirl_jax.method.state import TrainState, state_shardings
from pirl_jax.runtime.mesh import split, whole
from pirl_jax.runtime.processes import first_failure, wait_for_all
from pirl_jax.storage.checksums import checksums, json_checksum
from pirl_jax.storage.files import read_json
from pirl_jax.storage.formats import FIRST_CHECKED, FORMAT, upgrade

ITEMS = {"model": ("params", "batch_stats"), "train": ("opt_state", "step", "seed", "normaliser"),
         "bank": ("bank", "usable")}
BEST_METRIC = "knn_top1"
ASIDE = "unreadable-"
"""Start of the name of a folder into which a damaged checkpoint has been moved."""

RETRY_SECONDS = 20
PATIENCE_SECONDS = 600
"""If the last checkpoint of a run cannot be written, it is tried again every RETRY_SECONDS for PATIENCE_SECONDS."""


class Checkpoints:
  """The checkpoints of one run; a context manager that waits until the last save is on disk.

  The newest checkpoints and the one with the best kNN are kept. A policy that keeps only the best would delete the
  newest checkpoint whenever it is not the best; then the run could not resume.
  """

  def __init__(self, folder: str | os.PathLike, *, keep: int) -> None:
    """Opens `folder`; if it does not exist, the first save creates it.

    Args:
      folder: of the checkpoints.
      keep: number of newest checkpoints to keep, >= 1.
    """
    self._folder = Path(folder).absolute()
    self._keep = keep
    self._manager: CheckpointManager | None = None
    self._writing = False
    self._knn_top1: dict[int, float | None] = {}  # by step, for the checkpoints that this program has saved

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()

  def steps(self) -> list[int]:
    """Returns the steps of the finished checkpoints on disk, the oldest first."""
    return sorted(self._open().all_steps()) if self._folder.is_dir() else []

  def read_meta(self, step: int) -> dict[str, Any]:
    """Returns the `meta` of a checkpoint; an older format is converted to the current one.

    Raises:
      UserError: a later version of the program wrote the checkpoint, in a format that this version does not know.
      Exception: the file is missing or damaged; Orbax raises errors of many types.
      ValueError: the content of the file does not have its checksum.
    """
    meta = self._open().restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
    checksum, version = meta.pop("checksum", None), meta["format"]
    if checksum not in (None, json_checksum(meta)) or checksum is None and version in range(FIRST_CHECKED, FORMAT + 1):
      raise ValueError("meta is not as it was written")
    if version not in range(1, FORMAT + 1):
      raise UserError(f"checkpoint {self._folder / str(step)} has format {version}, and this program reads formats 1 "
                      f"to {FORMAT}; use the version of the program that wrote it, or a later one")
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
    try:
      with StandardCheckpointer() as reader:
        return reader.metadata(self._folder / str(step) / item).item_metadata.tree
    except Exception as error:  # of many types, see restore
      raise self._unreadable(step, error) from error

  def _read_item(self, step: int, item: str, as_stored: Mapping[str, Any],
                 sharding_of: Callable[[Any], jax.sharding.Sharding]) -> dict[str, Any]:
    """Returns an item with the types in which it was saved, after comparing its checksums."""
    try:
      tree, changed = self._read_and_compare(step, self.read_meta(step), item, as_stored, sharding_of)
    except Exception as error:  # of many types, see restore
      raise self._unreadable(step, error) from error
    if changed:
      raise self._unreadable(step, changed)
    return tree

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
    """
    try:
      meta = self.read_meta(step)
      # A checkpoint without checksums has no list of its items; then the items on disk are read.
      for item in meta.get("checksums") or [name for name in ITEMS if (self._folder / str(step) / name).is_dir()]:
        _, changed = self._read_and_compare(
          step, meta, item, self._stored(step, item),
          lambda tree, item=item: split(mesh) if item == "bank" and _divides(tree, mesh) else whole(mesh))
        if changed:
          return changed
    except Exception as error:  # of many types, see restore
      return reason_of(error)
    return ""

  def best_metric(self, step: int) -> float | None:
    """Returns the kNN accuracy by which the best checkpoint is chosen, in [0, 1].

    The result is None if the accuracy was not measured or cannot be read.
    """
    if step in self._knn_top1:
      return self._knn_top1[step]
    # The file is read without Orbax, because Orbax calls this method in the middle of a save.
    meta = read_json(self._folder / str(step) / "meta" / "metadata") or {}
    checksum = meta.pop("checksum", None)
    if BEST_METRIC in meta:
      return meta[BEST_METRIC] if checksum == json_checksum(meta) else None
    return (read_json(self._legacy_metrics(step)) or {}).get(BEST_METRIC)

  def _legacy_metrics(self, step: int | str) -> Path:
    """Returns the file in which Orbax kept the kNN accuracy of older formats."""
    return self._folder / str(step) / "metrics" / "metrics"

  def _unreadable(self, step: int, error: Exception | str) -> UserError:
    others = ", ".join(str(other) for other in self.steps() if other != step)
    return UserError(f"checkpoint {self._folder / str(step)} cannot be read ({reason_of(error)})"
                     + (f"; choose another step, there are {others}" if others else ""))

  def restore_newest(self, expect: Callable[[dict[str, Any]], TrainState], mesh: jax.sharding.Mesh, *,
                     say: Callable[[str], None]) -> TrainState:
    """Returns the state of the newest checkpoint that can be read and whose checksums are right.

    Newer checkpoints are damaged. They are named and moved to `unreadable-STEP` in the same folder. If they stayed in
    place, Orbax would silently skip every later save up to their step.

    Args:
      expect: expect(meta) returns the argument `like` of `restore` for the checkpoint with this `meta`. It raises a
        UserError if the checkpoint belongs to another run.
      mesh: see `restore`.
      say: prints a line.

    Raises:
      UserError: from `expect`, or because no checkpoint can be read. In both cases nothing on disk has changed.
    """
    unreadable = {}
    for step in reversed(self.steps()):
      failure, meta, items = "", {}, {}
      state: Any = None
      try:
        meta = self.read_meta(step)
        state = self.restore(step, expect(meta), mesh)
        items = _items(state)
      except UserError:
        raise
      except Exception as error:  # Orbax raises Exception itself for a damaged data file
        failure = reason_of(error)
      # All processes compute the checksums together. So first every process must have read its part.
      if failure := first_failure(failure) or _changed(meta, items):
        unreadable[step] = failure
        continue
      self.close()
      for bad_step, reason in unreadable.items():
        say(f"checkpoint {bad_step} cannot be read, moved to {self._aside(bad_step).name}: {reason}")
        if jax.process_index() == 0:
          (self._folder / str(bad_step)).rename(self._aside(bad_step))
      if unreadable:
        # No process may look at the folder again before the damaged checkpoints have been moved.
        wait_for_all("moving the checkpoints that cannot be read")
      return state
    raise UserError(f"none of the checkpoints in {self._folder} can be read ({unreadable}); "
                    "move the folder away to start from the beginning, or choose another --workdir")

  def _aside(self, step: int) -> Path:
    """Returns a new path for a damaged checkpoint; an earlier one of the same step is never overwritten."""
    names = itertools.chain([f"{ASIDE}{step}"], (f"{ASIDE}{step}-{number}" for number in itertools.count(2)))
    return next(path for path in map(self._folder.joinpath, names) if not path.exists())

  def save(self, step: int, state: TrainState, meta: Mapping[str, Any], *, knn_top1: float | None,
           surely: bool = False, say: Callable[[str], None] = print) -> None:
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

    Raises:
      UserError: with `surely`, if the checkpoint could not be written.
    """
    begun = time.monotonic()
    for attempt in itertools.count():
      try:
        self._start_save(step, state, meta, knn_top1)
        if surely:
          self._open(writing=True).wait_until_finished()
        return
      except Exception as error:  # of many types, see restore; it may come from an earlier save that ended meanwhile
        if jax.process_count() > 1:
          raise
        self._abandon()
        say(f"WARNING: a checkpoint could not be written, at step {step} ({reason_of(error)})")
        if not surely and attempt:
          return
        if surely and time.monotonic() - begun > PATIENCE_SECONDS:
          raise UserError(f"the checkpoint of step {step} could not be written to {self._folder} ({reason_of(error)}); "
                          f"on disk are {self.steps()}; make room, and the same command resumes from there") from error
        if attempt:
          say(f"trying again in {RETRY_SECONDS} s")
          time.sleep(RETRY_SECONDS)

  def _start_save(self, step: int, state: TrainState, meta: Mapping[str, Any], knn_top1: float | None) -> None:
    items = _items(state)
    self._knn_top1[step] = knn_top1
    meta = {**meta, "format": FORMAT, BEST_METRIC: knn_top1,
            "checksums": {item: checksums(fields) for item, fields in items.items()}}
    saved = self._open(writing=True).save(
      step, args=args.Composite(**{item: args.StandardSave(fields) for item, fields in items.items()},
                                meta=args.JsonSave({**meta, "checksum": json_checksum(meta)})))
    if not saved:
      raise RuntimeError(f"Orbax skipped the checkpoint of step {step}; on disk are {self.steps()}")

  def _abandon(self) -> None:
    """Gives up the save in progress; the next save removes its files."""
    manager, self._manager, self._writing = self._manager, None, False
    with contextlib.suppress(Exception):  # closing raises the error of the save once more
      if manager is not None:
        manager.close()

  def close(self) -> None:
    """Waits until everything is on disk. A later call of another method opens the folder again."""
    if self._manager is not None:
      self._manager.close()
      self._manager = None

  def _open(self, *, writing: bool = False) -> CheckpointManager:
    """Returns Orbax's manager.

    Unfinished files of a killed run are removed only when this run saves (`writing`). A run that is refused must not
    change the folder.
    """
    if writing and not self._writing:
      self.close()
    if self._manager is None:
      for path in map(self._legacy_metrics, filter(str.isdigit, (child.name for child in self._folder.glob("*")))):
        # Orbax reads this file of every checkpoint; if one of them is damaged, Orbax opens none of the checkpoints.
        if path.exists() and read_json(path) is None:
          raise UserError(f"{path} is damaged; move {path.parent} away: the checkpoint itself is whole, but without "
                          "its kNN accuracy it is not kept as the best one")
      self._manager = CheckpointManager(self._folder, options=CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy([LatestN(self._keep), _Best(self.best_metric)]),
        cleanup_tmp_directories=writing))
      self._writing = writing
    return self._manager


class _Best(PreservationPolicy):
  """Keeps the checkpoint with the best kNN. Orbax's own policy would read the metric from a file without a checksum."""

  def __init__(self, metric_of: Callable[[int], float | None]) -> None:
    self._metric_of = metric_of

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    found = {info.step: metric for info in checkpoints if (metric := self._metric_of(info.step)) is not None}
    best = max(found, key=lambda step: (found[step], step), default=None)
    return [info.step == best for info in checkpoints]


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
    saved, found = meta["checksums"][item], checksums(tree)
    wrong += [f"{item}/{name}" for name in sorted(saved.keys() | found.keys()) if saved.get(name) != found.get(name)]
  more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
  return f"not as it was saved: {', '.join(wrong[:3])}{more}" if wrong else ""


def reason_of(error: Exception | str) -> str:
  """Returns the message of an error in one line; the disk's own words come before TensorStore's long text."""
  text = " ".join(str(error).split()) or type(error).__name__
  if of_the_disk := re.search(r"([^:]+) \[os_error_code=", text):
    text = f"{of_the_disk[1].strip()}: {text}"
  return text if len(text) < 200 else f"{text[:200]} ..."


def _divides(tree: Any, mesh: jax.sharding.Mesh) -> bool:
  return all(x.shape and x.shape[0] % mesh.size == 0 for x in jax.tree.leaves(tree))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Returns {"params/trunk/conv1/kernel": shape, ...}."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape)
          for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def template_of(tree: Any, sharding: jax.sharding.Sharding) -> Any:
  """Returns a tree of shapes and types for restoring `tree` with this sharding."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
