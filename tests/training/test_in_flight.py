"""Which steps the host waits for, and that what they report is neither lost nor late."""

import numpy as np
import pytest
from test_pretrain import rows, tiny

from pirl_jax.training import pretrain
from pirl_jax.training.in_flight import STEPS_IN_FLIGHT, InFlight


class Pending:
  """A figure of a step that is not ready until somebody waits for it, and notes that somebody has."""

  def __init__(self, step, value, asked):
    self._step, self._value, self._asked = step, value, asked

  def block_until_ready(self):
    self._asked.append(self._step)
    return self

  def __array__(self, dtype=None, copy=None):
    self.block_until_ready()
    return np.asarray(self._value, dtype)

  def __int__(self):
    return int(np.asarray(self))

  def __bool__(self):
    return bool(np.asarray(self))


def test_steps_are_over_in_order_and_the_newest_are_never_waited_for():
  asked, over = [], []
  steps = InFlight(lambda step, index, metrics: over.append((step, index, metrics["loss"]._value)))
  for step in range(1, 6):
    steps.submit(step, -step, {"loss": Pending(step, step / 2, asked)})
    assert asked == list(range(1, step - STEPS_IN_FLIGHT + 1)) == [step for step, *_ in over]
  steps.drain()
  assert over == [(step, -step, step / 2) for step in range(1, 6)]
  steps.drain()
  assert len(over) == len(asked) == 5


def watched_run(monkeypatch, folder, **changes):
  """Returns [(newest step submitted, step waited for)] of a run."""
  waits, newest, real = [], 0, pretrain.make_step

  class Waits(list):
    def append(self, step):
      waits.append((newest, step))

  def make_step(parts):
    step_fn = real(parts)

    def step(state, batch):
      nonlocal newest
      newest += 1
      state, metrics = step_fn(state, batch)
      return state, {name: Pending(newest, value, Waits()) for name, value in metrics.items()}

    return step

  monkeypatch.setattr(pretrain, "make_step", make_step)
  pretrain.run(tiny(**{"evaluate.every_epochs": 0, "num_epochs": 2, **changes}), str(folder))
  return waits


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_waits_for_no_step_but_those_two_behind(tmp_path, monkeypatch, every):
  waits = watched_run(monkeypatch, tmp_path / "run", **{"log.every_steps": every, "checkpoint.every_steps": 6})
  early = [(newest, step) for newest, step in waits if newest not in (6, 8)]  # the steps that are saved
  assert early and all(step <= newest - STEPS_IN_FLIGHT for newest, step in early)
  assert {step for _, step in waits} == set(range(1, 9))
  assert [row["step"] for row in rows(tmp_path / "run")] == ([*range(1, 9)] if every == 1 else [3, 6, 8])
