"""The sections of the report of one run. Each function returns HTML and reads the files of the run or its `Sight`."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from PIL import Image

import pirl_jax
from pirl_jax import configs
from pirl_jax.configs.base import get_base
from pirl_jax.data.reading import why_broken
from pirl_jax.errors import UserError
from pirl_jax.evaluation.representation import rank_me
from pirl_jax.reporting import charts, looking, page
from pirl_jax.reporting.looking import Sight
from pirl_jax.reporting.meanings import FIGURES, METRICS
from pirl_jax.storage.files import read_json
from pirl_jax.storage.meanings import field_meanings
from pirl_jax.storage.settings import flatten

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "opencv-python-headless", "pillow")

TOGETHER = (("loss", ("loss", "loss_image", "loss_pretext", "loss_angle")),
            ("similarity with the bank", ("similarity_own", "similarity_negatives")))
"""(Title, columns) of the charts that show several columns of metrics.jsonl; each other column has its own chart."""

NAMED_BROKEN = 50
"""Number of broken images that the page names."""

MAIN = ("top1", "top5", "mean_average_precision", "separation", "raw_pixels", "untrained", "trained")
"""The figures of a result that are shown at once, if they are there; all of them lie in [0, 1]."""

COLOURED = 30
"""Up to this many classes are named below the map."""


@dataclasses.dataclass(frozen=True)
class RunFiles:
  """What the folder of a run holds, and what its network makes of images.

  Attributes:
    label: short name of the run.
    folder: of the run.
    config: of the run; {} if it cannot be read.
    rows: of metrics.jsonl.
    sight: see `Sight`; None if the network or the images could not be opened.
    problem: the reason, if `sight` is None.
  """

  label: str
  folder: Path
  config: dict[str, Any]
  rows: Sequence[dict[str, Any]]
  sight: Sight | None
  problem: str

  def last(self, name: str) -> float | None:
    """Returns the last value of a column of metrics.jsonl, or None if there is none."""
    return next((row[name] for row in reversed(self.rows) if row.get(name) is not None), None)

  def results(self) -> dict[str, dict[str, Any]]:
    """Returns the contents of results/*.json by the file's name, except the verdict."""
    found = {path.stem: read_json(path) for path in sorted((self.folder / "results").glob("*.json"))}
    return {name: stored for name, stored in found.items() if stored and name != "verdict"}


def summary(run: RunFiles) -> str:
  """Returns how far the run is, as tiles."""
  epochs, epoch = run.config.get("num_epochs"), run.last("epoch")
  state = "" if epoch is None or epochs is None else "finished" if epoch >= epochs else "unfinished"
  figures = [("step", f"{run.last('step') or 0:,.0f}"),
             (f"of {epochs} epochs, {state}" if state else "epochs", f"{epoch or 0:.4g}")]
  for name, label in (("loss", "loss"), ("images_per_second", "images/s")):
    if (value := run.last(name)) is not None:
      figures.append((label, charts.number(value)))
  for name, label in (("knn_top1", "kNN top-1"), ("nearest_view", "nearest view")):
    if (value := run.last(name)) is not None:
      figures.append((label, f"{value:.1%}"))
  model = run.config.get("model", {})
  if model:
    figures.append((f"at {run.config['data']['image_size']} pixels", str(model.get("arch", ""))))
  if run.sight:
    figures.append(("training images", f"{run.sight.total:,}"))
  return page.tiles(figures)


def judgement(run: RunFiles) -> str:
  """Returns the verdict without labels and, if measured, the kNN of raw pixels, untrained and trained network."""
  parts = [summary(run)]
  if found := read_json(run.folder / "results" / "verdict.json"):
    word = str(found.get("verdict", ""))
    kind = "good" if word == "has learnt" else "open" if word == "has not learnt" else "bad"
    sentence = page.escaped(found.get("sentence", ""))
    parts.append(f'<div class="verdict {kind}"><b>{page.escaped(word)}</b>{sentence}</div>')
    figures, untrained = found.get("figures") or {}, found.get("untrained") or {}
    rows = [[name, value, untrained.get(name), METRICS[name].healthy if name in METRICS else ""]
            for name, value in figures.items() if not isinstance(value, dict | list)]
    parts.append(page.table(["figure", "this run", "untrained network", "healthy"], rows))
    if thresholds := found.get("thresholds"):
      parts.append(f"<details><summary>thresholds</summary>{page.tree(thresholds, {})}</details>")
  else:
    parts.append('<p class="soft">There is no verdict (results/verdict.json).</p>')
  if learning := read_json(run.folder / "results" / "learning.json"):
    bars = [(label, learning[name]) for name, label in (
      ("raw_pixels", "raw pixels"), ("untrained", "untrained network"), ("trained", "trained network"))]
    lines = "".join(f'<span>{label}</span><b class="n">{value:.1%}</b><i style="width:{100 * value:.1f}%"></i>'
                    for label, value in bars)
    parts.append(f"<h3>kNN accuracy on {learning['num_test']:,} held-out images</h3>"
                 f'<div class="bars">{lines}</div>')
  return "".join(parts)


def curves(runs: Sequence[RunFiles]) -> str:
  """Returns a chart of each column of metrics.jsonl: of one run, or of several runs in the same axes."""
  if not any(run.rows for run in runs):
    return '<p class="soft">There is no row in metrics.jsonl yet.</p>'
  present = {name for run in runs for row in run.rows for name in row} - {"step", "epoch"}
  order = [*METRICS, *sorted(present - METRICS.keys())]
  panels = [(title, [name for name in names if name in present]) for title, names in TOGETHER
            if len(runs) == 1 and present & set(names)]
  shown = {name for _, names in panels for name in names}
  panels += [(name, [name]) for name in order if name in present - shown]
  panels.sort(key=lambda panel: order.index(panel[1][0]))
  figures = []
  for title, names in panels:
    lines = [charts.Series(run.label if len(runs) > 1 else name, *zip(*found, strict=True))
             for run in runs for name in names
             if (found := [(row["epoch"], row[name]) for row in run.rows if name in row and "epoch" in row])]
    meaning = METRICS.get(names[0]) if len(names) == 1 else None
    drawn = charts.line_chart(
      f"{title} over epochs", lines, may_be_log="loss" in names[0],
      level=_chance(runs[0].config) if "loss" in names and len(runs) == 1 else None,
      **({"low": meaning.low, "high": meaning.high} if meaning else {}))
    if drawn:
      keys = f"<div>{charts.legend([line.name for line in lines])}</div>" if len(lines) > 1 else ""
      notes = "".join(_reading(runs, name) for name in names)
      figures.append(f"<figure><h3>{page.escaped(title)}</h3>{drawn}<figcaption>{keys}{notes}</figcaption></figure>")
  about = "A green band is the healthy range at the end of a run."
  if len(runs) == 1 and _chance(runs[0].config):
    about += " The dashed line is the loss of a network that guesses."
  return f'<p class="soft">{about}</p><div class="charts">{"".join(figures)}</div>'


def _reading(runs: Sequence[RunFiles], name: str) -> str:
  """Returns the meaning of a column, its last value, and whether the last value is healthy."""
  meaning = METRICS.get(name)
  lines = [f"<b>{page.escaped(name)}</b>: {page.escaped(meaning.text)}." if meaning else f"<b>{page.escaped(name)}</b>"]
  for run in runs:
    value = run.last(name)
    if value is None:
      continue
    state = ""
    if meaning and (meaning.low is not None or meaning.high is not None):
      inside = (meaning.low is None or value >= meaning.low) and (meaning.high is None or value <= meaning.high)
      state = ' <span class="in">healthy</span>' if inside else ' <span class="out">outside the healthy range</span>'
    lines.append(f"{page.escaped(run.label) if len(runs) > 1 else 'Last'}: {charts.number(value)}{state}.")
  if meaning and meaning.healthy:
    lines.append(f"Healthy: {page.escaped(meaning.healthy)}.")
  return f"<p>{' '.join(lines)}</p>"


def _chance(config: Mapping[str, Any]) -> float | None:
  """Returns the loss of a network that guesses, if the loss has such a level: ln(K + 1) for `infonce`."""
  if config.get("objective") == "invariant" and config.get("loss") == "infonce" and config.get("num_negatives"):
    return math.log(config["num_negatives"] + 1)
  return None


def views(run: RunFiles) -> str:
  """Returns views.png: the first images as the network sees them."""
  path = run.folder / "views.png"
  if not path.exists():
    return '<p class="soft">There is no views.png; the first step of a run writes it.</p>'
  with Image.open(path) as opened:
    uri = page.data_uri(opened.convert("RGB"), longest=1_600)
  return ('<p class="soft">The first training images as the network gets them: the image view, and the transformed '
          "view, whose embedding becomes similar to that of the image.</p>"
          + page.picture(uri, "Pairs of image views and transformed views of the first training images", "wide"))


def neighbours(run: RunFiles, *, num_queries: int) -> str:
  """Returns some images with their nearest training images, by the pooled features; the originals with their names."""
  sight = _seen(run)
  kind = "held-out images" if sight.held_out else "training images"
  parts = [f'<p class="soft">On the left some {kind}, beside them the training images whose pooled features are '
           f"nearest (cosine similarity), among {len(sight.images.index):,} of {sight.total:,}. "
           + ("A green frame has the class of the query, a red frame another one." if sight.queries.source.class_names
              else "There are no labels; judge by eye.") + "</p>"]
  for row in range(min(num_queries, len(sight.queries.index))):
    tiles = [_tile(sight.queries, row, "query", "query")]
    for place, similarity in zip(sight.nearest[row], sight.similarity[row], strict=True):
      own, other = sight.queries.class_name(row), sight.images.class_name(int(place))
      frame = ("same" if own == other else "other") if own and other else ""
      tiles.append(_tile(sight.images, int(place), f"{similarity:.3f}", frame))
    parts.append(f'<div class="row">{"".join(tiles)}</div>')
  return "".join(parts)


def _tile(images: looking.Seen, place: int, note: str, frame: str) -> str:
  name, class_name = images.name(place), images.class_name(place)
  original = images.original(place, 160)
  small = " small" if original is not None and max(original.size) <= 64 else ""
  shown = page.picture(page.data_uri(original, longest=320, quality=75), name, "") if original is not None else (
    '<p class="soft">cannot be read</p>')
  about = "<br>".join(page.escaped(line) for line in (note, class_name, name) if line)
  return f'<figure class="{frame}{small}" title="{page.escaped(name)}">{shown}<figcaption>{about}</figcaption></figure>'


def feature_map(run: RunFiles, *, side: int) -> str:
  """Returns the map of features: the images themselves and, if there are labels, dots in the colours of the classes."""
  sight = _seen(run)
  count = len(sight.points)
  square = charts.unit_square(sight.points)
  uri = page.data_uri(looking.thumbnail_map(square, sight.images.thumbnails[:count], side), longest=side)
  parts = [f'<p class="soft">Images with similar pooled features lie together ({count:,} training images; PCA, then '
           "t-SNE). Distances between far groups and directions have no meaning. A network that has learnt nothing "
           "sorts by colour and brightness alone.</p>",
           page.picture(uri, f"Map of {count} training images by their features", "map-image")]
  classes = sight.images.source.class_names
  if classes and (sight.images.labels[:count] >= 0).any():
    labels = sight.images.labels[:count]
    names = [f"{sight.images.class_name(place)}: {sight.images.name(place)}" for place in range(count)]
    parts += ["<h3>The same map by class</h3>",
              charts.scatter("Map of the training images, coloured by class", square, names, labels.tolist(),
                             len(classes))]
    if len(classes) <= COLOURED:
      parts.append("<p>" + "".join(
        f'<span class="swatch" style="--c:{charts.group_colour(group, len(classes))}"></span>{page.escaped(name)}'
        for group, name in enumerate(classes)) + "</p>")
  return "".join(parts)


def layers(run: RunFiles) -> str:
  """Returns a table of the layers: rank and, if there are labels, nearest neighbours and linear classifiers."""
  sight = _seen(run)
  labels = sight.images.labels
  linear = {}
  for name, stored in run.results().items():
    of_layers = stored.get("figures", {}).get("layers")
    if isinstance(of_layers, dict) and all("top1" in found for found in of_layers.values()):  # linear classifiers
      linear[f"top-1 of {name}"] = {layer: found["top1"] for layer, found in of_layers.items()}
  rows = []
  for name, features in sight.images.layers.items():
    share = looking.same_class(features, labels)
    rows.append([name, features.shape[1], round(rank_me(features), 1), None if share is None else round(share, 3),
                 *(of_layer.get(name) for of_layer in linear.values())])
  header = ["layer", "channels", "rank", "nearest of same class", *linear]
  if (labels < 0).all():
    header, rows = [name for name in header if name != "nearest of same class"], [row[:3] + row[4:] for row in rows]
  return (f'<p class="soft">Of {len(labels):,} training images, each map averaged over its points. The rank is RankMe: '
          "the number of directions that the features fill, at most the number of channels."
          + ("" if (labels < 0).all() else " Nearest of same class is the share of the images whose nearest neighbour, "
             "itself left out, has the same class.") + "</p>" + page.table(header, rows))


def results(run: RunFiles) -> str:
  """Returns the figures of every file of results/, with the plot beside it."""
  parts = []
  for name, stored in run.results().items():
    figures = stored.get("figures", stored)
    step = f' <span class="soft">step {stored["step"]:,}</span>' if isinstance(stored.get("step"), int) else ""
    main = [f"<b>{page.escaped(figure)}</b> {figures[figure]:.1%}" for figure in MAIN
            if isinstance(figures.get(figure), float)]
    plot, drawn = run.folder / "results" / f"{name}.png", ""
    if plot.exists():
      with Image.open(plot) as opened:
        drawn = page.picture(page.data_uri(opened.convert("RGB"), longest=720), f"plot of {name}", "wide plot")
    shown = {key: value for key, value in figures.items() if key not in ("queries", "settings", "written", "splits")}
    parts.append(f"<figure><h3>{page.escaped(name)}{step}</h3>{drawn}<figcaption>{', '.join(main)}</figcaption>"
                 f"<details><summary>all figures</summary>{page.tree(shown, _texts(FIGURES))}</details></figure>")
  if parts:
    return f'<div class="charts">{"".join(parts)}</div>'
  return ('<p class="soft">There are no results yet; for example <code>python launch.py '
          f"--config=configs/evaluate.py:retrieval --config.checkpoint={page.escaped(run.folder)}</code>.</p>")


def settings(run: RunFiles) -> str:
  """Returns what was chosen and why, the fields that differ from configs/base.py, and all fields."""
  chosen = []
  with contextlib.suppress(OSError, ValueError):  # a run whose settings were all given has no such file
    chosen = json.loads((run.folder / "chosen.json").read_bytes())
  parts = [page.table(["field", "chosen", "why"], [[str(entry.get(name)) for name in ("field", "value", "why")]
                                                   for entry in chosen], stack=True)] if chosen else []
  folder, = configs.__path__
  meanings, base = field_meanings(Path(folder) / "base.py"), flatten(get_base().to_dict())
  fields = flatten(run.config)
  if not fields:
    return "".join(parts) + '<p class="soft">config.json cannot be read.</p>'
  every = [[name, str(value), meanings.get(name, "")] for name, value in fields.items()]
  changed = [row for row in every if row[1] != str(_as_json(base.get(row[0])))]
  header = ["field", "value", "meaning"]
  parts += ["<h3>Fields that differ from configs/base.py</h3>", page.table(header, changed, stack=True),
            f"<details><summary>all {len(every)} fields</summary>{page.table(header, every, stack=True)}</details>"]
  return "".join(parts)


def _as_json(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value


def broken(run: RunFiles) -> str:
  """Returns the images that could not be read, with the reasons."""
  stored = read_json(run.folder / "broken_images.json")
  if not stored or not stored.get("count"):
    return "<p>All images that were read so far could be read.</p>"
  rows = []
  for entry in stored["images"][:NAMED_BROKEN]:
    reason = entry.get("reason") or (why_broken(run.sight.images.source, entry["index"]) if run.sight else "")
    rows.append([entry["name"], reason])
  more = stored["count"] - len(rows)
  return (f"<p>{stored['count']:,} images cannot be read and have no weight (until step {stored['step']:,}).</p>"
          + page.table(["image", "reason"], rows, stack=True)
          + (f"<p>{more:,} more are listed in broken_images.json.</p>" if more > 0 else ""))


def machine() -> str:
  """Returns the machine and the versions with which this report was made."""
  devices = jax.devices()
  rows = [["devices", f"{len(devices)} x {devices[0].device_kind}"], ["CPU cores", str(os.cpu_count())],
          ["system", platform.platform()], ["Python", platform.python_version()], ["pirl_jax", pirl_jax.__version__]]
  for name in LIBRARIES:
    try:
      rows.append([name, importlib.metadata.version(name)])
    except importlib.metadata.PackageNotFoundError:
      continue
  return page.table(["", "of this report"], rows)


def _seen(run: RunFiles) -> Sight:
  if run.sight is None:
    raise UserError(run.problem)
  return run.sight


def _texts(meanings: Mapping[str, Any]) -> dict[str, str]:
  return {name: meaning.text for name, meaning in meanings.items()}
