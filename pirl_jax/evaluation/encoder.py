"""Computes features of any images with the network of a run, from Python.

Letters: N images, D numbers of a feature, H W height and width of an image in pixels.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pirl_jax.data.batches import Batches
from pirl_jax.data.given import KINDS, GivenSource, is_one
from pirl_jax.data.sources import DataSettings
from pirl_jax.errors import UserError
from pirl_jax.evaluation.features import stream_features, unit_norm
from pirl_jax.evaluation.inputs import Images, own_sizes
from pirl_jax.evaluation.layers import EMBEDDING, check_layers, has_embedding, layer_features, layer_names
from pirl_jax.models.network import Model
from pirl_jax.runtime.mesh import create_mesh
from pirl_jax.runtime.quieting import hushed
from pirl_jax.weights.opening import locate_weights, open_any


def load(path: str | PathLike[str], step: int | None = None, *, batch_size: int | None = None) -> "Encoder":
  """Returns the encoder of a run: its network with the weights of one checkpoint, on all devices that JAX sees.

  Args:
    path: the run's folder, an exported folder, or a file of weights that others have published (docs/weights.md).
    step: of the checkpoint; None takes the newest checkpoint.
    batch_size: number of images that pass through the network at a time, rounded up to a multiple of the number of
      devices. Fewer images are padded to a full batch. None takes the batch size of the run's own evaluation; then the
      features equal those of configs/evaluate.py:features bit for bit. For a few images and a large network a small
      batch is faster, and the features may differ in the last bits.

  Raises:
    UserError: there is no such run, checkpoint or file, it is damaged, or the weights in a file do not fit.
  """
  mesh = create_mesh()
  folder = locate_weights(fspath(path), field="path")
  if batch_size is not None and batch_size < 1:
    raise UserError(f"batch_size={batch_size} is not possible: a whole number from 1 is needed")
  with hushed():
    run = open_any(folder, folder.name, step or 0, mesh)
  sizes = own_sizes(run.meta["config"], num_devices=mesh.size)
  if batch_size is not None:
    sizes["batch_size"] = -(-batch_size // mesh.size) * mesh.size
  return Encoder(run.folder, run.step, run.meta["config"], run.model, mesh, **sizes)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Encoder:
  """A frozen network that turns images into features; `load` creates it.

  Attributes:
    folder: of the run, or the file of weights.
    step: of the checkpoint.
    config: the whole config of the run.
    model: the restored network.
    mesh: the devices.
    image_size: side in pixels of the square that the network sees.
    crop_fraction: share of the shorter side that the centre crop keeps, in (0, 1].
    batch_size: number of images that pass through the network at a time.
    num_threads: number of threads that decode.
  """

  folder: Path
  step: int
  config: dict[str, Any]
  model: Model
  mesh: jax.sharding.Mesh
  image_size: int
  crop_fraction: float
  batch_size: int
  num_threads: int

  @property
  def layers(self) -> tuple[str, ...]:
    """Returns the names of the layers that the encoder offers, from the input to the output.

    The names are "conv1", "res2", ..., "pooled" and, if the run has an image head f, "embedding", which is f(v_I).
    """
    network = self.model.network
    return (*layer_names(network), EMBEDDING) if has_embedding(network) else layer_names(network)

  def __call__(self, images: Any, layer: str = "pooled") -> np.ndarray:
    """Returns the features of the images, f32[N, D], in the order of the images.

    Each image passes the run's test transform: the shorter side is resized, then the central square is cut out. The map
    of a trunk layer is pooled to about 9,000 numbers, see `layers.pool`. "embedding" has unit norm; the features of the
    other layers are not normalised.

    Args:
      images: one image (then N is 1), or an iterable of images, for example a list or a generator. The images may have
        any sizes. An image is a path, a PIL image or an array, see `given.pixels_of`. An array of four axes holds
        several images.
      layer: one of `layers`.

    Raises:
      UserError: the layer is unknown, there is no image, or an image cannot be read; the message names the image.
    """
    check_layers(self.model.network, (layer,), field="the argument layer")
    forward_fn = layer_features(self.model.network, (layer,))
    with contextlib.closing(self._batches(images)) as batches:
      parts = [part.features[layer] for part in stream_features(forward_fn, self.model.variables, batches, self.mesh)]
    features = np.concatenate(parts)
    return unit_norm(features) if layer == EMBEDDING else features

  def __repr__(self) -> str:
    return (f"Encoder({str(self.folder)!r}, step={self.step}, arch={self.config['model']['arch']!r}, "
            f"image_size={self.image_size}, layers={self.layers})")

  def _batches(self, images: Any) -> Batches:
    """Yields the batches. Only the images of one batch are read from `images` at a time, so a generator works, too."""
    single = is_one(images)
    if not single and not isinstance(images, Iterable):
      raise UserError(f"images is of type {type(images).__name__}; give {KINDS}, or several of them")
    waiting, first = iter([images] if single else images), 0
    decoding = DataSettings.of(self.config["data"]).decoding
    shorter_side = round(self.image_size / self.crop_fraction)
    while chunk := list(itertools.islice(waiting, self.batch_size)):
      names = ["images" if single else f"images[{first + number}]" for number in range(len(chunk))]
      source = GivenSource(chunk, names=names, decoding=decoding, shorter_side=shorter_side)
      yield from Images(source, self.image_size, self.crop_fraction, self.batch_size, self.num_threads).test_batches()
      first += len(chunk)
    if not first:
      raise UserError("images is empty; give one image or more")
