"""The figures of docs/results.md: runs them, keeps them, writes the tables, and runs one again to compare.

  python -m benchmarks.results run tiny-24 --images=tiny-imagenet-40 --seeds=10,11     # trains, evaluates and keeps
  python -m benchmarks.results write                       # the tables of docs/results.md, from docs/results.jsonl
  python -m benchmarks.results pictures                    # the curves of each row, from docs/results/traces.jsonl
  python -m benchmarks.results pictures --images=tiny-imagenet-40     # neighbours and map too, by the networks
  python -m benchmarks.results --check                     # trains the smallest row once more, two minutes on two cores

A row is a study (`ROWS`). `run` gives the commands that docs/results.md shows; it skips runs that are finished and goes
on with those that are not. docs/results.jsonl has a line for each run, so rows can grow seed by seed. `run` also keeps
the curves of each run, exports the network of the first seed of each point, and keeps its card.
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
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import cards, pictures
from pirl_jax.runtime.devices import num_cores
from pirl_jax.studies.statistics import Difference, paired_difference

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "results.jsonl"
PAGE = ROOT / "docs" / "results.md"
TRACES = ROOT / "docs" / "results" / "traces.jsonl"
MARKS = {section: (f"<!-- {section}: written by benchmarks.results -->", f"<!-- end of {section} -->")
         for section in ("tables", "options", "invariance")}
"""{section of the page: what stands before and after its tables}."""

FIGURES = {"kNN top-1": "kNN, pooled", "linear top-1 of res3": "linear, res3", "linear top-1 of res4": "linear, res4"}
"""{name of a figure in study.csv: its name in the tables}."""

DECIDES = "kNN top-1"
"""The figure of `FIGURES` by which a question is answered."""

INVARIANCE = {"plain: mean distance": "plain distance", "plain: separation": "plain separation",
              "corrected: distance over that to another image": "corrected distance / to another",
              "corrected: separation": "corrected separation"}
"""The same for invariance, which is evaluated twice: names begin with the name of the evaluation."""

POINT = 0.01
"""A difference of two shares within +- this is called none."""

CHECKED, TOLERANCE = ("textures", "PIRL", 0), 0.03
"""The run that `--check` repeats, and how far its kNN may be from the kept one: rounding differs between machines."""

EVALUATIONS = {
  "knn": (), "linear": ("--config.plot=layers", "--config.evaluation=linear_small",
                        "--config.evaluation_settings.linear.num_epochs=14",
                        "--config.evaluation_settings.linear.cached=True"),
  **{name: ("--config.evaluation=invariance", "--config.evaluation_settings.invariance.representation=trunk",
            f"--config.evaluation_settings.invariance.centred={corrected}",
            f"--config.evaluation_settings.invariance.augmented={corrected}")
     for name, corrected in (("plain", False), ("corrected", True))}}
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
    points: {series: (system, {field: value})}; the first one is compared with each of the others.
    evaluations: of every run, names of `EVALUATIONS`.
    figures: {name of a figure, after "EVALUATION: " if several have it: its name in the tables}.
    share: True if the figures are shares, shown in %.
    section: of the page, a name of `MARKS`.
    gains: True if a difference is what another point gains over the first one, instead of the reverse.
    shared: {series: another row, which trains and keeps the runs of this series}.
  """

  title: str
  flags: tuple[str, ...]
  points: dict[str, tuple[str, dict[str, Any]]]
  evaluations: tuple[str, ...] = ("knn", "linear")
  figures: Mapping[str, str] = dataclasses.field(default_factory=lambda: FIGURES)
  share: bool = True
  section: str = "tables"
  gains: bool = False
  shared: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def command(self, name: str, evaluation: str, *, series: Iterable[str], seeds: Sequence[int], workdir: str,
              images: str) -> list[str]:
    """Returns the arguments of launch.py that train and evaluate these runs."""
    points = [(one, "", *self.points[one]) for one in series]
    return ["--config=configs/study.py:own", f"--workdir={workdir}", f"--config.name={name}-{evaluation}",
            f"--config.seeds={tuple(seeds)}", *(flag.replace("{images}", images) for flag in self.flags),
            *EVALUATIONS[evaluation], f"--config.points={points}"]


HELD_OUT = {"Tiny-ImageNet-40": "val", "CIFAR-10": "test"}
"""{data set: the sub-folder of its held-out images}."""


