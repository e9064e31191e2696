"""The door for Python: what `import pirl_jax` offers, the page that tells of it, and the notebook."""

import json
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import cv2
import jax.numpy as jnp
import numpy as np
import pytest

import pirl_jax
from pirl_jax.configs import evaluate, pirl
from pirl_jax.training import pretrain as training
from pirl_jax.views.normalisation import denormalise

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "python.md"
NOTEBOOK = ROOT / "notebooks" / "first_steps.ipynb"
NAMES = ["Encoder", "UserError", "__version__", "evaluate", "load", "pretrain"]


def in_a_new_process(code):
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
  return json.loads(done.stdout)


def test_the_import_loads_no_library_and_takes_less_than_a_tenth_of_a_second():
  code = """
import json, sys, time
before, started = set(sys.modules), time.process_time()
import pirl_jax
seconds = time.process_time() - started
dir(pirl_jax), pirl_jax.UserError, pirl_jax.__version__
print(json.dumps([seconds, sorted({name.split('.')[0] for name in set(sys.modules) - before})]))
"""
  found = [in_a_new_process(code) for _ in range(3)]
  assert min(seconds for seconds, _ in found) < 0.1
  foreign = {name for name in found[0][1] if name not in sys.stdlib_module_names}
  assert foreign == {"pirl_jax"}


def test_every_name_is_there_and_no_other():
  assert pirl_jax.__all__ == NAMES == dir(pirl_jax)
  found = in_a_new_process("""
import json, pirl_jax
print(json.dumps({name: repr(getattr(pirl_jax, name)) for name in pirl_jax.__all__}))
""")
  assert found.keys() == set(NAMES) and found["Encoder"] == "<class 'pirl_jax.evaluation.encoder.Encoder'>"
  assert found["load"].startswith("<function load") and found["evaluate"].startswith("<function evaluate")
  with pytest.raises(AttributeError, match="module 'pirl_jax' has no attribute 'train'"):
    pirl_jax.train  # noqa: B018
  assert pirl_jax.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def tiny():
  config = pirl.get_config()
  config.update(num_epochs=2, batch_size=32, num_negatives=32, report=False, export=False)
  config.data.update(num_images=128, image_size=16)
  config.jigsaw.update(crop_size=18, patch_size=5)
  config.checkpoint.every_steps = 2
  config.evaluate.update(num_images=48, every_epochs=0, batch_size=32, learning=False)
  return config


