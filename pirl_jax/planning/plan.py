"""The job `plan`: what a run will need, before it is started."""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from pirl_jax.choosing.arranging import arrange
from pirl_jax.choosing.choices import choose_settings, format_choices, open_fields
from pirl_jax.choosing.estimate import PASSING, Needs, estimate
from pirl_jax.choosing.facts import facts_of_chips
from pirl_jax.data.batches import steps_per_epoch
from pirl_jax.errors import UserError
from pirl_jax.planning.lowering import Described, lower_step
from pirl_jax.planning.work import work_of
from pirl_jax.runtime import chips
from pirl_jax.training.parts import check_config, check_shares

NUM_IMAGES = {"imagenet2012": 1_281_167, "cifar10": 50_000, "stl10": 100_000}
"""Of the training split, by TFDS's name."""

IMAGES_PER_CORE = 557
"""Decoded and cropped twice in a core-second, ImageNet's JPEGs: `python -m benchmarks.input_pipeline`, Xeon 2.1 GHz."""

IMAGES_PER_PROCESS = 10_000
"""That a Python process can hand on in a second, however many cores it has: the ceiling that
`python -m benchmarks.input_pipeline` prints, here on two cores of an AMD EPYC with other work."""

LATENCY = 1.2e-5
"""Seconds of a collective of a few bytes; assumed."""

LARGEST_POOL = 0.9
"""Share of a GPU's memory that JAX can be given; the rest is for CUDA's own programs."""


@dataclasses.dataclass(frozen=True)
class RunPlan:
  """What a run needs on its chips.

  Attributes:
    run: its config.
    chip: one of the devices.
    num_devices: number of them.
    num_images: training images.
    num_classes: of these.
    needs: of a step on one device.
    efficiency: share of the maker's rates that is reached.
  """

  run: ConfigDict
  chip: chips.Chip
  num_devices: int
  num_images: int
  num_classes: int
  needs: Needs
  efficiency: float

  @property
  def arithmetic_seconds(self) -> float:
    """Returns the time of the arithmetic of a step at the maker's rate."""
    rate = self.chip.bfloat16 if self.run.model.dtype == "bfloat16" else self.chip.float32
    return self.needs.flops / rate

  @property
  def traffic_seconds(self) -> float:
    """Returns the time of the memory traffic of a step at the maker's rate, or the compiler's if that is longer."""
    return max(sum(self.needs.traffic.values()) / self.chip.memory_rate, self.needs.cycle_seconds)

  @property
  def link_seconds(self) -> float:
    """Returns the time of what is sent in a step; in a ring every byte travels twice."""
    return 2 * self.needs.sent / self.chip.link_rate + self.needs.collectives * LATENCY

  @property
  def step_seconds(self) -> float:
    """Returns the time of a step."""
    return (max(self.arithmetic_seconds, self.traffic_seconds) + self.link_seconds) / self.efficiency


def run(config: ConfigDict, workdir: str) -> None:
  """Prints what the run `config.run` needs. Nothing is written or run; `workdir` is not used.

  Raises:
    UserError: the run is not possible, or does not say how many images it has.
  """
  del workdir
  chips.prepare_compilers()
  plan, compiled = make_plan(config)
  for line in lines_of(plan, compiled):
    print(line)


def make_plan(config: ConfigDict) -> tuple[RunPlan, str]:
  """Returns the plan of a run, and in words where its figures come from.

  Raises:
    UserError: see `run`.
  """
  given = config.run
  chip, num_devices = chips.read_name(config.chip)
  if config.memory:
    if config.memory < 0:
      raise UserError(f"memory={config.memory} is not possible: GiB of a device, or 0 for the chip's own")
    chip = dataclasses.replace(chip, memory=config.memory * 2**30)
  num_images = config.images or given.data.num_images or NUM_IMAGES.get(given.data.name, 0)
  if num_images < 1:
    raise UserError("the run does not say how many images it has; give --config.images=NUMBER")
  if open_fields(given):
    facts = facts_of_chips(chip, num_devices, num_images=num_images, num_classes=config.classes)
    given, made = choose_settings(arrange(given)[0], facts)
    print(format_choices(made))
  if not 0 < config.efficiency <= 1:
    raise UserError(f"efficiency={config.efficiency} is not possible: it lies in (0, 1]")
  check_config(given)
  check_shares(given, num_devices)
  needs = estimate(given, num_images=num_images, num_classes=config.classes, num_devices=num_devices)
  source = "an estimate from the network's layers, within about 25 % of programs that were compiled for an H100"
  way = chips.way_to_compile(config.chip)
  if config.compile and not way:
    started = time.perf_counter()
    needs = compiled_needs(needs, given, config, num_images)
    source = (f"memory, traffic and what is sent: read from the step as the {chip.name}'s compiler makes it, in "
              f"{time.perf_counter() - started:.0f} s")
  elif config.compile:
    source += f"; for figures from a compiled step: {way}"
  return RunPlan(given, chip, num_devices, num_images, config.classes, needs, config.efficiency), source


