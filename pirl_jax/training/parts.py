"""Builds the parts of a run from its config. All checks are made before anything compiles."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from pirl_jax import system
from pirl_jax.choosing.arranging import arrange
from pirl_jax.choosing.choices import Choice, choose_settings, format_choices, open_fields
from pirl_jax.choosing.facts import facts_of
from pirl_jax.configs.base import get_base
from pirl_jax.data import batches, overlap, sources
from pirl_jax.data.in_memory import keep
from pirl_jax.data.records import check_text
from pirl_jax.errors import UserError
from pirl_jax.evaluation.inputs import Images
from pirl_jax.method import losses, memory_bank, products
from pirl_jax.method.contrast import Contrast
from pirl_jax.method.optimizer import Optimizer, cosine_schedule, create_optimizer, step_schedule
from pirl_jax.method.prediction_step import make_prediction_step
from pirl_jax.method.programs import Step
from pirl_jax.method.state import Keeps, TrainState, create_state
from pirl_jax.method.step import Momenta, Weights, make_contrastive_step
from pirl_jax.models.network import Network
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.views.permutations import SUBSETS

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


@dataclasses.dataclass(frozen=True)
class Parts:
  """The parts of a run, built before anything compiles or is written.

  `choices` are the fields of `config` that the program has chosen.
  """

  config: ConfigDict
  workdir: Path
  mesh: jax.sharding.Mesh
  train: sources.Source
  test: sources.Source | None
  layout: memory_bank.Layout
  network: Network
  optimizer: Optimizer
  views_fn: Callable
  steps_per_epoch: int
  choices: tuple[Choice, ...] = ()

  @property
  def total_steps(self) -> int:
    """Returns the number of steps of the whole run."""
    return self.config.num_epochs * self.steps_per_epoch

  @property
  def parallel_network(self) -> Network:
    """Returns the network for the step: batch norm works over all devices, each device, or groups of images."""
    model = self.config.model
    return self.network.with_batch_norm(axis=mesh_lib.AXIS if model.batch_norm == "global" else None,
                                        group=model.batch_norm_group if model.batch_norm == "groups" else None)

  def initial_state(self, *, with_bank: bool = True) -> TrainState:
    """Returns the state before the first step; every call returns the same values.

    Args:
      with_bank: False leaves out the bank, which may be large.
    """
    config = self.config
    create_bank = partial(memory_bank.create, dim=config.model.dim, dtype=DTYPES[config.bank.dtype],
                          averaged=config.bank.averaged)
    keeps = Keeps(bank=with_bank and system.has_bank(config), ages=system.has_ages(config),
                  momentum_encoder=system.has_momentum_encoder(config))
    return create_state(
      config.seed, self.network, self.optimizer, self.layout, mesh=self.mesh, create_bank=create_bank,
      inputs=system.network_inputs(config), keeps=keeps)


def _one_of(choices: Iterable[str]) -> tuple[Callable[[Any], bool], str]:
  return lambda value: value in choices, f"choose from {', '.join(choices)}"


RULES = (
  (("batch_size", "micro_batches", "data.image_size", "data.num_threads", "jigsaw.crop_size", "jigsaw.grid",
    "jigsaw.patch_size", "model.dim", "checkpoint.every_steps", "checkpoint.keep", "evaluate.k", "evaluate.batch_size",
    "log.every_steps"), lambda value: value >= 1, "a whole number from 1 is needed"),
  (("data.image_size", "jigsaw.crop_size", "jigsaw.patch_size"), lambda value: value <= 10_000,
   "at most 10,000 is possible"),
  (("model.dim",), lambda value: value <= 65_536, "at most 65,536 is possible"),
  (("num_epochs",), lambda value: value >= 0, "0 (the untrained network) or more is needed"),
  (("model.batch_norm_group",), lambda value: value >= 2, "statistics need 2 images or more"),
  (("bank.averaged",), lambda value: 1 <= value <= 1_024, "1 to 1,024 vectors are possible"),
  (("evaluate.every_epochs", "evaluate.views"), lambda value: value >= 0, "0 (never) or more is needed"),
  (("num_negatives",), lambda value: value >= 0, "0 (every row) or more is needed"),
  (("bank.max_age",), lambda value: 0 <= value < 2**31, "a number of steps is needed, or 0 for no limit"),
  (("data.num_images", "evaluate.num_images", "jigsaw.num_permutations"), lambda value: value >= 0,
   "0 (all) or more is needed"),
  (("pretext_weight", "nearest_positive", "bank.momentum", "optimizer.momentum", "data.max_bad_fraction",
    "optimizer.end_factor", "optimizer.warmup_factor"), lambda value: 0 <= value <= 1, "it lies in [0, 1]"),
  (("optimizer.learning_rate", "optimizer.weight_decay", "optimizer.warmup_epochs", "angle_weight"),
   lambda value: 0 <= value < float("inf"), "a finite number from 0 is needed"),
  (("data.holdout", "bank.encoder_momentum"), lambda value: 0 <= value < 1, "it lies in [0, 1)"),
  (("data.kept_side",), lambda value: value >= 0, "0 (not kept) or more is needed"),
  (("seed",), lambda value: 0 <= value < 2**32, "it lies in [0, 2**32)"),
  (("name",), lambda value: re.fullmatch(r"[\w.+\- ]{0,200}", value) and value.strip(".") or not value,
   "it becomes a folder: letters, digits, _ . + - and spaces only"),
  (("model.width",), lambda value: value <= 64, "at most 64 is possible"),
  (("evaluate.batch_size",), lambda value: value <= 65_536, "at most 65,536 is possible"),
  (("temperature", "evaluate.temperature"), lambda value: 0 < value <= 1_000, "it lies in (0, 1000]"),
  (("evaluate.crop_fraction",), lambda value: 0.1 <= value <= 1, "it lies in [0.1, 1]"),
  (("optimizer.decay_factor",), lambda value: 0 < value <= 1, "it lies in (0, 1]"),
  (("data.image_scale", "jigsaw.crop_scale"), lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1,
   "it is (smallest, largest), within (0, 1]"),
  (("negative_ranks",), lambda value: len(value) == 2 and 0 <= value[0] < value[1] <= 1,
   "it is (first, last), two shares of the ranks within [0, 1]"),
  (("objective",), *_one_of(system.OBJECTIVES)),
  (("negative_sampling",), *_one_of(("shared", "per_image"))),
  (("jigsaw.permutation_subset",), *_one_of(SUBSETS)),
  (("optimizer.schedule",), *_one_of(("cosine", "steps"))),
  (("model.dtype", "bank.dtype"), *_one_of(DTYPES)),
  (("model.head",), *_one_of(("linear", "mlp"))),
  (("model.batch_norm",), *_one_of(("global", "groups", "device"))),
  (("optimizer.update_interval",), *_one_of(("step", "epoch"))),
  (("model.dtype", "bank.dtype"), lambda value: value != "float64" or jax.config.values["jax_enable_x64"],
   "JAX computes in it only with JAX_ENABLE_X64=1 in the environment"),
)
"""(Fields, function that says whether a value is possible, rule in words), in the order in which they are checked."""

OF_THE_BANK = ("angle_weight", "nearest_positive", "negative_ranks", "bank.encoder_momentum", "bank.max_age")
"""Fields of the comparison with the bank that are options; they are refused where there is no bank."""


def check_config(config: ConfigDict) -> None:
  """Raises UserError for a value that is wrong whatever the data are. An open field has no value yet."""
  for fields, holds, rule in RULES:
    for field in fields:
      if _get(config, field) is not None and not holds(_get(config, field)):
        raise UserError(f"{field}={_get(config, field)!r} is not possible: {rule}")
  for field in ("data.root", "data.split", "data.name", "evaluate.root", "evaluate.split", "evaluate.name"):
    check_text(field, _get(config, field) or "")
  if config.num_negatives == 0 and config.negative_sampling != "shared":
    raise UserError(f"negative_sampling={config.negative_sampling!r} is not possible: num_negatives=0 takes every row "
                    "for every image, there is nothing to draw")
  if config.num_negatives == 0 and config.own_row_is_negative:
    raise UserError("own_row_is_negative=True is not possible: num_negatives=0 takes every row once, and an image has "
                    "its own row as the positive")
  base = get_base()
  for field in OF_THE_BANK if not system.has_bank(config) else ():
    if (value := _get(config, field)) != _get(base, field):
      raise UserError(f"{field}={value} is not possible with objective={config.objective!r}, which has no memory bank")
  if tuple(config.negative_ranks) != (0, 1) and config.loss == "nce":
    raise UserError(f"negative_ranks={tuple(config.negative_ranks)} is not possible with loss='nce', which counts on "
                    "negatives drawn at random; choose --config.loss=infonce")
  if config.data.holdout and config.evaluate.split:
    raise UserError(f"data.holdout={config.data.holdout} and evaluate.split={config.evaluate.split!r} are not possible "
                    "together: both say which images are held out")


def _get(config: ConfigDict, field: str) -> Any:
  for part in field.split("."):
    config = config[part]
  return config


def build(config: ConfigDict, workdir: Path,
          check_images: Callable[[sources.Source], None] = lambda train: None) -> Parts:
  """Returns the parts of the run. The data are opened and everything is checked; nothing is compiled or written.

  The fields that the config leaves open are chosen, and the choices are printed.

  Args:
    config: of the run.
    workdir: its folder.
    check_images: is called with the training images before anything that depends on their number; it raises UserError
      if they are not those of the run in `workdir`.

  Raises:
    UserError: the settings do not fit each other, the data or the devices.
  """
  mesh = mesh_lib.create_mesh()
  if not open_fields(config):
    check_shares(config, mesh.size)
    views_fn = system.views_of(config)  # what is wrong with the views needs no data to be said
    train, test = _outside(workdir, open_data(config))
    check_images(train)
    return assemble(config, workdir, mesh, views_fn, train, test, device_bytes=mesh_lib.device_bytes())
  config, made = arrange(config)
  train, test = _outside(workdir, open_data(config))
  check_images(train)
  config, more = choose_settings(config, facts_of(mesh, train))
  made = (*made, *more)
  print(format_choices(made))
  check_config(config)
  check_shares(config, mesh.size)
  parts = assemble(config, workdir, mesh, system.views_of(config), train, test, device_bytes=mesh_lib.device_bytes())
  return dataclasses.replace(parts, choices=made)


def _outside(workdir: Path, opened: tuple[sources.Source, sources.Source | None]) -> tuple[
    sources.Source, sources.Source | None]:
  """Returns the sources; raises UserError if the figures of a run in `workdir` would be images of one of them."""
  for source in opened:
    if source is not None and source.holds(workdir):
      raise UserError(f"the folder of the run, {workdir}, lies among the images: its figures would be new images, and "
                      "the run could not be resumed; choose another --workdir, outside of data.root")
  return opened


def check_shares(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError if a batch does not divide among the devices, or a device's into micro-batches and groups."""
  for field in ("batch_size", "evaluate.batch_size"):
    if _get(config, field) % num_devices:
      raise UserError(f"{field}={_get(config, field)} does not divide among {num_devices} devices; "
                      f"try --config.{field}={max(1, _get(config, field) // num_devices) * num_devices}")
  images = config.batch_size // num_devices
  if images % config.micro_batches:
    raise UserError(f"micro_batches={config.micro_batches} does not divide the {images} images of a batch on each of "
                    f"{num_devices} devices; choose a divisor of {images}")
  images, group = images // config.micro_batches, config.model.batch_norm_group
  if config.model.batch_norm == "groups" and images % group:
    raise UserError(f"model.batch_norm_group={group} does not divide the {images} images that pass through a device at "
                    f"once (batch_size={config.batch_size}, devices: {num_devices}, micro_batches="
                    f"{config.micro_batches}); take fewer devices or parts, a divisor of {images}, or "
                    "--config.model.batch_norm=global")


