"""The pictures of docs/results.md: curves and layers of each row from kept lines, neighbours and a map by networks."""

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pirl_jax.evaluation.features import unit_norm
from pirl_jax.figures.plots import Shown, save_neighbours
from pirl_jax.reporting.looking import plane, same_class
from pirl_jax.storage.logbook import METRICS
from pirl_jax.storage.rows import read_rows
from pirl_jax.studies.figures import Line, Panel, save_panels

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "results"
NEIGHBOURS, MAP = "neighbours.png", "map.png"

CURVES = {"loss_image": "loss of the image view, nats", "negatives_beaten": "share of the negatives beaten",
          "knn_top1": "kNN top-1"}
"""{figure of the log: its label}; figures that a row's runs have not measured get no panel."""

PARTS = 24
"""A curve is kept as its means over at most so many equal parts of the training."""

QUERIES, SHOWN_NEIGHBOURS = 4, 5
CLASSES = [colormaps["Dark2"](number) for number in range(8)]
"""The colours of the classes on the map; no system has them."""

PALETTE = 64
"""A picture has so many colours, which takes a third of the bytes."""

WORDS = {
  "n01443537": "goldfish", "n01774750": "tarantula", "n01784675": "centipede", "n02074367": "dugong",
  "n02123045": "tabby", "n02129165": "lion", "n02268443": "dragonfly", "n02321529": "sea cucumber",
  "n02423022": "gazelle", "n02793495": "barn", "n02815834": "beaker", "n02837789": "bikini", "n02892201": "plaque",
  "n02909870": "bucket", "n02948072": "candle", "n03026506": "stocking", "n03355925": "flagpole",
  "n03388043": "fountain", "n03444034": "go-kart", "n03617480": "kimono", "n03796401": "moving van",
  "n03854065": "organ", "n03980874": "poncho", "n03983396": "pop bottle", "n03992509": "potter's wheel",
  "n04265275": "space heater", "n04328186": "stopwatch", "n04398044": "teapot", "n04417672": "thatch",
  "n04596742": "wok", "n04597913": "wooden spoon", "n07579787": "plate", "n07711569": "mashed potato",
  "n07747607": "orange", "n07749582": "lemon", "n07875152": "potpie", "n07920052": "espresso", "n09246464": "cliff",
  "n09332890": "lakeshore", "n09428293": "seashore"}
"""The classes of Tiny-ImageNet-40 in words."""


def trace(run: Path, layers: Mapping[str, float]) -> dict[str, Any]:
  """Returns the curves of a run and its accuracy by layer, as JSON values.

  Returns:
    `epoch`, the ends of at most `PARTS` equal parts of the training; `curves`, {figure: its mean over each part, None
    where it was not logged}; `layers`.
  """
  rows = [row for row in read_rows(run / METRICS) if row.get("epoch")]
  last, parts = rows[-1]["epoch"] if rows else 0, min(PARTS, len(rows))
  values: dict[str, list[list[float]]] = {name: [[] for _ in range(parts)] for name in CURVES}
  for row in rows:
    part = math.ceil(row["epoch"] / last * parts - 1e-9) - 1
    for name in CURVES:
      if row.get(name) is not None:
        values[name][part].append(row[name])
  curves = {name: [float(f"{np.mean(part):.4g}") if part else None for part in found]
            for name, found in values.items() if any(found)}
  return {"epoch": [round(last * (part + 1) / parts, 3) for part in range(parts)], "curves": curves,
          "layers": dict(layers)}


def panels_of(traces: Sequence[Mapping[str, Any]]) -> list[Panel]:
  """Returns the panels of a row: each curve over the epochs, and the accuracy over the layers, with a line a series.

  The line is the mean over the seeds, the band the standard deviation.

  Args:
    traces: the kept lines of the row: what `trace` returns, with `series` and `seed`.
  """
  of_series: dict[str, list[Mapping[str, Any]]] = {}
  for line in traces:
    of_series.setdefault(line["series"], []).append(line)
  panels = []
  for name, label in CURVES.items():
    lines = {series: _band(found[0]["epoch"], [one["curves"][name] for one in found])
             for series, found in of_series.items() if all(name in one["curves"] for one in found)}
    if lines:
      panels.append(Panel("", f"{label}\n{_seeds(of_series)}", "bands", lines, "epoch"))
  lines = {series: _band(list(found[0]["layers"]), [[100 * value for value in one["layers"].values()] for one in found])
           for series, found in of_series.items()}
  return [*panels, Panel("", f"linear top-1, %\n{_seeds(of_series)}", "bands", lines, "layer")]


