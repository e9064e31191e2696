"""Compiles a run's programs for a chip that is not there, and prints what the chip would do.

  python -m benchmarks.compile_for --chip=v5e-8 --config=configs/pirl.py:imagenet
  python -m benchmarks.compile_for --chip=h100 --part=views --config.model.dtype=bfloat16

Printed are kernels, bytes by part, the compiler's cycles where it gives them, memory of a device, collectives,
convolutions in float32, scatters, conditionals and host transfers; the last line is the same as JSON. Nothing runs.
The compilers are wheels that are installed by hand, see `pirl_jax/runtime/chips.py`. `step` is the whole program, for
all devices; the other parts are compiled for one device and its share of a batch. Milliseconds are bytes at the maker's
bandwidth, or cycles at the clock rate: a lower bound, never a measurement.
"""

import json
import re
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from benchmarks import program as program_lib
from benchmarks.program import Program
from pirl_jax import system
from pirl_jax.data.records import Source
from pirl_jax.errors import UserError
from pirl_jax.method.randomness import view_keys
from pirl_jax.method.state import state_shardings
from pirl_jax.models.pooling import max_pool
from pirl_jax.runtime import chips, mesh
from pirl_jax.training import parts as parts_lib
from pirl_jax.views.normalisation import normalise_image

SCOPES = ("views", "network", "loss", "bank", "optimizer")
"""Named by the step, see `method/`; the innermost of them that a kernel stands in is its part."""


class Described(Source):
  """Images of which only the number and the classes are known."""

  description, fingerprint = "described by flags", ""

  def __init__(self, num_images: int, num_classes: int):
    """Takes the number of images and of classes."""
    self._num_images = num_images
    self.class_names = tuple(str(number) for number in range(num_classes))

  def __len__(self):
    return self._num_images

  def __getitem__(self, index):
    raise NotImplementedError("nothing runs")

  def labels(self):
    """Has none to give: nothing runs."""
    raise NotImplementedError("nothing runs")

  def image_name(self, index):
    """Returns the number."""
    return str(index)


def shaped(shape, dtype, devices, spec=mesh.WHOLE):
  """Returns the shape of an argument that lies on these devices."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(devices, spec))


def crops_of(config: ConfigDict, batch_size: int, devices: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns a batch of crops, u8[B, S, S, 3] each."""
  return {name: shaped((batch_size, size, size, 3), jnp.uint8, devices, mesh.SPLIT)
          for name, (size, _) in system.crops_of(config).items()}


def lowered_step(config: ConfigDict, devices: jax.sharding.Mesh, source: Source, chip: chips.Chip) -> list:
  """Returns the program, or the two programs, of a step, lowered for these devices."""
  parts = parts_lib.assemble(config, Path("runs"), devices, system.views_of(config), source, None,
                             device_bytes=int(chip.memory))
  shardings = state_shardings(devices, with_bank=system.has_bank(config))
  state = jax.eval_shape(parts.initial_state)
  state = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state,
                       jax.tree.broadcast(shardings, state))
  batch = crops_of(config, config.batch_size, devices)
  for name, dtype in (("index", jnp.int32), ("label", jnp.int32), ("valid", bool)):
    batch[name] = shaped((config.batch_size,), dtype, devices, mesh.SPLIT)
  lowered = parts_lib.make_step(parts).lower(state, batch)
  return list(lowered) if isinstance(lowered, tuple) else [lowered]


def lowered_part(part: str, config: ConfigDict, device: jax.sharding.Mesh, num_images: int) -> list:
  """Returns a part of what one device does with its share of a batch, lowered."""
  crops = crops_of(config, num_images, device)
  if part == "views":
    views_fn = system.views_of(config)
    def run(index, crops):
      return views_fn(view_keys(0, jnp.int32(0), index), crops.get("image_crop"), crops.get("pretext_crop"))
    arguments = shaped((num_images,), jnp.int32, device), crops
  elif part == "cut":
    pretext = system.pretext_of(config)
    def run(index, crop):
      return jax.vmap(lambda key, crop: pretext(key, crop, lambda patches: patches))(
        view_keys(0, jnp.int32(0), index), crop)
    arguments = shaped((num_images,), jnp.int32, device), crops["pretext_crop"]
  elif part == "pool":
    side = config.data.image_size // 2
    shapes = [(num_images, n, n, 64 * config.model.width) for n in (side, (side - 1) // 2 + 1)]
    def run(x, slope):
      out, pullback = jax.vjp(max_pool, x)
      return out, pullback(slope)[0]
    arguments = tuple(shaped(shape, config.model.dtype, device) for shape in shapes)
  else:
    network = system.network_of(config, num_classes=1_000)
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), *system.network_inputs(config), train=False))
    def run(variables, image):
      return network.apply(variables, normalise_image(image), method=lambda net, x: net.trunk(x, train=False)["pooled"])
    size = config.data.image_size
    arguments = (jax.tree.map(lambda x: shaped(x.shape, x.dtype, device), variables),
                 shaped((num_images, size, size, 3), jnp.uint8, device))
  return [jax.jit(run).lower(*arguments)]


