"""The plot of one evaluation, or of several evaluations in one figure."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pirl_jax.figures.colours import colours_of
from pirl_jax.storage.files import replacing


@dataclasses.dataclass(frozen=True)
class Curve:
  """One line of the plot.

  Attributes:
    x_label, y_label: of the axes.
    x: numbers, or names, for example of layers. Names must be the same for all runs of a comparison.
    y: numbers, as many as `x`.
    low, high: lower and upper edge of a band around the line, as many numbers, or None.
    log_x: True for a logarithmic x axis.
  """

  x_label: str
  y_label: str
  x: Sequence[float] | Sequence[str]
  y: Sequence[float]
  low: Sequence[float] | None = None
  high: Sequence[float] | None = None
  log_x: bool = False


def save_plot(path: str | os.PathLike, title: str, curves: Mapping[str, Curve]) -> None:
  """Writes a figure with one line for each run; a line has a band if its curve has one.

  Args:
    path: the file; its ending says the format, and its folder is created.
    title: above the axes.
    curves: by the run's name; its colour is that of its system, see `colours_of`.
  """
  figure = Figure(figsize=(6, 4), layout="constrained")
  FigureCanvasAgg(figure)  # needs no display, and the figure does not stay in pyplot's list of open figures
  axes = figure.subplots()
  colours = colours_of(curves)
  for name, curve in curves.items():
    axes.plot(curve.x, curve.y, label=name, color=colours[name], marker="." if len(curve.x) < 40 else None)
    if curve.low is not None and curve.high is not None:
      axes.fill_between(curve.x, curve.low, curve.high, alpha=0.2, color=colours[name])
  axes.set(xlabel=curve.x_label, ylabel=curve.y_label)
  if curve.log_x:  # to set the scale to "linear" would put numbers in place of the names of layers or classes
    axes.set_xscale("log")
  # A dollar sign in the name of a data set or run must not start a formula.
  axes.set_title(title, parse_math=False)
  axes.grid(alpha=0.3)
  for text in axes.legend().get_texts():
    text.set_parse_math(False)
  with replacing(path) as file:
    figure.savefig(file, dpi=120, format=Path(path).suffix[1:])
