"""What every protocol hands back, and the table and the plot of one run or of several side by side."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pirl_jax.storage.files import replacing


@dataclasses.dataclass(frozen=True)
class Curve:
  """One line of the plot.

  Attributes:
    x_label, y_label: of the axes.
    x: numbers, or names (layers, say), the same for every run of a comparison where they are names.
    y: as many numbers.
    low, high: the band about it, as many numbers, or None.
    log_x: whether the axis of x is logarithmic.
  """

  x_label: str
  y_label: str
  x: Sequence[float] | Sequence[str]
  y: Sequence[float]
  low: Sequence[float] | None = None
  high: Sequence[float] | None = None
  log_x: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a protocol found, JSON values throughout.

  Attributes:
    figures: everything measured, for the result file. Accuracies and precisions lie in [0, 1].
    table: the few figures for people, by the name of their row; an accuracy as a share in [0, 1].
    curve: the line of this run in the plot; None where there is nothing to plot.
  """

  figures: dict[str, Any]
  table: dict[str, float]
  curve: Curve | None = None

  def to_json(self) -> dict[str, Any]:
    """Returns all of it as JSON values."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, stored: Mapping[str, Any]) -> Self:
    """Returns what `to_json` gave."""
    return cls(**{**stored, "curve": stored["curve"] and Curve(**stored["curve"])})


def format_table(title: str, outcomes: Mapping[str, Outcome], *, share: bool = True) -> str:
  """Returns lines of text: a row for each name in the outcomes' tables, a column for each run.

  Args:
    title: the first line.
    outcomes: by the run's name.
    share: the figures are shares, shown in per cent; else plain numbers.
  """
  rows = list(dict.fromkeys(name for outcome in outcomes.values() for name in outcome.table))
  width = max(map(len, rows))
  columns = {name: max(len(name), 8) for name in outcomes}
  lines = [title]
  if len(outcomes) > 1:
    lines.append(" " * (width + 2) + "".join(f"  {name:>{columns[name]}}" for name in outcomes))
  for row in rows:
    cells = (_cell(outcome.table.get(row), share).rjust(columns[name]) for name, outcome in outcomes.items())
    lines.append(f"  {row:<{width}}" + "".join(f"  {cell}" for cell in cells))
  return "\n".join(lines)


def _cell(value, share):
  if value is None:
    return "-"
  if share:
    return f"{value:.1%}"
  return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def save_plot(path: str | os.PathLike, title: str, outcomes: Mapping[str, Outcome]) -> None:
  """Writes a figure with one line for each run, with its band where there is one.

  Args:
    path: the file, its ending says the format; its folder is created.
    title: above the axes.
    outcomes: by the run's name; each has a curve.
  """
  figure = Figure(figsize=(6, 4), layout="constrained")
  FigureCanvasAgg(figure)  # draws without a display and without pyplot's list of open figures
  axes = figure.subplots()
  for name, outcome in outcomes.items():
    curve = outcome.curve
    (line,) = axes.plot(curve.x, curve.y, label=name, marker="." if len(curve.x) < 40 else None)
    if curve.low is not None:
      axes.fill_between(curve.x, curve.low, curve.high, alpha=0.2, color=line.get_color())
  axes.set(xlabel=curve.x_label, ylabel=curve.y_label, xscale="log" if curve.log_x else "linear")
  # Names of data and runs may hold dollars, and are no formulas.
  axes.set_title(title, parse_math=False)
  axes.grid(alpha=0.3)
  for text in axes.legend().get_texts():
    text.set_parse_math(False)
  with replacing(path) as file:
    figure.savefig(file, dpi=120, format=Path(path).suffix[1:])
