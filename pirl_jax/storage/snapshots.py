"""Snapshots of a long evaluation, so that the same command goes on."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
from orbax.checkpoint import CheckpointManager, CheckpointManagerOptions, args

from pirl_jax.runtime.mesh import whole
from pirl_jax.runtime.processes import first_failure
from pirl_jax.storage.checkpoints import reason_of, template_of
from pirl_jax.storage.checksums import checksums


class Snapshots:
  """Where a long evaluation stands, so that the same command goes on; a context manager.

  Only the newest one is kept. What lies in the folder belongs to one evaluation: the caller names the folder by it.
  """

  def __init__(self, folder: str | os.PathLike) -> None:
    """Opens `folder`; it is made by the first save."""
    self._folder = Path(folder).absolute()
    self._manager: CheckpointManager | None = None

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info: object) -> None:
    with self._tolerant("the last one"):
      manager, self._manager = self._manager, None
      if manager is not None:
        manager.close()

  def restore(self, like: Any, mesh: jax.sharding.Mesh) -> tuple[int, Any]:
    """Returns (step, tree) as last saved, or (0, `like`) where nothing that can be read was.

    One that cannot be read is named and thrown away: what is lost is time.

    Args:
      like: the tree at the start, of arrays whole on every device.
      mesh: where the arrays are to lie.
    """
    if self._folder.is_dir():
      template = template_of(like, whole(mesh))
      for step in sorted(self._open().all_steps(), reverse=True):
        failure, found = "", {}
        try:
          found = self._open().restore(
            step, args=args.Composite(tree=args.StandardRestore(template), checksums=args.JsonRestore()))
        except Exception as error:  # Orbax raises Exception itself for a damaged file
          failure = reason_of(error)
        failure = first_failure(failure)  # checksums are taken by all processes together
        if not failure and found["checksums"] == checksums(found["tree"]):
          return step, found["tree"]
        print(f"snapshot {self._folder / str(step)} cannot be read, thrown away: {failure or 'not as it was saved'}")
        self._open().delete(step)  # else Orbax would skip every save up to this step without a word
    return 0, like

  def save(self, step: int, tree: Any) -> None:
    """Starts to write a tree of arrays under a step >= 1, higher than the last, and returns before it is on disk.

    A disk that cannot take it is no reason to end the evaluation: that is said. (Of several processes all end.)
    """
    items = args.Composite(tree=args.StandardSave(tree), checksums=args.JsonSave(checksums(tree)))
    with self._tolerant(f"that of step {step}"):
      if not self._open().save(step, args=items):
        raise RuntimeError("Orbax skipped it")

  @contextlib.contextmanager
  def _tolerant(self, which: str) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # of many types, see restore; of an earlier save, too, that ended meanwhile
      if jax.process_count() > 1:
        raise
      print(f"WARNING: a snapshot could not be written to {self._folder}, {which} ({reason_of(error)}); the evaluation "
            "goes on without it")
      manager, self._manager = self._manager, None
      with contextlib.suppress(Exception):  # it says once more what went wrong
        if manager is not None:
          manager.close()

  def _open(self) -> CheckpointManager:
    if self._manager is None:
      self._manager = CheckpointManager(self._folder, options=CheckpointManagerOptions(
        max_to_keep=1, cleanup_tmp_directories=True))
    return self._manager
