"""What a run writes down: metrics.jsonl, TensorBoard events and the progress line.

One row of metrics.jsonl is one step. `log` and `record` for the same step add to the same row, so whoever
reads the file finds the kNN figure beside the loss of its step.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO, Self, TextIO

import numpy as np
from tqdm import tqdm

from pirl_jax.storage.files import strict, write_file
from pirl_jax.storage.tensorboard import TensorBoard

METRICS = "metrics.jsonl"

PLAIN_SECONDS = 10.0
"""Least seconds between two progress lines where there is no terminal: five minutes stay on one page."""


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Returns the rows of a metrics.jsonl; a line torn by a crash is left out; [] if there is no file."""
  try:
    lines = Path(path).read_bytes().splitlines()
  except FileNotFoundError:
    return []
  rows = []
  for line in lines:
    with contextlib.suppress(ValueError):  # what json raises, and what bytes that are no UTF-8 raise
      row = json.loads(line)
      if isinstance(row, dict) and isinstance(row.get("step"), int):
        rows.append(row)
  return rows


class Logbook:
  """The notes of one run; a context manager. Only the process with `enabled` writes and prints.

  Steps count from 1: step s is logged after the s-th update. On resume the rows after `start_step`, which the
  run is about to live through again, are cut, in metrics.jsonl and (by its purge mark) in TensorBoard.
  """

  def __init__(self, workdir: str | os.PathLike, *, start_step: int, total_steps: int, steps_per_epoch: int,
               batch_size: int, enabled: bool = True, stream: TextIO | None = None) -> None:
    """Opens the files of `workdir` and starts the clock.

    Args:
      workdir: the run's folder; created.
      start_step: steps already done (0: a new run).
      total_steps: the last step of the run.
      steps_per_epoch: steps of an epoch, >= 1.
      batch_size: global batch size; images/s counts these.
      enabled: False on every process but the first: nothing is written or printed, the figures are kept.
      stream: where progress and messages go (None: standard output). On a terminal it is one line that
      refreshes,
        elsewhere plain lines, at most one in `PLAIN_SECONDS`.
    """
    self._total_steps = total_steps
    self._steps_per_epoch = steps_per_epoch
    self._batch_size = batch_size
    self._enabled = enabled
    self._stream = stream if stream is not None else sys.stdout
    self._terminal = self._stream.isatty()
    self._bar: tqdm | None = None
    self._file: BinaryIO | None = None
    self._tensorboard: TensorBoard | None = None
    self._closed = False

    self._path = Path(workdir) / METRICS
    self._rows = [row for row in read_rows(self._path) if row["step"] <= start_step]
    self._behind = False  # whether rows are missing on disk, because it did not take them
    if enabled:
      self._write_all()
      self._tensorboard = TensorBoard(workdir, start_step, self.say)

    self._start_step = self._logged_step = start_step
    self._started = perf_counter()
    self._paused_seconds = 0.0
    self._logged_seconds = 0.0  # working time at the last log
    self._rate_mark = None  # (step, wall time) after the first log: what came before holds the compilation
    self._rates = []  # (images, working seconds, seconds of them that waited for data) of each interval
    self._plain_printed = -math.inf

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()

  def log(self, step: int, metrics: Mapping[str, float], *, data_wait_seconds: float) -> None:
    """Writes the row of `step` and refreshes the progress line.

    To `metrics` it adds `epoch`, `images_per_second` and `data_wait` (in [0, 1]), both over the working time
    since the last log: `paused` time does not count.

    Args:
      step: steps done so far; larger than at the last log.
      metrics: scalars by name (numpy's or JAX's too); those that are not finite become null.
      data_wait_seconds: seconds since the last log in which the loop waited for its next batch.

    Raises:
      ValueError: `step` is not after the last logged one.
    """
    if step <= self._logged_step:
      raise ValueError(f"step {step} is logged after step {self._logged_step}")
    working = self._working_seconds()
    seconds = max(working - self._logged_seconds, 1e-9)
    images = (step - self._logged_step) * self._batch_size
    self._rates.append((images, seconds, min(data_wait_seconds, seconds)))
    self._logged_step, self._logged_seconds = step, working
    figures = {name: float(value) for name, value in metrics.items()}
    self._write(step, {**figures, "images_per_second": images / seconds,
                       "data_wait": min(data_wait_seconds / seconds, 1.0)})
    self._show_progress(step)
    if self._rate_mark is None:
      self._rate_mark = (step, perf_counter())

  def record(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds figures (`knn_top1`, say) to the row of `step`; where that step has no row yet, it gets its own.

    Raises:
      ValueError: a later step has been written already.
    """
    self._write(step, {name: float(value) for name, value in metrics.items()})
    if self._bar is not None:
      self._show_progress(max(step, self._logged_step))

  @property
  def rows(self) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl, those that the disk did not take among them."""
    return list(self._rows)

  def has(self, step: int, name: str) -> bool:
    """Returns whether the row of a step has a figure of that name."""
    return any(row["step"] == step and name in row for row in reversed(self._rows))

  def say(self, text: str) -> None:
    """Prints a message on lines of its own, above the progress line."""
    if self._enabled:
      tqdm.write(text, file=self._stream)
      self._stream.flush()

  @contextlib.contextmanager
  def tolerant(self, name: str) -> Iterator[None]:
    """Within it a disk that is full or read-only is said, and not raised; `name` is what was to be written."""
    try:
      yield
    except OSError as error:
      self.say(f"WARNING: {name} could not be written ({error.strerror or error})")

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Stops the clock of images/s and data wait: round evaluations, checkpoints and the compilation."""
    before = self._working_seconds()
    try:
      yield
    finally:
      self._paused_seconds += self._working_seconds() - before

  def summary(self) -> str:
    """Returns a few lines on the run so far: time, the last loss and its mean over an epoch, speed, kNN.

    Mean speed and waiting leave out the first interval of this session where there are others, because it
    holds the compilation.
    """
    total = perf_counter() - self._started
    pause = f", {_clock(self._paused_seconds)} of it in pauses (evaluation, checkpoints)"
    lines = [f"{self._logged_step - self._start_step} steps in {_clock(total)}"
             + (pause if self._paused_seconds >= 1 else "")
             + f", now at step {self._logged_step} (epoch {self._logged_step / self._steps_per_epoch:.4g})"]
    losses = [(row["step"], row["loss"]) for row in self._rows if row.get("loss") is not None]
    if losses:
      last_step, last = losses[-1]
      epoch = [loss for step, loss in losses if step > last_step - self._steps_per_epoch]
      lines.append(f"loss {last:.4g} at step {last_step}, {np.mean(epoch):.4g} in the mean of the last epoch")
    if self._rates:
      images, seconds, wait = np.sum(self._rates[1:] or self._rates, axis=0)
      lines.append(f"{images / seconds:,.0f} images/s in the mean, "
                   f"{wait / seconds:.0%} of the time waiting for data")
    knn = [(row["knn_top1"], row["step"]) for row in self._rows if row.get("knn_top1") is not None]
    if knn:
      best, best_step = max(knn, key=lambda pair: pair[0])
      lines.append(f"kNN {knn[-1][0]:.1%} at step {knn[-1][1]}, at best {best:.1%} at step {best_step}")
    return "\n".join(lines)

  def close(self) -> None:
    """Closes files and progress line; what is written stays. A second call does nothing."""
    if self._closed:
      return
    self._closed = True
    if self._bar is not None:
      self._bar.close()
    if self._enabled:
      if self._behind:
        with self.tolerant(self._path.name):
          self._write_all()
      with contextlib.suppress(OSError):
        if self._file is not None:
          self._file.close()
      if self._tensorboard is not None:
        self._tensorboard.close()

  def _working_seconds(self) -> float:
    return perf_counter() - self._started - self._paused_seconds

  def _write(self, step: int, figures: Mapping[str, Any]) -> None:
    last_step = self._rows[-1]["step"] if self._rows else -1
    if step < last_step:
      raise ValueError(f"figures of step {step} come after those of step {last_step}")
    if step == last_step:
      row = {**self._rows.pop(), **strict(figures)}
      offset = self._row_offset if self._enabled else 0
    else:
      row = {"step": step, "epoch": step / self._steps_per_epoch, **strict(figures)}
      offset = self._file_size if self._enabled else 0
    self._rows.append(row)
    if not self._enabled:
      return
    try:
      if self._behind:
        self._write_all()
        self.say(f"{self._path.name} could be written again, nothing of it is missing")
      else:
        self._write_row(row, offset)
    except OSError as error:
      if not self._behind:
        self.say(f"WARNING: {self._path} could not be written ({error.strerror or error}); the rows are kept in memory "
                 "and written once it can")
      self._behind = True
    if self._tensorboard is not None:
      self._tensorboard.add(step, figures)

  def _write_row(self, row: Mapping[str, Any], offset: int) -> None:
    # One write of a whole line. Figures added to a row lengthen it, so its old beginning is written over with
    # itself.
    line, file = _line(row), self._file
    assert file is not None  # open from the beginning to `close`
    file.seek(offset)
    file.write(line)
    file.flush()
    file.truncate()
    self._row_offset, self._file_size = offset, offset + len(line)

  def _write_all(self) -> None:
    """Writes the file anew, whole or not at all."""
    if self._file is not None:
      with contextlib.suppress(OSError):  # what it could not write is in the rows
        self._file.close()
    lines = [_line(row) for row in self._rows]
    write_file(self._path, b"".join(lines))
    self._file = open(self._path, "r+b")  # noqa: SIM115, open as long as the run
    # The row being written begins here; it is written anew when figures are added to it.
    self._row_offset = sum(map(len, lines[:-1]))
    self._file_size = sum(map(len, lines))
    self._behind = False

  def _show_progress(self, step: int) -> None:
    if not self._enabled:
      return
    if self._terminal:
      if self._bar is None:
        self._bar = tqdm(total=self._total_steps, initial=self._start_step, file=self._stream,
                         dynamic_ncols=True, bar_format="{percentage:3.0f}% |{bar:8}| {desc}")
      self._bar.n = step
      self._bar.set_description_str(self._progress_text(step))
    elif perf_counter() - self._plain_printed >= PLAIN_SECONDS or step >= self._total_steps:
      self._plain_printed = perf_counter()
      print(self._progress_text(step), file=self._stream, flush=True)

  def _progress_text(self, step: int) -> str:
    # What matters most comes first: a narrow terminal cuts the end.
    parts = [f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}",
             f"epoch {step / self._steps_per_epoch:.1f}/{self._total_steps / self._steps_per_epoch:.4g}"]
    loss = self._last("loss")
    if "loss" in self._rows[-1] or loss is not None:
      # A row that has no finite loss says so here: the older, finite one would hide it.
      now = self._rows[-1].get("loss", loss)
      parts.append("loss not finite" if now is None else f"loss {now:.3f}")
    knn = self._last("knn_top1")
    if knn is not None:
      parts.append(f"kNN {knn:.1%}")
    left = self._seconds_left(step)
    if left is not None:
      parts.append(f"{_clock(left)} left")
    if self._rates:
      images, seconds, wait = self._rates[-1]
      parts += [f"{images / seconds:,.0f} images/s", f"data wait {wait / seconds:.0%}"]
    return "  ".join(parts)

  def _last(self, name: str) -> Any:
    return next((row[name] for row in reversed(self._rows) if row.get(name) is not None), None)

  def _seconds_left(self, step: int) -> float | None:
    """Returns an estimate by the wall time since the first log, evaluations and checkpoints included."""
    remaining = self._total_steps - step
    if self._rate_mark is not None and step > self._rate_mark[0]:
      mark_step, mark_time = self._rate_mark
      return remaining * (perf_counter() - mark_time) / (step - mark_step)
    if self._rates:
      images, seconds, _ = self._rates[-1]
      return remaining * self._batch_size * seconds / images
    return None


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _line(row: Mapping[str, Any]) -> bytes:
  return (json.dumps(row, allow_nan=False) + "\n").encode()