def _band(x: Sequence[Any], values: Sequence[Sequence[float | None]]) -> Line:
  found = np.array(values, float)  # None becomes NaN, which is not drawn
  return Line(x, found.mean(0).tolist(), found.std(0, ddof=1).tolist() if len(found) > 1 else None)


def _seeds(of_series: Mapping[str, Sequence[Any]]) -> str:
  counts = sorted({len(found) for found in of_series.values()})
  return f"(mean and standard deviation, seeds: {' to '.join(map(str, counts))})"


def save_row(name: str, title: str, traces: Sequence[Mapping[str, Any]], folder: Path = PICTURES) -> None:
  """Writes NAME.png with the panels of a row; nothing if no trace is kept."""
  if traces:
    save_panels(folder / f"{name}.png", title, panels_of(traces))
    _shrink(folder / f"{name}.png")


def save_networks(runs: Mapping[str, Path], images: str, title: str, folder: Path = PICTURES) -> None:
  """Writes the nearest neighbours and the map of held-out images by the networks of some runs.

  The queries are the first held-out images of `QUERIES` classes, and the map shows all held-out images of as many
  classes as it has colours. The classes are evenly spread over the sorted names, so nobody has chosen them.

  Args:
    runs: {series: folder of a run}; the same images for all.
    images: the folder of images.
    title: of the data and the training.
    folder: of the pictures.
  """
  features = {series: _features(run, images) for series, run in runs.items()}
  _save_neighbours({one: found for one, found in features.items() if one != "Random"}, Path(images), title,
                   folder / NEIGHBOURS)
  _save_map({one: test for one, (_, test) in features.items()}, title, folder / MAP)


Features = dict[str, np.ndarray]
"""What a file of the protocol `features` holds: features f32[N, D], label i32[N], name str[N], class_names."""


def _features(run: Path, images: str) -> tuple[Features, Features]:
  """Returns the features of the training and of the held-out images by the network of a run."""
  command = ["--config=configs/evaluate.py:features", f"--config.checkpoint={run}", f"--config.data.root={images}"]
  subprocess.run([sys.executable, "launch.py", *command], cwd=ROOT, check=True)
  files = [run / "results" / f"features-{split}.npz" for split in ("train", "val")]
  with np.load(files[0]) as train, np.load(files[1]) as test:
    return dict(train), dict(test)


def _word(class_name: str) -> str:
  return WORDS.get(class_name, class_name)


def _save_neighbours(features: Mapping[str, tuple[Features, Features]], images: Path, title: str, path: Path) -> None:
  _, test = next(iter(features.values()))
  count = len(test["class_names"])
  queries = [int(np.flatnonzero(test["label"] == label)[0]) for label in range(0, count, count // QUERIES)][:QUERIES]

  def shown(split: str, found: Features, place: int, note: str, similarity: float | None = None) -> Shown:
    with Image.open(images / split / str(found["name"][place])) as image:
      pixels = np.asarray(image.convert("RGB"))
    return Shown(pixels, note, _word(str(found["class_names"][found["label"][place]])), similarity)

  rows = []
  for query in queries:
    for series, (train, held_out) in features.items():
      similarity = unit_norm(train["features"]) @ unit_norm(held_out["features"][query])
      nearest = np.argsort(-similarity, kind="stable")[:SHOWN_NEIGHBOURS]
      rows.append([shown("val", held_out, query, f"by {series}"),
                   *(shown("train", train, int(place), "", float(similarity[place])) for place in nearest)])
  save_neighbours(path, rows, title=f"{title}: held-out images and their nearest training images")
  _shrink(path)


def _save_map(features: Mapping[str, Features], title: str, path: Path) -> None:
  figure = Figure(figsize=(4.2 * len(features), 4.8), layout="constrained")
  FigureCanvasAgg(figure)
  figure.suptitle(f"{title}: held-out images of {len(CLASSES)} classes", parse_math=False)
  for axes, (series, found) in zip(figure.subplots(1, len(features), squeeze=False)[0], features.items(), strict=True):
    count = len(found["class_names"])
    classes = list(range(0, count, count // len(CLASSES)))[:len(CLASSES)]
    kept = np.isin(found["label"], classes)
    points, labels = plane(found["features"][kept]), found["label"][kept]
    for colour, label in zip(CLASSES, classes, strict=True):
      axes.scatter(*points[labels == label].T, s=12, color=colour, label=_word(str(found["class_names"][label])))
    share = same_class(found["features"][kept], labels)
    axes.set(title=f"{series}: {share:.0%} beside one of their class", xticks=[], yticks=[])
  figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(CLASSES), frameon=False)
  figure.savefig(path, dpi=110)
  _shrink(path)


def _shrink(path: Path) -> None:
  with Image.open(path) as image:
    image.convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE).save(path, optimize=True)
