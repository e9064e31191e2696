"""Is it learning? Compares the kNN accuracy on raw pixels, on the untrained network and on the trained network.

All three classify the same held-out images by their neighbours among the same training images, with the same test
transform, k, temperature and cosine similarity.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pirl_jax.evaluation import features as features_lib
from pirl_jax.evaluation.protocols import knn

NAMES = {"raw_pixels": "raw pixels", "untrained": "untrained network", "trained": "trained network"}


@dataclasses.dataclass(frozen=True)
class LearningSettings:
  """How the neighbours vote.

  Attributes:
    k: number of neighbours, >= 1.
    temperature: tau > 0.
  """

  k: int
  temperature: float


def measure_learning(train_batches: Iterable[Mapping[str, np.ndarray]],
                     test_batches: Iterable[Mapping[str, np.ndarray]], *,
                     forward_fn: Callable[[Any, jax.Array], jax.Array], untrained: Mapping[str, Any],
                     trained: Mapping[str, Any], mesh: Mesh, settings: LearningSettings,
                     about: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the table as JSON values.

  The table holds the top-1 accuracy in [0, 1] of `raw_pixels` (the network's normalised input, flattened), `untrained`
  and `trained` (pooled trunk features). The batch statistics of the untrained network are those of the training images.

  It also holds `protocol`, `similarity`, `features`, `k` as given, `k_used` (smaller than `k` if there are fewer
  training images), `temperature`, `num_train` (labelled images that voted), `num_test` (labelled images that were
  classified), `num_broken_train`, `num_broken_test`, and the entries of `about`.

  The raw pixels of all images are in memory at once (12 kB for an image of 32 x 32).

  Args:
    train_batches: the training images under the test transform, see `features.extract_features`.
    test_batches: the held-out images.
    forward_fn: forward_fn(variables, image f32[b, H, W, 3] normalised) -> pooled trunk features f32[b, C].
    untrained: {"params": ..., "batch_stats": ...} before the first step, see `features.calibrate_batch_stats`.
    trained: {"params": ..., "batch_stats": ...} of the run.
    mesh: the devices.
    settings: how the neighbours vote.
    about: entries that a reader needs to repeat the measurement: seed, checkpoint step, descriptions and fingerprints
      of both sets of images, image size and crop fraction of the test transform.

  Raises:
    UserError: there are no labels, no image can be read, or k or the temperature is out of range.
  """
  variables = {"untrained": untrained, "trained": trained}

  # One pass over the images serves all three, because decoding an image costs more than a small network does.
  def all_features(variables: Mapping[str, Any], image: jax.Array) -> dict[str, jax.Array]:
    networks = {name: forward_fn(values, image) for name, values in variables.items()}
    return {"raw_pixels": jnp.reshape(image, (image.shape[0], -1)), **networks}

  train, test = (features_lib.extract_features(all_features, variables, batches, mesh)
                 for batches in (train_batches, test_batches))
  found = {}
  for name in NAMES:
    references, queries = (features_lib.unit_norm(part.features[name]) for part in (train, test))
    found[name] = knn.accuracy(references, train.labels, queries, test.labels, mesh=mesh, k=settings.k,
                               temperature=settings.temperature)
  counts = found["trained"]
  return {
    "protocol": "learning",
    **{name: figures["top1"] for name, figures in found.items()},
    "similarity": "cosine",
    "features": "pooled trunk features; raw pixels: the normalised input",
    "k": settings.k,
    "k_used": counts["k"],
    "temperature": settings.temperature,
    "num_train": counts["num_references"],
    "num_test": counts["num_queries"],
    "num_broken_train": train.num_broken,
    "num_broken_test": test.num_broken,
    **about,
  }


def format_learning(table: Mapping[str, Any]) -> str:
  """Returns the table of `measure_learning` as lines of text."""
  width = max(map(len, NAMES.values()))
  title = (f"Is it learning? kNN top-1 (k={table['k_used']}, temperature {table['temperature']:g}), "
           f"{table['num_test']:,} held-out among {table['num_train']:,} training images")
  return "\n".join([title, *(f"  {text:<{width}}  {table[name]:6.1%}" for name, text in NAMES.items())])
