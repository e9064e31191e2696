"""What a network makes of some images: features of every layer, nearest neighbours, and a map.

Letters: N images of the sample, Q queries, n neighbours, D numbers of a feature, C channels of a layer.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from pirl_jax.data.batches import Batches
from pirl_jax.data.crops import BrokenImage, open_image, shrink
from pirl_jax.data.records import Source
from pirl_jax.data.subsets import Subset
from pirl_jax.errors import UserError
from pirl_jax.evaluation.features import stream_features, unit_norm
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.layers import layer_names
from pirl_jax.models.network import Model

MOST_IMAGES = 2_000
MOST_SECONDS = 20.0
"""Features are computed of at most so many images, and no longer than about this time: a large network on a CPU gets
through fewer images."""

MAPPED = 1_000
"""Largest number of images on the map; t-SNE takes one to two seconds for them."""

BATCH = 64
QUERIES = 8
NEIGHBOURS = 6
THUMBNAIL = 48
"""Side in pixels of an image on the map."""


class Seen(NamedTuple):
  """Images of one source with their features.

  Attributes:
    source: the images.
    index: i32[N], the indices of the records.
    labels: i32[N]; -1 for an image without a label.
    layers: by name f32[N, C]: each layer's map, averaged over its points; from the input to the output.
    thumbnails: u8[H', W', 3] of each image, as the network sees it.
  """

  source: Source
  index: np.ndarray
  labels: np.ndarray
  layers: dict[str, np.ndarray]
  thumbnails: list[np.ndarray]

  def name(self, place: int) -> str:
    """Returns the name of an image of the sample."""
    return self.source.image_name(int(self.index[place]))

  def class_name(self, place: int) -> str:
    """Returns the name of the class of an image of the sample, or ""."""
    return self.source.class_names[self.labels[place]] if self.labels[place] >= 0 else ""

  def original(self, place: int, side: int) -> Image.Image | None:
    """Returns the original image with a shorter side of at most `side` pixels; None if it cannot be read any more."""
    try:
      record = self.source[int(self.index[place])]
      return Image.fromarray(shrink(open_image(record.image, self.source.decoding), side))
    except (BrokenImage, MemoryError, OSError, UserError):
      return None


class Sight(NamedTuple):
  """What a network makes of some images.

  Attributes:
    images: a sample of the training images, spread over all of them.
    queries: some held-out images or, if there are none, some of `images`.
    held_out: whether the queries are held out.
    total: number of training images.
    nearest: i64[Q, n], the places in `images` of the nearest neighbours of each query, the nearest first; an image is
      not its own neighbour.
    similarity: f32[Q, n], their cosine similarities of pooled features.
    points: f32[M, 2], the map: the first M images of the sample.
  """

  images: Seen
  queries: Seen
  held_out: bool
  total: int
  nearest: np.ndarray
  similarity: np.ndarray
  points: np.ndarray


def look(model: Model, train: Images, test: Images | None, *, mesh: Mesh) -> Sight:
  """Returns what the network makes of at most `MOST_IMAGES` training images and of some held-out images.

  Args:
    model: the network.
    train: the training images under the test transform.
    test: the held-out images, or None.
    mesh: the devices, all of this process.

  Raises:
    UserError: no image can be read.
  """
  averages = _averages(model)
  images = _sample(model, averages, train, MOST_IMAGES, mesh)
  if test is not None:
    queries, places = _sample(model, averages, test, QUERIES, mesh), None
  else:
    places = _spread(len(images.index), QUERIES)
    queries = Seen(images.source, images.index[places], images.labels[places],
                     {name: layer[places] for name, layer in images.layers.items()},
                     [images.thumbnails[place] for place in places])
  similarity = unit_norm(queries.layers["pooled"]) @ unit_norm(images.layers["pooled"]).T
  if places is not None:
    similarity[np.arange(len(places)), places] = -np.inf
  count = min(NEIGHBOURS, len(images.index) - (places is not None))
  nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
  return Sight(images, queries, test is not None, len(train), nearest,
               np.take_along_axis(similarity, nearest, axis=1), plane(images.layers["pooled"][:MAPPED]))


def plane(features: np.ndarray) -> np.ndarray:
  """Returns f32[N, 2]: a map on which images with similar features lie together (PCA to 50 numbers, then t-SNE).

  With fewer than 10 images the map has the first two principal components.

  Args:
    features: f32[N, D]; only their directions count.
  """
  centred = unit_norm(features).astype(np.float64)
  centred -= centred.mean(axis=0)
  axes, strengths, _ = np.linalg.svd(centred, full_matrices=False)
  components = axes[:, :50] * strengths[:50]
  if len(features) < 10:
    return np.pad(components[:, :2], ((0, 0), (0, max(0, 2 - components.shape[1])))).astype(np.float32)
  from sklearn.manifold import TSNE  # takes a second to import
  from threadpoolctl import threadpool_limits
  # As scikit-learn's init="pca", which divides by zero if all features are equal.
  start = components[:, :2] / max(components[:, 0].std(), 1e-12) * 1e-4
  with threadpool_limits(1):  # several threads wait for each other, and beside JAX's own take three times as long
    return TSNE(init=start.astype(np.float32), perplexity=min(30.0, (len(features) - 1) / 3), max_iter=500,
                random_state=0).fit_transform(components)


def same_class(features: np.ndarray, labels: np.ndarray) -> float | None:
  """Returns the share, in [0, 1], of labelled images whose nearest labelled other image has the same class.

  Returns None if fewer than two images have labels.

  Args:
    features: f32[N, C], compared by their cosine.
    labels: i32[N]; -1 for an image without a label.
  """
  known = labels >= 0
  if known.sum() < 2:
    return None
  similarity = unit_norm(features[known]) @ unit_norm(features[known]).T
  np.fill_diagonal(similarity, -np.inf)
  return float(np.mean(labels[known][similarity.argmax(axis=1)] == labels[known]))


def _averages(model: Model) -> Any:
  """Returns forward_fn(variables, image f32[b, H, W, 3]) -> {layer: f32[b, C]}, the maps averaged over their points."""
  names, network = layer_names(model.network), model.single

  def forward(variables: Any, image: jax.Array) -> dict[str, jax.Array]:
    found: Any = network.apply(variables, image, method="features")
    return {name: jnp.mean(found[name], axis=tuple(range(1, found[name].ndim - 1))) for name in names}

  return forward


def _sample(model: Model, forward_fn: Any, images: Images, most: int, mesh: Mesh) -> Seen:
  """Returns at most `most` images with their features, as many as `MOST_SECONDS` allow."""
  order = _spread(len(images), most)
  # Mixed, so that the images are spread over the whole set if there is no time for all of them.
  order = order[np.random.default_rng(0).permutation(len(order))]
  chosen = dataclasses.replace(images, source=Subset(images.source, order.tolist()),
                               batch_size=-(-BATCH // mesh.size) * mesh.size)
  thumbnails: dict[int, np.ndarray] = {}
  started, parts = time.perf_counter(), []
  with contextlib.closing(chosen.test_batches()) as batches:
    for part in stream_features(forward_fn, model.variables, _noted(batches, thumbnails), mesh):
      parts.append(part)
      if time.perf_counter() - started > MOST_SECONDS:
        break
  if not sum(len(part.index) for part in parts):
    raise UserError("none of the images can be read")
  layers, labels, places = jax.tree.map(lambda *arrays: np.concatenate(arrays), *(part[:3] for part in parts))
  layers = {name: layers[name] for name in layer_names(model.network)}  # JAX has sorted the names
  return Seen(images.source, order[places], labels, layers, [thumbnails[int(place)] for place in places])


def _noted(batches: Batches, thumbnails: dict[int, np.ndarray]) -> Iterator[Mapping[str, np.ndarray]]:
  """Yields the batches, and keeps a small version of each image in `thumbnails`, by the image's index."""
  for batch in batches:
    for image, index in zip(batch["image"], batch["index"], strict=True):
      small = Image.fromarray(image)
      small.thumbnail((THUMBNAIL, THUMBNAIL))
      thumbnails[int(index)] = np.asarray(small)
    yield batch


def _spread(count: int, most: int) -> np.ndarray:
  """Returns at most `most` of the numbers below `count`, evenly spread, i64[...]."""
  return np.arange(count) if count <= most else np.linspace(0, count - 1, most).astype(np.int64)


def thumbnail_map(points: np.ndarray, thumbnails: Sequence[np.ndarray], side: int) -> Image.Image:
  """Returns an image of `side` x `side` pixels, else transparent, with a small image at each point of the map.

  Args:
    points: f[N, 2] in [0, 1].
    thumbnails: N images u8[h, w, 3].
    side: in pixels.
  """
  canvas = Image.new("RGBA", (side, side), (0, 0, 0, 0))
  size = max(16, min(THUMBNAIL, round(side / max(4, len(points)) ** 0.5)))
  for (x, y), pixels in zip(points * (side - size), thumbnails, strict=True):
    canvas.paste(Image.fromarray(pixels).resize((size, size)), (round(float(x)), round(float(y))))
  return canvas
