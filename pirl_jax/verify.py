"""Lists the checkpoints of a run and verifies them: all of each is read and compared with its checksums."""

from datetime import datetime

from ml_collections import ConfigDict

from pirl_jax.errors import UserError
from pirl_jax.runs import run_folder
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.checkpoints import ASIDE, Checkpoints
from pirl_jax.storage.formats import FIRST_CHECKED


def run(config: ConfigDict, workdir: str) -> None:
  """Prints a line for each checkpoint: step, size, when it was written, kNN, and whether it is whole.

  Nothing is written and nothing moved; `workdir` is not used.

  Raises:
    UserError: no such run, no checkpoint in it, or one that is damaged.
  """
  del workdir
  if not config.checkpoint:
    raise UserError("config.checkpoint is empty; give the folder of a run, --config.checkpoint=runs/pirl")
  folder = run_folder(config.checkpoint) / "checkpoints"
  damaged = []
  with Checkpoints(folder, keep=1) as checkpoints:
    steps = checkpoints.steps()
    print(f"{folder}: {len(steps)} checkpoint(s)")
    print(f"{'step':>12} {'MB':>10}  {'written':16}  {'kNN':>6}")
    for step in steps:
      reason = checkpoints.check(step, mesh_lib.create_mesh())
      state = f"DAMAGED: {reason}" if reason else "whole"
      if not reason and (version := checkpoints.read_meta(step)["format"]) < FIRST_CHECKED:
        state = f"can be read (format {version} has no checksums)"
      knn_top1 = checkpoints.best_metric(step)
      files = [path.stat() for path in (folder / str(step)).rglob("*") if path.is_file()]
      size = sum(file.st_size for file in files) / 1e6
      written = datetime.fromtimestamp(max((file.st_mtime for file in files), default=0)).isoformat(" ", "minutes")
      accuracy = "" if knn_top1 is None else f"{knn_top1:.1%}"
      print(f"{step:>12,} {size:>10,.1f}  {written}  {accuracy:>6}  {state}")
      damaged += [str(step)] if reason else []
  aside = sorted(path.name for path in folder.glob(f"{ASIDE}*"))
  if aside:
    print(f"set aside because they could not be read: {', '.join(aside)}")
  if not steps:
    raise UserError(f"{folder} holds no finished checkpoint")
  if damaged:
    raise UserError(f"of {len(steps)} checkpoint(s) in {folder}, damaged: {', '.join(damaged)}; a run that goes on "
                    "takes the newest whole one and sets those after it aside")
