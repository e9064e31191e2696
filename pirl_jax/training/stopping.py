"""Signals that end a program: the current step is finished and the state is saved before the program ends.

JAX is imported inside the functions that need it, because `note_signals` must work while JAX is loading.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Self

from pirl_jax.runtime.speaking import hurry

EXIT_CODES: dict[int, int] = {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGQUIT: 131} | {
  getattr(signal, name): 0
  for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "SIGPWR") if hasattr(signal, name)}
"""The signals by which a program is asked to end, and its exit code then.

A person sends SIGINT (Ctrl-C) and SIGQUIT, a terminal that is closed SIGHUP. Schedulers send SIGTERM, or before it what
the user has chosen: SIGUSR1 and SIGUSR2 (Slurm's --signal, LSF's -wa, SGE's -notify), SIGXCPU (LSF and every limit of
CPU time), SIGALRM (`timeout -s`). SIGPWR means that the power fails. Without a handler each of them ends the program.
"""

ALWAYS = {signal.SIGTERM, signal.SIGINT}
"""Signals that are taken even if the program was started with them ignored, as shells do for `command &`. The others
stay ignored: SIGHUP under nohup."""

PREEMPTION_NOTICE = "RECEIVED_PREEMPTION_NOTICE"
"""Under this key JAX's preemption service tells all processes that one of them got SIGTERM."""

PAUSE_SECONDS = 0.1
"""How often a pause looks whether a signal has come."""


def _taken() -> list[int]:
  """Returns the signals of `EXIT_CODES` that are not ignored."""
  return [number for number in EXIT_CODES if number in ALWAYS or signal.getsignal(number) not in (
    signal.SIG_IGN, None)]


def note_signals() -> Callable[[bool], None]:
  """Notes SIGTERM and its like without ending the program, until it is known whether the job trains.

  Returns:
    settle(trains). After this call the signals end the program: with their exit code in a job that trains, else as
    before. If a signal was noted, it takes effect in this call.
  """
  noted: list[int] = []
  before = {number: signal.signal(number, lambda number, _: noted.append(number))
            for number in _taken() if number != signal.SIGINT}  # nothing is lost by KeyboardInterrupt

  def settle(trains: bool) -> None:
    for number, handler in before.items():
      signal.signal(number, (lambda number, _: sys.exit(EXIT_CODES[number])) if trains else handler)
    for number in noted[:1]:
      os.kill(os.getpid(), number)
  return settle


class Stopped(SystemExit):
  """Ends the program with the exit code of the signal; everything that had to be saved has been saved."""


class Stopping:
  """A context manager in which the signals of `EXIT_CODES` ask a run to stop, and a second SIGINT ends it at once.

  By default a signal raises `Stopped` as soon as Python can run the handler. Code that has something to save uses
  `held`. If there are several processes, all stop after the same step, even if only one of them got the signal: JAX's
  preemption service agrees on the step.
  """

  def __init__(self) -> None:
    """Starts in the state in which no signal has come."""
    from pirl_jax.runtime.processes import alone

    self._asked: signal.Signals | None = None
    self._held = False
    self._questions = 0
    self._received = 0
    self._alone = alone()

  def __enter__(self) -> Self:
    self._in_main = threading.current_thread() is threading.main_thread()
    if not self._in_main:  # Python delivers signals to the main thread only
      return self
    # With several processes JAX itself must receive SIGTERM; a handler here would hide the signal from JAX.
    signals = [number for number in _taken() if self._alone or number != signal.SIGTERM]
    # Python runs a signal handler only when the main thread returns from the devices. The watching thread reads the
    # signals from a socket and can act at once.
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
    """While held, a signal only sets a flag, which `requested` reports.

    `held(False)` restores the default: a signal raises `Stopped` at once.
    """
    before, self._held = self._held, hold
    try:
      if not hold:
        self.check()
      yield
    finally:
      self._held = before

  def check(self) -> None:
    """Raises `Stopped` if this is the only process and it has been asked to stop."""
    if self._asked is not None and self._alone:
      _say("stopped; the same command resumes")
      raise Stopped(EXIT_CODES[self._asked])

  def requested(self) -> bool:
    """Returns whether to stop here; the answer is the same in all processes.

    All processes must call this equally often, at least once a step. With several processes the answer is True only
    once.
    """
    from jax.experimental import multihost_utils

    self._questions += 1
    return self._asked is not None if self._alone else multihost_utils.reached_preemption_sync_point(self._questions)

  def ask(self) -> None:
    """Asks all processes to stop, as SIGTERM to this one does."""
    os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the others

  def asked(self) -> bool:
    """Returns whether one of the processes has been asked to stop, which this process may not yet have acted upon.

    Unlike `requested` this asks nobody to agree on a step, and may be called at any time.
    """
    if self._alone:
      return self._asked is not None
    from jax._src.distributed import global_state  # JAX has no public function that tells this

    assert global_state.client is not None  # there are several processes
    try:
      return bool(global_state.client.key_value_try_get(PREEMPTION_NOTICE))
    except RuntimeError:  # no process has been asked
      return False

  def pause(self, seconds: float) -> bool:
    """Waits. Returns True, at once, if a signal comes meanwhile; a signal that came before does not count."""
    before, end = self._received, time.monotonic() + seconds
    while time.monotonic() < end and self._received == before:
      time.sleep(min(PAUSE_SECONDS, seconds))
    return self._received != before

  def stop(self) -> NoReturn:
    """Raises `Stopped`; to be called after everything has been saved."""
    raise Stopped(EXIT_CODES[self._asked or signal.SIGTERM])  # if another process got the signal, it counts as SIGTERM

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    self._asked = signal.Signals(number)
    self._received += 1
    hurry()
    if not self._held:
      self.check()

  def _listen(self) -> None:
    interrupts = 0
    while number := self._watched.recv(1):
      if number[0] in EXIT_CODES and self._alone and self._held and not self._questions:
        # The first step is still compiling, which may take minutes. Nothing unsaved exists yet, so the program can end.
        _end("stopped before the first step; the same command resumes", number[0])
      if number[0] == signal.SIGINT:
        interrupts += 1
        if interrupts > 1:
          _end("ended at once, by a second Ctrl-C", signal.SIGINT)
        if self._held:
          _say("Ctrl-C: finishes the step and saves; a second Ctrl-C ends at once")
      if number[0] in EXIT_CODES and number[0] != signal.SIGTERM and not self._alone:
        self.ask()


def _say(text: str) -> None:
  """Writes a line to standard error, not by print: the handler may have interrupted a print."""
  with contextlib.suppress(OSError):  # the terminal may be gone
    os.write(2, f"\n{text}\n".encode())


def _end(text: str, number: int) -> NoReturn:
  """Ends the program at once, although its main thread is busy; its output so far is flushed."""
  if sys.stdout is not None:
    sys.stdout.flush()
  _say(text)
  os._exit(EXIT_CODES[number])
