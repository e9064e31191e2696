"""Time of a step and bytes sent between devices, for memory banks of different sizes. `python -m benchmarks.bank`

This runs the real train step with a trivial network instead of the ResNet. So the time is that of the bank: scores,
loss, gradient with respect to the embeddings, and the update of the rows. The negatives are drawn once for the batch,
drawn for each image (as in the PyTorch implementations), or are all rows. The devices are virtual devices of this CPU,
or those that JAX sees.

  python -m benchmarks.bank --rows 50_000 1_281_167 10_000_000 --devices 1 8
  python -m benchmarks.bank --rows 0                     # as many rows as fit into 60 % of the memory
"""

import argparse
import statistics
import time
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pirl_jax.method import losses, memory_bank
from pirl_jax.method.contrast import Contrast
from pirl_jax.method.optimizer import Optimizer
from pirl_jax.method.state import create_state
from pirl_jax.method.step import Momenta, Weights, make_contrastive_step
from pirl_jax.models.heads import ImageHead
from pirl_jax.models.network import Network
from pirl_jax.planning.program import sent_bytes
from pirl_jax.runtime import mesh as mesh_lib

DIM = 128
ROUNDS = 5
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
NEGATIVES = {"shared": "drawn once", "per_image": "drawn for each image", "all": "all rows"}


class Pixels(nn.Module):
  """A trunk that returns the pixels as its features."""

  batch_norm_axis: str | None = None
  batch_norm_group: int | None = None

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool, views: int = 1) -> dict[str, jax.Array]:
    """Returns the pixels as pooled features, f32[B, H * W * 3]."""
    self.variable("batch_stats", "unused", jnp.zeros, ())
    return {"pooled": jnp.reshape(images, (len(images), -1))}


def views_fn(keys: jax.Array, image_crop: jax.Array, pretext_crop: jax.Array) -> tuple[jax.Array, jax.Array, None]:
  """Returns the crops without a change as image view and pretext view."""
  del keys
  return image_crop / 255, pretext_crop[:, None] / 255, None


def measure(num_rows: int, *, dtype: str, num_devices: int, negatives: str, num_negatives: int,
            batch_size: int) -> str:
  """Returns a line of the table."""
  mesh = mesh_lib.create_mesh(num_devices)
  count = 0 if negatives == "all" else num_negatives
  layout = memory_bank.create_layout(num_rows, num_devices=num_devices, num_negatives=count)
  pixels: Any = Pixels()  # used instead of a ResNet
  network, optimizer = Network(pixels, ImageHead(DIM), ImageHead(DIM)), Optimizer(
    optax.sgd(0.1), optax.constant_schedule(0.1))
  loss_fn = losses.make_loss("infonce", temperature=0.1, num_images=num_rows, num_negatives=count or num_rows)
  contrast = Contrast(loss_fn, layout, num_negatives=count, temperature=0.1,
                      negative_sampling="per_image" if negatives == "per_image" else "shared")
  step = make_contrastive_step(network, optimizer, views_fn, contrast, mesh, weights=Weights(0.5), momenta=Momenta(0.5))
  state = create_state(0, network, optimizer, layout, mesh=mesh,
                       create_bank=partial(memory_bank.create, dim=DIM, dtype=DTYPES[dtype]),
                       inputs=(jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, 1, 4, 4, 3))))

  def batch(number: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(number)
    crops = rng.integers(0, 256, (2, batch_size, 4, 4, 3), np.uint8)
    first = rng.integers(num_rows - batch_size)
    return jax.device_put({"image_crop": crops[0], "pretext_crop": crops[1], "valid": np.ones(batch_size, bool),
                           "index": np.arange(first, first + batch_size, dtype=np.int32)}, mesh_lib.split(mesh))

  lowered = step.lower(state, batch(0))
  programs = [program.compile() for program in (lowered if isinstance(lowered, tuple) else (lowered,))]
  temporary = max(program.memory_analysis().temp_size_in_bytes for program in programs)
  sent = sum(sum(sent_bytes(program.as_text()).values()) for program in programs)
  times = []
  for number in range(1 + ROUNDS):
    given = batch(number)
    started = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, given))
    times.append(time.perf_counter() - started)
  bank = state.bank.addressable_shards[0].data.nbytes
  sent = sent / 2**10 if num_devices > 1 else 0
  milliseconds = 1e3 * statistics.median(times[1:])
  return (f"{num_rows:>13,} {dtype:>9} {num_devices:>8} {NEGATIVES[negatives]:>21} {milliseconds:>9,.1f} "
          f"{bank / 2**20:>10,.1f} {temporary / 2**20:>10,.1f} {sent:>10,.1f}")


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 1_281_167, 10_000_000], help="0: as many as fit")
  parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
  parser.add_argument("--devices", type=int, nargs="+", default=[1, 8])
  parser.add_argument("--negatives", nargs="+", default=list(NEGATIVES), choices=NEGATIVES)
  parser.add_argument("--num_negatives", type=int, default=4_096)
  parser.add_argument("--batch_size", type=int, default=64)
  given = parser.parse_args()
  jax.config.update("jax_num_cpu_devices", max(given.devices))
  device = jax.devices()[0]
  print(f"{device.device_kind}, {len(jax.devices())} device(s); batch {given.batch_size}, {given.num_negatives:,} "
        f"negatives where they are drawn, two terms, softmax loss; median of {ROUNDS} steps; MiB and KiB on one device")
  print(f"{'rows':>13} {'stored as':>9} {'devices':>8} {'negatives':>21} {'ms a step':>9} {'bank MiB':>10} "
        f"{'other MiB':>10} {'sent KiB':>10}")
  for rows in given.rows:
    for dtype in given.dtypes:
      for devices in given.devices:
        for negatives in given.negatives:
          fitting = int(0.6 * mesh_lib.device_bytes() * jax.local_device_count() / DIM / jnp.dtype(dtype).itemsize)
          print(measure(rows or fitting, dtype=dtype, num_devices=devices, negatives=negatives,
                        num_negatives=given.num_negatives, batch_size=given.batch_size), flush=True)


if __name__ == "__main__":
  main()
