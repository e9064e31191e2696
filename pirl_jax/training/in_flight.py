"""The steps that were submitted to the devices and are not known to be over."""

from collections import deque
from collections.abc import Callable

import jax
import numpy as np

STEPS_IN_FLIGHT = 2
"""Number of steps that the host may submit before it waits. Two keep the devices busy, and few batches are in memory at
once."""


class InFlight:
  """Hands on what the steps of a run report, in order, as soon as the steps are over.

  The host never waits for the steps that it has just submitted, so the devices always have a next step to do.
  """

  def __init__(self, over: Callable[[int, np.ndarray, dict[str, jax.Array]], None]) -> None:
    """Starts without any steps.

    Args:
      over: over(step, index, metrics) is called for each step when the step is over; see `submit`.
    """
    self._over, self._steps = over, deque()

  def submit(self, step: int, index: np.ndarray, metrics: dict[str, jax.Array]) -> None:
    """Adds a step that has just been submitted, and waits for the step `STEPS_IN_FLIGHT` before it.

    Args:
      step: number of the step.
      index: i32[b], the indices of the images in this process's part of the batch.
      metrics: what the step reports, by name; on the devices.
    """
    self._steps.append((step, index, metrics))
    if len(self._steps) > STEPS_IN_FLIGHT:
      self._wait_for_oldest()

  def drain(self) -> None:
    """Waits for all steps."""
    while self._steps:
      self._wait_for_oldest()

  def _wait_for_oldest(self) -> None:
    step, index, metrics = self._steps.popleft()
    jax.block_until_ready(metrics)
    self._over(step, index, metrics)
