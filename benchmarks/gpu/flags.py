"""The step with flags of XLA, remat and micro-batches, in processes of their own. `python -m benchmarks.gpu.flags`

Every variant compiles the whole step: take a few in a call, `--variants default latency_hiding`. A flag is worth
keeping if it is more than 2 % faster.
"""

import json
import os
import subprocess
import sys

from benchmarks.gpu.setting import arguments

VARIANTS = {
  # name: (XLA's flags, arguments of benchmarks.gpu.step)
  "default": ("", ()),
  "latency_hiding": ("--xla_gpu_enable_latency_hiding_scheduler=true", ()),
  "no_command_buffers": ("--xla_gpu_enable_command_buffer=", ()),
  "deterministic": ("--xla_gpu_deterministic_ops=true", ()),
  "no_autotuning": ("--xla_gpu_autotune_level=0", ()),
  "remat": ("", ("--remat",)),
  "micro_batches_2": ("", ("--micro_batches", "2")),
  "micro_batches_4": ("", ("--micro_batches", "4")),
}


def main() -> None:
  """Prints the line of `benchmarks.gpu.step` for each variant, and all in the last line."""
  given = arguments(__doc__, variants=["default", "latency_hiding", "no_command_buffers"], batch=512)
  found = {}
  for name in given.variants:
    flags, more = VARIANTS[name]
    command = [sys.executable, "-m", "benchmarks.gpu.step", "--batches", str(given.batch), *more,
               *(["--tiny"] if given.tiny else [])]
    ended = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, stdout=subprocess.PIPE, text=True)
    # A variant that does not fit, or a flag that this version of XLA does not know, is an answer as well.
    found[name] = json.loads(ended.stdout.splitlines()[-1]) if not ended.returncode else ended.returncode
    print(name, found[name], flush=True)
  print(json.dumps(found))


if __name__ == "__main__":
  main()
