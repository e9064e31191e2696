"""Charts as SVG for an HTML page: lines over epochs, and points on a plane. Colours come from the page's style sheet.

Every text from outside is escaped. A chart needs no script: names appear when the pointer rests on a line or point.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 38
"""Size of a chart and of its margins; one unit is one pixel on a phone."""

COLOURS = 8
"""Number of colours in the page's style sheet, --c0 to --c7; further lines repeat them, dashed."""

MOST_POINTS = 400
"""A longer line is drawn through the means of this many parts."""

LOG_FROM = 50
"""A positive quantity whose largest value is this many times its smallest is drawn on a logarithmic axis."""


@dataclasses.dataclass(frozen=True)
class Series:
  """One line of a chart.

  Attributes:
    name: of the line, for the legend.
    x, y: as many numbers each; a y that is None interrupts the line.
  """

  name: str
  x: Sequence[float]
  y: Sequence[float | None]


def line_chart(title: str, lines: Sequence[Series], *, low: float | None = None, high: float | None = None,
               level: float | None = None, may_be_log: bool = False) -> str:
  """Returns an SVG element with the lines over epochs, or "" if no line has a point.

  Args:
    title: says to screen readers what the chart shows.
    lines: drawn in the order of the page's colours.
    low, high: the healthy range, marked as a band; None for an end that is open. Both None: no band.
    level: a value that is marked by a dashed line, for example the loss of guessing.
    may_be_log: True allows a logarithmic axis, see `LOG_FROM`.
  """
  lines = [_thinned(line) for line in lines]
  xs = [x for line in lines for x, y in zip(line.x, line.y, strict=True) if y is not None]
  ys = [y for line in lines for y in line.y if y is not None]
  if not ys:
    return ""
  logarithmic = may_be_log and min(ys) > 0 and max(ys) > LOG_FROM * min(ys)
  # The end of the healthy range is in sight, whether the lines are in the range or not.
  marks = [*ys, *(value for value in (low, high, level) if value is not None and _near(value, ys))]
  across = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, False)
  up = _Axis(min(marks), max(marks), HEIGHT - BOTTOM, TOP, logarithmic)
  parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
  if low is not None or high is not None:
    top = up(min(high, up.high) if high is not None else up.high)
    bottom = up(max(low, up.low) if low is not None else up.low)
    if bottom > top:
      parts.append(f'<rect class="healthy" x="{LEFT}" y="{top:.1f}" width="{WIDTH - LEFT - RIGHT}" '
                   f'height="{bottom - top:.1f}"><title>healthy range</title></rect>')
  for value in up.ticks():
    parts.append(f'<path class="grid" d="M{LEFT} {up(value):.1f}H{WIDTH - RIGHT}"/>'
                 f'<text x="{LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{number(value)}</text>')
  for value in across.ticks():
    parts.append(f'<text x="{across(value):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{number(value)}</text>')
  parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">epoch</text>')
  if level is not None and up.low <= level <= up.high:
    parts.append(f'<path class="level" d="M{LEFT} {up(level):.1f}H{WIDTH - RIGHT}"/>')
  for place, line in enumerate(lines):
    dashed = ' stroke-dasharray="5 3"' if place >= COLOURS else ""
    style = f'style="--c:var(--c{place % COLOURS})"'
    parts.append(f'<path class="line" {style} d="{_path(line, across, up)}"{dashed}>'
                 f'<title>{html.escape(line.name)}</title></path>')
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
    if len(points) <= 12:
      parts += [f'<circle class="dot" {style} cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.5"/>' for x, y in points]
  return "".join([*parts, "</svg>"])


def legend(names: Sequence[str]) -> str:
  """Returns the names of the lines with their colours, as HTML."""
  return "".join(f'<span class="key" style="--c:var(--c{place % COLOURS})">{html.escape(name)}</span>'
                 for place, name in enumerate(names))


def scatter(title: str, points: np.ndarray, names: Sequence[str], groups: Sequence[int], num_groups: int) -> str:
  """Returns an SVG element with a dot for each point, coloured by its group.

  Args:
    title: says to screen readers what the plot shows.
    points: f[N, 2], any range.
    names: N names, shown when the pointer rests on a dot.
    groups: N numbers below `num_groups`; -1 for none.
    num_groups: number of groups.
  """
  side = 600
  parts = [f'<svg class="map" viewBox="0 0 {side} {side}" role="img" aria-label="{html.escape(title)}">']
  for (x, y), name, group in zip(unit_square(points) * (side - 20) + 10, names, groups, strict=True):
    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{group_colour(group, num_groups)}">'
                 f'<title>{html.escape(name)}</title></circle>')
  return "".join([*parts, "</svg>"])


def unit_square(points: np.ndarray) -> np.ndarray:
  """Returns f[N, 2] in [0, 1]: the points, moved and stretched so that they fill the square."""
  low, high = points.min(axis=0), points.max(axis=0)
  return (points - low) / np.maximum(high - low, 1e-12)


def group_colour(group: int, num_groups: int) -> str:
  """Returns the CSS colour of a group: hues around the circle, of alternating lightness; grey for -1."""
  return "#8b949e" if group < 0 else f"hsl({360 * group / num_groups:.0f} 70% {(42, 60)[group % 2]}%)"


def number(value: float) -> str:
  """Returns a number with three figures, without an exponent where it is short."""
  if value == 0:
    return "0"
  if abs(value) >= 1000:
    return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.2g}"
  return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


class _Axis:
  """Maps values to places in the SVG."""

  def __init__(self, low: float, high: float, start: float, end: float, logarithmic: bool) -> None:
    if high <= low:
      pad = abs(low) * 0.1 or 1.0
      low, high = low - pad, high + pad
    self.low, self.high, self._start, self._end, self._logarithmic = low, high, start, end, logarithmic

  def __call__(self, value: float) -> float:
    scale = math.log if self._logarithmic else float
    share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
    return self._start + share * (self._end - self._start)

  def ticks(self) -> list[float]:
    """Returns round values within the axis, about four."""
    if self._logarithmic:
      powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
      ticks = [factor * 10.0**power for power in powers for factor in (1, 3)]
      return [tick for tick in ticks if self.low <= tick <= self.high] or [self.low, self.high]
    rough = (self.high - self.low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(self.low / step - 1e-9)
    return [round(step * count, 12) for count in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _near(value: float, ys: Sequence[float]) -> bool:
  """Returns whether the value is in the range of the lines, or not much further away than the range is wide."""
  width = (max(ys) - min(ys)) or abs(max(ys)) or 1
  return min(ys) - width <= value <= max(ys) + width


def _thinned(line: Series) -> Series:
  """Returns the line, or a line through the means of `MOST_POINTS` parts if it has more points."""
  if len(line.x) <= MOST_POINTS:
    return line
  x, y = [], []
  for part in np.array_split(np.arange(len(line.x)), MOST_POINTS):
    known = [value for place in part if (value := line.y[place]) is not None]
    x.append(float(np.mean([line.x[place] for place in part])))
    y.append(float(np.mean(known)) if known else None)
  return Series(line.name, x, y)


def _path(line: Series, across: _Axis, up: _Axis) -> str:
  pieces, pen_down = [], False
  for x, y in zip(line.x, line.y, strict=True):
    if y is not None:
      pieces.append(f"{'L' if pen_down else 'M'}{across(x):.1f} {up(y):.1f}")
    pen_down = y is not None
  return "".join(pieces)
