"""The pictures of docs/results.md: what is drawn is what was kept, or what the networks find."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import pictures, results
from pirl_jax.figures.colours import SYSTEMS


def test_a_curve_is_kept_as_the_means_of_equal_parts(monkeypatch, tmp_path):
  monkeypatch.setattr(pictures, "PARTS", 4)
  rows = [{"step": step, "epoch": step / 5, "loss_image": float(step), "loss": 9.0} for step in range(1, 11)]
  rows[4]["loss_image"] = None
  rows[1]["negatives_beaten"] = 0.5
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  found = pictures.trace(tmp_path, {"res2": 0.25})
  # The parts end at 0.5, 1, 1.5 and 2 epochs: the steps 1 and 2, 3 to 5, 6 and 7, 8 to 10.
  assert found == {"epoch": [0.5, 1.0, 1.5, 2.0], "layers": {"res2": 0.25}, "curves": {
    "loss_image": [1.5, 3.5, 6.5, 9.0], "negatives_beaten": [0.5, None, None, None]}}
  assert pictures.trace(tmp_path / "untrained", {}) == {"epoch": [], "curves": {}, "layers": {}}


def test_the_panels_of_a_row_have_mean_and_deviation_over_the_seeds():
  def kept(series, seed, loss, layers):
    return {"series": series, "seed": seed, "epoch": [1.0, 2.0], "curves": {"loss_image": loss},
            "layers": dict(zip(("res2", "res3"), layers, strict=True))}

  loss, layers = pictures.panels_of([kept("PIRL", 0, [4.0, 3.0], [0.2, 0.3]), kept("PIRL", 1, [6.0, None], [0.4, 0.3]),
                                     kept("NPID++", 0, [5.0, 4.0], [0.1, 0.2])])
  assert list(loss.lines) == ["PIRL", "NPID++"] and loss.lines["PIRL"].x == [1.0, 2.0]
  assert loss.lines["PIRL"].y[0] == 5.0 and np.isnan(loss.lines["PIRL"].y[1])
  assert loss.lines["PIRL"].error[0] == pytest.approx(2**0.5) and loss.lines["NPID++"].error is None
  assert layers.lines["PIRL"].x == ["res2", "res3"] and layers.lines["PIRL"].y == pytest.approx([30, 30])
  assert layers.lines["PIRL"].error == pytest.approx([200**0.5, 0])
  assert "seeds: 1 to 2" in layers.y_label and set(loss.lines) <= set(SYSTEMS)


def test_each_row_with_curves_has_its_picture():
  rows = {line["row"] for line in results.read(results.TRACES)}
  assert {path.stem for path in pictures.PICTURES.glob("*.png")} == {*rows, "neighbours", "map"}
  for row in rows:
    traces, lines = (results.shown(row, results.read(file)) for file in (results.TRACES, results.KEPT))
    assert traces.keys() == lines.keys()
    for series, of_seed in traces.items():
      assert of_seed.keys() == lines[series].keys()
      for seed, trace in of_seed.items():
        assert trace["layers"]["res3"] == lines[series][seed]["figures"]["linear top-1 of res3"]


def test_neighbours_and_map_show_what_the_networks_find(monkeypatch, tmp_path):
  rng = np.random.default_rng(0)
  names = {"train": [f"{label}/{i}.png" for label in range(8) for i in range(6)],
           "val": [f"{label}/{i}.png" for label in range(8) for i in range(3)]}
  for split, found in names.items():
    for i, name in enumerate(found):
      (tmp_path / split / name).parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / split / name)
  features = {}
  for series in ("PIRL", "Random"):
    features[series] = tuple({
      "features": rng.normal(size=(len(found), 4)).astype(np.float32), "name": np.array(found),
      "label": np.array([int(name[0]) for name in found]),
      "class_names": np.array(["n01443537", *map(str, range(1, 8))])} for found in names.values())
  monkeypatch.setattr(pictures, "_features", lambda run, images: features[run])
  drawn = []
  monkeypatch.setattr(pictures, "save_neighbours", lambda path, rows, title: drawn.extend(rows) or Image.new(
    "RGB", (9, 9)).save(path))
  pictures.save_networks({one: one for one in features}, str(tmp_path), "a title", tmp_path)
  train, test = features["PIRL"]
  for row, query in zip(drawn, (0, 6, 12, 18), strict=True):  # the first image of the classes 0, 2, 4, 6
    cosines = [float(a @ test["features"][query] / np.linalg.norm(a) / np.linalg.norm(test["features"][query]))
               for a in train["features"]]
    nearest = sorted(range(48), key=lambda place: -cosines[place])[:5]
    assert [shown.image[0, 0, 0] for shown in row] == [query, *nearest]
    assert [shown.similarity for shown in row[1:]] == pytest.approx([cosines[place] for place in nearest], abs=1e-6)
    assert row[0].name == "by PIRL"
  assert drawn[0][0].class_name == "goldfish" and drawn[1][0].class_name == "2"
  assert Image.open(tmp_path / "map.png").width > 600 and Image.open(tmp_path / "map.png").mode == "P"
