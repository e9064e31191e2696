"""Checkpoints of a run: with snapshots.py the only file that knows Orbax.

A checkpoint is a folder STEP with one item for each use, so that an evaluation reads the model alone:
`model` (params, batch_stats), `train` (opt_state, step, seed, normaliser), `bank` (bank, usable) and `meta` (JSON).
What a system does not have (a bank, say) is missing from its item. `meta` holds the checksums of all arrays, and one of
itself.
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
"""Begins the name of a folder into which a damaged checkpoint has been moved."""

RETRY_SECONDS = 20
PATIENCE_SECONDS = 600
"""How long the last checkpoint of a run is tried to be written, and how often."""


class Checkpoints:
  """The checkpoints of one run; a context manager that waits for the last save to be on disk.

  Kept are the last few and the one with the best kNN: a policy that knows the best alone would delete the newest
  whenever it is not the best, and with it the way to resume.
  """

  def __init__(self, folder: str | os.PathLike, *, keep: int) -> None:
    """Opens `folder`, which need not be there yet: it is made by the first save.

    Args:
      folder: of the checkpoints.
      keep: how many of the newest to keep, >= 1.
    """
    self._folder = Path(folder).absolute()
    self._keep = keep
    self._manager: CheckpointManager | None = None
    self._writing = False
    self._knn_top1: dict[int, float | None] = {}  # by step, of what this program has saved

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()

  def steps(self) -> list[int]:
    """Returns the steps of the checkpoints on disk, oldest first; unfinished ones do not count."""
    return sorted(self._open().all_steps()) if self._folder.is_dir() else []

  def read_meta(self, step: int) -> dict[str, Any]:
    """Returns the `meta` of a checkpoint, that of an older format as this one has it.

    Raises:
      UserError: written by a later version of the program, in a format that this one does not know.
      Exception: Orbax's own errors, of many types, when the file is missing or damaged; ValueError where it is another
        than was written.
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
    """Returns the state of a checkpoint, split over `mesh` whatever mesh it was saved from.

    Args:
      step: of the checkpoint.
      like: a state of the same shapes; its arrays are not read.
      mesh: where the state is to lie.

    The checksums are not compared here, see `restore_newest`.

    Raises:
      Exception: Orbax's own errors, of many types, when files are missing or damaged.
    """
    shardings = state_shardings(mesh, with_bank=like.bank is not None)
    items = {
      item: args.StandardRestore({field: template_of(value, getattr(shardings, field))
                                  for field, value in fields.items()})
      for item, fields in _items(like).items()}
    restored = self._open().restore(step, args=args.Composite(**items))
    return like.replace(**{field: restored[item][field] for item, fields in _items(like).items() for field in fields})

  def restore_model(self, step: int, like: Mapping[str, Any], mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Returns {"params", "batch_stats"} of a checkpoint, whole on every device of `mesh`; nothing else is read.

    Args:
      step: of the checkpoint.
      like: the same tree of the network that is to take them; its arrays are not read.
      mesh: where they are to lie.

    Raises:
      UserError: a parameter or statistic is missing, is one too many or has another shape (all are compared by name
        before anything is read), the files cannot be read, or hold other values than were saved.
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

    Args:
      step: of the checkpoint.
      layout: of the run that wrote it.

    Raises:
      UserError: there is no bank, it is not of that layout, the files cannot be read, or hold other values than were
        saved.
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
    """Returns the tree of an item with shapes and types in the place of arrays, as Orbax wrote it down."""
    try:
      with StandardCheckpointer() as reader:
        return reader.metadata(self._folder / str(step) / item).item_metadata.tree
    except Exception as error:  # of many types, see restore
      raise self._unreadable(step, error) from error

  def _read_item(self, step: int, item: str, as_stored: Mapping[str, Any],
                 sharding_of: Callable[[Any], jax.sharding.Sharding]) -> dict[str, Any]:
    """Returns an item with the types in which it was saved, compared with its checksums."""
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
    """Returns what is wrong with a checkpoint, "" if it is whole: everything in it is read and its checksums compared.

    Args:
      step: of the checkpoint.
      mesh: where its arrays are to lie meanwhile.
    """
    try:
      meta = self.read_meta(step)
      # A checkpoint without checksums does not say what should be there.
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
    """Returns the kNN accuracy by which the best checkpoint is chosen; None where it was not measured, or cannot be
    read."""
    if step in self._knn_top1:
      return self._knn_top1[step]
    # Read past Orbax, which asks for it in the middle of saving.
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

  def restore_newest(self, check_meta: Callable[[dict[str, Any]], None], like: TrainState, mesh: jax.sharding.Mesh, *,
                     say: Callable[[str], None]) -> TrainState:
    """Returns the state of the newest checkpoint that can be read and has the values that were saved.

    Newer ones that cannot, or have not, are named and moved to `unreadable-STEP` beside it: left in their place, they
    would make Orbax skip every later save up to their step without a word.

    Args:
      check_meta: raises a UserError when a checkpoint belongs to another run.
      like: see `restore`.
      mesh: see `restore`.
      say: prints a line.

    Raises:
      UserError: from `check_meta`, or because none of the checkpoints can be read; the disk is as it was.
    """
    unreadable = {}
    for step in reversed(self.steps()):
      failure, meta, state = "", {}, like
      try:
        meta = self.read_meta(step)
        check_meta(meta)
        state = self.restore(step, like, mesh)
      except UserError:
        raise
      except Exception as error:  # Orbax raises Exception itself for a damaged data file
        failure = reason_of(error)
      # Checksums are taken by all processes together, so only once each of them has read its part.
      if failure := first_failure(failure) or _changed(meta, _items(state)):
        unreadable[step] = failure
        continue
      self.close()
      for bad_step, reason in unreadable.items():
        say(f"checkpoint {bad_step} cannot be read, moved to {self._aside(bad_step).name}: {reason}")
        if jax.process_index() == 0:
          (self._folder / str(bad_step)).rename(self._aside(bad_step))
      if unreadable:
        wait_for_all("moving the checkpoints that cannot be read")  # before any process looks at the folder again
      return state
    raise UserError(f"none of the checkpoints in {self._folder} can be read ({unreadable}); "
                    "move the folder away to start anew, or choose another --workdir")

  def _aside(self, step: int) -> Path:
    """Returns where a damaged checkpoint goes; an earlier one of the same step is never written over."""
    names = itertools.chain([f"{ASIDE}{step}"], (f"{ASIDE}{step}-{number}" for number in itertools.count(2)))
    return next(path for path in map(self._folder.joinpath, names) if not path.exists())

  def save(self, step: int, state: TrainState, meta: Mapping[str, Any], *, knn_top1: float | None,
           surely: bool = False, say: Callable[[str], None] = print) -> None:
    """Starts to write a checkpoint and returns before it is on disk; the state may be donated at once.

    A disk that cannot take it is no reason to lose the run: that is said, what was begun is cleared away, and it is
    tried once more at once and else at the next save. (Of several processes all end then: each would have to know of
    the other's disk.)

    Args:
      step: steps taken.
      state: the whole state.
      meta: JSON values, to which the format and the checksums are added.
      knn_top1: measured at this step, if it was; the best is kept.
      surely: returns only once it is on disk, and tries for `PATIENCE_SECONDS`.
      say: prints a line.

    Raises:
      UserError: asked to be sure, it could not be written.
    """
    begun = time.monotonic()
    for attempt in itertools.count():
      try:
        self._start_save(step, state, meta, knn_top1)
        if surely:
          self._open(writing=True).wait_until_finished()
        return
      except Exception as error:  # of many types, see restore; of an earlier save, too, that ended meanwhile
        if jax.process_count() > 1:
          raise
        self._abandon()
        say(f"WARNING: a checkpoint could not be written, at step {step} ({reason_of(error)})")
        if not surely and attempt:
          return
        if surely and time.monotonic() - begun > PATIENCE_SECONDS:
          raise UserError(f"the checkpoint of step {step} could not be written to {self._folder} ({reason_of(error)}); "
                          f"on disk are {self.steps()}; make room, and the same command goes on from there") from error
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
    """Gives up what is being written; the next save clears it away."""
    manager, self._manager, self._writing = self._manager, None, False
    with contextlib.suppress(Exception):  # it says once more what went wrong
      if manager is not None:
        manager.close()

  def close(self) -> None:
    """Waits until everything is on disk. Another call opens the folder again."""
    if self._manager is not None:
      self._manager.close()
      self._manager = None

  def _open(self, *, writing: bool = False) -> CheckpointManager:
    """Returns Orbax's manager. What a killed run left half-written goes only once this run saves: one that is refused
    must leave the folder as it was."""
    if writing and not self._writing:
      self.close()
    if self._manager is None:
      for path in map(self._legacy_metrics, filter(str.isdigit, (child.name for child in self._folder.glob("*")))):
        if path.exists() and read_json(path) is None:  # Orbax reads all, and one that it cannot keeps it from the rest
          raise UserError(f"{path} is damaged; move {path.parent} away: without it the checkpoint is whole, but not "
                          "known as the one with the best kNN")
      self._manager = CheckpointManager(self._folder, options=CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy([LatestN(self._keep), _Best(self.best_metric)]),
        cleanup_tmp_directories=writing))
      self._writing = writing
    return self._manager


