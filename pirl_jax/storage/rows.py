"""The rows of a metrics.jsonl in memory, and how they are read."""

import array
import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from pirl_jax.errors import UserError
from pirl_jax.storage.reading import try_reading

LAST_STEP = 2**53
"""Larger steps are not exact as a float."""


class Rows(Sequence[dict[str, Any]]):
  """Rows {name: number or None}, as a sequence of dicts that are made when they are asked for.

  A row takes 8 bytes for each figure; as a dict it would take more than a kilobyte.
  """

  def __init__(self) -> None:
    """Starts without rows."""
    self._names: list[tuple[str, ...]] = []  # each set of names once
    self._known: dict[tuple[str, ...], int] = {}
    self._kinds, self._starts = array.array("q"), array.array("q")  # for each row: its names, its first value
    self._values = array.array("d")  # NaN for None

  def append(self, row: Mapping[str, Any]) -> None:
    """Adds a row with an integer `step`; of the other values those are kept that are None or a number.

    Numbers that are not finite become None.
    """
    kept = {name: value for name, value in row.items() if value is None or type(value) in (int, float)}
    names = tuple(kept)
    if names not in self._known:
      self._known[names] = len(self._names)
      self._names.append(names)
    self._kinds.append(self._known[names])
    self._starts.append(len(self._values))
    self._values.extend(map(_number, kept.values()))

  def pop(self) -> dict[str, Any]:
    """Removes the last row and returns it."""
    row = self[-1]
    del self._values[self._starts.pop():], self._kinds[-1:]
    return row

  def last(self, name: str) -> float | None:
    """Returns the last value of a figure that is not None; None if there is no value."""
    kinds = {kind for kind, names in enumerate(self._names) if name in names}
    if kinds:
      for index in range(len(self) - 1, -1, -1):
        if self._kinds[index] in kinds and (value := self[index][name]) is not None:
          return value
    return None

  def __len__(self) -> int:
    return len(self._kinds)

  @overload
  def __getitem__(self, index: int) -> dict[str, Any]: ...
  @overload
  def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
  def __getitem__(self, index: int | slice) -> Any:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    names, start = self._names[self._kinds[index]], self._starts[index]
    row: dict[str, Any] = {name: None if math.isnan(value) else value
                           for name, value in zip(names, self._values[start:start + len(names)], strict=True)}
    row["step"] = int(row["step"])
    return row


def _number(value: float | None) -> float:
  try:
    number = math.nan if value is None else float(value)
  except OverflowError:
    number = math.nan
  return number if math.isfinite(number) else math.nan


def read_rows(path: str | os.PathLike, last_step: int = LAST_STEP) -> Rows:
  """Returns the rows of a metrics.jsonl, none if there is no file; a line that is no row, or is cut, is left out.

  Args:
    path: of the file.
    last_step: rows of later steps are left out.

  Raises:
    UserError: the file cannot be read.
  """
  rows, damage = try_reading(str(path), lambda: _rows_of(_lines(path), last_step), folder=Path(path))
  if damage:
    raise UserError(f"{path} cannot be read ({damage}); move it away, or choose another --workdir")
  return rows


def training_seconds(rows: Sequence[Mapping[str, Any]], batch_size: int) -> float:
  """Returns how long the steps of a run took, in seconds, in all pieces together and without evaluations and saves.

  Args:
    rows: of the whole run. `images_per_second` of a row is the mean since the row before it.
    batch_size: images of a step.
  """
  seconds, before = 0.0, 0
  for row in rows:
    if rate := row.get("images_per_second"):
      seconds += (row["step"] - before) * batch_size / rate
      before = row["step"]
  return seconds


def _lines(path: str | os.PathLike) -> Iterator[bytes]:
  try:
    with open(path, "rb") as file:
      yield from file
  except FileNotFoundError:
    pass


def _rows_of(lines: Iterator[bytes], last_step: int) -> Rows:
  rows = Rows()
  for line in lines:
    # ValueError is raised for text that is not JSON and for bytes that are not UTF-8.
    with contextlib.suppress(ValueError, RecursionError):
      row = json.loads(line)
      if isinstance(row, dict) and type(step := row.get("step")) is int and 0 <= step <= last_step:
        rows.append(row)
  return rows
