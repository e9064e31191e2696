"""The batches of a run as they come from the disk, and what happens if they do not come.

A process that runs alone ends before the step that has no batch. Several processes cannot: the others have begun this
step and wait for it. Therefore the process without a batch asks all to stop, and takes part with void batches, which
change nothing, until all have agreed on the step after which they stop.
"""

import concurrent.futures
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from pirl_jax import system
from pirl_jax.data import batches
from pirl_jax.data.batches import Batch
from pirl_jax.errors import Unreadable
from pirl_jax.runtime import processes
from pirl_jax.training.guards import Broken
from pirl_jax.training.parts import Parts
from pirl_jax.training.stopping import Stopped, Stopping

LOOK_SECONDS = 0.5
"""How often a process that waits for its batch looks whether another one has been asked to stop."""


class Incoming:
  """The batches of this process, in order.

  Attributes:
    failure: the error for which no further batch comes, if there is one.
  """

  def __init__(self, parts: Parts, start_step: int, broken: Broken, stopping: Stopping) -> None:
    """Starts reading the batches from the one after step `start_step` on.

    Args:
      parts: of the run.
      start_step: number of steps taken.
      broken: names the images that cannot be read.
      stopping: tells whether the run was asked to stop.
    """
    config, crops = parts.config, system.crops_of(parts.config)
    self._stream = batches.train_batches(
      parts.train, crops=crops, batch_size=config.batch_size, seed=config.seed, start_step=start_step,
      process=(jax.process_index(), jax.process_count()), num_threads=config.data.num_threads,
      partial=config.partial_batch)
    self._broken, self._stopping = broken, stopping
    self._make_void = partial(batches.void_batch, crops, config.batch_size // jax.process_count(),
                              partial=config.partial_batch)
    self._void: Batch | None = None  # once a batch has not come, all further ones are this one
    self.failure: Unreadable | None = None

  def next(self, step: int) -> tuple[Batch | None, float]:
    """Returns (the batch of a step, the seconds of waiting for it).

    If the run is asked to stop while the batch does not come, or if the storage of the images fails for too long, the
    batch is None in a process that runs alone, and void in one of several, from then on.
    """
    started = time.perf_counter()
    batch = self._void or self._await(step)
    if batch is None and not processes.alone():
      if self.failure:
        self._stopping.ask()
      batch = self._void = self._make_void()
    return batch, time.perf_counter() - started

  def close(self) -> None:
    """Ends the reading threads."""
    self._stream.close()

  def _await(self, step: int) -> Batch | None:
    wait = interruptibly if processes.alone() else _in_the_background
    try:
      batch, _ = wait(self._stopping, self._read, step)  # a read of a stalled disk never returns
    except Unreadable as error:
      self.failure = error
      return None
    return batch

  def _read(self, step: int) -> Batch:
    batch = next(self._stream)
    self._broken.note(step, batch)  # reads them once more
    return batch


def interruptibly(stopping: Stopping, fn: Callable, *args: Any) -> tuple[Any, bool]:
  """Returns (fn(*args), False), or (None, True) if the run was asked to stop meanwhile."""
  try:
    with stopping.held(False):
      return fn(*args), False
  except Stopped:
    return None, True


def _in_the_background(stopping: Stopping, fn: Callable, *args: Any) -> tuple[Any, bool]:
  """Returns what `interruptibly` returns; here any of several processes may have been asked to stop."""
  found = concurrent.futures.Future()

  def call() -> None:
    try:
      found.set_result(fn(*args))
    except BaseException as error:  # raised in the thread that waits
      found.set_exception(error)

  threading.Thread(target=call, daemon=True).start()  # if `fn` never returns, the thread ends with the process
  while True:
    done, _ = concurrent.futures.wait([found], LOOK_SECONDS)
    if done:
      return found.result(), False
    if stopping.asked():
      return None, True
