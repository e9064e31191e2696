"""Snapshots of a long evaluation, from which the same command resumes."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
from orbax.checkpoint import CheckpointManager, CheckpointManagerOptions, args

from pirl_jax.runtime.mesh import whole
from pirl_jax.runtime.processes import first_failure, wait_for_all
from pirl_jax.storage.checkpoints import template_of
from pirl_jax.storage.checksums import checksums
from pirl_jax.storage.reading import reason_of, try_reading
from pirl_jax.storage.retention import Retention, steps_in


class Snapshots:
  """The snapshots of a long evaluation, from which the same command resumes; a context manager.

  Only the newest snapshot is kept. A folder must belong to one evaluation; the caller chooses the name of the folder
  accordingly.
  """

  def __init__(self, folder: str | os.PathLike) -> None:
    """Opens `folder`; the first save creates it."""
    self._folder = Path(folder).absolute()
    self._manager: CheckpointManager | None = None
    self._retention = Retention(self._folder, keep=1, what="snapshot")

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info: object) -> None:
    with self._tolerant("the last one"):
      manager, self._manager = self._manager, None
      if manager is not None:
        manager.close()
        self._retention.settle()

  def restore(self, like: Any, mesh: jax.sharding.Mesh) -> tuple[int, Any]:
    """Returns (step, tree) of the newest snapshot, or (0, `like`) if there is no snapshot that can be read.

    A snapshot that is damaged is named and deleted; only computing time is lost.

    Args:
      like: the tree at the start; its arrays are replicated on every device.
      mesh: the devices for the arrays.

    Raises:
      UserError: the disk does not allow reading now.
    """
    template = template_of(like, whole(mesh))
    for step in reversed(steps_in(self._folder)):
      folder = self._folder / str(step)
      found, damage = try_reading(f"snapshot {folder}", functools.partial(self._read, step, template), folder=folder,
                                  agree=first_failure)
      # All processes compute the checksums together. So first every process must have read its part.
      if not damage and found["checksums"] == checksums(found["tree"]):
        return step, found["tree"]
      print(f"snapshot {folder} cannot be read, deleted: {damage or 'not as it was saved'}")
      if jax.process_index() == 0:
        self._retention.remove(step)
    wait_for_all("removing the snapshots that cannot be read")
    return 0, like

  def _read(self, step: int, template: Any) -> Any:
    return self._open().restore(
      step, args=args.Composite(tree=args.StandardRestore(template), checksums=args.JsonRestore()))

  def save(self, step: int, tree: Any) -> None:
    """Starts writing a tree of arrays and returns before it is on disk.

    If the disk cannot take the snapshot, a warning is printed and the evaluation continues. With several processes an
    error ends all of them.

    Args:
      step: >= 1, and higher than that of the last snapshot.
      tree: of arrays.
    """
    items = args.Composite(tree=args.StandardSave(tree), checksums=args.JsonSave(checksums(tree)))
    with self._tolerant(f"that of step {step}"):
      self._open().save(step, args=items, force=True)  # without it Orbax skips a snapshot if a later one is left
      if jax.process_index() == 0:
        self._retention.expect(step)
    for line in self._retention.words():
      print(line)

  @contextlib.contextmanager
  def _tolerant(self, which: str) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # of many types, see restore; it may come from an earlier save that ended meanwhile
      if jax.process_count() > 1:
        raise
      print(f"WARNING: a snapshot could not be written to {self._folder}, {which} ({reason_of(error)}); the evaluation "
            "continues without it")
      manager, self._manager = self._manager, None
      self._retention.give_up()
      with contextlib.suppress(Exception):  # closing raises the error of the save once more
        if manager is not None:
          manager.close()

  def _open(self) -> CheckpointManager:
    if self._manager is None:
      self._manager = CheckpointManager(self._folder, options=CheckpointManagerOptions(
        lightweight_initialize=True, cleanup_tmp_directories=True))
    return self._manager
