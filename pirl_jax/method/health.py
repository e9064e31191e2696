"""Is the run still sound? What a step must not hold (NaN, infinity), and what it should not come to (collapse)."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pirl_jax.errors import UserError
from pirl_jax.storage.files import write_json

QUANTITIES = ("the loss", "the gradients", "the parameters", "the batch statistics", "the rows of the memory bank")
"""Looked at in each step, in the order in which a number that is not finite passes from one to the next."""

NOT_FINITE = "not_finite"
"""Name among the metrics of a step of what `not_finite` returns."""

COLLAPSED_SPREAD = 0.05
"""`embedding_spread` below which all embeddings are taken to be alike: 1 fills the sphere."""


def not_finite(loss: Any, gradients: Any, parameters: Any, batch_stats: Any, bank_rows: Any = ()) -> jax.Array:
  """Returns bool[5]: in which of `QUANTITIES`, trees of arrays, there is a NaN or an infinity. Runs within the step."""
  def holds_one(tree):
    return jnp.any(jnp.array([jnp.any(~jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)], bool))

  return jnp.stack([holds_one(tree) for tree in (loss, gradients, parameters, batch_stats, bank_rows)])


class Guard:
  """Looks at what the steps report, a while after they were started, so that the devices never wait for the host."""

  def __init__(self, folder: Path, *, picture_name: Callable[[int], str], say: Callable[[str], None]):
    """Has seen nothing yet.

    Args:
      folder: of the run; what is known of a bad step is written there.
      picture_name: name of a picture by its index.
      say: prints a line.
    """
    self._folder, self._picture_name, self._say = folder, picture_name, say
    self._unseen = []  # (step, the batch's indices, bool[5] on the devices)
    self._warned = False

  def note(self, step: int, index: np.ndarray, found: jax.Array) -> None:
    """Keeps what a step reports until the next `check`.

    Args:
      step: the one just started.
      index: i32[b], of the pictures in this process's part of its batch.
      found: bool[5], see `not_finite`.
    """
    self._unseen.append((step, index, found))

  def check(self) -> None:
    """Waits for the steps noted since the last time and looks at them.

    Raises:
      UserError: one of them held a number that is not finite; `not_finite.json` says which pictures it had.
    """
    unseen, self._unseen = self._unseen, []
    for (step, index, _), found in zip(unseen, jax.device_get([found for *_, found in unseen]), strict=True):
      if found.any():
        bad = [name for name, is_bad in zip(QUANTITIES, found, strict=True) if is_bad]
        process = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._folder / f"not_finite{process}.json"
        with contextlib.suppress(OSError):  # a disk that is full must not hide what went wrong
          write_json(path, {"step": step, "not_finite": bad, "pictures": [
            {"index": int(number), "name": self._picture_name(int(number))} for number in index]})
        raise UserError(
          f"in step {step}, {bad[0]} held numbers that are not finite{_also(bad[1:])}; the checkpoints from before "
          f"are whole, in {self._folder / 'checkpoints'}; its pictures are listed in {path}; a lower "
          "optimizer.learning_rate may help, in another --workdir")

  def warn_of_collapse(self, step: int, figures: Mapping[str, float]) -> None:
    """Says once in a run that all embeddings have become alike; `figures` are the metrics of a step."""
    spread = figures.get("embedding_spread", 1)
    if spread < COLLAPSED_SPREAD and not self._warned:
      self._warned = True
      self._say(f"WARNING: step {step}: all embeddings of the batch are nearly alike (embedding_spread {spread:.3f}; 1 "
                "fills the sphere, 0 is a point). A network that stays so has learnt nothing: a lower "
                "optimizer.learning_rate or more negatives may help")


def _also(names):
  return f", then {', '.join(names)}" if names else ""
