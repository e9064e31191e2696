"""The whole way once, in about a minute: python -m pytest -m smoke

A loss, a view, a tiny run; then the run goes on, and is judged and exported.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from launching import TRAINING, launch, rows

from pirl_jax.configs import evaluate as evaluate_configs
from pirl_jax.evaluation import evaluate
from pirl_jax.method import losses
from pirl_jax.method.negatives import Scores
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.views.normalisation import denormalise
from pirl_jax.views.recipe import Recipe
from pirl_jax.views.two_views import create_pretext, make_views

pytestmark = pytest.mark.smoke

EPOCH = 4  # steps: 128 images in batches of 32


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of two epochs, as launch.py leaves it."""
  folder = tmp_path_factory.mktemp("smoke") / "run"
  launch(*TRAINING, "--config.num_epochs=2", f"--workdir={folder}")
  return folder


def judged(run, variant):
  """Returns the figures of an evaluation of the run."""
  config = evaluate_configs.get_config(variant)
  config.update_from_flattened_dict({
    "checkpoint": str(run), "data.source": "embedded", "data.num_images": 64, "data.test_num_images": 32,
    "data.test_split": "test"})
  evaluate.run(config, "")
  result, = (run / "results").glob(f"{variant}-*.json")
  return json.loads(result.read_text())["figures"]


def test_a_loss():
  rng = np.random.default_rng(0)
  positive, negative, weight = rng.uniform(-9, 9, 5), rng.uniform(-9, 9, (5, 8)), np.ones((5, 8))
  loss_fn = losses.make_loss("infonce", temperature=0.1, num_images=100, num_negatives=8)
  found, _ = loss_fn(jnp.float32(positive), Scores(jnp.float32(negative), jnp.float32(weight)),
                     normaliser=jnp.float32(1))
  np.testing.assert_allclose(found, oracles.infonce(positive, negative, weight), rtol=2e-5)


def test_a_view():
  nothing = Recipe(brightness=0, contrast=0, saturation=0, hue=0, group_probability=0, grayscale_probability=0,
                   flip_probability=0)
  rotation = create_pretext("rotation", image_size=8, image_scale=(0.2, 1.0), settings={})
  crops = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
  views_fn = jax.jit(make_views(rotation, recipe=nothing, pretext_recipe=nothing))
  image, pretext, turns = views_fn(jax.random.split(jax.random.key(0), 4), crops, crops)
  np.testing.assert_array_equal(denormalise(image), crops)
  expected = [np.rot90(crop, turn) for crop, turn in zip(crops, np.asarray(turns), strict=True)]
  np.testing.assert_array_equal(denormalise(pretext)[:, 0], expected)


def test_a_run_takes_every_step_and_leaves_its_files(run):
  found = rows(run)
  assert [row["step"] for row in found] == list(range(1, 2 * EPOCH + 1))
  assert np.isfinite([row["loss"] for row in found]).all()
  left = {path.name for path in run.iterdir()}
  assert {"config.json", "metrics.jsonl", "views.png", "curves.png", "checkpoints"} <= left


def test_the_checkpoint_is_judged_by_nearest_neighbours(run):
  figures = judged(run, "knn")
  assert 0 < figures["top1"] <= figures["top5"] <= 1


def test_features_are_exported(run):
  judged(run, "features")
  file, = (run / "results").glob("features-*-train.npz")
  with np.load(file) as exported:
    assert exported["features"].shape[0] == 64 and np.isfinite(exported["features"]).all()
    np.testing.assert_array_equal(exported["index"], np.arange(64))


def test_the_same_command_goes_on(run):
  launch(*TRAINING, "--config.num_epochs=3", f"--workdir={run}")
  assert [row["step"] for row in rows(run)] == list(range(1, 3 * EPOCH + 1))
  assert Checkpoints(run / "checkpoints", keep=3).steps()[-1] == 3 * EPOCH