def part_of(scope: str) -> str:
  """Returns which of `SCOPES` a kernel belongs to, "other" if to none."""
  return next((name for name in reversed(re.split("[/()]", scope)) if name in SCOPES), "other")


def report(compiled: list, chip: chips.Chip) -> dict:
  """Returns what the compiled programs of one call do on a device: see the module."""
  traffic, cycles, counts, collectives = Counter(), Counter(), Counter(), {}
  memory = Counter()
  for each in compiled:
    program = Program(each.as_text())
    for kernel, computation, times in program.kernels():
      part = part_of(program.scope(kernel))
      counts["kernels"] += times
      traffic[part] += times * program.traffic(kernel, computation)
      cycles[part] += times * kernel.cycles
    counts.update(program_lib.peculiarities(program))
    sent, number = program_lib.collectives(program)
    for name in sent:
      before = collectives.get(name, {"number": 0, "bytes": 0})
      collectives[name] = {"number": before["number"] + number[name], "bytes": before["bytes"] + sent[name]}
    stats = each.memory_analysis()
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory["arguments and results"] = max(memory["arguments and results"], held)
    memory["temporary"] = max(memory["temporary"], stats.temp_size_in_bytes)
  found = {**counts, "bytes": dict(traffic), "bytes_total": traffic.total(),
           "milliseconds_by_bytes": round(1e3 * traffic.total() / chip.memory_rate, 3), "memory": dict(memory),
           "fits": memory.total() < 0.95 * chip.memory, "collectives": collectives}
  if chip.clock_rate:
    found |= {"cycles": dict(cycles), "milliseconds_by_cycles": round(1e3 * cycles.total() / chip.clock_rate, 3)}
  return found


def define_flags() -> None:
  """Defines the flags; not at import, because launch.py has some of the same names."""
  config_flags.DEFINE_config_file("config", "configs/pirl.py:imagenet", "The run.")
  flags.DEFINE_string("chip", "v5e-8", f"{', '.join(chips.COMPILED)}, with a number of chips.")
  flags.DEFINE_enum("part", "step", ["step", "views", "cut", "pool", "evaluate"], "What to compile.")
  flags.DEFINE_integer("images", 1_281_167, "Training images.")
  flags.DEFINE_integer("classes", 1_000, "Classes of the images.")
  flags.DEFINE_string("text", "", "File for the text of the compiled program.")


def main(argv: list[str]) -> None:
  """Prints the report."""
  del argv
  given = flags.FLAGS
  config = given.config
  try:
    devices, chip = chips.chips_mesh(given.chip)
    started = time.perf_counter()
    if given.part == "step":
      parts_lib.check_config(config)
      parts_lib.check_shares(config, devices.size)
      lowered = lowered_step(config, devices, Described(given.images, given.classes), chip)
    else:
      one = jax.sharding.Mesh(np.array(devices.devices[:1]), devices.axis_names)
      lowered = lowered_part(given.part, config, one, config.batch_size // devices.size)
  except UserError as error:
    raise app.UsageError(str(error)) from error
  compiled = [each.compile() for each in lowered]
  seconds = time.perf_counter() - started
  if given.text:
    Path(given.text).write_text("\n".join(each.as_text() for each in compiled))
  found = {"chip": given.chip, "config": config.name, "part": given.part, "devices": devices.size,
           "images_on_a_device": config.batch_size // devices.size, "compile_seconds": round(seconds, 1),
           **report(compiled, chip)}
  for name, value in found.items():
    if isinstance(value, dict):
      for inner, number in value.items():
        print(f"{name + ', ' + inner:<40}{str(number) if isinstance(number, dict) else f'{number:,}':>24}")
    else:
      print(f"{name:<40}{str(value) if isinstance(value, str | bool) else f'{value:,}':>24}")
  print(json.dumps(found))


if __name__ == "__main__":
  chips.prepare_compilers()
  define_flags()
  app.run(main)
