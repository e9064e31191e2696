"""The figure of a study.

The study's own panels stand beside a panel with the numbers of the paper (PIRL, arXiv 1912.01991). The paper published
its figures as plots, so only the numbers in its tables and text can be drawn.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pirl_jax.figures.colours import colours_of
from pirl_jax.storage.files import replacing
from pirl_jax.studies.statistics import CONFIDENCE, Cell


@dataclasses.dataclass(frozen=True)
class Line:
  """A line of a panel, or one of its bars or intervals.

  Attributes:
    x: numbers, or names; not used for a bar or an interval, which stands above its own name.
    y: numbers, as many as `x`.
    error: half the height of the error bars or of the band, as many numbers; None draws no error.
    series: name of the series, if it differs from the name of the line. A series has the same colour in all panels, and
      a system in all figures, see `colours_of`.
  """

  x: Sequence[float] | Sequence[str]
  y: Sequence[float]
  error: Sequence[float] | None = None
  series: str = ""


@dataclasses.dataclass(frozen=True)
class Panel:
  """One panel of the figure, with its own axes.

  Attributes:
    title: names the data and the network.
    y_label: of the y axis; also says what the error bars are.
    kind: "lines", "bands" (lines with an error band), "bars" or "intervals" (error bars and a line at 0).
    lines: by name.
    x_label: of the x axis.
    log_x: True for a logarithmic x axis.
    note: text below the x axis.
  """

  title: str
  y_label: str
  kind: str
  lines: Mapping[str, Line]
  x_label: str = ""
  log_x: bool = False
  note: str = ""


LAYERS = ("conv1", "res2", "res3", "res4", "res5")
IMAGENET = "paper, ImageNet, ResNet-50"
DERIVED = ("derived: the model of table 5, 400 epochs and 4,096 negatives;\n"
           "the paper shows the other points in its plot alone")

PAPER = {
  "lambda": Panel(IMAGENET, "linear top-1, %", "lines", {"PIRL (derived)": Line([0.5], [62.2], series="PIRL")},
                  "lambda, weight of the pretext term", note=DERIVED),
  "permutations": Panel(
    "paper, ImageNet then VOC07, ResNet-50", "SVM mean average precision, %", "lines",
    {"PIRL (derived)": Line([362_880], [79.8], series="PIRL")}, "number of permutations", log_x=True, note=DERIVED),
  "negatives": Panel(IMAGENET, "linear top-1, %", "lines", {"PIRL (derived)": Line([4_096], [62.2], series="PIRL")},
                     "number of negatives", log_x=True, note=DERIVED),
  "pretext": Panel(
    IMAGENET, "linear top-1 of the best layer, %", "bars",
    {"PIRL (Jigsaw)": Line([""], [62.2]), "PIRL (Rotation)": Line([""], [60.2]),
     "PIRL (Rotation + Jigsaw)": Line([""], [63.1]), "NPID++": Line([""], [59.0]), "Jigsaw": Line([""], [45.7]),
     "RotNet": Line([""], [48.9]), "Random": Line([""], [13.7])},
    note="PIRL: table 5, 400 epochs, 4,096 negatives;\nNPID++: table 2, 800 epochs, 32,000 negatives;\n"
         "Jigsaw, RotNet: table 2; Random: res2 of table 7"),
  "layers": Panel(
    IMAGENET, "linear top-1, %", "lines",
    {"PIRL": Line(LAYERS, [6.2, 30.0, 40.1, 56.6, 63.6]), "Jigsaw": Line(LAYERS, [12.4, 28.0, 39.9, 45.7, 34.2]),
     "NPID++": Line(LAYERS, [6.6, 27.4, 38.5, 53.1, 59.0]), "Random": Line(LAYERS, [9.6, 13.7, 12.0, 8.0, 5.6])},
    "layer", note="table 7"),
}
"""The panel of the paper for each study. For the paper's figure 4 (distances) no number is known, and the paper has no
study of how negatives are drawn."""


def lines_panel(cells: Sequence[Cell], *, title: str, figure: str, x_label: str, log_x: bool, share: bool) -> Panel:
  """Returns a panel of lines.

  If the cells have layers, there is a line for each point over the layers. Otherwise there is a line for each series
  over the numbers `x`.

  Args:
    cells: of one figure, or of one figure in each layer.
    title: of the panel.
    figure: name of the figure.
    x_label: of the x axis.
    log_x: True for a logarithmic x axis.
    share: True shows the figures in per cent.
  """
  by_name: dict[str, list[Cell]] = {}
  for cell in cells:
    by_name.setdefault(cell.label if cell.layer else cell.series, []).append(cell)
  lines = {}
  for name, found in by_name.items():
    if not found[0].layer:
      found.sort(key=lambda cell: float(cell.x))
    x = [cell.layer for cell in found] if found[0].layer else [float(cell.x) for cell in found]
    lines[name] = Line(x, *_heights(found, share))
  return Panel(title, _y_label(figure, cells, share), "lines", lines, x_label, log_x)


def bars_panels(cells: Sequence[Cell], *, title: str, figure: str, x_label: str, reference: str,
                share: bool) -> list[Panel]:
  """Returns a panel with a bar for each point and, if there are several seeds, a panel with differences.

  The second panel shows the differences to the reference.

  Args:
    cells: of one figure.
    title: of the panels.
    figure: name of the figure.
    x_label: of the x axes.
    reference: label of a point, or "" for no differences.
    share: True shows the figures in per cent.
  """
  scale = 100 if share else 1
  bars = {cell.label: Line([""], *_heights([cell], share), cell.series) for cell in cells}
  panels = [Panel(title, _y_label(figure, cells, share), "bars", bars, x_label)]
  if reference and len(cells[0].values) > 1:
    intervals = {}
    for cell in cells:
      mean, high = (cell.difference.mean, cell.difference.high) if cell.difference else (0.0, 0.0)
      assert high is not None  # there are several seeds
      intervals[cell.label] = Line([""], [mean * scale], [(high - mean) * scale], cell.series)
    panels.append(Panel(title, f"difference to {reference}{', points' if share else ''}\n"
                        f"(mean over the seeds, {CONFIDENCE:.0%} interval)", "intervals", intervals, x_label))
  return panels


def distances_panel(matched: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str, figure: str,
                    x_label: str) -> Panel:
  """Returns a panel with the density of the distances of each point; a band shows the standard deviation over seeds.

  Args:
    matched: by label of the point, the histogram of each seed: `counts` and the `edges` of its bins.
    title: of the panel.
    figure: label of the y axis.
    x_label: of the x axis.
  """
  lines = {}
  for label, seeds in matched.items():
    edges = np.array(seeds[0]["edges"])
    densities = [np.array(one["counts"]) / np.sum(one["counts"]) / np.diff(edges) for one in seeds]
    error = np.std(densities, axis=0, ddof=1).tolist() if len(seeds) > 1 else None
    lines[label] = Line(((edges[1:] + edges[:-1]) / 2).tolist(), np.mean(densities, axis=0).tolist(), error)
  num_seeds = len(next(iter(matched.values())))
  return Panel(title, f"{figure}\n({_seeds(num_seeds)})", "bands", lines, x_label)


def _heights(cells: Sequence[Cell], share: bool) -> tuple[list[float], list[float] | None]:
  """Returns (means, standard deviations) of the cells; with one seed the standard deviations are None."""
  scale = 100 if share else 1
  spreads = [scale * cell.std for cell in cells if cell.std is not None]
  return [scale * cell.mean for cell in cells], spreads or None


def _y_label(figure: str, cells: Sequence[Cell], share: bool) -> str:
  return f"{figure}{', %' if share else ''}\n({_seeds(len(cells[0].values))})"


def _seeds(number: int) -> str:
  return f"mean and standard deviation over {number} seeds" if number > 1 else "one seed"


def save_panels(path: str | os.PathLike, title: str, panels: Sequence[Panel]) -> None:
  """Writes a figure with the panels side by side.

  Args:
    path: the file; its ending says the format, and its folder is created.
    title: above all panels.
    panels: at least one.
  """
  colours = colours_of(line.series or name for panel in panels for name, line in panel.lines.items())
  figure = Figure(figsize=(5.6 * len(panels), 4.6), layout="constrained")
  FigureCanvasAgg(figure)  # needs no display, and the figure does not stay in pyplot's list of open figures
  figure.suptitle(title, parse_math=False)
  all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axes, panel in zip(all_axes, panels, strict=True):
    _draw(axes, panel, colours)
    if panel.kind == "lines" and all(len(line.x) == 1 for line in panel.lines.values()):
      axes.sharex(all_axes[0])  # with the x axis of the first panel a single point stands at its right place
  with replacing(path) as file:
    figure.savefig(file, dpi=120, format=Path(path).suffix[1:])


def _draw(axes: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
  for place, (name, line) in enumerate(panel.lines.items()):
    colour = colours[line.series or name]
    if panel.kind == "bars":
      bars = axes.bar([place], line.y, yerr=line.error, capsize=4, color=colour)
      axes.bar_label(bars, fmt="%.1f", label_type="center", color="white")
    elif panel.kind == "intervals":
      axes.errorbar([place], line.y, yerr=line.error, fmt="o", capsize=4, color=colour)
    elif panel.kind == "bands":
      axes.plot(line.x, line.y, label=name, color=colour)
      if line.error is not None:
        axes.fill_between(line.x, np.subtract(line.y, line.error), np.add(line.y, line.error), alpha=0.2,
                          color=colour)
    else:
      alone = len(line.x) == 1
      axes.errorbar(line.x, line.y, yerr=line.error, label=name, color=colour, marker="*" if alone else "o",
                    capsize=3, markersize=14 if alone else 4)
      if alone:
        axes.annotate(f"{line.y[0]:g}", (line.x[0], line.y[0]), textcoords="offset points", xytext=(-8, 5),
                      ha="right")
  if panel.kind in ("bars", "intervals"):
    axes.set_xticks(range(len(panel.lines)), panel.lines, rotation=30, ha="right", parse_math=False)
  else:
    for text in axes.legend().get_texts():
      text.set_parse_math(False)  # a dollar sign in the name of a setting must not start a formula
  if panel.kind == "intervals":
    axes.axhline(0, color="black", linewidth=0.8)
  if panel.log_x:
    axes.set_xscale("log")
  axes.set_title(panel.title, parse_math=False)
  axes.set_ylabel(panel.y_label)
  axes.set_xlabel("\n".join(filter(None, (panel.x_label, panel.note))))
  axes.grid(alpha=0.3)
