"""What a run will need, worked out before it is started: `python -m benchmarks.plan --images=1_281_167 --devices=8`

Memory of a device, bytes moved, share of compute, host cores for the images and wall-clock time, with every
assumption printed. FLOPs, weights and activations come from the network itself (traced, never run); the rates of chips
are their makers', and the share of them that is reached is assumed. `--check` holds sizes, FLOPs and bytes against a
program that is compiled here; no time was held against a GPU or TPU yet.
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.program import sent_bytes
from pirl_jax.method import losses, memory_bank
from pirl_jax.method.contrast import Contrast
from pirl_jax.method.optimizer import create_optimizer
from pirl_jax.method.state import create_state
from pirl_jax.method.step import make_contrastive_step
from pirl_jax.models.heads import ImageHead, PatchesHead
from pirl_jax.models.network import Network
from pirl_jax.models.resnet import create_resnet
from pirl_jax.runtime import chips
from pirl_jax.runtime import mesh as mesh_lib

DIM = 128
IMAGES_PER_CORE = 557
"""Decoded and cropped twice in a core-second, ImageNet's JPEGs: `python -m benchmarks.input_pipeline`, Xeon 2.1 GHz."""

PASSES = 4
"""Times that an activation passes through a device's memory: written and read on the way there and on the way back."""

SETS = {"imagenet-1k": 1_281_167, "imagenet-22k": 14_197_122, "yfcc-100m": 99_171_688, "one billion": 10**9}


CHIPS = {chip.name if chip.platform == "cuda" else f"tpu-{chip.name}": chip for chip in chips.CHIPS.values()}


@dataclasses.dataclass(frozen=True)
class Case:
  """A run: what the plan depends on. Sizes in pixels; `batch` is that of all devices."""

  images: int
  devices: int
  arch: str = "resnet50"
  stem: str = "imagenet"
  image_size: int = 224
  patch_size: int = 64
  patches: int = 9
  batch: int = 1024
  micro_batches: int = 1
  negatives: int = 32_000
  epochs: int = 800
  dtype: str = "bfloat16"
  bank_dtype: str = "float32"
  remat: bool = False

  @property
  def network(self) -> Network:
    """Returns the network of the run."""
    trunk = create_resnet(self.arch, stem=self.stem, dtype=jnp.dtype(self.dtype), remat=self.remat)
    return Network(trunk, ImageHead(DIM), PatchesHead(DIM))

  def inputs(self, batch: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Returns the shapes of both views of a batch."""
    return (jax.ShapeDtypeStruct((batch, self.image_size, self.image_size, 3), jnp.float32),
            jax.ShapeDtypeStruct((batch, self.patches, self.patch_size, self.patch_size, 3), jnp.float32))


def nbytes(tree) -> int:
  """Returns the bytes of all arrays of a tree."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def plan(case: Case) -> dict[str, float]:
  """Returns what a step needs on one device: bytes by purpose, FLOPs of network and bank, bytes sent."""
  network, local = case.network, case.batch // case.devices // case.micro_batches
  variables = jax.eval_shape(lambda *views: network.init(jax.random.key(0), *views, train=False), *case.inputs(1))
  params, stats = nbytes(variables["params"]), nbytes(variables["batch_stats"])

  def forward(params, stats, *views):
    return network.apply({"params": params, "batch_stats": stats}, *views, train=True, mutable=["batch_stats"])[0]

  def kept(params, stats, *views):
    # The function that works out the gradient holds, as a tree, what it has kept of the forward pass.
    return jax.vjp(lambda params: forward(params, stats, *views), params)[1]

  def loss(params, *rest):
    return sum(jnp.sum(out) for out in forward(params, *rest))

  shapes = variables["params"], variables["batch_stats"], *case.inputs(local)
  activations = max(0, nbytes(jax.eval_shape(kept, *shapes)) - params)
  cost: Any = jax.jit(jax.grad(loss)).lower(*shapes).cost_analysis()
  flops = cost["flops"] * case.micro_batches

  layout = memory_bank.create_layout(case.images, num_devices=case.devices, num_negatives=case.negatives)
  read = case.negatives or layout.num_rows
  # Two terms, each scores and slopes (scored once, in chunks) or scores and the two gradients' factors.
  bank_flops = 2 * 2 * 2 * case.batch * read * DIM / case.devices
  itemsize = jnp.dtype(case.bank_dtype).itemsize
  scores = 4 * case.batch // case.micro_batches * (
    case.negatives / case.devices if case.negatives else min(8_192, layout.num_rows / case.devices))
  channels = stats / 4 / 2  # of all batch norms; each is called for the patches and for the images
  return {
    "weights, gradient and momentum": 3 * params + stats,
    "activations kept for the gradient": activations,
    "views": nbytes(case.inputs(local)),
    "bank": layout.num_rows / case.devices * (DIM * itemsize + 1),
    "scores and negatives": 3 * 2 * scores + 2 * 4 * DIM * case.negatives / case.devices,
    "network FLOPs": flops,
    "bank FLOPs": bank_flops,
    "bank bytes read": 2 * itemsize * DIM * read / case.devices,
    # Gradients, summed; embeddings of both views, gathered; own rows, summed; means and variances of batch norm, and
    # their gradients, for both calls of the trunk; sums over the negatives.
    "bytes sent": (params + 4 * DIM * case.batch * 3 + case.micro_batches * 2 * 2 * 2 * 4 * channels
                   + 2 * 4 * 4 * case.batch) * (case.devices > 1),
  }


