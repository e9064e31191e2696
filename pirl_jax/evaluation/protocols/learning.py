"""Is it learning? kNN accuracy on raw pixels, on the untrained network and on the trained one, side by side.

All three judge the same held-out images after the same test transform, with the same k, temperature and
cosine similarity, against the training images.
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
  """How a neighbour votes.

  Attributes:
    k: neighbours, >= 1.
    temperature: tau > 0.
  """

  k: int
  temperature: float


def measure_learning(train_batches: Iterable[Mapping[str, np.ndarray]],
                     test_batches: Iterable[Mapping[str, np.ndarray]], *,
                     forward_fn: Callable[[Any, jax.Array], jax.Array], untrained: Mapping[str, Any],
                     trained: Mapping[str, Any], mesh: Mesh, settings: LearningSettings,
                     about: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the table, JSON values.

  It holds `raw_pixels` (the network's normalised input, flattened), `untrained` and `trained` (pooled
  trunk features; the untrained network's batch statistics are those of the training images):
  top-1 in [0, 1]. Besides: `protocol`, `similarity`, `features`, `k` as asked, `k_used` (fewer training
  images allow no more), `temperature`, `num_train` and `num_test` (labelled images that voted and were
  judged), `num_broken_train`, `num_broken_test`, and `about`.

  Raw pixels of all images stand in memory at once (12 kB for an image of 32 x 32).

  Args:
    train_batches: the training images under the test transform, see `features.extract_features`.
    test_batches: the held-out images.
    forward_fn: forward_fn(variables, image f32[b, H, W, 3] normalised) -> pooled trunk features f32[b, C].
    untrained: {"params": ..., "batch_stats": ...} before the first step, see `features.calibrate_batch_stats`.
    trained: the same of the run.
    mesh: the devices.
    settings: how a neighbour votes.
    about: what the reader needs to repeat it: seed, checkpoint step, descriptions and fingerprints of both
      sets of images, image size and crop fraction of the test transform.

  Raises:
    UserError: no labels, no readable images, or an impossible k or temperature.
  """
  variables = {"untrained": untrained, "trained": trained}

  # One pass over the images serves all three: decoding them costs more than a small network does.
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
  """Returns the table of `measure_learning` as lines of text for people."""
  width = max(map(len, NAMES.values()))
  title = (f"Is it learning? kNN top-1 (k={table['k_used']}, temperature {table['temperature']:g}), "
           f"{table['num_test']:,} held-out among {table['num_train']:,} training images")
  return "\n".join([title, *(f"  {text:<{width}}  {table[name]:6.1%}" for name, text in NAMES.items())])
