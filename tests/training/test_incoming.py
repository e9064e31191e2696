"""Batches that do not come: a process that runs alone gets none, one of several gets void ones from then on."""

import contextlib
import threading

import pytest
from test_pretrain import tiny

from pirl_jax.errors import Unreadable
from pirl_jax.training import incoming
from pirl_jax.training import parts as parts_lib
from pirl_jax.training.incoming import Incoming
from pirl_jax.training.stopping import Stopped


class Signals:
  """Whether a run was asked to stop, and how often it asked the others."""

  def __init__(self, *, of_others=False, here=False):
    self._of_others, self._here, self.num_asks = of_others, here, 0

  def asked(self):
    return self._of_others

  def ask(self):
    self.num_asks += 1

  @contextlib.contextmanager
  def held(self, hold=True):
    if self._here:
      raise Stopped(0)
    yield


class Named:
  """Names nothing."""

  def note(self, step, batch):
    pass


def opened(monkeypatch, tmp_path, stream, signals, *, alone):
  monkeypatch.setattr(incoming, "LOOK_SECONDS", 0.01)
  monkeypatch.setattr(incoming.processes, "alone", lambda: alone)
  monkeypatch.setattr(incoming.batches, "train_batches", lambda *_, **__: stream)
  return Incoming(parts_lib.build(tiny(), tmp_path), 0, Named(), signals)


def batches(*found):
  for batch in found:
    if isinstance(batch, Exception):
      raise batch
    yield batch


@pytest.mark.parametrize("alone", [True, False])
def test_images_that_cannot_be_read(monkeypatch, tmp_path, alone):
  error, signals = Unreadable("x.png cannot be read"), Signals()
  found = opened(monkeypatch, tmp_path, batches({"index": 1}, error), signals, alone=alone)
  assert found.next(1)[0] == {"index": 1} and found.failure is None
  batch, _ = found.next(2)
  assert found.failure is error
  if alone:
    assert batch is None and not signals.num_asks
  else:
    assert (batch["index"] == -1).all() and len(batch["index"]) == tiny().batch_size
    assert found.next(3)[0] is batch and signals.num_asks == 1  # asked once, and no image is read again


def test_a_signal_ends_the_wait_of_a_process_that_runs_alone(monkeypatch, tmp_path):
  found = opened(monkeypatch, tmp_path, batches({"index": 1}), Signals(here=True), alone=True)
  assert found.next(1)[0] is None and found.failure is None


def test_a_signal_to_another_process_ends_the_wait_for_a_read_that_never_returns(monkeypatch, tmp_path):
  came = threading.Event()

  def stalled():
    came.wait()
    yield {"index": 1}

  signals = Signals(of_others=True)
  found = opened(monkeypatch, tmp_path, stalled(), signals, alone=False)
  batch, seconds = found.next(1)
  assert (batch["index"] == -1).all() and 0 < seconds < 60
  came.set()
  assert found.next(2)[0] is batch and found.failure is None and not signals.num_asks


def test_an_error_of_the_program_is_no_missing_image(monkeypatch, tmp_path):
  found = opened(monkeypatch, tmp_path, batches(ZeroDivisionError()), Signals(), alone=False)
  with pytest.raises(ZeroDivisionError):
    found.next(1)
