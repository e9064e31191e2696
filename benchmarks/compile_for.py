"""Compiles a run's programs for a chip that is not there, and prints what the chip would do.

  python -m benchmarks.compile_for --chip=v5e-8 --config=pirl:imagenet
  python -m benchmarks.compile_for --chip=h100 --config=pirl:imagenet --part=views --config.model.dtype=bfloat16

Printed are kernels, bytes by part, the compiler's cycles where it gives them, memory of a device, collectives,
convolutions in float32, scatters, conditionals and host transfers; the last line is the same as JSON. Nothing runs.
The compilers are wheels that are installed by hand, see `pirl_jax/runtime/chips.py`. `step` is the whole program, for
all devices; the other parts are compiled for one device and its share of a batch. Milliseconds are bytes at the maker's
bandwidth, or cycles at the clock rate: a lower bound, never a measurement.
"""

import json
import time
from pathlib import Path

from absl import flags

from pirl_jax.launching import command
from pirl_jax.planning import lowering
from pirl_jax.planning.work import work_of
from pirl_jax.runtime import chips
from pirl_jax.training import parts


def define_flags() -> None:
  """Defines the flags beside those of launch.py; not at import, because a test imports this module."""
  flags.DEFINE_string("chip", "v5e-8", f"{', '.join(chips.COMPILED)}, with a number of chips.")
  flags.DEFINE_enum("part", "step", ["step", *lowering.PARTS], "What to compile.")
  flags.DEFINE_integer("images", 1_281_167, "Training images.")
  flags.DEFINE_integer("classes", 1_000, "Classes of the images.")
  flags.DEFINE_string("text", "", "File for the text of the compiled program.")


def main(argv: list[str]) -> None:
  """Prints what the programs do.

  Raises:
    UserError: the run does not fit the chips, or the compilers are missing.
  """
  del argv
  given, config = flags.FLAGS, command.CONFIG.value
  chips.prepare_compilers()
  mesh, chip = chips.chips_mesh(given.chip)
  started = time.perf_counter()
  parts.check_config(config)
  parts.check_shares(config, mesh.size)
  if given.part == "step":
    lowered = lowering.lower_step(config, mesh, lowering.Described(given.images, given.classes),
                                  device_bytes=int(chip.memory))
  else:
    lowered = lowering.lower_part(given.part, config, mesh, given.images)
  compiled = [each.compile() for each in lowered]
  seconds = time.perf_counter() - started
  if given.text:
    Path(given.text).write_text("\n".join(each.as_text() or "" for each in compiled))
  found = {"chip": given.chip, "config": config.name, "part": given.part, "devices": mesh.size,
           "images_on_a_device": config.batch_size // mesh.size, "compile_seconds": round(seconds, 1),
           **work_of(compiled, chip)}
  for name, value in found.items():
    if isinstance(value, dict):
      for inner, number in value.items():
        print(f"{name + ', ' + inner:<40}{str(number) if isinstance(number, dict) else f'{number:,}':>24}")
    else:
      print(f"{name:<40}{str(value) if isinstance(value, str | bool) else f'{value:,}':>24}")
  print(json.dumps(found))


if __name__ == "__main__":
  define_flags()
  command.start(main)
