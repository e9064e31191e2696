"""What the choice of settings depends on: the devices, the machine and the images."""

import dataclasses
import io
from typing import Any

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from pirl_jax.data.crops import FORMATS, BrokenImage
from pirl_jax.data.reading import read_record
from pirl_jax.data.records import Source
from pirl_jax.errors import UserError
from pirl_jax.runtime import memory
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.runtime.chips import Chip
from pirl_jax.runtime.devices import num_cores

SAMPLED = 64
"""Images whose size is looked at."""


@dataclasses.dataclass(frozen=True)
class Facts:
  """What the choice of settings depends on.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    device: what a device is called.
    num_devices: number of devices.
    device_bytes: memory of a device that the run can use.
    bfloat16: whether a device computes in bfloat16 faster than in float32.
    num_cores: of this machine, for this process.
    host_bytes: memory of this machine.
    num_images: training images.
    num_classes: of them; 0 without labels.
    shorter_side: median of the images' shorter sides in pixels.
  """

  platform: str
  device: str
  num_devices: int
  device_bytes: float
  bfloat16: bool
  num_cores: int
  host_bytes: int
  num_images: int
  num_classes: int
  shorter_side: int


def facts_of(mesh: Mesh, source: Source) -> Facts:
  """Returns the facts about these devices, this machine and these training images.

  Args:
    mesh: the devices.
    source: the training images; `SAMPLED` of them are opened.
  """
  device: Any = mesh.devices.flat[0]
  return Facts(
    platform=device.platform, device=device.device_kind, num_devices=mesh.size,
    device_bytes=mesh_lib.device_bytes(), bfloat16=_has_bfloat16(device), num_cores=num_cores(),
    host_bytes=memory.host_bytes(), num_images=len(source),
    num_classes=source.num_labels, shorter_side=_shorter_side(source))


def facts_of_chips(chip: Chip, num_devices: int, *, num_images: int, num_classes: int) -> Facts:
  """Returns the facts about chips that are not there, and photographs of ImageNet's size.

  Args:
    chip: one of the devices.
    num_devices: number of them.
    num_images: training images.
    num_classes: of these.
  """
  platform = "gpu" if chip.platform == "cuda" else chip.platform
  return Facts(platform=platform, device=chip.name, num_devices=num_devices, device_bytes=chip.default_pool,
               bfloat16=True, num_cores=16, host_bytes=2**36, num_images=num_images, num_classes=num_classes,
               shorter_side=375)


def _has_bfloat16(device: Any) -> bool:
  if device.platform == "gpu":  # NVIDIA's have units for bfloat16 from compute capability 8.0 on
    return float(getattr(device, "compute_capability", 0)) >= 8
  return device.platform == "tpu"


def _shorter_side(source: Source) -> int:
  """Returns the median of the shorter sides of a sample of the images, 224 if none of them can be read."""
  indices = np.unique(np.linspace(0, len(source) - 1, min(SAMPLED, len(source))).astype(int))
  sides = [side for index in indices if (side := _side(source, int(index)))]
  return int(np.median(sides)) if sides else 224


def _side(source: Source, index: int) -> int:
  try:
    image = read_record(source, index).image
    if isinstance(image, bytes):  # the header is enough
      with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
        return min(opened.size)
    return min(image.shape[:2])
  except UserError:
    raise
  # The training counts it as broken, and says so.
  except (BrokenImage, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
    return 0
