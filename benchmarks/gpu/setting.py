"""What the scripts of this folder share: the main run's step without its config files, clocks, and the last line.

Nothing here needs more than JAX, Flax, Optax and NumPy: no data library, no config library. Letters: B batch.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pirl_jax.method import losses, memory_bank, products
from pirl_jax.method.contrast import Contrast
from pirl_jax.method.optimizer import create_optimizer
from pirl_jax.method.state import TrainState, create_state
from pirl_jax.method.step import Momenta, Weights, make_contrastive_step
from pirl_jax.models.heads import ImageHead, PatchesHead
from pirl_jax.models.network import Network
from pirl_jax.models.resnet import ResNet
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.views.jigsaw import Jigsaw
from pirl_jax.views.normalisation import normalise_image
from pirl_jax.views.recipe import BASE
from pirl_jax.views.two_views import make_views

DIM, TEMPERATURE = 128, 0.07


@dataclasses.dataclass(frozen=True)
class Setting:
  """The settings of the paper's main run, in bfloat16; sizes in pixels."""

  batch: int = 1024
  blocks: tuple[int, ...] = (3, 4, 6, 3)
  bottleneck: bool = True
  channels: int = 64
  image_size: int = 224
  crop_size: int = 255
  patch_size: int = 64
  images: int = 1_281_167
  negatives: int = 32_000
  dtype: str = "bfloat16"
  remat: bool = False
  micro_batches: int = 1

  @property
  def jigsaw(self) -> Jigsaw:
    """Returns the transform."""
    return Jigsaw(crop_size=self.crop_size, crop_scale=(0.6, 1.0), grid=3, patch_size=self.patch_size)

  @property
  def network(self) -> Network:
    """Returns trunk and heads."""
    trunk = ResNet(self.blocks, self.bottleneck, self.channels, dtype=jnp.dtype(self.dtype), remat=self.remat)
    return Network(trunk, ImageHead(DIM), PatchesHead(DIM))


TINY = Setting(batch=8, blocks=(1, 1), channels=8, image_size=32, crop_size=36, patch_size=10, images=512,
               negatives=256)
"""For a CPU, to see that a script runs."""


def arguments(doc: str, **defaults: Any) -> argparse.Namespace:
  """Returns the arguments of a script: --tiny, and those of `defaults`, by name with their default values.

  With --tiny `setting` is `TINY`, otherwise the main run's.
  """
  parser = argparse.ArgumentParser(description=doc.splitlines()[0])
  parser.add_argument("--tiny", action="store_true", help="a tiny size, for a CPU")
  for name, default in defaults.items():
    if isinstance(default, bool):
      parser.add_argument(f"--{name}", action="store_true")
    elif isinstance(default, list):
      parser.add_argument(f"--{name}", nargs="+", type=type(default[0]), default=default)
    else:
      parser.add_argument(f"--{name}", type=type(default), default=default)
  given = parser.parse_args()
  given.setting = TINY if given.tiny else Setting()
  return given


def without_views(keys: jax.Array, image: jax.Array, patches: jax.Array) -> tuple[jax.Array, jax.Array, None]:
  """Returns the views f32[B, H, W, 3] and f32[B, P, h, w, 3] of levels u8 of the same shapes: normalised only."""
  del keys
  return normalise_image(image), normalise_image(patches), None


def views_of(setting: Setting) -> Callable:
  """Returns the views_fn of the main run, see `make_views`."""
  return make_views(setting.jigsaw, recipe=BASE, pretext_recipe=BASE)


def contrast_of(setting: Setting, *, loss: str = "nce", negatives: int | None = None,
                product: Callable = products.in_halves) -> Contrast:
  """Returns what embeddings are compared with; `negatives` None: those of the setting, 0: all rows."""
  number = setting.negatives if negatives is None else negatives
  layout = memory_bank.create_layout(setting.images, num_devices=1, num_negatives=number)
  loss_fn = losses.make_loss(loss, temperature=TEMPERATURE, num_images=setting.images,
                             num_negatives=number or setting.images)
  return Contrast(loss_fn, layout, num_negatives=number, temperature=TEMPERATURE, product=product)


def create(setting: Setting, *, views: bool = True) -> tuple[Callable, TrainState, dict[str, jax.Array]]:
  """Returns (step, state, batch) of the main run on the first device; without `views` the patches come cut."""
  mesh, contrast = mesh_lib.create_mesh(1), contrast_of(setting)
  optimizer = create_optimizer(optax.constant_schedule(0.12), momentum=0.9, weight_decay=1e-4)
  step = make_contrastive_step(
    setting.network.with_batch_norm(axis=mesh_lib.AXIS), optimizer, views_of(setting) if views else without_views,
    contrast, mesh, weights=Weights(0.5), momenta=Momenta(0.5), micro_batches=setting.micro_batches)
  size, patch = setting.image_size, setting.patch_size
  state = create_state(
    0, setting.network, optimizer, contrast.layout, mesh=mesh,
    create_bank=partial(memory_bank.create, dim=DIM),
    inputs=(jnp.zeros((1, size, size, 3)), jnp.zeros((1, 9, patch, patch, 3))))
  return step, state, jax.device_put(batch_of(setting, views=views), mesh_lib.split(mesh))


def batch_of(setting: Setting, *, views: bool = True) -> dict[str, np.ndarray]:
  """Returns crops u8[B, H, W, 3] and u8[B, S, S, 3] of noise (without `views` patches u8[B, P, h, w, 3]), and images.
  """
  rng, size, count = np.random.default_rng(0), setting.image_size, setting.batch
  patches = (setting.crop_size,) * 2 if views else (9, setting.patch_size, setting.patch_size)
  return {"image_crop": rng.integers(0, 256, (count, size, size, 3), np.uint8),
          "pretext_crop": rng.integers(0, 256, (count, *patches, 3), np.uint8),
          "index": rng.permutation(setting.images)[:count].astype(np.int32), "valid": np.ones(count, bool)}


def compile_seconds(fn: Callable, *given: Any) -> tuple[Any, float]:
  """Returns (fn(*given) with its arrays ready, the seconds of this first call)."""
  started = time.perf_counter()
  out = jax.block_until_ready(fn(*given))
  return out, time.perf_counter() - started


def milliseconds(runs: Mapping[str, Callable], *, rounds: int = 5, steps: int = 10) -> dict[str, float]:
  """Returns {name: median milliseconds of a call}, over blocks that take turns.

  Args:
    runs: {name: run()}, each returns arrays; a call is dispatched before the one before it has ended.
    rounds: blocks of each.
    steps: calls of a block.
  """
  for run in runs.values():
    jax.block_until_ready(run())
  times = {name: [] for name in runs}
  for _ in range(rounds):
    for name, run in runs.items():
      started, out = time.perf_counter(), None
      for _ in range(steps):
        out = run()
      jax.block_until_ready(out)
      times[name].append(1e3 * (time.perf_counter() - started) / steps)
  return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes() -> int:
  """Returns the most bytes that were taken on the first device since the process began; 0 on a CPU."""
  return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def chained(step: Callable, state: Any, batch: Any) -> Callable[[], Any]:
  """Returns run() that does a step from the state that the one before it has left, and returns the metrics."""
  def run() -> Any:
    nonlocal state
    state, metrics = step(state, batch)
    return metrics
  return run


def finish(**found: Any) -> None:
  """Prints what was found, as JSON in one line, with the machine and the versions."""
  device = jax.devices()[0]
  print(json.dumps({"device": device.device_kind, "jax": jax.__version__, "xla_flags": os.environ.get("XLA_FLAGS", ""),
                    **found}))