def compiled_needs(estimated: Needs, given: ConfigDict, config: ConfigDict, num_images: int) -> Needs:
  """Returns the needs of a step, read from the step as it is compiled for the chip.

  Args:
    estimated: gives the arithmetic, and the memory of what is there before a step.
    given: the config of the run.
    config: of the plan.
    num_images: training images.

  Raises:
    UserError: see `parts.assemble`.
  """
  mesh, chip = chips.chips_mesh(config.chip)
  lowered = lower_step(given, mesh, Described(num_images, config.classes), device_bytes=int(chip.memory))
  work = work_of([each.compile() for each in lowered], chip)
  sent = work["collectives"].values()
  passing = sum(work["memory"].values()) - sum(size for name, size in estimated.memory.items() if name != PASSING)
  return dataclasses.replace(
    estimated, memory={**estimated.memory, PASSING: passing}, traffic=work["bytes"],
    sent=sum(each["bytes"] for each in sent), collectives=sum(each["number"] for each in sent),
    cycle_seconds=work.get("milliseconds_by_cycles", 0) / 1e3)


def lines_of(plan: RunPlan, source: str) -> Iterator[str]:
  """Yields the plan in lines of text.

  Args:
    plan: of a run.
    source: where its figures come from.
  """
  given, chip, needs = plan.run, plan.chip, plan.needs
  seconds, steps = plan.step_seconds, steps_per_epoch(
    plan.num_images, given.batch_size, partial=given.partial_batch)
  total, rate = sum(needs.memory.values()), given.batch_size / seconds
  yield (f"{given.name} on {plan.num_devices} x {chip.name}: {plan.num_images:,} images, batch {given.batch_size:,}, "
         f"{given.model.dtype}")
  yield source
  yield f"{'memory of a device':<46}{'GiB':>10}"
  for name, size in needs.memory.items():
    yield f"  {name:<44}{size / 2**30:>10.3f}"
  yield f"  {'together':<44}{total / 2**30:>10.3f} of {chip.memory / 2**30:.1f}"
  yield f"does it fit: {verdict(plan)}"
  traffic = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in needs.traffic.items())
  yield f"sent by a device in a step: {needs.sent / 1e6:,.1f} MB in {needs.collectives:,} collectives"
  yield f"through the memory of a device in a step: {sum(needs.traffic.values()) / 1e9:,.1f} GB ({traffic})"
  yield (f"a step: {1e3 * seconds:,.2f} ms at {plan.efficiency:.0%} of the maker's rates, and at all of them memory "
         f"{1e3 * plan.traffic_seconds:,.2f} ms or, if longer, arithmetic {1e3 * plan.arithmetic_seconds:,.2f} ms "
         f"({needs.flops / 1e12:,.2f} TFLOP), and links {1e3 * plan.link_seconds:,.2f} ms")
  yield (f"images: {rate:,.0f} a second; {-(-rate // IMAGES_PER_CORE):,.0f} host cores to decode photographs"
         + (f", in {-(-rate // IMAGES_PER_PROCESS):.0f} processes or more" if rate > IMAGES_PER_PROCESS else ""))
  hours = given.num_epochs * steps * seconds / 3_600
  yield (f"the run: {given.num_epochs} epochs of {steps:,} steps, "
         f"{f'{hours / 24:,.1f} days' if hours > 48 else f'{hours:,.2f} hours'}, without evaluations and checkpoints")


def verdict(plan: RunPlan) -> str:
  """Returns in words whether the run fits into a device's memory and, if not, the flags of the run that make it fit."""
  chip, total = plan.chip, sum(plan.needs.memory.values())
  pool = f"the {chip.default_pool / 2**30:.1f} GiB that JAX takes by default"
  if total <= chip.default_pool:
    return f"yes, into {pool}"
  ways = []
  if chip.platform == "cuda" and total <= LARGEST_POOL * chip.memory:
    ways.append(f"XLA_PYTHON_CLIENT_MEM_FRACTION={LARGEST_POOL} in the environment")
  parts = [number for number in range(2, 65) if not plan.run.batch_size // plan.num_devices % number]
  for changes in ([("micro_batches", number) for number in parts], [("model.remat", True)],
                  [("bank.dtype", "bfloat16")]):
    fitting = (change for change in changes if _total_with(plan, *change) <= chip.default_pool)
    ways += [f"--config.{name}={value}" for name, value in itertools.islice(fitting, 1)]
  return f"not into {pool}; " + (f"set {', or '.join(ways)}" if ways else "take more devices or a smaller batch")


def _total_with(plan: RunPlan, field: str, value: Any) -> float:
  """Returns the bytes that the run would need with another value: as estimated, in proportion to what is known."""
  def estimated(given: ConfigDict) -> dict[str, float]:
    return dict(estimate(given, num_images=plan.num_images, num_classes=plan.num_classes,
                         num_devices=plan.num_devices).memory)

  changed = plan.run.copy_and_resolve_references()
  changed.update_from_flattened_dict({field: value})
  before, after = estimated(plan.run), estimated(changed)
  return sum(size * after[name] / before[name] for name, size in plan.needs.memory.items() if size)
