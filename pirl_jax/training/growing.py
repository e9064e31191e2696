"""Goes on with a folder that has changed: known images keep the rows of the memory bank, new images get new rows.

Letters: S * R rows of the bank, D dimensions of an embedding.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pirl_jax.data import contents
from pirl_jax.errors import UserError
from pirl_jax.method.memory_bank import Layout
from pirl_jax.method.state import TrainState, state_shardings
from pirl_jax.training.parts import Parts


def carry_over(parts: Parts, state: TrainState, meta: Mapping[str, Any]) -> TrainState:
  """Returns the state for the images as they are now.

  An image is known if its name and its size in bytes are those of before. Weights, momentum and the number of steps
  stay. The rows of images that are gone are dropped.

  Args:
    parts: of the run, with the images as they are now.
    state: of the checkpoint, with the rows of the images of before; the bank is [S * R, D].
    meta: of the checkpoint.

  Raises:
    UserError: the run's folder has no list of the images of before, or the source has no names.
  """
  before, now = contents.remembered(parts.workdir, meta["data"]), parts.train.listing()
  if now is None or len(before) != meta["num_images"]:
    raise UserError(f"data.grown=True is not possible for the run in {parts.workdir}: " + (
      "only images in a folder have names by which they are found again" if now is None
      else f"{contents.FILE} does not list its {meta['num_images']} images"))
  known = {line: index for index, line in enumerate(before)}
  pairs = np.array([(known[line], index) for index, line in enumerate(now) if line in known], np.int64).reshape(-1, 2)
  old_rows = Layout(meta["num_images"], meta["num_strata"]).row_of(pairs[:, 0])
  new_rows = parts.layout.row_of(pairs[:, 1])
  fresh, shardings = parts.initial_state(), state_shardings(parts.mesh, with_bank=state.bank is not None)

  def moved(name: str) -> jax.Array:
    old, new = (_on_host(getattr(one, name)) for one in (state, fresh))
    new = np.array(new)
    new[new_rows] = old[old_rows]
    return jax.make_array_from_callback(new.shape, getattr(shardings, name), lambda part: new[part])

  print(f"the images have changed: {len(pairs):,} keep their rows, {len(now) - len(pairs):,} are new, "
        f"{len(before) - len(pairs):,} are gone; an epoch has {parts.steps_per_epoch:,} steps, and the images have "
        "another order from now on")
  return state.replace(**{name: moved(name) for name in ("usable", "bank", "written")
                          if getattr(state, name) is not None})


def _on_host(array: jax.Array) -> np.ndarray:
  return np.asarray(array) if array.is_fully_addressable else np.asarray(
    multihost_utils.process_allgather(array, tiled=True))