def _flags(data: str, *more: str) -> tuple[str, ...]:
  return *FOLDER, f"--config.settings.evaluate.split={HELD_OUT[data]}", *more


def _photographs(data: str, network: str, epochs: int, *more: str, **fields: Any) -> Row:
  given = {"num_epochs": epochs, **{name.replace("__", "."): value for name, value in fields.items()}}
  return Row(f"{data}, {network}, {epochs} epochs", _flags(data, *more),
             {"PIRL": ("pirl", given), "NPID++": ("npid", given)})


def _options(data: str, epochs: int, evaluations: tuple[str, ...], points: Mapping[str, dict[str, Any]],
             *more: str, beside: str = "") -> Row:
  figures = FIGURES if "linear" in evaluations else {DECIDES: FIGURES[DECIDES]}
  return Row(f"{data}, ResNet-8, {epochs} epochs", _flags(data, *more),
             {name: ("pirl", {"num_epochs": epochs, **fields}) for name, fields in {"PIRL": {}, **points}.items()},
             evaluations, figures, section="options", gains=True, shared={"PIRL": beside} if beside else {})


ROWS = {
  "tiny-24": _photographs("Tiny-ImageNet-40", "ResNet-8", 24),
  "tiny-24-time": Row(
    "Tiny-ImageNet-40, ResNet-8, the same time", _flags("Tiny-ImageNet-40"),
    {"PIRL": ("pirl", {"num_epochs": 24}), "NPID++, 48 epochs": ("npid", {"num_epochs": 48})},
    shared={"PIRL": "tiny-24"}),
  "tiny-6": _photographs("Tiny-ImageNet-40", "ResNet-8", 6),
  "tiny-wide-12": _photographs("Tiny-ImageNet-40", "ResNet-8 twice as wide", 12,
                               "--config.settings.checkpoint.every_steps=936", model__width=2),
  "cifar10-10": _photographs("CIFAR-10", "ResNet-8", 10),
  "textures": Row("embedded textures, 1,024 images, ResNet-8, 24 epochs", QUIET,
                  {"PIRL": ("pirl", {}), "NPID++": ("npid", {})}),
  "tiny-options": _options("Tiny-ImageNet-40", 6, ("knn",), {
    "nearest_positive=0.5": {"nearest_positive": 0.5},
    "hardest 8 %": {"negative_ranks": (0.0, 0.08)},
    "ring of 1 to 10 %": {"negative_ranks": (0.01, 0.1)},
    "angle_weight=0.4": {"angle_weight": 0.4},
    "temperature=0.2": {"temperature": 0.2},
    "momentum encoder": {"bank.encoder_momentum": 0.999, "bank.momentum": 0.0, "bank.max_age": 64,
                         "num_negatives": 0},
    "RandAugment": {"photometric.group_probability": 0.0, "photometric.randaugment_operations": 2,
                    "pretext_photometric.group_probability": 0.66, "pretext_photometric.randaugment_operations": 0}},
    beside="tiny-6"),
  "tiny-options-24": _options("Tiny-ImageNet-40", 24, ("knn", "linear"), {
    "nearest_positive=0.5": {"nearest_positive": 0.5},
    "angle_weight=0.4": {"angle_weight": 0.4}}, beside="tiny-24"),
  "cifar10-options-10": _options("CIFAR-10", 10, ("knn",), {
    "temperature=0.07 at rate 0.07": {"temperature": 0.07, "optimizer.learning_rate": 0.07},
    "bank.momentum=0": {"bank.momentum": 0.0},
    "every row and infonce": {"num_negatives": 0, "loss": "infonce"}}, beside="cifar10-10"),
  "cifar10-60": _options("CIFAR-10", 60, ("knn", "linear"), {
    "temperature=0.2 at rate 0.2": {"temperature": 0.2, "optimizer.learning_rate": 0.2}},
    "--config.settings.checkpoint.every_steps=7810"),
  "cifar10-150": _options("CIFAR-10", 150, ("knn", "linear"), {}, "--config.settings.checkpoint.every_steps=3905"),
  "tiny-invariance": Row(
    "Tiny-ImageNet-40, ResNet-8, 24 epochs", _flags("Tiny-ImageNet-40"),
    {"PIRL": ("pirl", {"num_epochs": 24}), "NPID++": ("npid", {"num_epochs": 24}),
     "Jigsaw": ("jigsaw", {"num_epochs": 24, "optimizer.learning_rate": 0.05}),
     "Random": ("random_init", {"num_epochs": 0})},
    ("plain", "corrected"), INVARIANCE, share=False, section="invariance"),
}
"""{name: row}. A row with a `checkpoint.every_steps` of its own is saved on the way, so its runs can be cut."""

