"""Chooses the fields of a run that its config leaves open, and says why. README: "Your own images".

A field is open if its value is None, which the command line calls "auto". Every field that is given stays as it is, and
the later choices follow from it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from pirl_jax.choosing.estimate import estimate
from pirl_jax.choosing.facts import Facts
from pirl_jax.errors import UserError
from pirl_jax.method.memory_bank import negatives_within
from pirl_jax.storage.settings import flatten

NCE_IMAGES = 1_000_000
"""From this number of images on the loss is the paper's `nce`. The paper shows that `nce` learns with sets of 1.0 and
1.3 million images. On 689, 4,096 and 50,000 images it diverges: docs/own_images.md has the figures."""

NEGATIVES = 4_096
"""For GPUs and TPUs, as in the paper's section 4."""

MARGIN = 1.25
"""The estimated memory times this number must fit. The estimate is within about 25 % of compiled programs."""

CPU_IMAGES = (300_000, 750_000)
"""Fewest and most images that a run on a CPU sees: five to fourteen minutes on two cores."""

EPOCHS = (200, 2_000)
"""Fewest and most epochs of a small set on a GPU or TPU."""

GPU_IMAGES = (20_000_000, 256_000_000)
"""Images that a run on a GPU or TPU sees: of a small set, within `EPOCHS`, and at most, as 200 epochs of ImageNet."""

LARGEST = ((48, 32), (80, 64), (160, 96))
"""(Limit, size): images with a median shorter side below the limit get views of this size; larger ones 224 pixels."""

KEPT_SHARE = 0.25
"""Largest share of the machine's memory that decoded images may take."""

LEARNING_IMAGES = 100_000
"""For larger sets, or views above 64 pixels, kNN on raw pixels at the end would need too much memory and time."""


@dataclasses.dataclass(frozen=True)
class Choice:
  """A field that was chosen.

  Attributes:
    field: "group.field".
    value: the chosen one.
    why: in words.
  """

  field: str
  value: Any
  why: str


def open_fields(config: ConfigDict) -> list[str]:
  """Returns the names of the fields that the config leaves open."""
  return [name for name, value in flatten(config.to_dict()).items() if value is None]


def recalled(config: ConfigDict, stored: Mapping[str, Any]) -> ConfigDict:
  """Returns the config with the values of a stored run in its open fields: a run that resumes does not choose again."""
  values = flatten(dict(stored))
  return with_values(config, {name: values[name] for name in open_fields(config) if values.get(name) is not None})


def with_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
  """Returns the config with the values {"group.field": value}."""
  filled = config.copy_and_resolve_references()
  filled.update_from_flattened_dict({name: tuple(value) if isinstance(value, list) else value
                                     for name, value in values.items()})
  return filled


def choose_settings(config: ConfigDict, facts: Facts) -> tuple[ConfigDict, list[Choice]]:
  """Returns the config without open fields, and what was chosen.

  Args:
    config: of a run whose images are known: of the group `data`, only sizes may be open.
    facts: about devices and images.

  Raises:
    UserError: a field is open that nothing chooses, or no choice fits the devices.
  """
  choosing = _Choosing(config.copy_and_resolve_references(), facts)
  for rule in RULES:
    rule(choosing)
  if left := open_fields(choosing.config):
    raise UserError(f"nothing chooses {left[0]}; give it a value, --config.{left[0]}=...")
  return choosing.config, choosing.made


