"""The report: one HTML file that shows everything about one run, or compares several runs.

The job `report` makes it of any runs; a run with the field `report` makes its own at its end. The file needs no network
and no other file. A section that fails shows its error, and the others are there.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from pirl_jax.data import sources
from pirl_jax.errors import UserError
from pirl_jax.evaluation.inputs import Images, own_sizes
from pirl_jax.evaluation.subjects import labels
from pirl_jax.reporting import meanings, page, sections
from pirl_jax.reporting.charts import number
from pirl_jax.reporting.looking import Sight, look
from pirl_jax.reporting.sections import RunFiles
from pirl_jax.runs import open_run, require_checkpoint, run_folder
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.files import read_json, write_file
from pirl_jax.storage.formats import upgrade_config
from pirl_jax.storage.logbook import METRICS
from pirl_jax.storage.rows import read_rows
from pirl_jax.storage.settings import flatten

NAME = "report.html"


def run(config: ConfigDict, workdir: str) -> None:
  """Writes the report of the runs that `config.checkpoint` lists, separated by commas.

  The report of one run is RUN/report.html, that of several is runs/compare/report.html; `workdir` takes the place of
  both folders. A run may still be training; then its newest checkpoint is shown.

  Raises:
    UserError: nothing is named, a name is not the folder of a run, or the file cannot be written.
  """
  require_checkpoint(config.checkpoint)
  folders = [run_folder(name.strip()) for name in config.checkpoint.split(",") if name.strip()]
  if len(set(folders)) < len(folders):
    raise UserError(f"--config.checkpoint={config.checkpoint} names a run twice")
  mesh = mesh_lib.create_mesh()
  started = time.perf_counter()
  runs = [read_run(label, folder, lambda folder=folder: look_at(folder, mesh))
          for label, folder in zip(labels(folders), folders, strict=True)]
  for found in runs:
    if found.problem:
      print(f"{found.label}: no neighbours and no map, because {found.problem}")
  output = Path(workdir) if workdir else folders[0] if len(folders) == 1 else Path("runs/compare")
  try:
    print(f"written: {write(output / NAME, runs)}, in {time.perf_counter() - started:.0f} s")
  except OSError as error:
    raise UserError(f"{output / NAME} cannot be written ({error.strerror}); choose another --workdir") from error


def read_run(label: str, folder: Path, look_fn: Callable[[], Sight]) -> RunFiles:
  """Returns the files of a run, with what `look_fn` returns or with the error that it raises."""
  sight, problem = None, ""
  try:
    sight = look_fn()
  except Exception as error:  # the other sections need neither the network nor the images
    problem = _in_words(error)
  config = read_json(folder / "config.json") or {}
  with contextlib.suppress(KeyError, TypeError, AttributeError):  # a config that is damaged is shown as it is
    config = upgrade_config(config)
  return RunFiles(label, folder, config, read_rows(folder / METRICS), sight, problem)


def look_at(folder: Path, mesh: jax.sharding.Mesh) -> Sight:
  """Returns what the network of the newest checkpoint in the folder of a run makes of the run's images.

  Raises:
    UserError: the checkpoint or the images cannot be opened.
  """
  opened = open_run(folder, folder.name, 0, mesh)
  config = opened.meta["config"]
  sizes, held_out = own_sizes(config, num_devices=mesh.size), config["evaluate"]
  train, test = sources.open_both(sources.DataSettings.of(config["data"]), split=held_out["split"],
                                  num_images=held_out["num_images"])
  return look(opened.model, Images(train, **sizes), None if test is None else Images(test, **sizes), mesh=mesh)


def write(path: Path, runs: Sequence[RunFiles]) -> str:
  """Writes the report of the runs. Returns its path and its size in words.

  Raises:
    OSError: the file cannot be written.
  """
  content = make(runs).encode("utf-8", "replace")
  write_file(path, content)
  return f"{path} ({len(content) / 1e6:.1f} MB)"


def make(runs: Sequence[RunFiles]) -> str:
  """Returns the report of one or several runs as HTML."""
  now = time.strftime("%Y-%m-%d %H:%M")
  if len(runs) == 1:
    found, = runs
    title = f"Run {found.config.get('name') or found.label}"
    parts = [(key, heading, _guarded(make_fn)) for key, heading, make_fn in _of_run(found, several=False)]
  else:
    title = f"{len(runs)} runs"
    parts = [("overview", "Overview", _guarded(lambda: comparison(runs))),
             ("curves", "Curves", _guarded(lambda: sections.curves(runs)))]
    for place, found in enumerate(runs):
      bodies = [f"<h3>{page.escaped(heading)}</h3>{_guarded(make_fn)}" for _, heading, make_fn in
                _of_run(found, several=True)]
      parts.append((f"run-{place}", found.label, "".join(bodies)))
  parts.append(("machine", "Machine and versions", _guarded(sections.machine)))
  return page.document(title, f"{', '.join(str(found.folder) for found in runs)}, {now}", parts)


def _of_run(found: RunFiles, *, several: bool) -> list[tuple[str, str, Callable[[], str]]]:
  """Returns (id, heading, function that returns the body) of the sections of a run."""
  parts = [
    ("verdict", "Verdict", lambda: sections.judgement(found)),
    ("curves", "Curves", lambda: sections.curves([found])),
    ("views", "Views", lambda: sections.views(found)),
    ("neighbours", "Neighbours", lambda: sections.neighbours(found, num_queries=3 if several else 8)),
    ("map", "Map of features", lambda: sections.feature_map(found, side=700 if several else 1_200)),
    ("layers", "Layers", lambda: sections.layers(found)),
    ("results", "Results", lambda: sections.results(found)),
    ("settings", "Settings", lambda: sections.settings(found)),
    ("broken", "Broken images", lambda: sections.broken(found))]
  return [part for part in parts if not several or part[0] != "curves"]  # the curves are drawn together


def comparison(runs: Sequence[RunFiles]) -> str:
  """Returns a table with a column for each run: verdict, last figures, and the fields in which the runs differ."""
  labels_of = [found.label for found in runs]
  verdicts = [(read_json(found.folder / "results" / "verdict.json") or {}).get("verdict", "") for found in runs]
  present = {name for found in runs for row in found.rows for name in row}
  names = [*(name for name in meanings.METRICS if name in present), *sorted(present - meanings.METRICS.keys())]
  rows: list[list[Any]] = [["verdict", *verdicts]] if any(verdicts) else []
  rows += [[name, *(_text_of(found.last(name)) for found in runs)] for name in names]
  flat = [flatten(found.config) for found in runs]
  differing = [name for name in dict.fromkeys(name for fields in flat for name in fields)
               if len({str(fields.get(name)) for fields in flat}) > 1]
  fields_of = [[name, *(str(fields.get(name, "")) for fields in flat)] for name in differing]
  return ("<h3>Last figures</h3>" + page.table(["", *labels_of], rows)
          + "<h3>Fields that differ</h3>" + page.table(["", *labels_of], fields_of))


def _text_of(value: float | None) -> str:
  return "" if value is None else number(value)


def _guarded(make_fn: Callable[[], str]) -> str:
  """Returns what `make_fn` returns, or the error that it raises, as HTML."""
  try:
    return make_fn()
  except Exception as error:  # one section must not take the others away
    return f'<p class="problem">This section could not be made: {page.escaped(_in_words(error))}</p>'


def _in_words(error: Exception) -> str:
  words = " ".join(str(error).split()) or type(error).__name__
  return words if isinstance(error, UserError) else f"{type(error).__name__}: {words}"
