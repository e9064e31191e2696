"""Figures of a run that need no labels: augmented views of a fixed sample of images, and the rank of the bank.

Letters: N sampled images, V views of each, O other images, B views of a batch on all devices, C trunk features, D
embedding, H side of a view in pixels, R rows of the bank.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from pirl_jax import system
from pirl_jax.data import batches
from pirl_jax.data.records import Source
from pirl_jax.evaluation import representation
from pirl_jax.method import memory_bank
from pirl_jax.method.randomness import view_keys
from pirl_jax.method.state import TrainState
from pirl_jax.models.network import Network
from pirl_jax.runtime import processes
from pirl_jax.runtime.mesh import SPLIT, WHOLE, split, whole
from pirl_jax.training.parts import Parts
from pirl_jax.training.stopping import Stopping
from pirl_jax.views.recipe import Recipe
from pirl_jax.views.two_views import make_views

NUM_VIEWS = 4
"""V. An even number: one half are queries for the nearest view, and the other half are in the gallery."""

NUM_GALLERY = 2_048
"""Largest number of images in the gallery. More images make the nearest view harder to find."""

MIN_HELD_OUT = 32
"""With fewer held-out images than this, the accuracy of the nearest view would be too coarse; training images serve."""

SMALLEST_SHARE = 0.6
"""A view covers at least this share of the largest area that the run's image crops cover."""

COLOUR_SHARE = 0.5
"""Strength of the colour jitter of a view, as a share of the strength in the run's own recipe."""

SEED = 0
"""Of the views. It is not the run's seed: runs on the same images are compared on the same views."""

KEPT_BYTES = 2**28
"""Views that take no more memory than this are read once in a run, not at every evaluation."""

NUM_BANK_ROWS = 2_048
"""Number of rows of the bank whose rank is measured: enough for 128 dimensions, and little time."""


@dataclasses.dataclass(frozen=True)
class Sample:
  """The images whose views are compared.

  Attributes:
    source: the images from which the N images are taken: held-out images, or else training images.
    index: i64[N], their records.
    others: i64[O], records of further training images, which fill the gallery.
  """

  source: Source
  index: np.ndarray
  others: np.ndarray


def sample_of(parts: Parts) -> Sample:
  """Returns the sample of a run; it depends on the numbers of images alone."""
  held_out = parts.test is not None and len(parts.test) >= MIN_HELD_OUT
  source = parts.test if parts.test is not None and held_out else parts.train
  index = spaced(len(source), parts.config.evaluate.views)
  others = spaced(len(parts.train), NUM_GALLERY)
  if not held_out:
    others = np.setdiff1d(others, index)
  return Sample(source, index, others[spaced(len(others), NUM_GALLERY - len(index))])


def spaced(num: int, count: int) -> np.ndarray:
  """Returns min(num, count) numbers from 0, ..., num - 1 at equal distances, i64[...], in ascending order."""
  count = max(0, min(num, count))
  return np.arange(count) * num // max(1, count)


