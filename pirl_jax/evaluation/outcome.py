"""The outcome that every protocol returns, and the text table that shows the outcomes of one or several runs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from pirl_jax.figures.curves import Curve


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The outcome of a protocol; all values are JSON values.

  Attributes:
    figures: everything that was measured, for the result file. Accuracies and precisions lie in [0, 1].
    table: the few figures that are printed, by the name of their row; accuracies lie in [0, 1].
    curve: the line of this run in the plot, or None if there is nothing to plot.
  """

  figures: dict[str, Any]
  table: dict[str, float]
  curve: Curve | None = None

  def to_json(self) -> dict[str, Any]:
    """Returns the outcome as JSON values."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, stored: Mapping[str, Any]) -> Self:
    """Returns the outcome from the result of `to_json`."""
    curve = stored["curve"]
    return cls(stored["figures"], stored["table"], curve and Curve(**curve))


def format_table(title: str, outcomes: Mapping[str, Outcome], *, share: bool = True) -> str:
  """Returns lines of text: a row for each name in the outcomes' tables, and a column for each run.

  Args:
    title: the first line.
    outcomes: by the name of the run.
    share: True shows the figures in per cent; False shows plain numbers.
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


def _cell(value: float | None, share: bool) -> str:
  if value is None:
    return "-"
  if share:
    return f"{value:.1%}"
  return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