def assemble(config: ConfigDict, workdir: Path, mesh: jax.sharding.Mesh, views_fn: Callable, train: sources.Source,
             test: sources.Source | None, *, device_bytes: int) -> Parts:
  """Returns the parts of a run on these devices and data, after all checks that are left.

  Args:
    config: of the run.
    workdir: its folder.
    mesh: the devices; a program may be compiled for devices that are not there.
    views_fn: see `system.views_of`.
    train: the training images; of these, number and classes count.
    test: the held-out images.
    device_bytes: memory of a device.

  Raises:
    UserError: something does not fit.
  """
  network = system.network_of(config, num_classes=train.num_labels)
  steps_per_epoch = batches.steps_per_epoch(len(train), config.batch_size, partial=config.partial_batch)
  if config.num_epochs * steps_per_epoch >= 2**31:
    raise UserError(f"num_epochs={config.num_epochs} of {steps_per_epoch:,} steps: steps are counted up to 2**31; take "
                    "fewer")
  layout = memory_bank.create_layout(
    len(train), num_devices=mesh.size, num_negatives=config.num_negatives if system.has_bank(config) else 0)
  if system.has_bank(config):
    memory_bank.check_fits(layout, dim=config.model.dim, dtype=DTYPES[config.bank.dtype], num_devices=mesh.size,
                           device_bytes=device_bytes)
  loss_of(config, layout)
  optimizer = create_optimizer(
    make_schedule(config, steps_per_epoch), momentum=config.optimizer.momentum,
    nesterov=config.optimizer.nesterov, weight_decay=config.optimizer.weight_decay,
    decay_biases=config.optimizer.decay_biases, decay_batch_norm=config.optimizer.decay_batch_norm)
  train, test = keep(train, config.data.kept_side), test and keep(test, config.data.kept_side)
  return Parts(config, workdir, mesh, train, test, layout, network, optimizer, views_fn, steps_per_epoch)


