"""The images that a protocol reads, under the test transform.

Letters: B batch, H side of an image in pixels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from pirl_jax.data import batches
from pirl_jax.data.records import Source


@dataclasses.dataclass(frozen=True)
class Images:
  """The images of one split, and how an evaluation reads them.

  Attributes:
    source: the images.
    image_size: H.
    crop_fraction: share of the shorter side that the centre crop keeps, in (0, 1].
    batch_size: B, images of a test batch over all devices.
    num_threads: number of threads that decode.
  """

  source: Source
  image_size: int
  crop_fraction: float
  batch_size: int
  num_threads: int

  def __len__(self) -> int:
    return len(self.source)

  def labels(self) -> np.ndarray:
    """Returns i32[N], see `Source.labels`; call this only if the source has class names."""
    labels = self.source.labels()
    assert labels is not None
    return labels

  def targets(self) -> np.ndarray:
    """Returns i8[N, C], see `Source.targets`; call this only if the source has class names."""
    targets = self.source.targets()
    assert targets is not None
    return targets

  def test_batches(self, *, squash: bool = False) -> batches.Batches:
    """Yields every image once, see `batches.eval_batches`; with `squash` the whole image, stretched to a square."""
    return batches.eval_batches(
      self.source, batch_size=self.batch_size, image_size=self.image_size, crop_fraction=self.crop_fraction,
      squash=squash, num_threads=self.num_threads)


def own_sizes(config: Mapping[str, Any], *, num_devices: int) -> dict[str, Any]:
  """Returns `image_size`, `crop_fraction`, `batch_size` and `num_threads` of `Images` for a run's own test.

  Args:
    config: of the run.
    num_devices: number of devices that share a batch. The run may have used another number; therefore its batch size is
      rounded up to a multiple of `num_devices`.
  """
  data, held_out = config["data"], config["evaluate"]
  return {"image_size": data["image_size"], "crop_fraction": held_out["crop_fraction"],
          "batch_size": -(-held_out["batch_size"] // num_devices) * num_devices, "num_threads": data["num_threads"]}
