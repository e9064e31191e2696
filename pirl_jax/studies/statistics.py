"""What a study found: means over seeds, paired differences, and the table for people."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats

CONFIDENCE = 0.95
UNSHOWN = "no difference shown"


@dataclasses.dataclass(frozen=True)
class Difference:
  """A mean of differences seed by seed, and the ends of its confidence interval; both None for one seed."""

  mean: float
  low: float | None
  high: float | None

  @property
  def verdict(self) -> str:
    """Returns in words whether the interval leaves out 0."""
    if self.low is None or self.high is None:
      return "one seed, no interval"
    return UNSHOWN if self.low <= 0 <= self.high else "difference shown"


@dataclasses.dataclass(frozen=True)
class Cell:
  """One figure of a point of the study.

  Attributes:
    series, x: of the point; `x` may be empty.
    figure: name of the figure.
    layer: the layer that it is of, or "".
    values: one a seed.
    difference: to the reference point; None without one, and at the reference itself.
  """

  series: str
  x: str
  figure: str
  layer: str
  values: tuple[float, ...]
  difference: Difference | None = None

  @property
  def label(self) -> str:
    """Returns SERIES X, the name of the point."""
    return f"{self.series} {self.x}".strip()

  @property
  def mean(self) -> float:
    """Returns the mean over the seeds."""
    return statistics.fmean(self.values)

  @property
  def std(self) -> float | None:
    """Returns the standard deviation over the seeds, with divisor their number less one; None for one seed."""
    return statistics.stdev(self.values) if len(self.values) > 1 else None

  def to_json(self) -> dict[str, Any]:
    """Returns all of it as JSON values."""
    difference = self.difference and {**dataclasses.asdict(self.difference), "verdict": self.difference.verdict}
    return {**dataclasses.asdict(self), "mean": self.mean, "std": self.std, "num_seeds": len(self.values),
            "difference": difference}


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
  """Returns the mean of values[i] - reference[i] and its 95 % interval by Student's t.

  It takes the differences as draws from one normal distribution, and knows nothing of other comparisons: of twenty
  such intervals one may be expected to miss.

  Args:
    values: one a seed.
    reference: of the same seeds.
  """
  differences = [value - other for value, other in zip(values, reference, strict=True)]
  mean = statistics.fmean(differences)
  if len(differences) < 2:
    return Difference(mean, None, None)
  quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
  half = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
  return Difference(mean, mean - half, mean + half)


def format_cells(title: str, cells: Sequence[Cell], *, reference: str, share: bool) -> str:
  """Returns lines of text: for each figure a row for each point.

  Args:
    title: the first line.
    cells: at least one.
    reference: label of the point that the others are compared with, or "".
    share: the figures are shares, shown in per cent; else plain numbers.
  """
  lines = [title, f"{_spread(cells)}{', %' if share else ''}"]
  if reference:
    lines.append(f"against {reference}: mean difference seed by seed [{CONFIDENCE:.0%} interval, each for itself]")
  width = max(len(cell.label) for cell in cells)
  figures = list(dict.fromkeys(cell.figure for cell in cells))
  for figure in figures:
    lines.append(f"  {figure}")
    for cell in cells:
      if cell.figure == figure:
        spread = "" if cell.std is None else f" +- {_number(cell.std, share):<5}"
        lines.append(f"    {cell.label:<{width}}  {_number(cell.mean, share):>6}{spread}"
                     f"  {_against(cell, reference, share)}".rstrip())
  return "\n".join(lines)


def _spread(cells: Sequence[Cell]) -> str:
  num_seeds = len(cells[0].values)
  return f"mean +- standard deviation over {num_seeds} seeds" if num_seeds > 1 else "one seed"


def _against(cell: Cell, reference: str, share: bool) -> str:
  found = cell.difference
  if found is None:
    return "reference" if cell.label == reference else ""
  text = _number(found.mean, share, sign="+")
  if found.low is not None and found.high is not None:
    text += f" [{_number(found.low, share, sign='+')}, {_number(found.high, share, sign='+')}]"
  return f"{text}  {found.verdict}" if found.low is None or found.verdict == UNSHOWN else text


def _number(value: float, share: bool, sign: str = "") -> str:
  return f"{100 * value:{sign}.1f}" if share else f"{value:{sign}.3f}"
