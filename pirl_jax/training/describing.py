"""Describes a run before it starts, and says how to make it smaller."""

import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta

from pirl_jax.choosing.estimate import estimate
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.settings import flatten
from pirl_jax.training.parts import Parts


def describe(parts: Parts) -> Iterator[str]:
  """Yields lines about the memory that a step needs on a device, and about the number of steps."""
  config, device_bytes = parts.config, mesh_lib.device_bytes()
  needs = estimate(config, num_images=len(parts.train), num_classes=parts.train.num_labels,
                   num_devices=parts.mesh.size)
  size = sum(needs.memory.values())
  yield (f"memory: a step needs about {size / 2**30:.2f} GiB of the {device_bytes / 2**30:.1f} GiB of a device "
         "(an estimate, within about 25 %)")
  if size > device_bytes:
    yield f"WARNING: that may be too much; {way_out(parts)}"
  yield (f"steps: {config.num_epochs} epochs of {parts.steps_per_epoch:,} = {parts.total_steps:,} steps of "
         f"{config.batch_size} images")


def dry_run(parts: Parts) -> str:
  """Returns every field of the config, one in a line, for a run that is described and not started."""
  fields = "\n".join(f"  {name} = {value!r}" for name, value in flatten(parts.config.to_dict()).items())
  return f"config\n{fields}\ndry_run=True: nothing was written, compiled or trained"


def way_out(parts: Parts) -> str:
  """Returns the flags with which a step needs less memory, in words."""
  config = parts.config
  images, group = config.batch_size // parts.mesh.size, config.model.batch_norm_group
  least = group if config.model.batch_norm == "groups" else 1
  more = [number for number in range(config.micro_batches + 1, images // least + 1)
          if images % number == 0 and images // number % least == 0]
  ways = [f"--config.micro_batches={more[0]}"] if more else []
  if not config.model.remat:
    ways.append("--config.model.remat=True")
  if config.model.dtype == "float32" and parts.mesh.devices.flat[0].platform != "cpu":
    ways.append("--config.model.dtype=bfloat16")
  ways.append(f"--config.batch_size={max(parts.mesh.size, config.batch_size // 2)}")
  text = f"a step needs less with {', or '.join(ways)}"
  if config.data.kept_side:
    text += "; decoded images take less of the host with --config.data.kept_side=0"
  return (f"{text}; the host needs less with --config.data.num_threads=1. If the run has a checkpoint already, choose "
          "another --workdir, too")


class ExpectedTime:
  """Says once, after the first `STEPS` steps, how long the run will take."""

  STEPS = 100

  def __init__(self, total_steps: int, say: Callable[[str], None]) -> None:
    """Takes the number of the last step, and the function that prints a line."""
    self._total_steps, self._say = total_steps, say
    self._first: tuple[int, float] | None = None

  def note(self, step: int) -> None:
    """Notes that a step is over; the first one that is noted includes the compilation and is not counted."""
    now = time.perf_counter()
    if self._first is None:
      self._first = step, now
    first, started = self._first
    left = self._total_steps - step
    if step - first == self.STEPS and left:
      seconds = (now - started) / self.STEPS * left
      end = datetime.now() + timedelta(seconds=seconds)
      self._say(f"{self.STEPS} steps took {now - started:,.1f} s; the {left:,} left take about "
                f"{timedelta(seconds=round(seconds))}, until {end:%Y-%m-%d %H:%M}, without evaluations")
