"""What a run that trains is guarded against: numbers that are not finite, collapse, images that cannot be read."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pirl_jax.errors import UserError
from pirl_jax.method.health import QUANTITIES
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.files import write_json
from pirl_jax.storage.logbook import Logbook
from pirl_jax.training.parts import Parts

COLLAPSED_SPREAD = 0.05
"""`embedding_spread` below which all embeddings are taken to be alike: 1 fills the sphere."""

NAMED_BROKEN = 20
"""Broken images named in the log one by one; beyond them only the count goes on."""


class Guard:
  """Looks at what the steps report, a while after they were started, so that the devices never wait for the host."""

  def __init__(self, folder: Path, *, image_name: Callable[[int], str], say: Callable[[str], None]) -> None:
    """Has seen nothing yet.

    Args:
      folder: of the run; what is known of a bad step is written there.
      image_name: name of an image by its index.
      say: prints a line.
    """
    self._folder, self._image_name, self._say = folder, image_name, say
    self._unseen = []  # (step, the batch's indices, bool[5] on the devices)
    self._warned = False

  def note(self, step: int, index: np.ndarray, found: jax.Array) -> None:
    """Keeps what a step reports until the next `check`.

    Args:
      step: the one just started.
      index: i32[b], of the images in this process's part of its batch.
      found: bool[5], see `not_finite`.
    """
    self._unseen.append((step, index, found))

  def check(self) -> None:
    """Waits for the steps noted since the last time and looks at them.

    Raises:
      UserError: one of them held a number that is not finite; `not_finite.json` says which images it had.
    """
    unseen, self._unseen = self._unseen, []
    for (step, index, _), found in zip(unseen, jax.device_get([found for *_, found in unseen]), strict=True):
      if found.any():
        bad = [name for name, is_bad in zip(QUANTITIES, found, strict=True) if is_bad]
        process = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._folder / f"not_finite{process}.json"
        with contextlib.suppress(OSError):  # a disk that is full must not hide what went wrong
          write_json(path, {"step": step, "not_finite": bad, "images": [
            {"index": int(number), "name": self._image_name(int(number))} for number in index]})
        raise UserError(
          f"in step {step}, {bad[0]} held numbers that are not finite{_also(bad[1:])}; the checkpoints from before "
          f"are whole, in {self._folder / 'checkpoints'}; its images are listed in {path}; a lower "
          "optimizer.learning_rate may help, in another --workdir")

  def warn_of_collapse(self, step: int, figures: Mapping[str, float]) -> None:
    """Says once in a run that all embeddings have become alike; `figures` are the metrics of a step."""
    spread = figures.get("embedding_spread", 1)
    if spread < COLLAPSED_SPREAD and not self._warned:
      self._warned = True
      self._say(f"WARNING: step {step}: all embeddings of the batch are nearly alike (embedding_spread {spread:.3f}; 1 "
                "fills the sphere, 0 is a point). A network that stays so has learnt nothing: a lower "
                "optimizer.learning_rate or more negatives may help")


def _also(names: Sequence[str]) -> str:
  return f", then {', '.join(names)}" if names else ""


class Broken:
  """Counts and names the images that could not be read, each once."""

  def __init__(self, parts: Parts, book: Logbook) -> None:
    self._source, self._book, self._seen = parts.train, book, set()
    self._layout, self._limit = parts.layout, parts.config.data.max_bad_fraction
    self._path, self._count = parts.workdir / "broken_images.json", 0
    self._num_usable = jax.jit(jnp.sum, out_shardings=mesh_lib.whole(parts.mesh))
    self._on_every_device = jax.jit(lambda x: x, out_shardings=mesh_lib.whole(parts.mesh))

  def note(self, step: int, batch: dict[str, np.ndarray]) -> None:
    """Says in the log which images of the batch are broken and not yet named."""
    for index in batch["index"][~batch["valid"]]:
      if index not in self._seen:
        self._seen.add(index)
        if len(self._seen) <= NAMED_BROKEN:
          self._book.say(f"step {step}: {self._source.image_name(int(index))} cannot be read; from now on it has no "
                         f"weight ({len(self._seen)} broken so far)")
        elif len(self._seen) % 100 == 0:
          self._book.say(f"step {step}: {len(self._seen)} images cannot be read so far")

  def check(self, step: int, usable: jax.Array) -> None:
    """Writes the list of all that were found broken, by any process and before any restart.

    Args:
      step: the last one.
      usable: bool[S * R], see `TrainState`.

    Raises:
      UserError: they are more than `data.max_bad_fraction` of the images.
    """
    count = self._layout.num_images - int(self._num_usable(usable))
    if count == self._count:
      return
    self._count = count
    rows = np.asarray(self._on_every_device(usable))
    index = np.flatnonzero(~rows[self._layout.row_of(np.arange(self._layout.num_images))])
    if jax.process_index() == 0:
      with self._book.tolerant(self._path.name):
        write_json(self._path, {"step": step, "count": len(index), "images": [
          {"index": int(i), "name": self._source.image_name(int(i))} for i in index]})
    if len(index) > self._limit * self._layout.num_images:
      raise UserError(
        f"{count} of {self._layout.num_images} training images cannot be read, more than data.max_bad_fraction="
        f"{self._limit}; they are listed in {self._path}; where a disk or a network is at fault, the same command goes "
        "on from the newest checkpoint once it is back; else allow more, or start anew without them")
