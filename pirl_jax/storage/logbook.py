"""The log of a run: metrics.jsonl, TensorBoard events and the progress line.

One row of metrics.jsonl is one step. `log` and `record` for the same step add to the same row, so the kNN accuracy
stands beside the loss of its step.
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

from pirl_jax.storage.files import replacing, strict
from pirl_jax.storage.rows import Rows, read_rows
from pirl_jax.storage.tensorboard import TensorBoard

METRICS = "metrics.jsonl"

PLAIN_SECONDS = 10.0
"""Shortest time between two progress lines if there is no terminal; the lines of five minutes fit on one page."""


class Logbook:
  """The log of one run; a context manager. Only the process with `enabled` writes and prints.

  Steps count from 1: step s is logged after the s-th update. When a run resumes, it repeats the steps after
  `start_step`. Therefore the rows after `start_step` are removed from metrics.jsonl, and a purge mark hides them in
  TensorBoard.
  """

  def __init__(self, workdir: str | os.PathLike, *, start_step: int, total_steps: int, steps_per_epoch: int,
               batch_size: int, enabled: bool = True, stream: TextIO | None = None) -> None:
    """Opens the files of `workdir` and starts the clock.

    Args:
      workdir: the run's folder, which is created.
      start_step: number of steps already done; 0 for a new run.
      total_steps: the last step of the run.
      steps_per_epoch: number of steps in an epoch, >= 1.
      batch_size: global batch size, from which images/s is computed.
      enabled: False on every process except the first. With False nothing is written or printed, but the figures are
        kept in memory.
      stream: the stream for progress and messages; None is standard output. On a terminal the progress is one line that
        is refreshed; elsewhere it is plain lines, at most one in `PLAIN_SECONDS`.
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
    self._rows = read_rows(self._path, start_step)
    self._behind = False  # whether rows are missing in the file, because they could not be written
    if enabled:
      self._write_all()
      self._tensorboard = TensorBoard(workdir, start_step, self.say)

    self._start_step = self._logged_step = start_step
    self._started = perf_counter()
    self._paused_seconds = 0.0
    self._logged_seconds = 0.0  # working time at the last log
    self._rate_mark = None  # (step, wall time) after the first log; the time before includes the compilation
    self._rates = []  # for each interval: (images, working seconds, seconds of these spent waiting for data)
    self._plain_printed = -math.inf

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()

  def log(self, step: int, metrics: Mapping[str, float], *, data_wait_seconds: float) -> None:
    """Writes the row of `step` and refreshes the progress line.

    The row also gets `epoch`, `images_per_second` and `data_wait` (share of the time, in [0, 1]). The last two are over
    the working time since the last log; `paused` time does not count.

    Args:
      step: number of steps done so far; larger than at the last log.
      metrics: scalars by name, also of numpy or JAX; values that are not finite are written as null.
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
    """Adds figures, for example `knn_top1`, to the row of `step`; if the step has no row yet, a row is added.

    Raises:
      ValueError: a later step has been written already.
    """
    self._write(step, {name: float(value) for name, value in metrics.items()})
    if self._bar is not None:
      self._show_progress(max(step, self._logged_step))

  @property
  def rows(self) -> Rows:
    """Returns the rows of metrics.jsonl, including rows that could not be written yet."""
    return self._rows

  def has(self, step: int, name: str) -> bool:
    """Returns whether the last row is that of a step and has a figure of this name."""
    return bool(self._rows) and (row := self._rows[-1])["step"] == step and name in row

  def say(self, text: str) -> None:
    """Prints a message on lines of its own, above the progress line."""
    if self._enabled:
      tqdm.write(text, file=self._stream)
      self._stream.flush()

  @contextlib.contextmanager
  def tolerant(self, name: str) -> Iterator[None]:
    """Turns the error of a full or read-only disk into a printed warning; `name` is the file to be written."""
    try:
      yield
    except OSError as error:
      self.say(f"WARNING: {name} could not be written ({error.strerror or error})")

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Stops the clock of images/s and data wait, for evaluations, checkpoints and compilation."""
    before = self._working_seconds()
    try:
      yield
    finally:
      self._paused_seconds += self._working_seconds() - before

  def summary(self, *, chance_loss: float | None = None) -> str:
    """Returns a few lines about the run so far: time, last loss and its mean over the last epoch, speed, kNN.

    The mean speed and the waiting time leave out the first interval of this session, which includes the compilation. If
    it is the only interval, it is used.

    Args:
      chance_loss: of a network that tells nothing apart, shown beside the loss; None leaves it out.
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
      lines.append(f"loss {last:.4g} at step {last_step}, {np.mean(epoch):.4g} in the mean of the last epoch"
                   + ("" if chance_loss is None else f"; chance {chance_loss:.4g}"))
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
    """Closes the files and the progress line. A second call does nothing."""
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
        self.say(f"{self._path.name} could be written again; no row is missing")
      else:
        self._write_row(row, offset)
    except OSError as error:
      if not self._behind:
        self.say(f"WARNING: {self._path} could not be written ({error.strerror or error}); the rows are kept in memory "
                 "and written later")
      self._behind = True
    if self._tensorboard is not None:
      self._tensorboard.add(step, figures)

  def _write_row(self, row: Mapping[str, Any], offset: int) -> None:
    # The whole line is written at once. If figures are added to the last row, its line is overwritten by a longer one
    # with the same beginning.
    line, file = _line(row), self._file
    assert file is not None  # open from the beginning to `close`
    if not os.fstat(file.fileno()).st_nlink:  # somebody has deleted or replaced the file
      self._write_all()
      return
    file.seek(offset)
    file.write(line)
    file.flush()
    file.truncate()
    self._row_offset, self._file_size = offset, offset + len(line)

  def _write_all(self) -> None:
    """Writes the whole file again; the old file stays until the new one is complete."""
    if self._file is not None:
      with contextlib.suppress(OSError):  # nothing is lost: the rows are in memory, too
        self._file.close()
    size = start = 0
    with replacing(self._path) as file:
      for row in self._rows:
        start, size = size, size + file.write(_line(row))
    self._file = open(self._path, "r+b")  # noqa: SIM115, open as long as the run
    self._row_offset, self._file_size = start, size  # the last row is written again when figures are added to it
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
    # The most important parts come first, because a narrow terminal cuts the end.
    parts = [f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}",
             f"epoch {step / self._steps_per_epoch:.1f}/{self._total_steps / self._steps_per_epoch:.4g}"]
    loss = self._rows.last("loss")
    if "loss" in self._rows[-1] or loss is not None:
      # If the last row has a loss that is not finite, the line says so instead of showing an older, finite loss.
      now = self._rows[-1].get("loss", loss)
      parts.append("loss not finite" if now is None else f"loss {now:.3f}")
    for name, text in (("knn_top1", "kNN"), ("other_knn_top1", "other kNN")):
      if (knn := self._rows.last(name)) is not None:
        parts.append(f"{text} {knn:.1%}")
    if (rank := self._rows.last("bank_rank")) is not None:
      parts.append(f"bank rank {rank:.0f}")
    left = self._seconds_left(step)
    if left is not None:
      parts.append(f"{_clock(left)} left")
    if (rank := self._rows.last("feature_rank")) is not None:
      parts.append(f"feature rank {rank:.0f}")
    if len(self._rates) > 1:
      images, seconds, wait = self._rates[-1]
      parts += [f"{images / seconds:,.0f} images/s", f"data wait {wait / seconds:.0%}"]
    return "  ".join(parts)

  def _seconds_left(self, step: int) -> float | None:
    """Returns an estimate from the wall time since the first log, including evaluations and checkpoints."""
    if self._rate_mark is not None and step > self._rate_mark[0]:
      mark_step, mark_time = self._rate_mark
      return (self._total_steps - step) * (perf_counter() - mark_time) / (step - mark_step)
    return None  # the first interval includes the compilation


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _line(row: Mapping[str, Any]) -> bytes:
  return (json.dumps(row, allow_nan=False) + "\n").encode()
