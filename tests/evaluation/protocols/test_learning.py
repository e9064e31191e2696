"""The table "is it learning?" on toy networks whose answers are known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from pirl_jax.errors import UserError
from pirl_jax.evaluation.features import calibrate_batch_stats
from pirl_jax.evaluation.protocols.learning import LearningSettings, format_learning, measure_learning
from pirl_jax.reporting.meanings import FIGURES
from pirl_jax.runtime.mesh import create_mesh
from pirl_jax.views.normalisation import normalise_image


def images(seed, num):
  """Noise images whose class (0, 1, 2) is written into the first pixel alone."""
  rng = np.random.default_rng(seed)
  label = (np.arange(num) % 3).astype(np.int32)
  image = rng.integers(0, 256, (num, 4, 4, 3), np.uint8)
  image[:, 0, 0] = 100 + np.eye(3)[label] * 60
  return image, label


def opener(image, label, broken=()):
  def batches():
    for start in range(0, len(image), 8):
      index = np.arange(start, start + 8, dtype=np.int32)
      yield {"image": image[index], "label": label[index], "index": index, "valid": ~np.isin(index, broken)}
  return batches


def forward(variables, image):
  """A network that has learnt looks at the first pixel; batch norm does the rest."""
  x = jnp.reshape(image, (image.shape[0], -1)) @ variables["params"]["look"]
  stats = variables["batch_stats"]
  return (x - stats["mean"][None]) / jnp.sqrt(stats["var"][None] + 1e-5)


def stats(variables, image):
  x = jnp.reshape(image, (image.shape[0], -1)) @ variables["params"]["look"]
  old = variables["batch_stats"]
  mean = jax.lax.pmean(x.mean(0), "data")  # batch norm over all devices
  var = jax.lax.pmean(((x - mean[None]) ** 2).mean(0), "data")
  return {"mean": 0.5 * old["mean"] + 0.5 * mean, "var": 0.5 * old["var"] + 0.5 * var}


UNTRAINED = {"params": {"look": np.random.default_rng(5).normal(size=(48, 6)).astype(np.float32)},
             "batch_stats": {"mean": np.zeros(6, np.float32), "var": np.ones(6, np.float32)}}
TRAINED = {"params": {"look": np.eye(48, 3, dtype=np.float32)},
           "batch_stats": {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}}


def run(train, test, *, num_devices=4, k=200):
  mesh = create_mesh(num_devices)
  untrained = calibrate_batch_stats(stats, UNTRAINED, train(), mesh, momentum=0.5)
  return measure_learning(train(), test(), forward_fn=forward, untrained=untrained, trained=TRAINED, mesh=mesh,
                          settings=LearningSettings(k, 0.07),
                          about={"seed": 3, "checkpoint_step": 50, "train_data": "noise"})


def scikit_accuracy(train, train_labels, test, test_labels, k):
  model = KNeighborsClassifier(k, metric="cosine", algorithm="brute",
                               weights=lambda distance: np.exp((1 - distance) / 0.07))
  return model.fit(train, train_labels).score(test, test_labels)


def test_the_table_holds_the_three_figures_and_how_they_came_about():
  (image, label), (test_image, test_label) = images(0, 64), images(1, 40)
  test_label[5] = -1  # not judged
  table = run(opener(image, label, broken=(3, 9)), opener(test_image, test_label, broken=(7,)))

  kept, kept_test = np.setdiff1d(np.arange(64), (3, 9)), np.setdiff1d(np.arange(40), (5, 7))
  pixels, test_pixels = (np.asarray(normalise_image(jnp.asarray(x))).reshape(len(x), -1)
                         for x in (image[kept], test_image[kept_test]))
  assert table["raw_pixels"] == pytest.approx(
    scikit_accuracy(pixels, label[kept], test_pixels, test_label[kept_test], 62))
  # Calibrated: seven full batches of eight of the images that can be read, six are left over.
  looked = pixels @ UNTRAINED["params"]["look"]
  groups = looked[:56].reshape(7, 8, 6).astype(np.float64)
  mean, std = groups.mean(1).mean(0), np.sqrt(groups.var(1).mean(0) + 1e-5)
  assert table["untrained"] == pytest.approx(scikit_accuracy(
    (looked - mean) / std, label[kept], (test_pixels @ UNTRAINED["params"]["look"] - mean) / std,
    test_label[kept_test], 62))
  assert table["trained"] == 1.0
  assert table["raw_pixels"] < 0.9 and table["untrained"] < 0.9
  settings = {"protocol": "learning", "k": 200, "k_used": 62, "temperature": 0.07, "num_train": 62,
              "num_test": 38, "num_broken_train": 2, "num_broken_test": 1, "seed": 3, "checkpoint_step": 50}
  assert settings.items() <= table.items()
  assert json.loads(json.dumps(table)) == table
  assert table.keys() - FIGURES.keys() - settings.keys() == {"train_data"}  # of `about`; the glossary has the rest


def test_the_device_count_changes_nothing():
  train, test = opener(*images(0, 64)), opener(*images(1, 24))
  one, eight = (run(train, test, num_devices=n, k=5) for n in (1, 8))
  assert one == eight


def test_without_labels_it_says_so():
  image, label = images(0, 16)
  with pytest.raises(UserError, match="needs labels"):
    run(opener(image, label * 0 - 1), opener(image, label))
  with pytest.raises(UserError, match="needs labels"):
    run(opener(image, label), opener(image, label * 0 - 1))


def test_the_printed_table():
  text = format_learning({"raw_pixels": 0.1234, "untrained": 0.2, "trained": 1.0, "k_used": 200,
                          "temperature": 0.07, "num_train": 4000, "num_test": 1000})
  assert text.splitlines() == [
    "Is it learning? kNN top-1 (k=200, temperature 0.07), 1,000 held-out among 4,000 training images",
    "  raw pixels          12.3%",
    "  untrained network   20.0%",
    "  trained network    100.0%",
  ]
