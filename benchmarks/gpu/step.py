"""The whole step of the main run: seconds to compile, milliseconds, peak memory. `python -m benchmarks.gpu.step`

  python -m benchmarks.gpu.step --batches 256 512 1024
  python -m benchmarks.gpu.step --batches 1024 --micro_batches 2 --remat
  XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true python -m benchmarks.gpu.step --batches 512

The batches have to rise: the peak is that of the process.
"""

import dataclasses

from benchmarks.gpu.setting import arguments, chained, compile_seconds, create, finish, milliseconds, peak_bytes


def main() -> None:
  """Prints a line for each batch."""
  given = arguments(__doc__, batches=[256, 512, 1024], micro_batches=1, remat=False)
  found = []
  for batch in [given.setting.batch] if given.tiny else given.batches:
    setting = dataclasses.replace(given.setting, batch=batch, micro_batches=given.micro_batches, remat=given.remat)
    step, state, crops = create(setting)
    (state, _), seconds = compile_seconds(step, state, crops)
    each = milliseconds({"step": chained(step, state, crops)}, rounds=3, steps=2 if given.tiny else 10)["step"]
    found.append({"batch": batch, "compile_seconds": seconds, "milliseconds": each,
                  "images_per_second": 1e3 * batch / each, "peak_bytes": peak_bytes()})
    print(found[-1], flush=True)
    del step, state, crops
  finish(micro_batches=given.micro_batches, remat=given.remat, steps=found)


if __name__ == "__main__":
  main()