def loss_of(config: ConfigDict, layout: memory_bank.Layout) -> losses.Loss:
  """Returns the contrastive loss, see `losses.make_loss`."""
  return losses.make_loss(config.loss, temperature=config.temperature, num_images=layout.num_images,
                          num_negatives=config.num_negatives or layout.num_images)


def make_schedule(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
  """Returns schedule(step) -> learning rate. A run without epochs gets the schedule of one epoch, which is never used.

  Raises:
    UserError: the warm-up or the milestones do not fit the number of steps.
  """
  given = config.optimizer
  common = dict(
    base_rate=given.learning_rate * config.batch_size / 1024, num_steps=max(1, config.num_epochs) * steps_per_epoch,
    warmup_steps=round(given.warmup_epochs * steps_per_epoch) if config.num_epochs else 0,
    warmup_factor=given.warmup_factor, hold_steps=steps_per_epoch if given.update_interval == "epoch" else 1)
  if given.schedule == "steps":
    return step_schedule(milestones=given.milestones, decay_factor=given.decay_factor, **common)
  return cosine_schedule(end_factor=given.end_factor, **common)


def open_data(config: ConfigDict) -> tuple[sources.Source, sources.Source | None]:
  """Returns the training images and the held-out images; prints their descriptions.

  The held-out images are those of `evaluate.split` or, without it, those that `data.holdout` keeps out of the training;
  None without both.
  """
  split = config.evaluate.split
  train, test = sources.open_both(sources.DataSettings.of(config.data), split=split,
                                  num_images=config.evaluate.num_images)
  print(f"training images: {train.description}")
  if test is None:
    return train, None
  print(f"held-out images: {test.description if split else test.description.splitlines()[0]}")
  if warning := overlap.warning(train, test):
    print(warning)
  return train, test


def make_step(parts: Parts) -> Step:
  """Returns train_step(state, batch) -> (state, metrics) for the run's objective."""
  config = parts.config
  common = parts.parallel_network, parts.optimizer, parts.views_fn
  if not system.has_bank(config):
    return make_prediction_step(*common, parts.layout, parts.mesh, micro_batches=config.micro_batches)
  contrast = contrast_of(config, parts.layout, num_negatives=config.num_negatives)
  weights = Weights(config.pretext_weight, config.angle_weight)
  momenta = Momenta(config.bank.momentum, config.bank.encoder_momentum)
  return make_contrastive_step(*common, contrast, parts.mesh, weights=weights, momenta=momenta,
                               micro_batches=config.micro_batches)


def contrast_of(config: ConfigDict, layout: memory_bank.Layout, *, num_negatives: int) -> Contrast:
  """Returns what embeddings are compared with, and the loss of it, for a bank of this layout; see `Contrast`."""
  return Contrast(loss_of(config, layout), layout, num_negatives=num_negatives,
                  negative_sampling=config.negative_sampling, own_row_is_negative=config.own_row_is_negative,
                  nearest_positive=config.nearest_positive, negative_ranks=tuple(config.negative_ranks),
                  max_age=config.bank.max_age,
                  temperature=config.temperature,
                  product=products.in_halves if config.model.dtype == "bfloat16" else products.exact)


def test_images(parts: Parts, source: sources.Source) -> Images:
  """Returns the images of a source under the test transform."""
  config = parts.config
  return Images(source, image_size=config.data.image_size, crop_fraction=config.evaluate.crop_fraction,
                batch_size=config.evaluate.batch_size, num_threads=config.data.num_threads)