class ViewFigures:
  """Measures a network on the sample of its run. It can be called for several states, and compiles once."""

  def __init__(self, parts: Parts, stopping: Stopping) -> None:
    """Chooses the sample; reads and compiles nothing."""
    self._parts, self._stopping, self._sample = parts, stopping, sample_of(parts)
    self._kept: list[dict[str, np.ndarray]] | None = None
    self._forward = _make_forward(parts)

  @property
  def about(self) -> dict[str, Any]:
    """Returns what was measured on, as JSON values."""
    num = len(self._sample.index)
    return {"images": "training images" if self._sample.source is self._parts.train else "held-out images",
            "num_images": num, "num_gallery": num + len(self._sample.others), "num_views": NUM_VIEWS}

  def __call__(self, state: TrainState) -> dict[str, float]:
    """Returns the figures of a network in test mode, {} if fewer than two images can be read.

    - feature_rank: RankMe of the pooled features, a view of each image.
    - nearest_view: share, in [0, 1], of the images of which another view is the nearest in the gallery, by the cosine
      of the pooled features. The gallery holds a view of each of the N + O images.
    - embedding_rank: RankMe of the embeddings, a view of each image.
    - lidar, alignment, uniformity: of the embeddings, see `representation`.

    A network without embeddings has the first two alone.

    Raises:
      Stopped: the run is asked to stop.
    """
    found = self._embed({"params": state.params, "batch_stats": state.batch_stats})
    pooled, others = found["pooled"]
    if len(pooled) < 2:
      return {}
    nearest = [representation.nearest_is_own(pooled[:, query], np.concatenate([pooled[:, query + 1], others]))
               for query in range(0, NUM_VIEWS, 2)]
    figures = {"feature_rank": representation.rank_me(pooled[:, 0]), "nearest_view": float(np.mean(nearest))}
    if "embedding" in found:
      embeddings, _ = found["embedding"]
      figures |= {"embedding_rank": representation.rank_me(embeddings[:, 0]),
                  "lidar": representation.lidar(embeddings), "alignment": representation.alignment(embeddings),
                  "uniformity": representation.uniformity(embeddings[:, 0])}
    return figures

  def batches(self) -> Iterator[dict[str, np.ndarray]]:
    """Yields all views, as `image` u8[B, H, H, 3], `number` i32[B] of the view, `valid` bool[B] and `other` bool[B].

    The V views of an image follow each other. `other` is True for the O images, which have a single view. Padding has
    valid False.

    Raises:
      Stopped: the run is asked to stop.
    """
    if self._kept is not None:
      yield from self._kept
      return
    config, sample = self._parts.config, self._sample
    num_views = len(sample.index) * NUM_VIEWS + len(sample.others)
    kept = [] if num_views * 3 * config.data.image_size**2 <= KEPT_BYTES else None
    for source, index, views, first in ((sample.source, sample.index, NUM_VIEWS, 0),
                                        (self._parts.train, sample.others, 1, len(sample.index) * NUM_VIEWS)):
      stream = batches.view_batches(
        source, index, num_views=views, batch_size=max(1, config.evaluate.batch_size // views), seed=SEED,
        crop=crop_of(config), num_threads=config.data.num_threads)
      with contextlib.closing(stream):
        for read in stream:
          if self._stopping.requested():
            self._stopping.stop()
          batch = self._flat(read, first=first, is_other=views == 1)
          first += read["valid"].size * views
          yield batch
          if kept is not None:
            kept.append(batch)
    self._kept = kept

  def _flat(self, read: Mapping[str, np.ndarray], *, first: int, is_other: bool) -> dict[str, np.ndarray]:
    """Returns a batch of `batches` from one of `data.batches.view_batches`; its first view has the number `first`."""
    num_devices, views = self._parts.mesh.size, read["crops"].shape[1]
    size = -(-max(self._parts.config.evaluate.batch_size, NUM_VIEWS) // num_devices) * num_devices
    image = read["crops"].reshape(-1, *read["crops"].shape[2:])
    padding = size - len(image)
    return {"image": np.pad(image, ((0, padding), (0, 0), (0, 0), (0, 0))),
            "number": np.arange(first, first + size, dtype=np.int32),
            "valid": np.pad(np.repeat(read["valid"], views), (0, padding)), "other": np.full(size, is_other)}

  def _embed(self, variables: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns (f32[N, V, C], f32[O, C]) of the images that can be read, for "pooled" and perhaps "embedding"."""
    variables = jax.device_put(variables, whole(self._parts.mesh))
    found, is_other = [], []
    for batch in self.batches():
      placed = jax.device_put((batch["image"], batch["number"]), split(self._parts.mesh))
      vectors = self._forward(variables, *placed)
      found.append({name: np.asarray(x)[batch["valid"]] for name, x in vectors.items()})
      is_other.append(batch["other"][batch["valid"]])
    other = np.concatenate(is_other)
    return {name: (x[~other].reshape(-1, NUM_VIEWS, x.shape[1]), x[other])
            for name, x in ((name, np.concatenate([part[name] for part in found])) for name in found[0])}


def crop_of(config: ConfigDict) -> tuple[int, tuple[float, float]]:
  """Returns the side of a view in pixels, and the range of the share of the image's area that it covers."""
  low, high = config.data.image_scale
  return config.data.image_size, (max(low, SMALLEST_SHARE * high), high)


def half_recipe(config: ConfigDict) -> Recipe:
  """Returns the photometric augmentations of a view: flip and half of the colour jitter of the run's image view.

  The views of the training itself would be too hard: a ResNet-8 at 32 pixels that has learnt finds 8 % of them again,
  and half-strength views 68 %. An untrained network finds 13 % of the latter.
  """
  own = system.recipe_of(config, "photometric")
  strengths = {name: COLOUR_SHARE * getattr(own, name) for name in ("brightness", "contrast", "saturation", "hue")}
  return dataclasses.replace(own, **strengths, group_probability=0, grayscale_probability=0, blur_probability=0,
                             randaugment_operations=0)


def _make_forward(parts: Parts) -> Callable:
  """Returns forward(variables, image u8[B, H, H, 3], number i32[B]) -> {"pooled": f32[B, C], "embedding": f32[B, D]}.

  Each view gets the augmentations of `half_recipe`, drawn for its number. Embeddings have unit norm; a network without
  embeddings has pooled features alone.
  """
  network, recipe = parts.network, half_recipe(parts.config)
  views_fn = make_views(None, recipe=recipe, pretext_recipe=recipe)

  def both(network: Network, image: jax.Array) -> dict[str, jax.Array]:
    pooled = network.trunk(image, train=False)["pooled"]
    if not network.has_embedding:
      return {"pooled": pooled}
    assert network.image_head is not None
    return {"pooled": pooled, "embedding": memory_bank.normalise(network.image_head(pooled, train=False))}

  def device_forward(variables: Any, image: jax.Array, number: jax.Array) -> dict[str, jax.Array]:
    view, _, _ = views_fn(view_keys(SEED, 0, number), image, None)
    found: Any = network.apply(variables, view, method=both)
    return jax.tree.map(lambda x: x.astype(jnp.float32), found)

  mapped = jax.shard_map(device_forward, mesh=parts.mesh, in_specs=(WHOLE, SPLIT, SPLIT), out_specs=SPLIT)
  return jax.jit(mapped, out_shardings=whole(parts.mesh))


def make_bank_rows(parts: Parts) -> Callable[[TrainState], jax.Array]:
  """Returns bank_rows(state) -> f32[R, D], a fixed choice of rows; rows that are not usable are zero.

  Rows of zeros do not change RankMe.
  """
  rows = parts.layout.row_of(spaced(parts.layout.num_images, NUM_BANK_ROWS).astype(np.int32))

  def bank_rows(bank: jax.Array, usable: jax.Array) -> jax.Array:
    return jnp.where(usable[rows][:, None], memory_bank.vectors(bank[rows]).astype(jnp.float32), 0)

  compiled = jax.jit(bank_rows, out_shardings=whole(parts.mesh))

  def of_state(state: TrainState) -> jax.Array:
    found = compiled(state.bank, state.usable)
    # The next step does not wait for these rows. Between processes gloo would then confuse the messages of the two.
    return found if processes.alone() else jax.block_until_ready(found)

  return of_state
