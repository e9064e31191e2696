"""Checks during training: numbers that are not finite, collapse of the embeddings, images that cannot be read."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from pirl_jax.data import reading
from pirl_jax.errors import UserError
from pirl_jax.method.health import QUANTITIES
from pirl_jax.method.state import TrainState
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.files import write_json
from pirl_jax.storage.logbook import Logbook
from pirl_jax.training import verdict
from pirl_jax.training.parts import Parts

COLLAPSED_SPREAD = 0.05
"""If `embedding_spread` is below this value, the embeddings count as collapsed. 1 means that they fill the sphere."""

NAMED_BROKEN = 20
"""Number of broken images that the log names one by one; of further ones the log gives only the count."""


class Guard:
  """Checks the reports of the steps that are over."""

  def __init__(self, folder: Path, *, image_name: Callable[[int], str], say: Callable[[str], None]) -> None:
    """Creates a guard without any reports.

    Args:
      folder: of the run; `check` writes the details of a bad step there.
      image_name: function from an image's index to its name.
      say: prints a line.
    """
    self._folder, self._image_name, self._say = folder, image_name, say
    self._unseen = []  # (step, the batch's indices, bool[5] on the devices)
    self._warned = False

  def note(self, step: int, index: np.ndarray, found: jax.Array) -> None:
    """Stores the report of a step until the next `check`.

    Args:
      step: a step that is over; later than those noted before.
      index: i32[b], the indices of the images in this process's part of the batch.
      found: bool[5], one for each of `health.QUANTITIES`, see `health.not_finite`.
    """
    self._unseen.append((step, index, found))

  def check(self) -> None:
    """Checks the reports of the steps that were noted since the last check.

    Raises:
      UserError: a step held a number that is not finite. The file not_finite.json lists the images of this step.
    """
    unseen, self._unseen = self._unseen, []
    for (step, index, _), found in zip(unseen, jax.device_get([found for *_, found in unseen]), strict=True):
      if found.any():
        bad = [name for name, is_bad in zip(QUANTITIES, found, strict=True) if is_bad]
        said = f"in step {step}, {bad[0]} held numbers that are not finite{_also(bad[1:])}"
        process = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._folder / f"not_finite{process}.json"
        with contextlib.suppress(OSError):  # a full disk must not hide the error of the step
          write_json(path, {"step": step, "not_finite": bad, "images": [
            {"index": int(number), "name": self._image_name(int(number))} for number in index]})
          if jax.process_index() == 0:
            verdict.write_broken_off(self._folder, said)
        raise UserError(
          f"{said}; the earlier checkpoints in {self._folder / 'checkpoints'} are whole; the images of this step are "
          f"listed in {path}; a lower optimizer.learning_rate may help, in another --workdir")

  def warn_of_collapse(self, step: int, figures: Mapping[str, float]) -> None:
    """Prints a warning, once in a run, if all embeddings are nearly equal; `figures` are the metrics of a step."""
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
    self._path, self._num_usable = parts.workdir / "broken_images.json", self._layout.num_images
    self._on_every_device = jax.jit(lambda x: x, out_shardings=mesh_lib.whole(parts.mesh))

  def note(self, step: int, batch: dict[str, np.ndarray]) -> None:
    """Names in the log the broken images of the batch that have not been named before."""
    for index in batch["index"][~batch["valid"]]:
      if index not in self._seen:
        self._seen.add(index)
        if len(self._seen) <= NAMED_BROKEN:
          reason = reading.why_broken(self._source, int(index))
          self._book.say(f"step {step}: {self._source.image_name(int(index))} cannot be read"
                         f"{f' ({reason})' if reason else ''}; from now on it has no weight "
                         f"({len(self._seen)} broken so far)")
        elif len(self._seen) % 100 == 0:
          self._book.say(f"step {step}: {len(self._seen)} images cannot be read so far")

  def check(self, num_usable: int, state: TrainState) -> None:
    """Writes the list of all broken images, including those that other processes or earlier sessions have found.

    Args:
      num_usable: number of usable images after a step that is over, see `health.num_usable`. Only if it has changed,
        the list is written; this waits for `state`.
      state: the newest state, of which the list is made.

    Raises:
      UserError: the broken images are more than `data.max_bad_fraction` of all images.
    """
    if num_usable == self._num_usable:
      return
    self._num_usable = num_usable
    rows = np.asarray(self._on_every_device(state.usable))
    index = np.flatnonzero(~rows[self._layout.row_of(np.arange(self._layout.num_images))])
    if jax.process_index() == 0:
      with self._book.tolerant(self._path.name):
        write_json(self._path, {"step": int(state.step), "count": len(index), "images": [
          {"index": int(i), "name": self._source.image_name(int(i))} for i in index]})
    if len(index) > self._limit * self._layout.num_images:
      raise UserError(
        f"{len(index)} of {self._layout.num_images} training images cannot be read, more than data.max_bad_fraction="
        f"{self._limit}; they are listed in {self._path}; if a disk or a network has failed, the same command resumes "
        "from the newest checkpoint when it works again; otherwise raise data.max_bad_fraction, or start a new run "
        "without these images")
