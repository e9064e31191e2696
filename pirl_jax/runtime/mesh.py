"""The mesh of devices, and the two ways to lay out an array on the mesh."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pirl_jax.errors import UserError
from pirl_jax.runtime import memory

AXIS = "data"
"""The only mesh axis: a batch is split over it, and so are the rows of the memory bank."""

SPLIT = PartitionSpec(AXIS)
WHOLE = PartitionSpec()


def create_mesh(num_devices: int = 0) -> Mesh:
  """Returns a mesh with the single axis "data" over the first `num_devices` devices (0: all devices that JAX sees).

  Raises:
    UserError: there are fewer devices.
  """
  # The devices are sorted by process, so that each process has one contiguous block of the batch.
  devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
  if not 0 <= num_devices <= len(devices):
    raise UserError(f"num_devices={num_devices}, but JAX sees {len(devices)} {devices[0].platform} device(s); "
                    "use 0 for all of them")
  return Mesh(np.array(devices[:num_devices or len(devices)]), (AXIS,))


def device_bytes() -> int:
  """Returns the memory of a device of this process in bytes; CPU devices share the machine's memory equally."""
  device = jax.local_devices()[0]
  if stats := device.memory_stats():
    return stats["bytes_limit"]
  return memory.host_bytes() // jax.local_device_count()


def split(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that splits the first axis of an array over the devices."""
  return NamedSharding(mesh, SPLIT)


def whole(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that replicates an array on every device."""
  return NamedSharding(mesh, WHOLE)


def varying_alike(one: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns both arrays, of any shapes; inside `shard_map` both then vary over the same axes of the mesh.

  A `custom_vjp` needs this: a gradient varies like the array that it is taken by. If that array was the same on all
  devices, JAX then sums its gradient over the devices.
  """
  axes = [jax.typeof(x).mat.varying for x in (one, other)]
  return (jax.lax.pcast(one, tuple(axes[1] - axes[0]), to="varying"),
          jax.lax.pcast(other, tuple(axes[0] - axes[1]), to="varying"))
