"""Whether a run may start from the beginning: only if nothing shows that it ever had a checkpoint."""

import contextlib
import os
from pathlib import Path

from pirl_jax.errors import UserError
from pirl_jax.storage.files import read_json, write_json
from pirl_jax.storage.logbook import METRICS
from pirl_jax.storage.rows import read_rows

SAVED = "saved.json"
"""The file with the step of the checkpoint that was saved last; null before the first one. It lies beside the folder of
the checkpoints, so that it is left if that folder is lost."""

OF_A_FINISHED_RUN = "curves.png", "results/*.json", "export", "report.html", "trained.json"
"""What is written only after the last checkpoint is on disk, or from a checkpoint."""

LIKE_A_CHECKPOINT = "*/meta", "*/*/meta", "*/_CHECKPOINT_METADATA", "*/*/_CHECKPOINT_METADATA"
"""What a checkpoint holds, whatever the name of its folder is, and if it was moved one folder down."""


def note_saved(workdir: Path, step: int | None) -> None:
  """Writes the step of the newest checkpoint beside the checkpoints; a disk that does not take it is no error."""
  with contextlib.suppress(OSError):
    write_json(workdir / SAVED, {"step": step})


def saved_step(workdir: Path) -> int | None:
  """Returns the step of the checkpoint that was saved last, or None if no such step is noted."""
  step = (read_json(workdir / SAVED) or {}).get("step")
  return step if isinstance(step, int) else None


def check_new(workdir: Path, *, every_steps: int, total_steps: int) -> None:
  """Checks that a run without a checkpoint may start from the beginning, which erases its metrics.

  Args:
    workdir: the folder of the run.
    every_steps: number of steps between two checkpoints, as the run in this folder started.
    total_steps: the last step of the run, as it started.

  Raises:
    UserError: something in the folder shows that the run had a checkpoint or was finished, or the folder cannot be
      read.
  """
  folder = workdir / "checkpoints"
  try:
    sign = _sign(workdir, folder, every_steps, total_steps)
  except OSError as error:
    raise UserError(f"{workdir} cannot be read ({error.strerror or error}); when the disk can be read again, the same "
                    "command goes on") from error
  if sign:
    raise UserError(f"{sign}, but {folder} holds no checkpoint; bring the checkpoints back, or choose another "
                    f"--workdir, or move {workdir} away to start from the beginning")


def _sign(workdir: Path, folder: Path, every_steps: int, total_steps: int) -> str:
  """Returns in words what shows that the run had a checkpoint, or ""."""
  if os.path.lexists(folder) and not folder.is_dir():
    return f"{folder} is a link to a folder that is not there" if folder.is_symlink() else f"{folder} is no folder"
  for pattern in LIKE_A_CHECKPOINT:
    for path in folder.glob(pattern):
      if "orbax-checkpoint-tmp" not in str(path.relative_to(folder)):
        return f"{path.parent} looks like a checkpoint under another name"
  if (step := saved_step(workdir)) is not None:
    return f"{workdir / SAVED} says that the checkpoint of step {step} was saved"
  for pattern in OF_A_FINISHED_RUN:
    for path in workdir.glob(pattern):
      return f"{path} is of a run that has saved a checkpoint"
  last = max((row["step"] for row in read_rows(workdir / METRICS)), default=0)
  # A crash may come before the first checkpoint is complete. But the first checkpoint is complete before the second one
  # is started, so after twice the interval there must be one. If nothing is noted about checkpoints, the run is of an
  # older version, or the note is lost; then a row of the first checkpoint's step is enough.
  noted = read_json(workdir / SAVED) is not None
  if last > 2 * every_steps or not noted and 0 < min(every_steps, total_steps) <= last:
    return f"{workdir / METRICS} reaches step {last}"
  return ""
