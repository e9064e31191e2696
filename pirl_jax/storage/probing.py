"""Tries at the start of a run what its end depends on: that a checkpoint can be written into its folder."""

import os
import secrets
from pathlib import Path

import numpy as np
from orbax.checkpoint import Checkpointer, CompositeCheckpointHandler, args

from pirl_jax.errors import UserError
from pirl_jax.runtime.processes import alone
from pirl_jax.storage.files import write_file
from pirl_jax.storage.reading import reason_of
from pirl_jax.storage.retention import remove

PROBE = ".probe-"
"""Start of the name of the folder that is written and removed."""


def probe(workdir: Path) -> None:
  """Writes a tiny checkpoint beside those of the run, as Orbax writes them, and removes it.

  With several processes every process writes a file of its own in place of the checkpoint: Orbax would wait for the
  others, for ever if one of them cannot write.

  Args:
    workdir: the folder of the run, which exists.

  Raises:
    UserError: a checkpoint cannot be written there.
  """
  folder = workdir.absolute() / "checkpoints"
  folder = folder if folder.is_dir() else folder.parent
  path = folder / f"{PROBE}{os.getpid()}-{secrets.token_hex(4)}"
  try:
    if not alone():
      str(path).encode()  # raises ValueError: TensorStore takes paths in UTF-8 only
      write_file(path / "model" / "ocdbt.process_0" / "d" / ("0" * 32), b"0")
      path.rename(f"{path}.finished")
    else:
      with Checkpointer(CompositeCheckpointHandler()) as writer:
        writer.save(path, args=args.Composite(model=args.StandardSave({"x": np.zeros(1)}), meta=args.JsonSave({})))
  except Exception as error:  # Orbax raises errors of many types
    reason = "its name is not in UTF-8" if "\\udc" in ascii(str(path)) else reason_of(error)
    raise UserError(f"no checkpoint can be written to {folder} ({reason}); make room there, or choose another "
                    "--workdir") from error
  finally:
    for left in folder.glob(f"{PROBE if alone() else path.name}*"):  # alone: also what a killed run has left
      remove(left)