LOOKED = "tiny-invariance"
"""The row whose networks draw neighbours and map: that with the most systems."""


def run(name: str, *, series: Iterable[str], seeds: Sequence[int], workdir: str, images: str) -> list[dict[str, Any]]:
  """Trains and evaluates what is not finished, and returns a line of `KEPT` for each run, with `layers` beside it.

  `layers` is {layer: linear top-1}, empty without the evaluation "linear". What a command has measured is read as soon
  as it ends: another command with other seeds of this row, in the same folder, writes the same file.
  """
  row, series = ROWS[name], list(series)
  figures: dict[tuple[str, int], dict[str, float]] = {(one, seed): {} for one in series for seed in seeds}
  layers: dict[tuple[str, int], dict[str, float]] = {key: {} for key in figures}
  folders: dict[tuple[str, int], Path] = {}
  for evaluation in row.evaluations:
    command = row.command(name, evaluation, series=series, seeds=seeds, workdir=workdir, images=images)
    print(shlex.join(["python", "launch.py", *command]), flush=True)
    subprocess.run([sys.executable, "launch.py", *command], cwd=ROOT, check=True)
    for key, found in _measured(Path(workdir) / f"{name}-{evaluation}"):
      if key in figures:
        folders[key] = Path(found["run"])
        for figure in {found["figure"], f"{evaluation}: {found['figure']}"} & row.figures.keys():
          figures[key][figure] = float(found["value"])
        if evaluation == "linear" and found["layer"]:
          layers[key][found["layer"]] = float(found["value"])
    # A study that was stopped ends well, too; the next evaluation would train on.
    _check_complete(name, [key for key in figures if key not in folders])
  _check_complete(name, [key for key, found in figures.items() if found.keys() != row.figures.keys()])
  return [{"row": name, "series": one, "seed": seed, "figures": figures[one, seed],
           "seconds": json.loads((folder / "trained.json").read_text())["seconds"],
           "run": folder.name.rpartition("-")[0], "machine": machine(), "layers": layers[one, seed]}
          for (one, seed), folder in sorted(folders.items())]


def _check_complete(name: str, missing: Iterable[tuple[str, int]]) -> None:
  if told := [f"{one}, seed {seed}" for one, seed in sorted(missing)]:
    sys.exit(f"error: {name} has not all figures of {'; '.join(told)}: it was stopped. Nothing was kept; the same "
             "command goes on.")


def _measured(study: Path) -> Iterable[tuple[tuple[str, int], dict[str, str]]]:
  """Yields ((series, seed), line of study.csv) of a study; nothing if it was stopped before its first figure."""
  if (study / "study.csv").exists():
    with open(study / "study.csv", newline="") as file:
      for found in csv.DictReader(file):
        yield (found["series"], int(found["seed"])), found


def folder_of(line: Mapping[str, Any], workdir: str) -> Path:
  """Returns the folder of the run of a kept line."""
  return Path(workdir) / "runs" / f"{line['run']}-{line['seed']}"


def first_lines(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
  """Returns {(row, series): the line of its first seed}; these runs are exported."""
  first: dict[tuple[str, str], Mapping[str, Any]] = {}
  for line in sorted(lines, key=lambda line: line["seed"]):
    first.setdefault((line["row"], line["series"]), line)
  return first


def machine() -> str:
  """Returns processor, number of cores that this process may use, and the version of JAX."""
  name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else "")
  return (f"{name[1] if name else platform.processor()}, {num_cores()} core(s), jax {version('jax')}")


def keep(lines: Iterable[dict[str, Any]], kept: Path = KEPT) -> None:
  """Adds lines to the file; a line takes the place of an older one of the same run."""
  of_run = {(line["row"], line["series"], line["seed"]): line for line in [*read(kept), *lines]}
  kept.write_text("".join(f"{json.dumps(of_run[key])}\n" for key in sorted(of_run)))


