"""Training a classifier on labelled images by SGD: the common settings, the program of a step, and the loop.

Letters: B batch of all devices, b this device's part.
"""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pirl_jax.data import batches
from pirl_jax.errors import UserError
from pirl_jax.runtime.mesh import SPLIT, WHOLE
from pirl_jax.runtime.progress import Progress
from pirl_jax.storage.snapshots import Snapshots

BASE_BATCH = 256
"""Images of the batch for which the learning rate is given."""

STEPS_IN_FLIGHT = 2
"""Steps that the devices may be behind the host."""

CHECK_STEPS = 100
"""Steps after which, and at the end of each epoch, the losses are looked at and a snapshot may be written."""

SNAPSHOT_SECONDS = 60.0
"""Least seconds of training between two snapshots, so that writing stays a small part of the work."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
  """How a classifier is trained. A protocol that trains one adds its own settings to these.

  Attributes:
    group: of the config, named in errors.
    advice: what else helps if the loss is not finite, a clause that follows "choose a lower learning rate".
    num_epochs: >= 1; a batch is always whole, and the images left over are others in each epoch.
    batch_size: B, >= 1.
    learning_rate: for a batch of 256, above 0; scaled in proportion to the batch.
    milestones: shares of the epochs, in (0, 1), after which the rate is multiplied by `decay_factor`.
    decay_factor: in (0, 1].
    momentum: of SGD, in [0, 1).
    nesterov: PyTorch's variant of it.
    weight_decay: >= 0.
    image_scale: range of the share of the image's area that the random crop covers, in (0, 1].

  Raises:
    UserError: a value is out of range.
  """

  group: ClassVar[str]
  advice: ClassVar[str] = ""
  num_epochs: int
  batch_size: int
  learning_rate: float
  milestones: tuple[float, ...]
  decay_factor: float
  momentum: float
  nesterov: bool
  weight_decay: float
  image_scale: tuple[float, float]

  def __post_init__(self) -> None:
    for field in ("num_epochs", "batch_size"):
      self.require(getattr(self, field) >= 1, field, "a whole number from 1 is needed")
    self.require(0 < self.learning_rate < math.inf, "learning_rate", "a finite number above 0 is needed")
    # Past the end the rate would never fall, without a word.
    self.require(all(0 < share < 1 for share in self.falls_at), "milestones",
                 f"they are shares of the {self.num_epochs} epochs, between 0 and 1")
    self.require(0 < self.decay_factor <= 1, "decay_factor", "it lies in (0, 1]")
    self.require(0 <= self.momentum < 1, "momentum", "it lies in [0, 1)")
    self.require(0 <= self.weight_decay < math.inf, "weight_decay", "a finite number from 0 is needed")
    scale = self.image_scale
    self.require(len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1, "image_scale",
                 "it is (smallest, largest), within (0, 1]")

  def require(self, holds: bool, field: str, rule: str) -> None:
    """Raises UserError with the rule for a field unless it holds."""
    if not holds:
      raise UserError(f"{self.group}.{field}={getattr(self, field)!r} is not possible: {rule}")

  @property
  def first_rate(self) -> float:
    """Returns the learning rate of the first step, for the batch as it is."""
    return self.learning_rate * self.batch_size / BASE_BATCH

  @property
  def falls_at(self) -> tuple[float, ...]:
    """Returns the milestones that are used, as shares."""
    return self.milestones

  def as_used(self, seed: int) -> dict[str, Any]:
    """Returns the settings and the seed for a result file, JSON values; milestones are epochs there."""
    return dataclasses.asdict(self) | {"milestones": [share * self.num_epochs for share in self.falls_at],
                                       "image_scale": list(self.image_scale), "seed": seed}


@dataclasses.dataclass(frozen=True)
class Words:
  """What is said of a training.

  Attributes:
    title: of the progress line, and in front of errors.
    losses: their names, in the order in which they are told; ("",) for a single one.
    unreadable: the error if no image of an epoch can be read.
  """

  title: str
  losses: tuple[str, ...]
  unreadable: str


def check_divides(settings: TrainingSettings, mesh: Mesh) -> None:
  """Raises UserError unless the devices can share a batch."""
  size = settings.batch_size
  if size % mesh.size:
    raise UserError(f"{settings.group}.batch_size={size} does not divide among {mesh.size} devices; "
                    f"try --config.{settings.group}.batch_size={max(1, size // mesh.size) * mesh.size}")


def falling_rate(settings: TrainingSettings, steps_per_epoch: int) -> optax.Schedule:
  """Returns step -> learning rate f32[], scaled with the batch and multiplied by `decay_factor` at each milestone."""
  falls = [round(share * settings.num_epochs * steps_per_epoch) for share in sorted(settings.falls_at)]
  rates = [settings.first_rate * settings.decay_factor**count for count in range(len(falls) + 1)]
  # A table rather than powers on the device, which round differently from one kind to another.
  return lambda step: jnp.asarray(rates, jnp.float32)[jnp.sum(step >= jnp.asarray(falls, jnp.int32))]


def begin_training(state: Mapping[str, Any], losses: Iterable[str]) -> dict[str, Any]:
  """Returns the state before the first step: what is trained, and where the training stands.

  Args:
    state: arrays that the step of the protocol moves.
    losses: the names of its losses.

  Returns:
    `state`, "step" i32[], and of the epoch of the last step "epoch": "loss" {name: f32[]}, summed over the "num_read"
    i32[] images.
  """
  return {**state, "step": jnp.int32(0),
          "epoch": {"loss": {name: jnp.float32(0) for name in losses}, "num_read": jnp.int32(0)}}


def make_classifier_step(device_step: Callable, mesh: Mesh, *, steps_per_epoch: int) -> Callable:
  """Returns train_step(state, frozen, batch) -> (state, losses): one program, mapped over the devices of `mesh`.

  `state` is that of `begin_training`, whole on every device, and donated; `frozen` is never changed. `batch` holds
  arrays [B, ...], split over the devices.

  Args:
    device_step: device_step(state, frozen, batch) -> (state, losses {name: f32[]}, num_read f32[]). The losses are
      means, before the step, over the `num_read` images of the whole batch that can be read (0 if there is none).
    mesh: the devices.
    steps_per_epoch: after so many steps the sums of `state["epoch"]` start again.
  """
  def counted(state: dict[str, Any], frozen: Any,
              batch: Mapping[str, jax.Array]) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    step, epoch = state["step"], state["epoch"]
    state, losses, num_read = device_step(state, frozen, batch)
    # The sums of the epoch stay on the device, so that no step waits for the host.
    goes_on = step % steps_per_epoch != 0
    added = {"loss": jax.tree.map(lambda loss: loss * num_read, losses), "num_read": num_read.astype(jnp.int32)}
    epoch = jax.tree.map(lambda old, new: jnp.where(goes_on, old, 0) + new, epoch, added)
    return {**state, "step": step + 1, "epoch": epoch}, losses

  mapped = jax.shard_map(counted, mesh=mesh, in_specs=(WHOLE, WHOLE, SPLIT), out_specs=(WHOLE, WHOLE))
  return jax.jit(mapped, donate_argnums=0)


def train_classifier(train_step: Callable, state: dict[str, Any], open_stream: Callable[..., batches.Batches], *,
                     settings: TrainingSettings, steps_per_epoch: int, mesh: Mesh, folder: Path,
                     words: Words) -> dict[str, Any]:
  """Returns the state after the last step; interrupted before, the same call goes on from the snapshot in `folder`.

  Args:
    train_step: train_step(state, batch) -> (state, losses): that of `make_classifier_step`, given what is frozen.
    state: before the first step, see `begin_training`.
    open_stream: open_stream(start_step=) -> endless iterator of batches, from that step on.
    settings: how many epochs, and of how many images a batch is.
    steps_per_epoch: of whole batches.
    mesh: the devices.
    folder: holds the snapshots; belongs to exactly this training.
    words: for the progress line and errors.

  Raises:
    UserError: no image of an epoch can be read, or a loss is not finite.
  """
  num_steps = settings.num_epochs * steps_per_epoch
  with Snapshots(folder) as snapshots:
    start_step, state = snapshots.restore(state, mesh)
    if start_step:
      print(f"goes on from step {start_step} of {num_steps}")
    in_flight, saved = deque(), time.perf_counter()
    with (closing(open_stream(start_step=start_step)) as stream,
          Progress(words.title, (num_steps - start_step) * settings.batch_size) as progress):
      for step in range(start_step + 1, num_steps + 1):
        state, losses = train_step(state, batches.place(next(stream), mesh))
        in_flight.append(losses)
        if len(in_flight) > STEPS_IN_FLIGHT:
          jax.block_until_ready(in_flight.popleft())
        progress.update(settings.batch_size)
        at_end = step % steps_per_epoch == 0
        if not at_end and step % CHECK_STEPS:
          continue
        means, num_read = epoch_means(state)
        if at_end and not num_read:
          raise UserError(f"{words.title}: {words.unreadable}")
        epoch = -(-step // steps_per_epoch)
        _check_finite(means, settings, words, epoch)
        note = " ".join(f"{name} {means[name]:.3f}".lstrip() for name in words.losses)
        progress.update(0, note=f"epoch {epoch} of {settings.num_epochs}, loss {note}")
        # Processes must agree whether to save, and their clocks need not.
        due = time.perf_counter() - saved >= SNAPSHOT_SECONDS
        if multihost_utils.broadcast_one_to_all(np.bool_(due)):
          snapshots.save(step, state)
          saved = time.perf_counter()
  return state


def epoch_means(state: Mapping[str, Any]) -> tuple[dict[str, float], int]:
  """Returns ({name: mean loss of the epoch so far, in nats}, images read in it)."""
  sums = jax.device_get(state["epoch"])
  num_read = int(sums["num_read"])
  return {name: float(loss) / max(num_read, 1) for name, loss in sums["loss"].items()}, num_read


def _check_finite(means: Mapping[str, float], settings: TrainingSettings, words: Words, epoch: int) -> None:
  for name in words.losses:
    if not math.isfinite(means[name]):
      on = name and f" on {name}"
      raise UserError(f"{words.title}: the loss{on} is {means[name]} in epoch {epoch} at a learning rate of "
                      f"{settings.learning_rate} for {BASE_BATCH} images; choose a lower "
                      f"{settings.group}.learning_rate{settings.advice}")
