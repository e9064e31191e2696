"""SIGTERM and Ctrl-C: the step in hand is finished and saved before the program ends.

JAX is imported where it is needed: `note_sigterm` answers while it loads.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Self

EXIT_CODES: dict[int, int] = {signal.SIGTERM: 0, signal.SIGINT: 130}


def note_sigterm() -> Callable[[bool], None]:
  """Notes SIGTERM instead of ending the program, until it is known what it means.

  Returns:
    settle(trains), after which it ends the program: with exit code 0 in a job that trains, else as it did before. A
    signal that was noted is answered then.
  """
  noted = []
  before = signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))

  def settle(trains: bool) -> None:
    signal.signal(signal.SIGTERM, (lambda number, _: sys.exit(EXIT_CODES[number])) if trains else before)
    if noted:
      os.kill(os.getpid(), signal.SIGTERM)
  return settle


class Stopped(SystemExit):
  """Ends the program, with the exit code of its signal; what there was to save is saved."""


class Stopping:
  """A context manager in which SIGTERM and SIGINT ask a run to stop, and a second SIGINT ends it at once.

  Where there is nothing to save, `Stopped` is raised as soon as Python has a say; `held` is for where there is. Of
  several processes all stop after the same step, whichever of them was asked: JAX's own engine agrees on it.
  """

  def __init__(self) -> None:
    """Has not been asked."""
    from pirl_jax.runtime.processes import alone

    self._asked: signal.Signals | None = None
    self._held = False
    self._questions = 0
    self._alone = alone()

  def __enter__(self) -> Self:
    self._in_main = threading.current_thread() is threading.main_thread()
    if not self._in_main:  # Python hands signals to the main thread alone
      return self
    # SIGTERM of several processes belongs to JAX, which would not see it any more.
    signals = EXIT_CODES if self._alone else (signal.SIGINT,)
    # The handlers have to wait until the main thread is back from the devices, the watch has not.
    self._watched, self._signalled = socket.socketpair()
    self._signalled.setblocking(False)
    self._old_fd = signal.set_wakeup_fd(self._signalled.fileno(), warn_on_full_buffer=False)
    self._old_handlers = {number: signal.signal(number, self._handle) for number in signals}
    self._watch = threading.Thread(target=self._listen, daemon=True)
    self._watch.start()
    return self

  def __exit__(self, *exc_info: object) -> None:
    if self._in_main:
      for number, handler in self._old_handlers.items():
        signal.signal(number, handler)
      signal.set_wakeup_fd(self._old_fd)
      self._signalled.close()
      self._watch.join()
      self._watched.close()

  @contextlib.contextmanager
  def held(self, hold: bool = True) -> Iterator[None]:
    """While held, a signal only sets a flag, which `requested` reports; `held(False)`: it raises `Stopped` at once."""
    before, self._held = self._held, hold
    try:
      if not hold:
        self.check()
      yield
    finally:
      self._held = before

  def check(self) -> None:
    """Raises `Stopped` if this process by itself has been asked to stop."""
    if self._asked is not None and self._alone:
      os.write(2, b"\nstopped; the same command goes on\n")  # print may be at work below a handler
      raise Stopped(EXIT_CODES[self._asked])

  def requested(self) -> bool:
    """Returns whether to stop here, the same in all processes; all ask this equally often, at least once a step.

    Of several processes it is True a single time.
    """
    from jax.experimental import multihost_utils

    self._questions += 1
    return self._asked is not None if self._alone else multihost_utils.reached_preemption_sync_point(self._questions)

  def stop(self) -> NoReturn:
    """Raises `Stopped`, after everything has been saved."""
    raise Stopped(EXIT_CODES[self._asked or signal.SIGTERM])  # asked for by another process: SIGTERM

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    self._asked = signal.Signals(number)
    if not self._held:
      self.check()

  def _listen(self) -> None:
    interrupts = 0
    while number := self._watched.recv(1):
      if number[0] in EXIT_CODES and self._alone and self._held and not self._questions:
        # The first step compiles, which may take minutes, and there is nothing that is not saved.
        _end("stopped before the first step; the same command goes on", number[0])
      if number[0] != signal.SIGINT:
        continue
      interrupts += 1
      if interrupts > 1:
        _end("ended at once, by a second Ctrl-C", signal.SIGINT)
      if self._held:
        os.write(2, b"\nCtrl-C: finishes the step and saves; once more ends at once\n")
      if not self._alone:
        os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the others


def _end(text: str, number: int) -> None:
  """Ends the program though its main thread is busy, with what it has printed until now."""
  sys.stdout.flush()
  os.write(2, f"\n{text}\n".encode())
  os._exit(EXIT_CODES[number])
