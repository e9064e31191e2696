"""The progress line of whatever counts up to a known number."""

import sys
from time import perf_counter
from typing import Self, TextIO

import jax
from tqdm import tqdm

PLAIN_SECONDS = 10.0
"""Least seconds between two lines where there is no terminal."""


class Progress:
  """A context manager: one line that refreshes on a terminal, elsewhere a plain line now and then, and one at the end.

  Only the first process prints.
  """

  def __init__(self, title: str, total: int, *, unit: str = "images", stream: TextIO | None = None) -> None:
    """Starts the clock.

    Args:
      title: what is done.
      total: the number counted up to.
      unit: what is counted.
      stream: where the line goes (None: standard output).
    """
    self._title, self._total, self._unit = title, total, unit
    self._stream = stream if stream is not None else sys.stdout
    self._enabled = jax.process_index() == 0
    self._started = self._printed = perf_counter()
    self._done, self._note = 0, ""
    self._said: int | None = None
    self._bar = None
    if self._enabled and self._stream.isatty():
      self._bar = tqdm(total=total, desc=title, unit=f" {unit}", file=self._stream, dynamic_ncols=True)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, error_type: type[BaseException] | None, *exc_info: object) -> None:
    if self._bar is not None:
      self._bar.close()
    elif self._enabled and error_type is None and self._said != self._done:
      self._print()

  def update(self, count: int = 1, note: str = "") -> None:
    """Counts `count` more; `note` stands behind the count until the next one."""
    self._done += count
    self._note = note or self._note
    if self._bar is not None:
      self._bar.set_postfix_str(self._note, refresh=False)
      self._bar.update(count)
    elif self._enabled and perf_counter() - self._printed >= PLAIN_SECONDS:
      self._print()

  def _print(self) -> None:
    self._printed, self._said = perf_counter(), self._done
    seconds = self._printed - self._started
    rate = self._done / max(seconds, 1e-9)
    parts = [f"{self._title}: {self._done:,} of {self._total:,} {self._unit}", f"{seconds:.0f} s",
             f"{rate:,.{0 if rate >= 10 else 1}f} a second", self._note]
    print("  ".join(filter(None, parts)), file=self._stream, flush=True)