def keep_all(lines: Sequence[dict[str, Any]], workdir: str) -> None:
  """Keeps the lines that `run` returns, the curves of their runs, and the card of each first seed of a point.

  A run that is kept already, with these seconds, was trained before and keeps the machine that trained it.
  """
  machines = {_training(line): line["machine"] for line in read(KEPT)}
  kept = [{**line, "machine": machines.get(_training(line), line["machine"])} for line in lines]
  keep([{name: value for name, value in line.items() if name != "layers"} for line in kept], KEPT)
  keep([{**{name: line[name] for name in ("row", "series", "seed")},
         **pictures.trace(folder_of(line, workdir), line["layers"])} for line in lines if line["layers"]], TRACES)
  first = first_lines(read(KEPT))
  for line in lines:
    if first[line["row"], line["series"]]["seed"] == line["seed"]:
      folder = folder_of(line, workdir)
      cards.keep(cards.export(folder, Path(workdir) / "exports" / folder.name))


def _training(line: Mapping[str, Any]) -> tuple[str, int, float]:
  return line["run"], line["seed"], line["seconds"]


def read(kept: Path = KEPT) -> list[dict[str, Any]]:
  """Returns the lines of the file, [] if there is none."""
  return [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []


def shown(name: str, lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, Mapping[str, Any]]]:
  """Returns {series: {seed: line}} of what a row shows, {} without a line of its first point and one of its own.

  Points without a line are left out, and so are seeds that not all other points have.
  """
  row, lines = ROWS[name], list(lines)
  of_series = {one: found for one in row.points if (found := {
    line["seed"]: line for line in lines if (line["row"], line["series"]) == (row.shared.get(one, name), one)})}
  if next(iter(row.points)) not in of_series or of_series.keys() <= row.shared.keys():
    return {}
  seeds = sorted(set.intersection(*map(set, of_series.values())))
  return {one: {seed: found[seed] for seed in seeds} for one, found in of_series.items()} if seeds else {}


def table(name: str, lines: Sequence[dict[str, Any]]) -> str:
  """Returns the section of a row in Markdown, "" if the row shows nothing."""
  row, of_series = ROWS[name], shown(name, lines)
  if not of_series:
    return ""
  reference, *others = of_series
  seeds = list(of_series[reference])
  text = [f"#### {row.title}", "", f"Seeds {', '.join(map(str, seeds))}.", "",
          f"| | {' | '.join(row.figures.values())} | seconds of a run |", f"|---|{'---|' * (len(row.figures) + 1)}"]
  for one, found in of_series.items():
    cells = [_spread([line["figures"][figure] for line in found.values()], row.share) for figure in row.figures]
    seconds = statistics.median(line["seconds"] for line in found.values())
    text.append(f"| {one} | {' | '.join(cells)} | {seconds:.0f} |")
  for one in others:
    pair = (one, reference) if row.gains else (reference, one)
    cells = [_difference(paired_difference(*([line["figures"][figure] for line in of_series[point].values()]
                                             for point in pair)), row.share) for figure in row.figures]
    text.append(f"| {' - '.join(pair)} | {' | '.join(cells)} | |")
  if (pictures.PICTURES / f"{name}.png").exists():
    text += ["", f"![{row.title}: loss, negatives and layers](results/{name}.png)"]
  machines = sorted({line["machine"] for found in of_series.values() for line in found.values()})
  runs = ", ".join(f"`{found[seeds[0]]['run']}`" for found in of_series.values())
  commands = [shlex.join(["python", "launch.py", *row.command(
    name, evaluation, series=of_series, seeds=seeds, workdir="runs/results", images="IMAGES")])
    for evaluation in row.evaluations]
  return "\n".join([*text, "", f"Runs: {runs} (the digests of their configs). {'; '.join(machines)}.", "",
                    *_exported(name, lines), "<details><summary>commands</summary>", "", "```bash", *commands, "```",
                    "", "</details>", ""])


def _exported(name: str, lines: Iterable[dict[str, Any]]) -> list[str]:
  """Returns lines of Markdown that name the cards of the row's exported networks; none if there are none."""
  row, found, first = ROWS[name], [], first_lines(lines)
  for series in row.points:
    line = first.get((row.shared.get(series, name), series), {"run": "", "seed": ""})
    run = f"{line['run']}-{line['seed']}"
    if card := cards.read(run):
      found.append(f"[{series}](results/cards/{run}.json), weights `{card['weights']['sha256'][:16]}`, config "
                   f"`{card['digest']}`")
  return [f"Exported, each of its first seed: {'; '.join(found)}.", ""] if found else []