def report(case: Case, chip_name: str, efficiency: float) -> None:
  """Prints the plan of a run."""
  chip, found = CHIPS[chip_name], plan(case)
  memory = {name: found[name] for name in list(found)[:5]}
  rate = chip.bfloat16 if case.dtype == "bfloat16" else chip.float32
  passed = PASSES * case.micro_batches * found["activations kept for the gradient"]
  arithmetic, traffic = found["network FLOPs"] / rate / efficiency, passed / chip.memory_rate / efficiency
  network_seconds = max(arithmetic, traffic)
  bank_seconds = max(found["bank FLOPs"] / chip.float32, found["bank bytes read"] / chip.memory_rate) / efficiency
  link_seconds = 2 * found["bytes sent"] / chip.link_rate / efficiency
  step = network_seconds + bank_seconds + link_seconds
  total = sum(memory.values())
  steps = case.images // case.batch * case.epochs
  print(f"\n{case.images:,} images, {case.devices} x {chip_name}, {case.arch}, batch {case.batch:,}, "
        f"{f'{case.negatives:,}' if case.negatives else 'all'} negatives, {case.epochs} epochs, {case.dtype}, "
        f"bank in {case.bank_dtype}")
  print("memory of a device")
  for name, size in memory.items():
    print(f"  {name:<36}{size / 1e9:>10.2f} GB")
  verdict = "fits" if total < 0.9 * chip.memory else "DOES NOT FIT: more devices, micro_batches, remat or bfloat16"
  print(f"  {'together':<36}{total / 1e9:>10.2f} GB of {chip.memory / 1e9:.0f}: {verdict}")
  print(f"a step: {1e3 * step:.1f} ms = network {1e3 * network_seconds:.1f} ({found['network FLOPs'] / 1e12:.2f} TFLOP "
        f"{1e3 * arithmetic:.1f}, {passed / 1e9:.0f} GB of activations {1e3 * traffic:.1f}: the longer), "
        f"bank {1e3 * bank_seconds:.2f}, links {1e3 * link_seconds:.2f} ({found['bytes sent'] / 1e6:.0f} MB)")
  print(f"share of the network {network_seconds / step:.0%}; {case.batch / step:,.0f} images a second, "
        f"{case.batch / step / IMAGES_PER_CORE:.0f} host cores in all to decode them")
  print(f"wall-clock: {steps:,} steps, {steps * step / 86_400:,.1f} days, "
        f"{steps * step / 3_600 / case.epochs:,.2f} hours an epoch")


