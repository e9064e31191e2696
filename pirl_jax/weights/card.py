"""The card of exported weights: card.json for programs, README.md for people."""

import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import pirl_jax
from pirl_jax.runs import Run
from pirl_jax.storage.files import read_json, strict
from pirl_jax.storage.logbook import METRICS
from pirl_jax.storage.rows import read_rows
from pirl_jax.views.normalisation import MEAN, STD
from pirl_jax.weights import peers

CARD = "card.json"
CARD_FORMAT = 1

SHOWN = {
  # Figures of a result file in README.md: (name in the file, words)
  "learning": (("trained", "kNN top-1 of the trained network"), ("untrained", "kNN top-1 of the untrained network"),
               ("raw_pixels", "kNN top-1 of raw pixels")),
  "verdict": (("nearest_view", "share of views whose nearest neighbour is another view of the same image"),
              ("embedding_rank", "rank of the embeddings (RankMe)"), ("loss", "loss at the end")),
}


def card_of(run: Run) -> dict[str, Any]:
  """Returns everything that is known about the weights of a run, as JSON values.

  Of a folder on this machine only its last name is told, because cards are published.
  """
  config = run.meta["config"]
  folder = run.folder
  rows = [row for row in read_rows(folder / METRICS) if row["step"] <= run.step] if folder.is_dir() else []
  results = {path.stem: found for path in sorted((folder / "results").glob("*.json"))
             if (found := read_json(path)) is not None}
  data, test = ({**config[group], "root": Path(config[group]["root"]).name} for group in ("data", "evaluate"))
  return strict({
    "format": CARD_FORMAT,
    "name": config["name"] or run.label,
    "step": run.step,
    "config": {**config, "data": data, "evaluate": test, "init_from": Path(config["init_from"]).name},
    "num_classes": run.meta["num_classes"],
    "seeds": {"run": config["seed"]},
    "data": {"fingerprint": run.meta.get("data"), "num_images": run.meta.get("num_images")},
    "figures": {"last_row": rows[-1] if rows else None,
                "results": {name: _without_places(found) for name, found in results.items()}},
    "preprocessing": preprocessing(config),
    "program": {"pirl_jax": pirl_jax.__version__, "jax": jax.__version__, "git": git_state()}})


def preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what happens to an image before the network sees it, as JSON values; `config` is that of a run."""
  return {"image_size": config["data"]["image_size"], "crop_fraction": config["evaluate"]["crop_fraction"],
          "interpolation": "bilinear, without aliasing", "colours": "RGB, levels divided by 255",
          "mean": [round(float(value), 3) for value in MEAN], "std": [round(float(value), 3) for value in STD],
          "upright": config["data"]["upright"]}


def git_state() -> dict[str, Any] | None:
  """Returns {"commit", "changed"} of the checkout of this program; None if it is installed without git."""
  here = Path(__file__).parent
  try:
    commit, status = (subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10,
                                     check=True).stdout.strip()
                      for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no", ":/")))
  except (OSError, subprocess.SubprocessError):
    return None
  return {"commit": commit, "changed": bool(status)}


PRIVATE = ("written", "splits", "queries")
"""Figures that name files or images of this machine."""


def _without_places(found: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a result without names of this machine's files, and without the config of the run, which the card has."""
  kept = {name: value for name, value in found.items() if name not in ("checkpoint", "settings")}
  if isinstance(figures := kept.get("figures"), dict):
    kept["figures"] = {name: value for name, value in figures.items() if name not in PRIVATE}
  return kept


def readme(card: Mapping[str, Any], lines: Sequence[str], *, licence: str) -> str:
  """Returns the model card as Markdown, with the front matter of the Hugging Face Hub.

  Args:
    card: see `card_of`.
    lines: on the file and how it is loaded; they follow the description.
    licence: of the weights, an identifier of the Hub.
  """
  config, data = card["config"], card["config"]["data"]
  model = config["model"]
  plain = peers.is_plain(model)
  source = data["name"] or data["root"] or data["source"]
  front = ["---", "tags:", "- image-feature-extraction", *(["- timm"] if plain else []), "- pirl",
           f"library_name: {'timm' if plain else 'pirl_jax'}", f"license: {licence}",
           *(["datasets:", f"- {data['name']}"] if data["name"] else []), "---"]
  steps = f"step {card['step']:,}"
  about = [
    f"# {card['name']}", "",
    f"A {model['arch']} of width {model['width']}, pre-trained by pirl_jax, objective {config['objective']}, see "
    "[PIRL](https://arxiv.org/abs/1912.01991).", "",
    "| | |", "|---|---|",
    f"| data | {source}, {card['data']['num_images'] or '?'} images, fingerprint `{card['data']['fingerprint']}` |",
    f"| training | {config['num_epochs']} epochs, {steps}, batch {config['batch_size']}, seed {config['seed']} |",
    f"| method | pretext {config['pretext']}, loss {config['loss']}, temperature "
    f"{config['temperature']:g}, {config['num_negatives']:,} negatives |",
    f"| network | {model['arch']}, stem {model['stem']}, "
    f"{peers.num_features(model['arch'], model['width'])} pooled features |",
    f"| images | RGB; the shorter side is resized to {round(data['image_size'] / config['evaluate']['crop_fraction'])} "
    f"pixels (bilinear), the central {data['image_size']} x {data['image_size']} are cut out; levels / 255, minus "
    f"{card['preprocessing']['mean']}, divided by {card['preprocessing']['std']} |",
    f"| program | pirl_jax {card['program']['pirl_jax']}, jax {card['program']['jax']}"
    f"{_commit(card['program']['git'])} |",
    f"| licence | {licence}{', choose one before you publish the weights' if licence == 'unknown' else ''} |"]
  return "\n".join([*front, "", *about, "", "## Figures of this run", "", *_figures(card), "", *lines, "",
                    f"`{CARD}` has the whole config, the figures and the versions.", ""])


def _commit(git: Mapping[str, Any] | None) -> str:
  return "" if git is None else f", commit {git['commit'][:12]}{', with changes' if git['changed'] else ''}"


def _figures(card: Mapping[str, Any]) -> list[str]:
  """Returns a row for each figure, with its protocol, or a line that says that there are none."""
  rows = []
  last = card["figures"]["last_row"] or {}
  if last.get("knn_top1") is not None:
    rows.append(f"| kNN top-1 of held-out images against the memory bank | {last['knn_top1']:.4g} | k = "
                f"{card['config']['evaluate']['k']}, temperature {card['config']['evaluate']['temperature']:g} |")
  for name, found in card["figures"]["results"].items():
    figures = found.get("figures", found)
    wanted = SHOWN.get(name, tuple((key, f"{found.get('protocol', name)}, {key}") for key in figures if key in (
      "top1", "top5", "mean_average_precision", "best_layer")))
    settings = f"k = {found['k']}, temperature {found['temperature']:g}" if name == "learning" else (
      f"step {found.get('step', card['step'])}")
    rows += [f"| {words} | {_number(figures[key])} | {settings} |" for key, words in wanted
             if isinstance(figures.get(key), int | float | str)]
  if not rows:
    return ["None has been measured."]
  return ["| figure | value | protocol |", "|---|---|---|", *rows]


def _number(value: float | str) -> str:
  return value if isinstance(value, str) else f"{value:.4g}" if math.isfinite(value) else "not finite"