def _spread(values: Sequence[float], share: bool) -> str:
  deviation = f" +- {_number(statistics.stdev(values), share)}" if len(values) > 1 else ""
  return f"{_number(statistics.fmean(values), share)}{deviation}"


def _difference(found: Difference, share: bool) -> str:
  if found.low is None or found.high is None:
    return _number(found.mean, share, "+")
  if found.low > 0 or found.high < 0:
    words = "shown"
  elif share and found.low > -POINT and found.high < POINT:
    words = "no difference of a point"
  else:
    words = "not decided"
  mean, low, high = (_number(value, share, "+") for value in (found.mean, found.low, found.high))
  return f"{mean} [{low}, {high}] {words}"


def _number(value: float, share: bool, sign: str = "") -> str:
  return f"{100 * value:{sign}.1f}" if share else f"{value:{sign}.3f}"


def write(page: Path = PAGE, kept: Path = KEPT) -> None:
  """Puts the tables of all kept rows between the marks of their sections in the page."""
  lines, text = read(kept), page.read_text()
  for section, (begin, end) in MARKS.items():
    before, after = text.index(begin) + len(begin), text.index(end)
    tables = "\n".join(filter(None, (table(name, lines) for name, row in ROWS.items() if row.section == section)))
    text = f"{text[:before]}\n\n{tables}\n{text[after:]}"
  page.write_text(text)


def draw(images: str, workdir: str) -> None:
  """Writes the picture of each row and, if the folder of images is given, neighbours and map of the row `LOOKED`."""
  for name, row in ROWS.items():
    found = shown(name, read(TRACES)).values()
    pictures.save_row(name, row.title, [line for of_seed in found for line in of_seed.values()])
  if images:
    runs = {series: folder_of(line, workdir) for (row, series), line in first_lines(read()).items() if row == LOOKED}
    pictures.save_networks({one: runs[one] for one in ROWS[LOOKED].points if one in runs}, images, ROWS[LOOKED].title)


def check() -> bool:
  """Trains `CHECKED` again and returns whether its kNN is the kept one within `TOLERANCE`."""
  name, series, seed = CHECKED
  kept = next(line for line in read() if (line["row"], line["series"], line["seed"]) == CHECKED)
  with tempfile.TemporaryDirectory() as folder:
    again, = run(name, series=[series], seeds=[seed], workdir=folder, images="")
  expected, found = (line["figures"][DECIDES] for line in (kept, again))
  print(f"{name}, {series}, seed {seed}: {DECIDES} {found:.4f}, kept {expected:.4f}, may differ by {TOLERANCE}")
  return abs(found - expected) <= TOLERANCE


def main() -> None:
  """Does what the command line asks for."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--check", action="store_true")
  commands = parser.add_subparsers(dest="command")
  running, drawing = commands.add_parser("run"), commands.add_parser("pictures")
  running.add_argument("row", choices=ROWS)
  running.add_argument("--images", default="", help="folder of the images, not for textures")
  running.add_argument("--series", help="points of the row, with commas between them; all if it is not given",
                       type=lambda text: text.split(","))
  running.add_argument("--seeds", required=True, type=lambda text: [int(seed) for seed in text.split(",")])
  drawing.add_argument("--images", default="", help="folder of the images of neighbours and map; without, neither")
  for one in (running, drawing):
    one.add_argument("--workdir", default="runs/results")
  commands.add_parser("write")
  given = parser.parse_args()
  if given.check:
    sys.exit(not check())
  if given.command is None:
    parser.error("nothing to do: run, write, pictures or --check")
  if given.command == "run":
    points = [one for one in ROWS[given.row].points if one not in ROWS[given.row].shared]
    if unknown := set(given.series or ()) - set(points):
      parser.error(f"{given.row} trains no {', '.join(sorted(unknown))}; its points are {', '.join(points)}")
    lines = run(given.row, series=given.series or points, seeds=given.seeds, workdir=given.workdir, images=given.images)
    keep_all(lines, given.workdir)
  if given.command == "pictures":
    draw(given.images, given.workdir)
  write()


if __name__ == "__main__":
  main()
