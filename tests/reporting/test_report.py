"""The report: one HTML file without a network, of one or several runs, whatever is missing or has an odd name."""

import html.parser
import json
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest

from pirl_jax.configs import pirl
from pirl_jax.configs import report as report_config
from pirl_jax.errors import UserError
from pirl_jax.reporting import charts, looking, page, report, sections
from pirl_jax.training import pretrain

EVIL = "<img src=x onerror=alert(1)>.jpg"
SECTIONS = {"verdict", "curves", "views", "neighbours", "map", "layers", "results", "settings", "broken", "machine"}
VOID = {"meta", "link", "img", "br", "circle", "path", "rect"}


class Page(html.parser.HTMLParser):
  """Checks that every element is closed, and collects the tags, the ids, and everything that is loaded."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.ids, self.loaded, self.attributes = [], [], set(), [], set()
    self.feed(text)
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags.append(tag)
    self.ids.add(attrs.get("id"))
    self.attributes |= attrs.keys()
    self.loaded += [value for name, value in attrs.items() if name in ("src", "href", "srcset", "data")]
    assert tag != "img" or attrs["alt"]
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag not in VOID:
      assert self.open.pop() == tag


def checked(path):
  """Returns the parsed page, after checks that hold for every report."""
  text = path.read_text()
  parsed = Page(text)
  assert all(value.startswith(("data:", "#")) for value in parsed.loaded)
  assert not re.search(r"https?://|@import|url\(", text)
  assert "script" not in parsed.tags and not any(name.startswith("on") for name in parsed.attributes)
  assert len(text) < 5e6
  return parsed


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of one epoch on an unlabelled folder with an odd name and a broken file, with its own report."""
  folder = tmp_path_factory.mktemp("report")
  rng = np.random.default_rng(0)
  (folder / "images").mkdir()
  for number in range(40):
    content = cv2.imencode(".jpg", rng.integers(0, 256, (24, 20, 3), np.uint8))[1].tobytes()
    (folder / "images" / (EVIL if number == 0 else f"{number}.jpg")).write_bytes(content)
  (folder / "images" / "b<b>roken.jpg").write_bytes(b"no image")
  config = pirl.get_config("folder_small")
  config.update_from_flattened_dict({
    "data.root": str(folder / "images"), "data.image_size": 16, "jigsaw.crop_size": 18, "jigsaw.patch_size": 5,
    "batch_size": 16, "num_negatives": 16, "num_epochs": 2, "log.every_steps": 1, "evaluate.batch_size": 16})
  pretrain.run(config, str(folder / "run"))
  return folder / "run"


def reported(*folders, workdir=""):
  config = report_config.get_config()
  config.checkpoint = ",".join(map(str, folders))
  report.run(config, str(workdir))


def test_a_run_ends_with_its_report(run):
  parsed, text = checked(run / "report.html"), (run / "report.html").read_text()
  assert parsed.ids >= SECTIONS and "could not be made" not in text
  assert EVIL not in text and page.escaped(EVIL) in text
  assert "b&lt;b&gt;roken.jpg</td><td>none of the formats JPEG" in text  # named, with the reason
  assert text.count("<svg class=\"chart\"") >= 6 and "map-image" in text and "There are no labels" in text


def test_the_job_makes_the_same_report(run, tmp_path, capsys):
  reported(run, workdir=tmp_path)
  assert f"written: {tmp_path / 'report.html'} (" in capsys.readouterr().out
  ours, own = ((folder / "report.html").read_text().split('<section id="settings">')[0].split("<main>")[1]
               for folder in (tmp_path, run))
  rounded = re.compile(r"\d+\.\d+|data:[^\"]*")  # the batches have another size, and the map follows the last bits
  assert rounded.sub("", ours.split('id="map"')[0]) == rounded.sub("", own.split('id="map"')[0])


