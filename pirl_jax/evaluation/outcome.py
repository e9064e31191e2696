"""What every protocol hands back, and the table of one run or of several side by side."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from pirl_jax.figures.curves import Curve


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
    curve = stored["curve"]
    return cls(stored["figures"], stored["table"], curve and Curve(**curve))


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


def _cell(value: float | None, share: bool) -> str:
  if value is None:
    return "-"
  if share:
    return f"{value:.1%}"
  return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