class _Best(PreservationPolicy):
  """Keeps the one with the best kNN. Orbax's own reads it from a file that no checksum guards."""

  def __init__(self, metric_of: Callable[[int], float | None]) -> None:
    self._metric_of = metric_of

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    found = {info.step: metric for info in checkpoints if (metric := self._metric_of(info.step)) is not None}
    best = max(found, key=lambda step: (found[step], step), default=None)
    return [info.step == best for info in checkpoints]


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
  """Returns the fields of each item that this state has."""
  return {item: {field: getattr(state, field) for field in fields if getattr(state, field) is not None}
          for item, fields in ITEMS.items()}


def _changed(meta: Mapping[str, Any], items: Mapping[str, Any]) -> str:
  """Returns which arrays of {item: tree} are not those that were saved, "" if none or nobody knows."""
  if "checksums" not in meta:
    return ""
  wrong = []
  for item, tree in items.items():
    saved, found = meta["checksums"][item], checksums(tree)
    wrong += [f"{item}/{name}" for name in sorted(saved.keys() | found.keys()) if saved.get(name) != found.get(name)]
  more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
  return f"not as it was saved: {', '.join(wrong[:3])}{more}" if wrong else ""


def reason_of(error: Exception | str) -> str:
  """Returns what an error says in one line, the disk's own words ahead of TensorStore's, which are long."""
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
  """Returns the shapes and types of a tree of arrays, to be restored with this sharding."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