def check() -> None:
  """Compiles the step of a small case on this machine, and prints what was planned beside what was found."""
  case = Case(images=65_536, devices=4, arch="resnet8", stem="3x3s2", image_size=32, patch_size=10, batch=128,
              negatives=4_096, dtype="float32")
  planned, mesh = plan(case), mesh_lib.create_mesh(case.devices)
  layout = memory_bank.create_layout(case.images, num_devices=case.devices, num_negatives=case.negatives)
  optimizer = create_optimizer(optax.constant_schedule(0.1), momentum=0.9, weight_decay=1e-4)
  loss_fn = losses.make_loss("infonce", temperature=0.1, num_images=case.images, num_negatives=case.negatives)

  def views_fn(keys: jax.Array, image_crop: jax.Array, pretext_crop: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    del keys
    return image_crop / 255, pretext_crop / 255, None

  step = make_contrastive_step(
    case.network.with_batch_norm(axis=mesh_lib.AXIS), optimizer, views_fn,
    Contrast(loss_fn, layout, num_negatives=case.negatives, temperature=0.1), mesh, pretext_weight=0.5,
    bank_momentum=0.5)
  image, pretext = (np.zeros(x.shape, np.uint8) for x in case.inputs(case.batch))
  batch = {"image_crop": image, "pretext_crop": pretext, "valid": np.ones(case.batch, bool),
           "index": np.arange(case.batch, dtype=np.int32)}
  one_image, one_pretext = case.inputs(1)
  state = jax.eval_shape(lambda: create_state(
    0, case.network, optimizer, layout, mesh=mesh, dim=DIM, bank_dtype=jnp.float32,
    inputs=(jnp.zeros(one_image.shape), jnp.zeros(one_pretext.shape))))
  compiled = step.lower(state, batch).compile()
  memory, flops = compiled.memory_analysis(), compiled.cost_analysis()["flops"]
  given = planned["bank"] + planned["weights, gradient and momentum"] * 2 / 3 + nbytes((image, pretext)) / case.devices
  passing = (planned["activations kept for the gradient"] + planned["scores and negatives"] + planned["views"]
             + planned["weights, gradient and momentum"] / 3)
  rows = {
    "MB given to the step, on a device": (given / 1e6, memory.argument_size_in_bytes / 1e6),
    "MB in passing": (passing / 1e6, memory.temp_size_in_bytes / 1e6),
    "GFLOP": ((planned["network FLOPs"] + planned["bank FLOPs"]) / 1e9, flops / 1e9),
    "MB sent": (planned["bytes sent"] / 1e6, sum(sent_bytes(compiled.as_text()).values()) / 1e6),
  }
  print(f"{case.arch} on {case.devices} virtual devices, batch {case.batch}: planned and found in the compiled program")
  for name, (ours, theirs) in rows.items():
    print(f"  {name:<36}{ours:>10.2f}{theirs:>10.2f}   {ours / theirs:.2f}")


def main() -> None:
  """Prints the plan."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--chip", default="h100", choices=CHIPS)
  parser.add_argument("--images", type=int, default=0, help=f"0: {', '.join(SETS)}")
  parser.add_argument("--efficiency", type=float, default=0.5, help="share of the maker's rates that is reached")
  parser.add_argument("--check", action="store_true", help="hold the method against a program compiled here")
  for field in dataclasses.fields(Case)[1:]:
    if field.name == "remat":
      parser.add_argument("--remat", action="store_true")
    else:
      kind, default = (int, 8) if field.name == "devices" else (type(field.default), field.default)
      parser.add_argument(f"--{field.name}", type=kind, default=default)
  given = vars(parser.parse_args())
  chip, images, efficiency = given.pop("chip"), given.pop("images"), given.pop("efficiency")
  jax.config.update("jax_num_cpu_devices", 4)
  jax.config.update("jax_platforms", "cpu")
  if given.pop("check"):
    check()
    return
  print(f"""assumed: {efficiency:.0%} of the rates of arithmetic, memory and links; the network takes the longer of
its arithmetic and of {PASSES} passes of its activations through memory; the bank is float32 products; nothing
overlaps; {IMAGES_PER_CORE} images decoded a core-second; weights and momentum on every device; XLA may keep a third
less of the activations than is counted here""")
  for number in [images] if images else SETS.values():
    report(Case(images=number, **given), chip, efficiency)


if __name__ == "__main__":
  main()
