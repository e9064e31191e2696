"""What every protocol is given: a restored network, or an ensemble, and images under the test transform.

Letters: B batch, H side in pixels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from pirl_jax.data import batches
from pirl_jax.data.records import Source


@dataclasses.dataclass(frozen=True)
class Images:
  """The images of one split and how an evaluation reads them.

  Attributes:
    source: the images.
    image_size: H.
    crop_fraction: share of the shorter side that the centre crop keeps.
    batch_size: images of a test batch, over all devices.
    num_threads: that decode.
  """

  source: Source
  image_size: int
  crop_fraction: float
  batch_size: int
  num_threads: int

  def __len__(self) -> int:
    return len(self.source)

  def labels(self) -> np.ndarray:
    """Returns i32[N], see `Source.labels`; to be asked for only if there are class names."""
    labels = self.source.labels()
    assert labels is not None
    return labels

  def targets(self) -> np.ndarray:
    """Returns i8[N, C], see `Source.targets`; to be asked for only if there are class names."""
    targets = self.source.targets()
    assert targets is not None
    return targets

  def test_batches(self, *, squash: bool = False) -> batches.Batches:
    """Returns every image once, see `batches.eval_batches`; `squash` takes the whole image, its aspect changed."""
    return batches.eval_batches(
      self.source, batch_size=self.batch_size, image_size=self.image_size, crop_fraction=self.crop_fraction,
      squash=squash, num_threads=self.num_threads)


def own_sizes(config: Mapping[str, Any], *, num_devices: int) -> dict[str, Any]:
  """Returns `image_size`, `crop_fraction`, `batch_size` and `num_threads` of `Images` as a run tests by itself.

  Args:
    config: of the run.
    num_devices: that share a batch; they may be others than the run's, so its batch is rounded up to a multiple.
  """
  data, held_out = config["data"], config["evaluate"]
  return {"image_size": data["image_size"], "crop_fraction": held_out["crop_fraction"],
          "batch_size": -(-held_out["batch_size"] // num_devices) * num_devices, "num_threads": data["num_threads"]}
