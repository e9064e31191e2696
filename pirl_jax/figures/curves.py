"""The plot of one evaluation, or of several side by side."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

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


def save_plot(path: str | os.PathLike, title: str, curves: Mapping[str, Curve]) -> None:
  """Writes a figure with one line for each run, with its band where there is one.

  Args:
    path: the file, its ending says the format; its folder is created.
    title: above the axes.
    curves: by the run's name.
  """
  figure = Figure(figsize=(6, 4), layout="constrained")
  FigureCanvasAgg(figure)  # draws without a display and without pyplot's list of open figures
  axes = figure.subplots()
  for name, curve in curves.items():
    (line,) = axes.plot(curve.x, curve.y, label=name, marker="." if len(curve.x) < 40 else None)
    if curve.low is not None and curve.high is not None:
      axes.fill_between(curve.x, curve.low, curve.high, alpha=0.2, color=line.get_color())
  axes.set(xlabel=curve.x_label, ylabel=curve.y_label, xscale="log" if curve.log_x else "linear")
  # Names of data and runs may hold dollars, and are no formulas.
  axes.set_title(title, parse_math=False)
  axes.grid(alpha=0.3)
  for text in axes.legend().get_texts():
    text.set_parse_math(False)
  with replacing(path) as file:
    figure.savefig(file, dpi=120, format=Path(path).suffix[1:])