class _Choosing:
  """A config whose open fields are filled one after the other."""

  def __init__(self, config: ConfigDict, facts: Facts) -> None:
    self.config, self.facts, self.made = config, facts, []

  @property
  def on_cpu(self) -> bool:
    """Returns whether the devices are CPUs."""
    return self.facts.platform == "cpu"

  def take(self, why: str, **values: Any) -> None:
    """Fills each field that is open; `group__field` stands for "group.field"."""
    for name, value in values.items():
      field = name.replace("__", ".")
      if field in open_fields(self.config):
        self.config.update_from_flattened_dict({field: value})
        self.made.append(Choice(field, value, why))

  @property
  def steps_per_epoch(self) -> int:
    """Returns the number of whole batches of the training images, at least 1."""
    return max(1, self.facts.num_images // self.config.batch_size)


def _network(choosing: _Choosing) -> None:
  facts, config = choosing.facts, choosing.config
  if choosing.on_cpu:
    why = f"a CPU of {facts.num_cores} cores trains this network and size in minutes"
    choosing.take(why, model__arch="resnet8", data__image_size=32)
    small = config.data.image_size <= 64
    choosing.take(f"views of {config.data.image_size} pixels on a CPU", model__stem="3x3s2" if small else "imagenet")
    return
  size = next((size for limit, size in LARGEST if facts.shorter_side < limit), 224)
  choosing.take(f"the images' shorter side is {facts.shorter_side} pixels in the median", data__image_size=size)
  small = config.data.image_size < 160
  choosing.take(f"views of {config.data.image_size} pixels on {facts.device}",
                model__arch="resnet18" if small else "resnet50", model__stem="3x3" if small else "imagenet")


def _views(choosing: _Choosing) -> None:
  size, grid = choosing.config.data.image_size, choosing.config.jigsaw.grid
  small = size < 160
  if choosing.config.model.stem == "3x3s2":
    cell, patch = max(2, 12 * size // 32), max(2, 10 * size // 32)
  else:
    cell = max(16, size // 3) if small else round(size * 255 / 224 / 3)
    patch = round(cell * 64 / 85)
  why = f"in proportion to views of {size} pixels"
  choosing.take(why, jigsaw__crop_size=cell * grid, jigsaw__patch_size=patch)
  choosing.take("views below 160 pixels" if small else "views of ImageNet's size",
                data__image_scale=(0.2, 1.0) if small else (0.08, 1.0), evaluate__crop_fraction=1.0 if small else 0.875)


def _batch(choosing: _Choosing) -> None:
  facts, devices = choosing.facts, choosing.facts.num_devices
  usual = 128 if choosing.config.data.image_size < 160 else 256
  half = 1 << max(1, facts.num_images // 2).bit_length() - 1
  size = max(1, min(usual, half) // devices) * devices
  choosing.take("the largest power of two up to half of the images" if half < usual
                else f"usual for {choosing.config.model.arch}",
                batch_size=size)
  choosing.take("as many as pass through memory easily", evaluate__batch_size=-(-256 // devices) * devices)
  small_network = choosing.config.model.arch == "resnet8"
  choosing.take(f"best for {choosing.config.model.arch} in tests" if small_network else "published for such sets",
                optimizer__learning_rate=0.4 if small_network else 0.24 if usual == 128 else 0.12,
                optimizer__weight_decay=1e-4 if small_network or usual == 256 else 5e-4)


def _memory(choosing: _Choosing) -> None:
  facts, config = choosing.facts, choosing.config
  choosing.take(f"fastest on {facts.device}" if facts.bfloat16 else f"bfloat16 is no faster on {facts.device}",
                model__dtype="bfloat16" if facts.bfloat16 else "float32")
  images, group = config.batch_size // facts.num_devices, config.model.batch_norm_group
  in_groups = not choosing.on_cpu and images % group == 0 and images > 0
  choosing.take("statistics of 32 images, as in the authors' runs; parts of a batch then change nothing" if in_groups
                else "statistics of the whole batch", model__batch_norm="groups" if in_groups else "global")
  if config.micro_batches is not None and config.model.remat is not None:
    return
  if choosing.on_cpu:
    choosing.take("the memory of a CPU suffices", micro_batches=1, model__remat=False)
    return
  least = group if config.model.batch_norm == "groups" else max(1, min(images, 32))
  needs = 0.0
  for remat in (False, True):
    for parts in (number for number in range(1, images // least + 1) if images % (number * least) == 0):
      trial = with_values(config, {"micro_batches": config.micro_batches or parts,
                                   "model.remat": remat if config.model.remat is None else config.model.remat})
      needs = MARGIN * _estimated_bytes(trial, facts)
      if needs <= facts.device_bytes:
        choosing.take(f"about {needs / MARGIN / 2**30:.1f} GiB, of {facts.device_bytes / 2**30:.1f} GiB of a device",
                      micro_batches=trial.micro_batches, model__remat=trial.model.remat)
        return
  raise UserError(f"a step needs about {needs / MARGIN / 2**30:.1f} GiB even in small parts, and a device has "
                  f"{facts.device_bytes / 2**30:.1f} GiB; take a smaller network or image, for example "
                  "--config.model.arch=resnet18 --config.data.image_size=96")


def _estimated_bytes(config: ConfigDict, facts: Facts) -> float:
  """Returns the bytes that a step needs on a device; open `num_negatives` count as those that will be chosen."""
  values = {} if config.num_negatives is not None else {
    "num_negatives": negatives_within(NEGATIVES, facts.num_images)}
  needs = estimate(with_values(config, values), num_images=facts.num_images, num_classes=max(2, facts.num_classes),
                   num_devices=facts.num_devices)
  return sum(needs.memory.values())


def _loss(choosing: _Choosing) -> None:
  number, usual = choosing.facts.num_images, 2_048 if choosing.on_cpu else NEGATIVES
  negatives = negatives_within(usual, number)
  choosing.take("usual for this network" if negatives == usual else f"there are {number:,} images to choose from",
                num_negatives=negatives)
  small = number < NCE_IMAGES
  choosing.take(f"nce diverges on small sets; the paper shows it from {NCE_IMAGES:,} images on" if small
                else "the paper's loss",
                loss="infonce" if small else "nce")
  choosing.take(f"goes with {choosing.config.loss}", temperature=0.07 if choosing.config.loss == "nce" else 0.1)


def _length(choosing: _Choosing) -> None:
  facts, steps = choosing.facts, choosing.steps_per_epoch
  number = facts.num_images
  if choosing.on_cpu:
    fewest, most = CPU_IMAGES
    images = min(max(15 * number, fewest), most)
    epochs = min(EPOCHS[1], max(1, round(images / (steps * choosing.config.batch_size))))
  elif number < 100_000:
    epochs = min(EPOCHS[1], max(EPOCHS[0], GPU_IMAGES[0] // number))
  else:
    epochs = max(1, min(EPOCHS[0], GPU_IMAGES[1] // number))
  total, size = epochs * steps, choosing.config.batch_size
  choosing.take(f"{total:,} steps of {size} are {total * size:,} images in all", num_epochs=epochs)


def _reports(choosing: _Choosing) -> None:
  config = choosing.config
  total = config.num_epochs * choosing.steps_per_epoch
  choosing.take("about a hundred rows", log__every_steps=max(1, min(50, total // 100)))
  choosing.take("ten or more in a run", checkpoint__every_steps=max(100, min(2_500, -(-total // 10))))
  choosing.take("three in a run", evaluate__every_epochs=max(1, -(-config.num_epochs // 3)))
  labelled = choosing.facts.num_classes > 0 and bool(config.evaluate.split or config.data.holdout)
  small = choosing.facts.num_images <= LEARNING_IMAGES and config.data.image_size <= 64
  why = "there are labels and held-out images" if labelled else "needs labels and held-out images"
  choosing.take(why if small else "raw pixels of so many or so large images need too much memory",
                evaluate__learning=labelled and small)


def _reading(choosing: _Choosing) -> None:
  facts, config = choosing.facts, choosing.config
  choosing.take(f"{facts.num_cores} cores", data__num_threads=min(16, facts.num_cores))
  side = 4 * config.data.image_size
  stored = facts.num_images * 3 * 1.5 * min(side, facts.shorter_side) ** 2
  fits = choosing.on_cpu and stored <= KEPT_SHARE * facts.host_bytes
  choosing.take(f"about {stored / 1e6:,.0f} MB of decoded images stay in memory: decoding costs more than the network"
                if fits else "images are decoded anew each time", data__kept_side=side if fits else 0)


RULES: Sequence[Callable[[_Choosing], None]] = (
  _network, _views, _batch, _memory, _loss, _length, _reports, _reading)
"""The rules in their order; a later one sees what the earlier ones have chosen."""


def format_choices(choices: Sequence[Choice]) -> str:
  """Returns the choices as lines of text: field, value, why."""
  values = [f"{choice.value:,}" if isinstance(choice.value, int) and not isinstance(choice.value, bool)
            else str(choice.value) or '""' for choice in choices]
  width = max(len(choice.field) for choice in choices), max(map(len, values))
  lines = [f"{'chosen':<{sum(width) + 3}}  why"]
  return "\n".join(lines + [f"  {choice.field:<{width[0]}} {value:<{width[1]}}  {choice.why}"
                            for choice, value in zip(choices, values, strict=True)])
