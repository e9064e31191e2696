"""Checkpoints of a run: the only file that knows Orbax.

A checkpoint is a folder STEP with one item for each use, so that an evaluation reads the model alone:
`model` (params, batch_stats), `train` (opt_state, step, normaliser), `bank` (bank, usable) and `meta` (JSON).
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
from orbax.checkpoint import CheckpointManager, CheckpointManagerOptions, args
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from pirl_jax.errors import UserError
from pirl_jax.state import TrainState, state_shardings

FORMAT = 1
"""Of the items above; written into `meta` and checked before anything is read."""

ITEMS = {"model": ("params", "batch_stats"), "train": ("opt_state", "step", "normaliser"), "bank": ("bank", "usable")}
BEST_METRIC = "knn_top1"


class Checkpoints:
  """The checkpoints of one run; a context manager that waits for the last save to be on disk.

  Kept are the last few and the one with the best kNN: a policy that knows the best alone would delete the newest
  whenever it is not the best, and with it the way to resume.
  """

  def __init__(self, folder: str | os.PathLike, *, keep: int):
    """Opens `folder`, which need not be there yet: it is made by the first save.

    Args:
      folder: of the checkpoints.
      keep: how many of the newest to keep, >= 1.
    """
    self._folder = Path(folder).absolute()
    self._keep = keep
    self._manager, self._writing = None, False

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def steps(self) -> list[int]:
    """Returns the steps of the checkpoints on disk, oldest first; unfinished ones do not count."""
    return sorted(self._open().all_steps()) if self._folder.is_dir() else []

  def read_meta(self, step: int) -> dict[str, Any]:
    """Returns the `meta` of a checkpoint.

    Raises:
      UserError: written by a version of the program with another format.
    """
    meta = self._open().restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
    if meta["format"] != FORMAT:
      raise UserError(f"checkpoint {self._folder / str(step)} has format {meta['format']}, this program reads format "
                      f"{FORMAT}; use the version of the program that wrote it")
    return meta

  def restore(self, step: int, like: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the state of a checkpoint, split over `mesh` whatever mesh it was saved from.

    Args:
      step: of the checkpoint.
      like: a state of the same shapes; its arrays are not read.
      mesh: where the state is to lie.

    Raises:
      Exception: Orbax's own errors, of many types, when files are missing or damaged.
    """
    shardings = state_shardings(mesh)
    items = {
      item: args.StandardRestore({field: _template(getattr(like, field), getattr(shardings, field))
                                  for field in fields})
      for item, fields in ITEMS.items()}
    restored = self._open().restore(step, args=args.Composite(**items))
    return like.replace(**{field: restored[item][field] for item, fields in ITEMS.items() for field in fields})

  def restore_newest(self, check_meta: Callable[[dict[str, Any]], None], like: TrainState, mesh: jax.sharding.Mesh, *,
                     say: Callable[[str], None]) -> TrainState:
    """Returns the state of the newest checkpoint that can be read.

    Newer ones that cannot are named and moved to `unreadable-STEP` beside it: left in their place, they would make
    Orbax skip every later save up to their step without a word.

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
      try:
        check_meta(self.read_meta(step))
        state = self.restore(step, like, mesh)
      except UserError:
        raise
      except Exception as error:  # Orbax raises Exception itself for a damaged data file
        unreadable[step] = " ".join(str(error).split())[:200]
        continue
      self.close()
      for bad_step, reason in unreadable.items():
        say(f"checkpoint {bad_step} cannot be read, moved to unreadable-{bad_step}: {reason}")
        if jax.process_index() == 0:
          (self._folder / str(bad_step)).rename(self._folder / f"unreadable-{bad_step}")
      return state
    raise UserError(f"none of the checkpoints in {self._folder} can be read ({unreadable}); "
                    "move the folder away to start anew, or choose another --workdir")

  def save(self, step: int, state: TrainState, meta: Mapping[str, Any], *, knn_top1: float | None) -> None:
    """Starts to write a checkpoint and returns before it is on disk; the state may be donated at once.

    Args:
      step: steps taken.
      state: the whole state.
      meta: JSON values, to which the format is added.
      knn_top1: measured at this step, if it was; the best is kept.
    """
    items = {item: args.StandardSave({field: getattr(state, field) for field in fields})
             for item, fields in ITEMS.items()}
    saved = self._open(writing=True).save(
      step, args=args.Composite(**items, meta=args.JsonSave({**meta, "format": FORMAT})),
      metrics=None if knn_top1 is None else {BEST_METRIC: knn_top1})
    if not saved:
      raise RuntimeError(f"Orbax skipped the checkpoint of step {step}; on disk are {self.steps()}")

  def close(self) -> None:
    """Waits until everything is on disk. Another call opens the folder again."""
    if self._manager is not None:
      self._manager.close()
      self._manager = None

  def _open(self, *, writing=False):
    """Returns Orbax's manager. What a killed run left half-written goes only once this run saves: one that is refused
    must leave the folder as it was."""
    if writing and not self._writing:
      self.close()
    if self._manager is None:
      def best_fn(metrics):
        return metrics[BEST_METRIC]
      policy = AnyPreservationPolicy([
        LatestN(self._keep), BestN(get_metric_fn=best_fn, n=1, keep_checkpoints_without_metrics=False)])
      self._manager = CheckpointManager(self._folder, options=CheckpointManagerOptions(
        preservation_policy=policy, best_fn=best_fn,  # without best_fn Orbax does not write the metrics at all
        cleanup_tmp_directories=writing))
      self._writing = writing
    return self._manager


def _template(tree, sharding):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
