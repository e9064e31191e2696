"""Which checkpoints are kept, and how the others are removed once a newer one is on disk."""

import contextlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from pirl_jax.errors import UserError

REMOVING = ".removing-"
"""Start of the name of a folder that is being removed. A checkpoint gets this name first, so it is never half there."""

LOOK_SECONDS = 0.2
"""How often a thread looks whether a checkpoint is on disk."""


def steps_in(folder: Path) -> list[int]:
  """Returns the steps of the finished checkpoints in a folder, the oldest first; [] if there is no folder.

  Raises:
    UserError: the folder is not a folder, or cannot be read.
  """
  try:
    names = [entry.name for entry in os.scandir(folder) if entry.name.isdecimal() and entry.is_dir()]
  except FileNotFoundError:
    return []
  except OSError as error:
    raise UserError(f"the checkpoints in {folder} cannot be listed ({error.strerror or error}); when they can be, the "
                    "same command goes on") from error
  return sorted(int(name) for name in names if name == str(int(name)))


def remove(path: Path) -> str:
  """Removes a folder. Returns "" or, if something of it cannot be removed, the reason.

  Of a link to a folder only the link is removed.
  """
  wrong: list[str] = []

  def note(_: object, name: str, error: object) -> None:
    of_it = error[1] if isinstance(error, tuple) else error
    wrong.append(f"{name}: {getattr(of_it, 'strerror', None) or of_it}")

  try:
    if path.is_symlink():
      path.unlink()
    else:
      shutil.rmtree(path, onerror=note)  # `onexc` only from Python 3.12 on
  except OSError as error:
    note(None, str(path), error)
  return wrong[0] if wrong else ""


class Retention:
  """Removes the checkpoints that are not kept: all but the newest, the best, and those whose kNN cannot be read.

  A checkpoint is removed only when a newer one is on disk. What cannot be removed is named once, and nothing else
  depends on it.
  """

  def __init__(self, folder: Path, *, keep: int, metric_of: Callable[[int], float | None] = lambda _: None,
               note: Callable[[int], None] = lambda _: None, what: str = "checkpoint") -> None:
    """Removes nothing yet.

    Args:
      folder: of the checkpoints.
      keep: number of newest checkpoints to keep.
      metric_of: metric_of(step) -> kNN accuracy, None if it was not measured; raises ValueError or OSError if it cannot
        be read.
      note: note(step) is called once this checkpoint is on disk, by another thread.
      what: the name of what is kept here, for messages.
    """
    self._folder, self._keep, self._metric_of, self._note, self._what = folder, keep, metric_of, note, what
    self._lock = threading.Lock()
    self._awaited: int | None = None
    self._over = threading.Event()
    self._named: set[str] = set()
    self._words: list[str] = []

  def expect(self, step: int) -> None:
    """Waits in a thread until the checkpoint of this step is on disk; then does what `settle` does."""
    self._over.set()
    self._over = threading.Event()
    self._awaited = step
    threading.Thread(target=self._watch, args=(step, self._over), daemon=True).start()

  def give_up(self) -> None:
    """Waits no longer: the checkpoint could not be written."""
    self._over.set()
    self._awaited = None

  def settle(self) -> None:
    """Notes the checkpoint that is expected, if it is on disk, and removes the checkpoints that are not kept.

    If the folder cannot be read now, the next call is the next try.
    """
    with self._lock, contextlib.suppress(UserError, OSError):
      if self._awaited is None or not (self._folder / str(self._awaited)).is_dir():
        return
      step, self._awaited = self._awaited, None
      self._over.set()
      self._note(step)
      self._remove_before(step)

  def words(self) -> list[str]:
    """Returns what is to be said since the last call."""
    words, self._words = self._words, []
    return words

  def _watch(self, step: int, over: threading.Event) -> None:
    while not over.wait(LOOK_SECONDS) and self._awaited == step:
      self.settle()

  def _remove_before(self, newest: int) -> None:
    for step in self._spare([step for step in steps_in(self._folder) if step <= newest]):
      self.remove(step)
    for path in self._folder.glob(f"{REMOVING}*"):  # also what could not be removed before
      if reason := remove(path):
        self._name(path, reason)

  def remove(self, step: int) -> None:
    """Removes a checkpoint; if this is not possible, `words` names it."""
    aside = self._folder / f"{REMOVING}{step}-{secrets.token_hex(4)}"
    try:
      (self._folder / str(step)).rename(aside)
    except OSError as error:
      self._name(self._folder / str(step), error.strerror or str(error))
    else:
      if reason := remove(aside):
        self._name(aside, reason)

  def _spare(self, steps: Sequence[int]) -> list[int]:
    """Returns those of the steps that are not kept. Checkpoints that cannot be judged stay, and count for nothing."""
    found = {}
    for step in steps:
      with contextlib.suppress(OSError, ValueError):
        found[step] = self._metric_of(step)
    measured = {step: metric for step, metric in found.items() if metric is not None}
    best = max(measured, key=lambda step: (measured[step], step), default=None)
    return [step for step in [*found][:-self._keep] if step != best]

  def _name(self, path: Path, reason: str) -> None:
    if path.name not in self._named:
      self._named.add(path.name)
      self._words.append(f"WARNING: the old {self._what} {path} cannot be removed ({reason}); remove it by hand; "
                         "nothing depends on it")