def test_several_runs_are_compared(run, tmp_path):
  shutil.copytree(run, tmp_path / "run&2")
  stored = json.loads((run / "config.json").read_text())
  (tmp_path / "run&2" / "config.json").write_text(json.dumps({**stored, "temperature": 0.2}))
  reported(run, tmp_path / "run&2", workdir=tmp_path)
  text = (tmp_path / "report.html").read_text()
  assert checked(tmp_path / "report.html").ids >= {"overview", "curves", "run-0", "run-1", "machine"}
  assert "run&amp;2" in text and "<td>temperature</td><td>0.1</td><td>0.2</td>" in text


def test_parts_that_are_missing_or_damaged_leave_the_others(run, tmp_path):
  folder = tmp_path / "run"
  (folder / "checkpoints").mkdir(parents=True)
  (folder / "results").mkdir()
  (folder / "results" / "odd.json").write_text('{"figures": [1, 2]}')
  (folder / "results" / "verdict.json").write_text("not JSON")
  (folder / "chosen.json").write_text('[{"field": "<i>"}]')
  (folder / "views.png").write_bytes(b"no image")
  (folder / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.5, "loss": null, "new<": 2}\n{"step": 2}\ncut')
  (folder / "config.json").write_text('{"data": 1}')
  reported(folder)
  assert checked(folder / "report.html").ids >= SECTIONS
  text = (folder / "report.html").read_text()
  assert text.count("could not be made") >= 4 and "holds no finished checkpoint" in text
  assert "new&lt;" in text and "&lt;i&gt;" in text


