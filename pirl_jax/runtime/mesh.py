"""The mesh of devices, and the ways an array can lie on it."""

import os

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pirl_jax.errors import UserError

AXIS = "data"
"""The only mesh axis: a batch is split over it, and so are the rows of the memory bank."""

SPLIT = PartitionSpec(AXIS)
WHOLE = PartitionSpec()


def create_mesh(num_devices: int = 0) -> Mesh:
  """Returns a mesh with the one axis "data" over the first `num_devices` devices (0: all that JAX sees).

  Raises:
    UserError: more devices are asked for than there are.
  """
  # By processes, so that each has a block of the batch, whatever order the devices come in.
  devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
  if not 0 <= num_devices <= len(devices):
    raise UserError(f"num_devices={num_devices}, but JAX sees {len(devices)} {devices[0].platform} device(s); "
                    "use 0 for all of them")
  return Mesh(np.array(devices[:num_devices or len(devices)]), (AXIS,))


def device_bytes() -> int:
  """Returns the memory of a device of this process, in bytes; virtual devices of a CPU share that of the machine."""
  device = jax.local_devices()[0]
  if stats := device.memory_stats():
    return stats["bytes_limit"]
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()


def split(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that splits the first axis over the devices."""
  return NamedSharding(mesh, SPLIT)


def whole(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that gives every device the whole array."""
  return NamedSharding(mesh, WHOLE)
