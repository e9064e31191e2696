"""What a study found, written down: the table, the figure, and every number in files."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pirl_jax.errors import UserError
from pirl_jax.evaluation.protocols import protocol_of, reading_of
from pirl_jax.storage.files import write_file, write_json
from pirl_jax.studies import figures as study_figures
from pirl_jax.studies.figures import PAPER, Panel
from pirl_jax.studies.points import Trial, given, named
from pirl_jax.studies.statistics import Cell, format_cells, paired_difference


def report(config: ConfigDict, trials: Sequence[Trial], folder: Path) -> None:
  """Writes study.csv, study.json and study.png into `folder`, and prints the table.

  Raises:
    UserError: a result lacks a figure that the study needs.
  """
  results = {trial.folder: result for trial in trials if (result := trial.result()) is not None}
  cells = create_cells(trials, results, config.reference)
  shown = [cell for cell in cells if bool(cell.layer) == (config.plot == "layers")]
  share = protocol_of(trials[0].evaluation.protocol).share
  write_rows(folder / "study.csv", config.study, trials, cells)
  write_json(folder / "study.json", {
    "study": config.study, "evaluation": config.evaluation, "seeds": config.seeds, "reference": config.reference,
    "std": "over the seeds, with divisor their number less one",
    "difference": "to the reference, seed by seed: the mean, and its 95 % interval by Student's t, each for itself",
    "cells": [cell.to_json() for cell in cells],
    "runs": [{"point": trial.point.label, "seed": trial.config.seed, "folder": str(trial.folder)} for trial in trials],
    "config": given(config)})
  title = config.title or f"{config.name}: {config.evaluation}"
  study_figures.save_panels(folder / "study.png", title, create_panels(config, trials, results, shown, share=share))
  title += f", seed{'s' if len(config.seeds) > 1 else ''} {', '.join(map(str, config.seeds))}"
  print("\n" + format_cells(title, shown, reference=config.reference, share=share))
  print("written: " + ", ".join(str(folder / f"study.{ending}") for ending in ("csv", "json", "png")))


def create_cells(trials: Sequence[Trial], results: Mapping[Path, dict[str, Any]], reference: str) -> list[Cell]:
  """Returns every figure of every point, with its difference to the reference point.

  Args:
    trials: in the order of points and seeds.
    results: the result of each, by the run's folder.
    reference: label of a point, or "": none.

  Raises:
    UserError: a result lacks a figure.
  """
  values = {}  # of (point, figure, layer), in the order of the seeds
  for trial in trials:
    with named(trial):
      for (figure, layer), value in read_figures(trial.evaluation.protocol, results[trial.folder]["figures"]).items():
        values.setdefault((trial.point, figure, layer), []).append(value)
  base = {figure: found for (point, figure, _), found in values.items() if point.label == reference}
  cells = []
  for (point, figure, layer), found in values.items():
    # A layer that the reference's network does not have is compared with nothing.
    compared = point.label != reference and figure in base
    difference = paired_difference(found, base[figure]) if compared else None
    cells.append(Cell(point.series, str(point.x), figure, layer, tuple(found), difference))
  return cells


def read_figures(protocol: str, figures: dict[str, Any]) -> dict[tuple[str, str], float]:
  """Returns the figures that a study takes, by name and layer ("" where it is of none); the one to draw comes first.

  Raises:
    UserError: one is not there.
  """
  reading = reading_of(protocol)
  try:
    found = {(name, ""): value for name, value in reading.figures(figures).items()}
    if reading.by_layer:
      name, stored = reading.by_layer
      found |= {(f"{name} of {layer}", layer): by[stored] for layer, by in figures["layers"].items()}
  except KeyError as error:
    raise UserError(f"the result of {protocol} has no {error.args[0]}; it may need labels") from error
  return found


def write_rows(path: Path, study: str, trials: Sequence[Trial], cells: Sequence[Cell]) -> None:
  """Writes the long table: a row for each figure of each run, an accuracy as a share in [0, 1]."""
  of_point = {}
  for trial in trials:
    of_point.setdefault(trial.point.label, []).append(trial)
  table = io.StringIO(newline="")
  writer = csv.writer(table)
  writer.writerow(["study", "series", "x", "seed", "figure", "layer", "value", "run"])
  for cell in cells:
    for trial, value in zip(of_point[cell.label], cell.values, strict=True):
      writer.writerow([study, cell.series, cell.x, trial.config.seed, cell.figure, cell.layer, value, trial.folder])
  write_file(path, table.getvalue().encode())


def create_panels(config: ConfigDict, trials: Sequence[Trial], results: Mapping[Path, dict[str, Any]],
                  cells: Sequence[Cell], *, share: bool) -> list[Panel]:
  """Returns the panels of the study's figure: its own, and the paper's where its numbers are known.

  Args:
    config: of the study.
    trials: all of them.
    results: by the run's folder.
    cells: those that the table shows.
    share: whether their figures are shares.
  """
  title = config.panel_title or f"here, {config.variant or 'embedded textures'}, {trials[0].config.model.arch}"
  first = [cell for cell in cells if cell.figure == cells[0].figure]
  reading = reading_of(trials[0].evaluation.protocol)
  if config.plot in ("lines", "layers"):
    drawn, figure = first, first[0].figure
    if config.plot == "layers" and reading.by_layer:
      drawn, figure = cells, reading.by_layer[0]
    panels = [study_figures.lines_panel(drawn, title=title, figure=config.y_label or figure, x_label=config.x_label,
                                        log_x=config.log_x, share=share)]
  elif config.plot == "bars":
    panels = study_figures.bars_panels(first, title=title, figure=config.y_label or first[0].figure,
                                       x_label=config.x_label, reference=config.reference, share=share)
  else:
    matched = {}
    for trial in trials:
      matched.setdefault(trial.point.label, []).append(results[trial.folder]["figures"][reading.distances])
    panels = [study_figures.distances_panel(matched, title=title, figure=config.y_label or "density",
                                            x_label=config.x_label)]
  return [*panels, PAPER[config.study]] if config.study in PAPER else panels