def test_verdict_chosen_settings_and_results_are_shown(run, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(run, folder)
  (folder / "results").mkdir(exist_ok=True)
  (folder / "results" / "verdict.json").write_text(json.dumps({
    "verdict": "has learnt", "sentence": "It <has>.", "figures": {"nearest_view": 0.9, "new": 1},
    "untrained": {"nearest_view": 0.4}, "thresholds": {"gain": 0.2}}))
  (folder / "results" / "learning.json").write_text(json.dumps({
    "raw_pixels": 0.1, "untrained": 0.2, "trained": 0.3, "num_test": 7}))
  (folder / "results" / "linear.json").write_text(json.dumps({
    "protocol": "linear", "step": 6, "figures": {"top1": 0.25, "layers": {"conv1": {"top1": 0.25}}}}))
  (folder / "chosen.json").write_text(json.dumps([{"field": "num_epochs", "value": 200, "why": "a small set"}]))
  reported(folder)
  text = (folder / "report.html").read_text()
  checked(folder / "report.html")
  assert 'class="verdict good"><b>has learnt</b>It &lt;has&gt;.' in text
  assert '<td>nearest_view</td><td class=n>0.9</td><td class=n>0.4</td>' in text
  assert "<td>num_epochs</td><td>200</td><td>a small set</td>" in text
  assert "top-1 of linear" in text and "7 held-out images" in text and "could not be made" not in text


def test_a_folder_that_cannot_be_written_is_one_line(run, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="report.html cannot be written .File exists.; choose another --workdir"):
    reported(run, workdir=tmp_path / "file")


@pytest.mark.parametrize("checkpoint, said", [
  ("", "config.checkpoint is empty"), ("{run},{run}", "names a run twice"), ("{run}/none", "there is no such folder")])
def test_wrong_names_are_one_line(run, checkpoint, said):
  config = report_config.get_config()
  config.checkpoint = checkpoint.format(run=run)
  with pytest.raises(UserError, match=said):
    report.run(config, "")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_chromium_shows_the_page_on_a_phone(run, tmp_path):
  """The page itself, not a table, must not be wider than the window; Chromium's smallest window has 500 pixels."""
  probe = (run / "report.html").read_text().replace("</body>", """<script>document.title =
    document.documentElement.scrollWidth - document.documentElement.clientWidth + ' ' +
    [...document.images].filter(image => !image.naturalWidth).length</script></body>""")
  frame = tmp_path / "phone.html"
  (tmp_path / "page.html").write_text(probe)
  frame.write_text("""<iframe src="page.html" width="360" height="800"></iframe><script>
    onload = () => document.title = frames[0].document.title</script>""")
  found = subprocess.run(
    ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
     f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", f"file://{frame}"],
    capture_output=True, text=True, timeout=120)
  assert "<title>0 0</title>" in found.stdout


def test_the_nearest_neighbours_are_those_of_plain_loops(run):
  sight = report.look_at(run, report.mesh_lib.create_mesh())
  assert not sight.held_out and sight.total == 41 and len(sight.images.index) == 40
  features = sight.images.layers["pooled"].astype(np.float64)
  unit = features / np.linalg.norm(features, axis=1, keepdims=True)
  for row, index in enumerate(sight.queries.index):
    place = sight.images.index.tolist().index(index)
    others = sorted((-float(unit[place] @ unit[other]), other) for other in range(40) if other != place)
    np.testing.assert_allclose(sight.similarity[row], [-value for value, _ in others[:6]], atol=1e-5)
  assert list(sight.images.layers) == ["conv1", "res2", "res3", "res4", "pooled"]


def test_nearest_of_same_class():
  axes = np.repeat(np.eye(4), [4, 4, 2, 2], axis=0).astype(np.float32)
  labels = np.repeat([0, 1, 2, 2], [4, 4, 2, 2])
  assert looking.same_class(axes, labels.astype(np.int32)) == 1
  assert looking.same_class(axes, np.arange(12)) == 0
  assert looking.same_class(axes, np.full(12, -1)) is None


@pytest.mark.parametrize("features", [
  np.ones((30, 8)), np.random.default_rng(0).normal(size=(4, 8)), np.ones((1, 8)), np.zeros((12, 2))])
def test_the_map_of_collapsed_and_of_few_features_is_finite(features):
  points = looking.plane(features.astype(np.float32))
  assert points.shape == (len(features), 2) and np.isfinite(points).all()
  assert np.isfinite(charts.unit_square(points)).all()


def test_the_map_keeps_groups_together():
  rng = np.random.default_rng(0)
  group = np.arange(60) % 3
  points = looking.plane(np.eye(8, dtype=np.float32)[group] + rng.normal(size=(60, 8)).astype(np.float32) * 0.05)
  distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.diag(np.full(60, np.inf))
  assert (group[distance.argmin(axis=1)] == group).all()


def test_a_chart_marks_its_healthy_range_and_leaves_gaps():
  line = charts.Series("<a>", [0, 1, 2, 3], [0.0, None, 1.0, 0.5])
  drawn = charts.line_chart("loss & more", [line], low=0.5, high=2.0)
  path = re.search(r'class="line"[^>]* d="([^"]*)"', drawn)[1]
  assert path.count("M") == 2 and path.count("L") == 1 and "&lt;a&gt;" in drawn and "loss &amp; more" in drawn
  box = re.search(r'class="healthy" x="48" y="([\d.]+)" width="302" height="([\d.]+)"', drawn)
  assert float(box[1]) < charts.HEIGHT / 2 and float(box[2]) > 0
  assert charts.line_chart("empty", [charts.Series("a", [0], [None])]) == ""
  Page(drawn)


@pytest.mark.parametrize("ys", [[1e-9, 1e9], [5.0, 5.0], [0.0], [-3, 4], [1e300, 1e299]])
def test_a_chart_of_any_range_has_ticks_within_it(ys):
  drawn = charts.line_chart("any", [charts.Series("a", list(range(len(ys))), ys)], may_be_log=True)
  places = [float(value) for value in re.findall(r'<text x="42" y="([-\d.]+)"', drawn)]
  assert places and all(0 <= place <= charts.HEIGHT for place in places) and "nan" not in drawn


def test_a_long_line_is_thinned():
  xs = list(range(10_000))
  drawn = charts.line_chart("long", [charts.Series("a", xs, [float(x % 7) for x in xs])])
  assert len(drawn) < 20_000


def test_a_sight_without_network_is_an_error_of_its_sections(run):
  found = report.read_run("run", run, lambda: 1 / 0)
  assert found.problem == "ZeroDivisionError: division by zero"
  with pytest.raises(UserError, match="ZeroDivisionError"):
    sections.layers(found)