@pytest.fixture
def interruptible():
  """A process that a shell has started in the background ignores SIGINT; in this test it raises KeyboardInterrupt."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_a_run_interrupted_in_python_goes_on_and_is_evaluated(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
  logged, log = [], training.Logbook.log

  def interrupted(book, step, *arguments, **options):
    logged.append(step)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    if len(logged) == 5:
      signal.raise_signal(signal.SIGINT)
    log(book, step, *arguments, **options)

  monkeypatch.setattr(training.Logbook, "log", interrupted)
  config = tiny()
  config.log.every_steps = 1
  with pytest.raises(KeyboardInterrupt):
    pirl_jax.pretrain(config, "runs/a")
  run = pirl_jax.pretrain(json.loads((tmp_path / "runs" / "a" / "config.json").read_text()), Path("runs/a"))
  assert run == tmp_path / "runs" / "a" and logged[:5] == [1, 2, 3, 4, 5] and logged[-1] == 8
  assert 1 < logged[5] <= 5  # from a checkpoint, not from the beginning

  config = evaluate.get_config("knn")
  config.update_from_flattened_dict({"checkpoint": str(run), "knn.k": 20})
  found = pirl_jax.evaluate(config)
  stored = json.loads((run / "results" / "knn.json").read_text())
  assert found == {"a": stored["figures"]} and 0 <= found["a"]["top1"] <= 1
  again = pirl_jax.evaluate(config.to_dict(), tmp_path / "elsewhere")
  assert again["a"]["top1"] == found["a"]["top1"] and (tmp_path / "elsewhere" / "results" / "knn.json").exists()


@pytest.mark.parametrize(("job", "config", "said"), [
  ("pretrain", evaluate.get_config("knn"), "the config has job='evaluate', and pretrain needs one with job='pretrain'"),
  ("evaluate", pirl.get_config(), "the config has job='pretrain', and evaluate needs one with job='evaluate'"),
  ("pretrain", {}, "the config has job=None"),
  ("pretrain", "configs/pirl.py", "config is of type str; give a ConfigDict"),
])
def test_what_is_no_config_for_the_job(tmp_path, job, config, said):
  with pytest.raises(pirl_jax.UserError, match=said):
    getattr(pirl_jax, job)(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_the_page_can_be_run_from_top_to_bottom(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  rng = np.random.default_rng(0)
  for name, side in (("cat.jpg", 50), ("dog.png", 40)):
    cv2.imwrite(name, rng.integers(0, 256, (side, 60, 3), np.uint8))
  config = tiny()
  config.num_epochs = 0
  pirl_jax.pretrain(config, "runs/pirl")
  blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
  assert len(blocks) == 7
  names = {}
  for block in blocks:
    exec(compile(block, str(PAGE), "exec"), names)
  assert names["run"] == tmp_path / "runs" / "first" and 0 < names["figures"]["top1"] < 1
  assert names["features"].shape == (4, 64) and names["many"].shape == (1_000, 2048)
  np.testing.assert_array_equal(names["features"][2:], np.repeat(names["one"], 2, axis=0))
  printed = capsys.readouterr().out
  assert "images[1], nothing.jpg, is not there; give the path of an image" in printed

  np.testing.assert_allclose(names["infonce"](
    names["positive"], names["Scores"](names["score"], names["weight"]), normaliser=jnp.float32(1))[0],
    [np.log1p(np.exp(-3) + np.exp(-4) + np.exp(-7)), np.log(4)], rtol=1e-6)

  rows, before, after = (np.asarray(x) for x in (
    names["layout"].row_of(names["index"]), names["bank"], names["moved"]))
  expected = before[rows] + np.asarray(names["embeddings"])
  np.testing.assert_allclose(after[rows], expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
  np.testing.assert_array_equal(np.delete(after, rows, axis=0), np.delete(before, rows, axis=0))
  scores = np.asarray(names["embeddings"], np.float64) @ before.T / 0.1
  own = scores[np.arange(3), rows]
  np.testing.assert_allclose(names["loss_of_all"], np.log(np.sum(np.exp(scores), axis=1)) - own, rtol=1e-4)
  np.testing.assert_allclose(names["loss"], names["loss_of_all"] - np.log(4), atol=0.7)  # a quarter of the rows

  assert names["image"].shape == (2, 32, 32, 3) and names["patches"].shape == (2, 9, 10, 10, 3)
  assert len(np.unique(denormalise(names["patches"]))) > 100


def run_notebook(folder, changed):
  """Returns the values of the variable `shares` and the outputs, after the cells were run in a kernel of their own."""
  import nbformat
  from nbclient import NotebookClient

  notebook = nbformat.read(NOTEBOOK, 4)
  for old, new in changed.items():
    assert sum(old in cell.source for cell in notebook.cells) == 1
    for cell in notebook.cells:
      cell.source = cell.source.replace(old, new)
  notebook.cells.append(nbformat.v4.new_code_cell("import json; print(json.dumps(dict(shares, num=len(features))))"))
  NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
  outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
  return json.loads(outputs[-1]["text"]), outputs


@pytest.fixture
def kernel(tmp_path, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # nobody's own settings


def test_the_notebook_runs_with_an_untrained_network(tmp_path, kernel, monkeypatch):
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  # Of the untrained network: to compile the step and to train are left to the slow test.
  shares, outputs = run_notebook(tmp_path, {"config.num_epochs = 24": "config.num_epochs = 0"})
  assert shares["num"] == 512 and 0 < shares["features"] < 1
  assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
  assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.slow
def test_the_notebook_shows_features_that_know_more_than_pixels(tmp_path, kernel):
  shares, _ = run_notebook(tmp_path, {})
  assert shares["features"] > shares["pixels"] + 0.1


def test_the_notebook_is_stored_as_it_ran():
  stored = json.loads(NOTEBOOK.read_text())
  cells = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
  assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
  assert not re.search(r"/home/|/root/|/tmp/|/work/", NOTEBOOK.read_text())
