"""The figures of docs/results.md: runs them, keeps them, writes the tables, and runs one again to compare.

  python -m benchmarks.results run tiny-24 --images=tiny-imagenet-40 --seeds=10,11     # trains, evaluates and keeps
  python -m benchmarks.results write                       # the tables of docs/results.md, from docs/results.jsonl
  python -m benchmarks.results --check                     # trains the smallest row once more, two minutes on two cores

A row is a study (`ROWS`). `run` gives the commands that docs/results.md shows; it skips runs that are finished and goes
on with those that are not. docs/results.jsonl has a line for each run, so rows can grow seed by seed.
"""

import argparse
import csv
import dataclasses
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pirl_jax.runtime.devices import num_cores
from pirl_jax.studies.statistics import Difference, paired_difference

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "results.jsonl"
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- tables: written by benchmarks.results -->", "<!-- end of tables -->"

FIGURES = {"kNN top-1": "kNN, pooled", "linear top-1 of res3": "linear, res3", "linear top-1 of res4": "linear, res4"}
"""{name of a figure in study.csv: its name in the tables}; the first one decides."""

POINT = 0.01
"""A difference within +- this is called none."""

CHECKED, TOLERANCE = ("textures", "PIRL", 0), 0.03
"""The run that `--check` repeats, and how far its kNN may be from the kept one: rounding differs between machines."""

EVALUATIONS = {
  "knn": (), "linear": ("--config.plot=layers", "--config.evaluation=linear_small",
                        "--config.evaluation_settings.linear.num_epochs=14",
                        "--config.evaluation_settings.linear.cached=True")}
QUIET = ("--config.settings.evaluate.views=0", "--config.settings.report=False", "--config.settings.export=False",
         "--config.settings.checkpoint.every_steps=1000000", "--config.settings.checkpoint.keep=1")
FOLDER = ("--config.variant=folder_small", "--config.settings.data.root={images}", "--config.settings.data.split=train",
          "--config.settings.data.labels=folder", "--config.settings.evaluate.every_epochs=0",
          "--config.settings.evaluate.learning=False", "--config.settings.batch_size=64",
          "--config.settings.optimizer.learning_rate=0.1", *QUIET)


@dataclasses.dataclass(frozen=True)
class Row:
  """A study of docs/results.md.

  Attributes:
    title: what was trained on what.
    flags: of the study; {images} stands for the folder of images.
    points: {series: (system, {field: value})}; the others are compared with the first one.
  """

  title: str
  flags: tuple[str, ...]
  points: dict[str, tuple[str, dict[str, Any]]]

  def command(self, name: str, evaluation: str, *, series: Iterable[str], seeds: Sequence[int], workdir: str,
              images: str) -> list[str]:
    """Returns the arguments of launch.py that train and evaluate these runs."""
    points = [(one, "", *self.points[one]) for one in series]
    return ["--config=configs/study.py:own", f"--workdir={workdir}", f"--config.name={name}-{evaluation}",
            f"--config.seeds={tuple(seeds)}", *(flag.replace("{images}", images) for flag in self.flags),
            *EVALUATIONS[evaluation], f"--config.points={points}"]


def _photographs(data: str, split: str, network: str, epochs: int, **fields: Any) -> Row:
  given = {"num_epochs": epochs, **{name.replace("__", "."): value for name, value in fields.items()}}
  return Row(f"{data}, {network}, {epochs} epochs", (*FOLDER, f"--config.settings.evaluate.split={split}"),
             {"PIRL": ("pirl", given), "NPID++": ("npid", given)})


ROWS = {
  "tiny-24": _photographs("Tiny-ImageNet-40", "val", "ResNet-8", 24),
  "tiny-6": _photographs("Tiny-ImageNet-40", "val", "ResNet-8", 6),
  "tiny-wide-12": _photographs("Tiny-ImageNet-40", "val", "ResNet-8 twice as wide", 12, model__width=2),
  "cifar10-10": _photographs("CIFAR-10", "test", "ResNet-8", 10),
  "textures": Row("embedded textures, 1,024 images, ResNet-8, 24 epochs", QUIET,
                  {"PIRL": ("pirl", {}), "NPID++": ("npid", {})}),
}


def run(name: str, *, series: Iterable[str], seeds: Sequence[int], workdir: str, images: str) -> list[dict[str, Any]]:
  """Trains and evaluates what is not finished, and returns a line of `KEPT` for each run."""
  row, series = ROWS[name], list(series)
  for evaluation in EVALUATIONS:
    command = row.command(name, evaluation, series=series, seeds=seeds, workdir=workdir, images=images)
    print(shlex.join(["python", "launch.py", *command]), flush=True)
    subprocess.run([sys.executable, "launch.py", *command], cwd=ROOT, check=True)
  figures: dict[tuple[str, int], dict[str, float]] = {}
  folders = {}
  for evaluation in EVALUATIONS:
    with open(Path(workdir) / f"{name}-{evaluation}" / "study.csv", newline="") as file:
      for found in csv.DictReader(file):
        key = found["series"], int(found["seed"])
        folders[key] = Path(found["run"])
        if found["figure"] in FIGURES:
          figures.setdefault(key, {})[found["figure"]] = float(found["value"])
  return [{"row": name, "series": one, "seed": seed, "figures": figures[one, seed],
           "seconds": json.loads((folder / "trained.json").read_text())["seconds"],
           "run": folder.name.rpartition("-")[0], "machine": machine()}
          for (one, seed), folder in sorted(folders.items())]


