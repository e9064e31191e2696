"""Features of anyone's images by the network of a run, from Python.

Letters: N images, D numbers of a feature, H W height and width.
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
from pirl_jax.errors import UserError
from pirl_jax.evaluation.features import stream_features, unit_norm
from pirl_jax.evaluation.inputs import Images, own_sizes
from pirl_jax.evaluation.layers import EMBEDDING, check_layers, has_embedding, layer_features, layer_names
from pirl_jax.models.network import Model
from pirl_jax.runs import open_run, run_folder
from pirl_jax.runtime.mesh import create_mesh
from pirl_jax.runtime.quieting import hushed


def load(path: str | PathLike[str], step: int | None = None, *, batch_size: int | None = None) -> "Encoder":
  """Returns the encoder of a run: its network with the weights of one checkpoint, on all devices that JAX sees.

  Args:
    path: the run's folder.
    step: of the checkpoint; None: the newest.
    batch_size: images that pass through the network at a time, rounded up to a multiple of the devices; fewer are
      filled up to it. None: as the run evaluates, then features are bit for bit those of configs/evaluate.py:features.
      For a few images and a large network a small one is quicker, and features may differ in the last bits.

  Raises:
    UserError: no such run or checkpoint, or one that is damaged.
  """
  mesh = create_mesh()
  folder = run_folder(fspath(path), field="path")
  if batch_size is not None and batch_size < 1:
    raise UserError(f"batch_size={batch_size} is not possible: a whole number from 1 is needed")
  with hushed():
    run = open_run(folder, folder.name, step or 0, mesh)
  sizes = own_sizes(run.meta["config"], num_devices=mesh.size)
  if batch_size is not None:
    sizes["batch_size"] = -(-batch_size // mesh.size) * mesh.size
  return Encoder(run.folder, run.step, run.meta["config"], run.model, mesh, **sizes)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Encoder:
  """A frozen network that turns images into features; `load` makes one.

  Attributes:
    folder: of the run.
    step: of the checkpoint.
    config: of the run, all of it.
    model: the restored network.
    mesh: the devices.
    image_size: pixels, side of the square that the network sees.
    crop_fraction: share of the shorter side that the centre crop keeps.
    batch_size: images that pass through the network at a time.
    num_threads: that decode.
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
    """Returns the layers that can be asked for, from the input to the output: "conv1", "res2", ..., "pooled".

    And "embedding", f(v_I), where the run has one.
    """
    network = self.model.network
    return (*layer_names(network), EMBEDDING) if has_embedding(network) else layer_names(network)

  def __call__(self, images: Any, layer: str = "pooled") -> np.ndarray:
    """Returns the features of the images, f32[N, D], in their order.

    Each image has the run's test transform: the shorter side resized, then the centre crop. The map of a layer of the
    trunk is pooled to about 9,000 numbers, see `layers.pool`; "embedding" has unit norm, the others are as they are.

    Args:
      images: one image (N is 1) or an iterable of several, a generator too, of any and of mixed sizes. An image is a
        path, a PIL image, or an array, see `given.pixels_of`; an array of four axes holds several.
      layer: one of `layers`.

    Raises:
      UserError: an unknown layer, no image, or one that cannot be read; the message names it.
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
    """Yields one batch after the other, each a set of images of its own: a generator is read as it is needed."""
    single = is_one(images)
    if not single and not isinstance(images, Iterable):
      raise UserError(f"images is of type {type(images).__name__}; give {KINDS}, or several of them")
    waiting, first = iter([images] if single else images), 0
    while chunk := list(itertools.islice(waiting, self.batch_size)):
      names = ["images" if single else f"images[{first + number}]" for number in range(len(chunk))]
      yield from Images(GivenSource(chunk, names=names), self.image_size, self.crop_fraction, self.batch_size,
                        self.num_threads).test_batches()
      first += len(chunk)
    if not first:
      raise UserError("images is empty; give one image or more")
