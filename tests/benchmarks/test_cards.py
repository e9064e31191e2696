"""The cards of docs/results: each belongs to its row, and says what was exported."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from test_results import study_of

from benchmarks import cards, results
from pirl_jax.storage.formats import upgrade_config
from pirl_jax.storage.settings import difference
from pirl_jax.studies.points import create_trial, read_points

KEPT = [(row, series, line) for (row, series), line in results.first_lines(results.read()).items()
        if cards.read(f"{line['run']}-{line['seed']}")]


def config_of(name, series, seed, folder):
  row = results.ROWS[name]
  images = "cifar10" if row.title.startswith("CIFAR-10") else "tiny-imagenet-40"  # the last name of the folder
  config = study_of(flag.replace("{images}", images) for flag in row.flags)
  config.points = [(series, "", *row.points[series])]
  point, = read_points(config)
  return create_trial(config, point, seed, folder).config.to_dict()


@pytest.mark.parametrize("name, series, line", KEPT)
def test_a_card_has_the_config_of_its_row(tmp_path, name, series, line):
  card = cards.read(f"{line['run']}-{line['seed']}")
  now = json.loads(json.dumps(config_of(name, series, line["seed"], tmp_path)))
  assert difference(upgrade_config(card["config"]), now, free=("name",)) is None
  assert card["digest"] == cards.digest_of(card["config"])
  assert card["seeds"] == {"run": line["seed"]} and len(card["weights"]["sha256"]) == 64
  assert re.fullmatch(r"folder:\d+:[0-9a-f]{32}", card["data"]["fingerprint"])


@pytest.mark.parametrize("name, series, line", [found for found in KEPT if results.ROWS[found[0]].share])
def test_a_card_and_the_kept_line_have_the_same_figures(name, series, line):
  found = cards.read(f"{line['run']}-{line['seed']}")["figures"]["results"]
  of_protocol = {file.rpartition("-")[0]: one["figures"] for file, one in found.items()}
  layers = of_protocol.get("linear_small", {"layers": {}})["layers"]  # of some rows kNN alone is evaluated
  figures = {"kNN top-1": of_protocol["knn"]["top1"],
             **{f"linear top-1 of {layer}": figure["top1"] for layer, figure in layers.items()}}
  assert line["figures"] == {figure: figures[figure] for figure in results.ROWS[name].figures}


def test_no_kept_file_names_a_place_of_a_machine():
  for path in [results.KEPT, results.TRACES, *cards.CARDS.glob("*")]:
    assert not re.search(r'"[^"]*(/home|/work|/tmp|/root|/Users)', path.read_text()), path


def test_what_is_exported_and_kept(monkeypatch, tmp_path):
  card = {"name": "pirl-1-0", "config": {"name": "pirl-1-0", "seed": 0, "num_epochs": 2},
          "figures": {"results": {"invariance": {"matched": {"mean": 1.0, "counts": [1, 2], "edges": [0, 1, 2]}}}}}

  def run(command, **_):
    folder = Path(next(flag for flag in command if flag.startswith("--workdir=")).removeprefix("--workdir="))
    folder.mkdir()
    (folder / "card.json").write_text(json.dumps(card))
    (folder / "model.safetensors").write_bytes(b"weights")

  monkeypatch.setattr(cards.subprocess, "run", run)
  found = cards.export(tmp_path / "run", tmp_path / "export")
  assert found["weights"] == {"file": "model.safetensors", "bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
  assert found["figures"]["results"]["invariance"] == {"matched": {"mean": 1.0}}
  assert found["digest"] == cards.digest_of({**card["config"], "name": "other", "seed": 1})
  assert found["digest"] != cards.digest_of({**card["config"], "num_epochs": 3})
  assert found["digest"] == cards.digest_of({**card["config"], "angle_weight": 0.0, "negative_ranks": [0.0, 1.0]})
  assert found["digest"] != cards.digest_of({**card["config"], "angle_weight": 0.4})
  cards.keep(found, tmp_path / "cards")
  assert cards.read("pirl-1-0", tmp_path / "cards") == found and cards.read("pirl-1-1", tmp_path / "cards") is None