def machine() -> str:
  """Returns processor, number of cores that this process may use, and the version of JAX."""
  name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else "")
  return (f"{name[1] if name else platform.processor()}, {num_cores()} core(s), jax {version('jax')}")


def keep(lines: Iterable[dict[str, Any]], kept: Path = KEPT) -> None:
  """Adds lines to the file; a line takes the place of an older one of the same run."""
  of_run = {(line["row"], line["series"], line["seed"]): line for line in [*read(kept), *lines]}
  kept.write_text("".join(f"{json.dumps(of_run[key])}\n" for key in sorted(of_run)))


def read(kept: Path = KEPT) -> list[dict[str, Any]]:
  """Returns the lines of the file, [] if there is none."""
  return [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []


def table(name: str, lines: Sequence[dict[str, Any]]) -> str:
  """Returns the section of a row in Markdown; only seeds that all of its points have are compared."""
  row = ROWS[name]
  by_point = {one: {line["seed"]: line for line in lines if line["row"] == name and line["series"] == one}
              for one in row.points}
  seeds = sorted(set.intersection(*(set(found) for found in by_point.values())))
  if not seeds:
    return ""
  reference, *others = row.points
  text = [f"#### {row.title}", "", f"Seeds {', '.join(map(str, seeds))}.", "",
          f"| | {' | '.join(FIGURES.values())} | seconds of a run |", f"|---|{'---|' * (len(FIGURES) + 1)}"]
  for one, found in by_point.items():
    cells = [_spread([found[seed]["figures"][figure] for seed in seeds]) for figure in FIGURES]
    text.append(f"| {one} | {' | '.join(cells)} | {statistics.median(found[seed]['seconds'] for seed in seeds):.0f} |")
  for one in others:
    cells = [_difference(paired_difference(*([by_point[point][seed]["figures"][figure] for seed in seeds]
                                             for point in (reference, one)))) for figure in FIGURES]
    text.append(f"| {reference} - {one} | {' | '.join(cells)} | |")
  machines = sorted({line["machine"] for found in by_point.values() for line in found.values()})
  runs = ", ".join(f"`{found[seeds[0]]['run']}`" for found in by_point.values())
  commands = [shlex.join(["python", "launch.py", *row.command(
    name, evaluation, series=row.points, seeds=seeds, workdir="runs/results", images="IMAGES")])
    for evaluation in EVALUATIONS]
  return "\n".join([*text, "", f"Runs: {runs} (the digests of their configs). {'; '.join(machines)}.", "",
                    "<details><summary>commands</summary>", "", "```bash", *commands, "```", "", "</details>", ""])


def _spread(values: Sequence[float]) -> str:
  deviation = f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
  return f"{100 * statistics.fmean(values):.1f}{deviation}"


def _difference(found: Difference) -> str:
  if found.low is None or found.high is None:
    return f"{100 * found.mean:+.1f}"
  if found.low > 0 or found.high < 0:
    words = "shown"
  elif found.low > -POINT and found.high < POINT:
    words = "no difference of a point"
  else:
    words = "not decided"
  return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}] {words}"


def write(page: Path = PAGE, kept: Path = KEPT) -> None:
  """Puts the tables of all kept rows between the marks in the page."""
  lines, text = read(kept), page.read_text()
  before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
  tables = "\n".join(filter(None, (table(name, lines) for name in ROWS)))
  page.write_text(f"{text[:before]}\n\n{tables}\n{text[after:]}")


def check() -> bool:
  """Trains `CHECKED` again and returns whether its kNN is the kept one within `TOLERANCE`."""
  name, series, seed = CHECKED
  kept = next(line for line in read() if (line["row"], line["series"], line["seed"]) == CHECKED)
  with tempfile.TemporaryDirectory() as folder:
    again, = run(name, series=[series], seeds=[seed], workdir=folder, images="")
  figure = next(iter(FIGURES))
  expected, found = (line["figures"][figure] for line in (kept, again))
  print(f"{name}, {series}, seed {seed}: {figure} {found:.4f}, kept {expected:.4f}, may differ by {TOLERANCE}")
  return abs(found - expected) <= TOLERANCE


def main() -> None:
  """Does what the command line asks for."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--check", action="store_true")
  commands = parser.add_subparsers(dest="command")
  running = commands.add_parser("run")
  running.add_argument("row", choices=ROWS)
  running.add_argument("--images", default="", help="folder of the images, not for textures")
  running.add_argument("--seeds", required=True, type=lambda text: [int(seed) for seed in text.split(",")])
  running.add_argument("--workdir", default="runs/results")
  commands.add_parser("write")
  given = parser.parse_args()
  if given.check:
    sys.exit(not check())
  if given.command == "run":
    keep(run(given.row, series=ROWS[given.row].points, seeds=given.seeds, workdir=given.workdir, images=given.images))
  if given.command == "write" or given.command == "run":
    write()
  if given.command is None:
    parser.error("nothing to do: run, write or --check")


if __name__ == "__main__":
  main()
