"""A pre-training run from its config: build, restore, loop, log, evaluate, save.

The config stops here: the rooms below are handed plain values.
"""

import contextlib
import dataclasses
import functools
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from ml_collections import ConfigDict

from pirl_jax import system
from pirl_jax.data import batches, contents, sources
from pirl_jax.errors import UserError
from pirl_jax.evaluation import features
from pirl_jax.evaluation.inputs import Model, Pictures
from pirl_jax.evaluation.protocols import knn, learning
from pirl_jax.figures import pictures
from pirl_jax.method import losses, memory_bank
from pirl_jax.method.health import NOT_FINITE, Guard
from pirl_jax.method.optimizer import cosine_schedule, create_optimizer, step_schedule
from pirl_jax.method.prediction_step import make_prediction_step
from pirl_jax.method.state import TrainState, create_state
from pirl_jax.method.step import make_train_step, view_keys
from pirl_jax.models.network import Network
from pirl_jax.models.resnet import BATCH_NORM_MOMENTUM
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.runtime import processes
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.storage.files import locked, read_json, write_json
from pirl_jax.storage.formats import FIRST_BITS, FIRST_RESUMED, FORMAT, upgrade_config
from pirl_jax.storage.logbook import METRICS, Logbook, read_rows
from pirl_jax.storage.settings import flatten
from pirl_jax.training.stopping import Stopped, Stopping
from pirl_jax.views.permutations import SUBSETS
from pirl_jax.views.two_views import denormalise

FREE_ON_RESUME = ("num_epochs", "checkpoint.", "evaluate.", "log.", "data.num_threads", "data.max_bad_fraction")
"""Fields that may change when a run goes on; a name that ends with a dot stands for its whole group."""

STEPS_IN_FLIGHT = 2
"""Steps that the devices may be behind the host: enough to keep them busy, and no pile of batches in memory."""

HANDOVER_SECONDS = 20
"""How long a run that is still ending in the same folder is waited for."""

NAMED_BROKEN = 20
"""Broken pictures named in the log one by one; beyond them only the count goes on."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run is made of, built before anything compiles or is written."""

  config: ConfigDict
  workdir: Path
  mesh: jax.sharding.Mesh
  train: sources.Source
  test: sources.Source | None
  layout: memory_bank.Layout
  network: Network
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  views_fn: Callable
  steps_per_epoch: int

  @property
  def total_steps(self) -> int:
    """Returns the number of steps of the whole run."""
    return self.config.num_epochs * self.steps_per_epoch

  @property
  def parallel_network(self) -> Network:
    """Returns the network as the step maps it: batch norm over all devices, unless each is to have its own."""
    return self.network.with_batch_norm_axis(mesh_lib.AXIS if self.config.model.batch_norm == "global" else None)

  def initial_state(self) -> TrainState:
    """Returns the state before the first step; the same at every call."""
    config = self.config
    return create_state(
      config.seed, self.network, self.optimizer, self.layout, mesh=self.mesh, dim=config.model.dim,
      bank_dtype=DTYPES[config.bank.dtype], inputs=system.network_inputs(config), with_bank=system.has_bank(config))


def run(config: ConfigDict, workdir: str) -> None:
  """Pre-trains as `config` says and writes everything into `workdir`; goes on where an earlier run there stopped.

  Without a `workdir` ("") the folder is runs/NAME.

  Raises:
    UserError: the config, the data or what lies in `workdir` does not allow it. Nothing has been compiled or written.
    Stopped: by SIGTERM or Ctrl-C, after the state was saved.
  """
  with Stopping() as stopping:
    pretrain(config, Path(workdir or f"runs/{config.name}"), stopping)


def pretrain(config: ConfigDict, workdir: Path, stopping: Stopping) -> None:
  """Does what `run` says, until it is finished or asked to stop."""
  parts = processes.together(prepare, config, workdir)
  processes.check_alike({
    "the folder of the run": str(workdir), **flatten(config.to_dict()),
    "the training pictures": parts.train.fingerprint,
    "the held-out pictures": parts.test and parts.test.fingerprint,
    "the version of jax": jax.__version__, "the format of checkpoints": FORMAT})
  with processes.together(hold, workdir), Checkpoints(
      workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
    if checkpoints.steps():
      state = restore(parts, checkpoints)
    else:
      processes.together(check_new, parts)
      state = parts.initial_state()
    start_step = int(state.step)
    processes.together(begin, parts)
    print(parameter_overview.get_parameter_overview(state.params, include_stats=False))
    with Logbook(workdir, start_step=start_step, total_steps=parts.total_steps,
                 steps_per_epoch=parts.steps_per_epoch, batch_size=config.batch_size,
                 enabled=jax.process_index() == 0) as book:
      if start_step:
        book.say(f"goes on from step {start_step} of {parts.total_steps}")
      if config.num_epochs:
        with stopping.held():
          state = train(parts, state, checkpoints, book, stopping)
        stopping.check()
      elif not checkpoints.steps():
        state = calibrate(parts, state)
        save(parts, state, checkpoints, knn_top1=None, surely=True, say=book.say)
      finish(parts, state, book)


def hold(workdir: Path) -> contextlib.ExitStack:
  """Returns what keeps other runs out of the folder until it is closed.

  Raises:
    UserError: another run is in it, or it cannot be made.
  """
  held = contextlib.ExitStack()
  if jax.process_index() == 0:
    try:
      held.enter_context(locked(workdir, patience=HANDOVER_SECONDS))
    except TimeoutError as error:
      raise UserError(f"another process is training in {workdir}; let it end, or choose another --workdir") from error
    except OSError as error:
      raise _unwritable(workdir, error) from error
  return held


def _unwritable(workdir, error):
  return UserError(f"nothing can be written to {workdir} ({error.strerror}); make room, or choose another --workdir")


def check_new(parts: Run) -> None:
  """Raises UserError where a run has come so far that it had checkpoints: to begin anew would lose its rows, too."""
  rows, before = read_rows(parts.workdir / METRICS), read_json(parts.workdir / "config.json") or parts.config.to_dict()
  # The first is on disk before the second is begun.
  if rows and rows[-1]["step"] > 2 * before["checkpoint"]["every_steps"]:
    raise UserError(f"{parts.workdir / METRICS} reaches step {rows[-1]['step']}, but {parts.workdir / 'checkpoints'} "
                    "holds no checkpoint; bring them back, or choose another --workdir, or delete that file to start "
                    "anew")


def begin(parts: Run) -> None:
  """Writes down what the run is and with which pictures it begins.

  Raises:
    UserError: nothing can be written.
  """
  if jax.process_index() != 0:
    return
  try:
    write_json(parts.workdir / "config.json", parts.config.to_dict())
    contents.remember(parts.train, parts.workdir)
  except OSError as error:
    raise _unwritable(parts.workdir, error) from error


def prepare(config: ConfigDict, workdir: Path) -> Run:
  """Returns the parts of the run, see `build`, after all checks that need no other process.

  Raises:
    UserError: see `check_config`, `check_same_config` and `build`.
  """
  check_config(config)
  check_same_config(config, workdir)
  return build(config, workdir)


def check_config(config: ConfigDict) -> None:
  """Raises UserError for a value that no data could make possible."""
  def require(holds, field, rule):
    if not holds:
      raise UserError(f"{field}={_get(config, field)!r} is not possible: {rule}")

  for field in ("batch_size", "micro_batches", "data.image_size", "data.num_threads", "jigsaw.crop_size", "jigsaw.grid",
                "jigsaw.patch_size", "model.dim", "checkpoint.every_steps", "checkpoint.keep", "evaluate.k",
                "evaluate.batch_size", "log.every_steps"):
    require(_get(config, field) >= 1, field, "a whole number from 1 is needed")
  for field, most in (("data.image_size", 10_000), ("jigsaw.crop_size", 10_000), ("jigsaw.patch_size", 10_000),
                      ("model.dim", 65_536)):
    require(_get(config, field) <= most, field, f"at most {most:,} is possible")
  for field, zero in (("num_epochs", "the untrained network"), ("evaluate.every_epochs", "never"),
                      ("num_negatives", "every row"), ("data.num_images", "all"), ("evaluate.num_images", "all"),
                      ("jigsaw.num_permutations", "all")):
    require(_get(config, field) >= 0, field, f"0 ({zero}) or more is needed")
  for field in ("pretext_weight", "bank.momentum", "optimizer.momentum", "data.max_bad_fraction"):
    require(0 <= _get(config, field) <= 1, field, "it lies in [0, 1]")
  for field in ("optimizer.learning_rate", "optimizer.weight_decay", "optimizer.end_factor",
                "optimizer.warmup_epochs", "optimizer.warmup_factor"):
    require(0 <= _get(config, field) < float("inf"), field, "a finite number from 0 is needed")
  require(0 < config.evaluate.temperature < float("inf"), "evaluate.temperature", "a number above 0 is needed")
  require(0 < config.evaluate.crop_fraction <= 1, "evaluate.crop_fraction", "it lies in (0, 1]")
  require(0 < config.optimizer.decay_factor <= 1, "optimizer.decay_factor", "it lies in (0, 1]")
  for field in ("data.image_scale", "jigsaw.crop_scale"):
    scale = _get(config, field)
    require(len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1, field, "it is (smallest, largest), within (0, 1]")
  for field, choices in (("objective", system.OBJECTIVES), ("negative_sampling", ("shared", "per_image")),
                         ("jigsaw.permutation_subset", SUBSETS),
                         ("optimizer.schedule", ("cosine", "steps")), ("model.dtype", DTYPES),
                         ("bank.dtype", DTYPES), ("model.head", ("linear", "mlp")),
                         ("model.batch_norm", ("global", "device")),
                         ("optimizer.update_interval", ("step", "epoch"))):
    require(_get(config, field) in choices, field, f"choose from {', '.join(choices)}")
  for field in ("model.dtype", "bank.dtype"):
    require(_get(config, field) != "float64" or jax.config.jax_enable_x64, field,
            "JAX computes in it only with JAX_ENABLE_X64=1 in the environment")
  require(config.num_negatives or config.negative_sampling == "shared", "negative_sampling",
          "num_negatives=0 takes every row for every image, there is nothing to draw")


def _get(config, field):
  for part in field.split("."):
    config = config[part]
  return config


def check_same_config(config: ConfigDict, workdir: Path) -> None:
  """Raises UserError if `workdir` holds a run with another config, but for the fields that may change."""
  path = workdir / "config.json"
  if not path.exists():
    return
  try:
    stored = upgrade_config(json.loads(path.read_text()))
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); delete it to go on, the checkpoints hold "
                    "the config, too; or choose another --workdir") from error
  compare_configs(config, stored, workdir)


def compare_configs(config: ConfigDict, stored: dict[str, Any], workdir: Path) -> None:
  """Raises UserError if the config stored with the run in `workdir` differs in a field that may not change."""
  before, now = flatten(stored), flatten(json.loads(json.dumps(config.to_dict())))
  for field in sorted(before.keys() | now.keys()):
    free = any(field == name or (name.endswith(".") and field.startswith(name)) for name in FREE_ON_RESUME)
    if not free and before.get(field) != now.get(field):
      raise UserError(f"{workdir} holds a run with {field}={before.get(field)!r}, and now it is {now.get(field)!r}; "
                      f"choose another --workdir, or give the old value to go on")


def build(config: ConfigDict, workdir: Path) -> Run:
  """Returns the parts of the run: opens the data and checks that all fits, without compiling or writing anything.

  Raises:
    UserError: something does not fit.
  """
  mesh = mesh_lib.create_mesh()
  num_devices = mesh.size
  for field in ("batch_size", "evaluate.batch_size"):
    if _get(config, field) % num_devices:
      raise UserError(f"{field}={_get(config, field)} does not divide among {num_devices} devices; "
                      f"try --config.{field}={max(1, _get(config, field) // num_devices) * num_devices}")
  images = config.batch_size // num_devices
  if images % config.micro_batches:
    raise UserError(f"micro_batches={config.micro_batches} does not divide the {images} images of a batch on each of "
                    f"{num_devices} devices; choose a divisor of {images}")
  views_fn = system.views_of(config)

  train, test = open_data(config)
  network = system.network_of(config, num_classes=0 if train.multi_label else len(train.class_names))
  steps_per_epoch = batches.steps_per_epoch(len(train), config.batch_size)
  if config.num_epochs * steps_per_epoch >= 2**31:
    raise UserError(f"num_epochs={config.num_epochs} of {steps_per_epoch:,} steps: steps are counted up to 2**31; take "
                    "fewer")
  layout = memory_bank.create_layout(
    len(train), num_devices=num_devices, num_negatives=config.num_negatives if system.has_bank(config) else 0)
  if system.has_bank(config):
    memory_bank.check_fits(layout, dim=config.model.dim, dtype=DTYPES[config.bank.dtype], num_devices=num_devices,
                           device_bytes=mesh_lib.device_bytes())
  make_loss(config, layout)
  schedule = make_schedule(config, steps_per_epoch)
  optimizer = create_optimizer(schedule, momentum=config.optimizer.momentum, weight_decay=config.optimizer.weight_decay,
                               decay_biases=config.optimizer.decay_biases)
  return Run(config, workdir, mesh, train, test, layout, network, optimizer, schedule, views_fn, steps_per_epoch)


def make_loss(config: ConfigDict, layout: memory_bank.Layout) -> Callable:
  """Returns the contrastive loss, see `losses.make_loss`."""
  return losses.make_loss(config.loss, temperature=config.temperature, num_images=layout.num_images,
                          num_negatives=config.num_negatives or layout.num_images)


def make_schedule(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
  """Returns step -> learning rate. A run without epochs has the schedule of one: its optimizer is never asked.

  Raises:
    UserError: the warm-up or the milestones do not fit.
  """
  given = config.optimizer
  common = dict(
    base_rate=given.learning_rate * config.batch_size / 1024, num_steps=max(1, config.num_epochs) * steps_per_epoch,
    warmup_steps=round(given.warmup_epochs * steps_per_epoch) if config.num_epochs else 0,
    warmup_factor=given.warmup_factor)
  if given.schedule == "steps":
    return step_schedule(milestones=given.milestones, decay_factor=given.decay_factor, **common)
  return cosine_schedule(end_factor=given.end_factor,
                         hold_steps=steps_per_epoch if given.update_interval == "epoch" else 1, **common)


def open_data(config: ConfigDict) -> tuple[sources.Source, sources.Source | None]:
  """Returns the training pictures and the held-out ones (None without `evaluate.split`), and prints what was found."""
  data = config.data
  common = dict(name=data.name, root=data.root, labels=data.labels, image_size=data.image_size)
  train = sources.open_source(data.source, split=data.split, num_images=data.num_images, **common)
  print(f"training pictures: {train.description}")
  if not config.evaluate.split:
    return train, None
  test = sources.open_source(data.source, split=config.evaluate.split, num_images=config.evaluate.num_images,
                             class_names=train.class_names, **common)
  print(f"held-out pictures: {test.description}")
  return train, test


def restore(parts: Run, checkpoints: Checkpoints) -> TrainState:
  """Returns the state of the newest checkpoint of this very run.

  Raises:
    UserError: the checkpoint is of another data set, network or bank, is past the end, or none can be read.
  """
  expected = run_meta(parts)

  def check(meta):
    if meta["format"] < FIRST_RESUMED:
      raise UserError(f"the checkpoint in {parts.workdir} has format {meta['format']}, in which a part of the state is "
                      "missing: it can be evaluated, not gone on with; choose another --workdir")
    if meta["format"] < FIRST_BITS and parts.config.bank.dtype == "bfloat16":
      raise UserError(f"the checkpoint in {parts.workdir} has format {meta['format']}, in which a bank of bfloat16 was "
                      "stored otherwise: it can be evaluated, not gone on with; choose another --workdir")
    for name, now in expected.items():
      if meta.get(name) != now:
        if name == "data" and (changes := contents.difference(parts.train, parts.workdir)):
          raise UserError(f"the training pictures are not those with which the run in {parts.workdir} began; "
                          f"{changes}; restore them, or choose another --workdir")
        raise UserError(f"the checkpoint in {parts.workdir} has {name} {meta.get(name)!r}, and this run {now!r}; "
                        "choose another --workdir")
    compare_configs(parts.config, meta["config"], parts.workdir)
    if meta["step"] > parts.total_steps:
      raise UserError(f"{parts.workdir} has already done {meta['step']} steps, and num_epochs="
                      f"{parts.config.num_epochs} is {parts.total_steps}; raise num_epochs")

  return checkpoints.restore_newest(check, jax.eval_shape(parts.initial_state), parts.mesh, say=print)


def run_meta(parts: Run) -> dict[str, Any]:
  """Returns what must be the same for a checkpoint to belong to this run, JSON values."""
  return {
    "data": parts.train.fingerprint, "num_images": parts.layout.num_images, "num_strata": parts.layout.num_strata,
    "model": parts.config.model.to_dict(), "num_classes": len(parts.train.class_names)}


def train(parts: Run, state: TrainState, checkpoints: Checkpoints, book: Logbook, stopping: Stopping) -> TrainState:
  """Returns the state after the last step.

  Raises:
    Stopped: see `run`.
  """
  config, start_step = parts.config, int(state.step)
  train_step = make_step(parts)
  evaluate = make_evaluation(parts, book, stopping)
  stream = batches.train_batches(
    parts.train, crops=system.crops_of(config), batch_size=config.batch_size, seed=config.seed, start_step=start_step,
    process_index=jax.process_index(), process_count=jax.process_count(), num_threads=config.data.num_threads)

  def evaluates(step):
    every_steps = config.evaluate.every_epochs * parts.steps_per_epoch
    return evaluate is not None and (step == parts.total_steps or step % every_steps == 0)

  def measure(step):
    knn_top1 = evaluate(state)["top1"]
    book.record(step, {"knn_top1": knn_top1})
    return knn_top1

  if start_step and evaluates(start_step) and not book.has(start_step, "knn_top1"):
    with stopping.held(False), book.paused():
      measure(start_step)
  guard = Guard(parts.workdir, picture_name=parts.train.picture_name, say=book.say)
  waited, in_flight, broken = 0.0, deque(), Broken(parts, book)
  for step in range(start_step + 1, parts.total_steps + 1):
    started = time.perf_counter()
    batch = next(stream)
    waited += time.perf_counter() - started
    broken.note(step, batch)
    if step == 1 and jax.process_index() == 0:
      with book.paused(), book.tolerant("views.png"):
        save_views(parts, batch)
    state, metrics = train_step(state, batches.place(batch, parts.mesh))
    guard.note(step, batch["index"], metrics.pop(NOT_FINITE))
    in_flight.append(metrics)
    if len(in_flight) > STEPS_IN_FLIGHT:
      jax.block_until_ready(in_flight.popleft())

    last = step == parts.total_steps
    if step % config.log.every_steps == 0 or last:
      # The schedule counts steps from 0: this is the rate of the step just taken.
      figures = {**jax.device_get(metrics), "learning_rate": float(parts.schedule(step - 1))}
      book.log(step, figures, data_wait_seconds=waited)
      waited = 0.0
      guard.check()
      broken.check(step, state.usable)
      if step > parts.steps_per_epoch:
        guard.warn_of_collapse(step, figures)
    stop = stopping.requested()
    if evaluates(step) or last or stop or step % config.checkpoint.every_steps == 0:
      with book.paused():
        guard.check()  # never over a good checkpoint
        knn_top1 = None
        if evaluates(step) and not stop:
          # It may take minutes, and whoever asks to stop has less: what is left out, the same command catches up on.
          try:
            with stopping.held(False):
              knn_top1 = measure(step)
          except Stopped:
            stop = True
        save(parts, state, checkpoints, knn_top1=knn_top1, surely=stop or last, say=book.say)
    if stop:
      book.say(f"stopped after step {step}, saved in {parts.workdir / 'checkpoints' / str(step)}; the same command "
               "goes on")
      stopping.stop()
  stream.close()
  return state


def save(parts: Run, state: TrainState, checkpoints: Checkpoints, **options: Any) -> None:
  """Starts to write a checkpoint of the state, see `Checkpoints.save`."""
  step = int(state.step)
  checkpoints.save(step, state, {**run_meta(parts), "step": step, "config": parts.config.to_dict()}, **options)


def calibrate(parts: Run, state: TrainState) -> TrainState:
  """Returns the untrained state with the batch statistics of the training pictures: random initialisation."""
  variables = features.calibrate_batch_stats(
    batch_stats_fn(parts), {"params": state.params, "batch_stats": state.batch_stats},
    test_pictures(parts, parts.train).test_batches(), parts.mesh, momentum=BATCH_NORM_MOMENTUM)
  trunk = jax.device_put(variables["batch_stats"]["trunk"], mesh_lib.whole(parts.mesh))
  return state.replace(batch_stats={**state.batch_stats, "trunk": trunk})


def make_step(parts: Run) -> Callable:
  """Returns train_step(state, batch) -> (state, metrics) of the run's system."""
  config = parts.config
  common = parts.parallel_network, parts.optimizer, parts.views_fn
  if not system.has_bank(config):
    return make_prediction_step(*common, parts.layout, parts.mesh, micro_batches=config.micro_batches)
  return make_train_step(
    *common, make_loss(config, parts.layout), parts.layout, parts.mesh, num_negatives=config.num_negatives,
    negative_sampling=config.negative_sampling, temperature=config.temperature, pretext_weight=config.pretext_weight,
    bank_momentum=config.bank.momentum, micro_batches=config.micro_batches)


class Broken:
  """Counts and names the pictures that could not be read, each once."""

  def __init__(self, parts: Run, book: Logbook):
    self._source, self._book, self._seen = parts.train, book, set()
    self._layout, self._limit = parts.layout, parts.config.data.max_bad_fraction
    self._path, self._count = parts.workdir / "broken_pictures.json", 0
    self._num_usable = jax.jit(jnp.sum, out_shardings=mesh_lib.whole(parts.mesh))
    self._on_every_device = jax.jit(lambda x: x, out_shardings=mesh_lib.whole(parts.mesh))

  def note(self, step: int, batch: dict[str, np.ndarray]) -> None:
    """Says in the log which pictures of the batch are broken and not yet named."""
    for index in batch["index"][~batch["valid"]]:
      if index not in self._seen:
        self._seen.add(index)
        if len(self._seen) <= NAMED_BROKEN:
          self._book.say(f"step {step}: {self._source.picture_name(int(index))} cannot be read; from now on it has no "
                         f"weight ({len(self._seen)} broken so far)")
        elif len(self._seen) % 100 == 0:
          self._book.say(f"step {step}: {len(self._seen)} pictures cannot be read so far")

  def check(self, step: int, usable: jax.Array) -> None:
    """Writes the list of all that were found broken, by any process and before any restart.

    Args:
      step: the last one.
      usable: bool[S * R], see `TrainState`.

    Raises:
      UserError: they are more than `data.max_bad_fraction` of the pictures.
    """
    count = self._layout.num_images - int(self._num_usable(usable))
    if count == self._count:
      return
    self._count = count
    rows = np.asarray(self._on_every_device(usable))
    index = np.flatnonzero(~rows[self._layout.row_of(np.arange(self._layout.num_images))])
    if jax.process_index() == 0:
      with self._book.tolerant(self._path.name):
        write_json(self._path, {"step": step, "count": len(index), "pictures": [
          {"index": int(i), "name": self._source.picture_name(int(i))} for i in index]})
    if len(index) > self._limit * self._layout.num_images:
      raise UserError(
        f"{count} of {self._layout.num_images} training pictures cannot be read, more than data.max_bad_fraction="
        f"{self._limit}; they are listed in {self._path}; where a disk or a network is at fault, the same command goes "
        "on from the newest checkpoint once it is back; else allow more, or start anew without them")


def save_views(parts: Run, batch: dict[str, np.ndarray]) -> None:
  """Saves a picture of the first images of the batch as the network sees them, views.png."""
  shown = {name: value[:8] for name, value in batch.items()}
  keys = view_keys(parts.config.seed, 0, jnp.asarray(shown["index"]))
  image, pretext, _ = jax.jit(parts.views_fn)(keys, shown.get("image_crop"), shown.get("pretext_crop"))
  pictures.save_views_picture(parts.workdir / "views.png", *(
    None if view is None else denormalise(view) for view in (image, pretext)))


def test_pictures(parts: Run, source: sources.Source) -> Pictures:
  """Returns the pictures of a source under the test transform."""
  config = parts.config
  return Pictures(source, image_size=config.data.image_size, crop_fraction=config.evaluate.crop_fraction,
                  batch_size=config.evaluate.batch_size, num_threads=config.data.num_threads)


def unlabelled(parts: Run) -> str:
  """Returns which pictures have no labels, so that kNN cannot be measured; "" if it can."""
  for name, source in (("training", parts.train), ("held-out", parts.test)):
    if source is None:
      return f"there are no {name} pictures (--config.evaluate.split)"
    if not source.class_names:
      return f"the {name} pictures have no labels (for folders of classes: --config.data.labels=folder)"
    if source.multi_label:
      return f"the {name} pictures may show several classes each"
  return ""


@dataclasses.dataclass(frozen=True)
class StoppablePictures(Pictures):
  """Pictures that are read no further once the run is asked to stop, in all processes alike."""

  stopping: Stopping

  def test_batches(self, **options: Any) -> Iterator[dict[str, np.ndarray]]:
    """Returns every picture once, see `Pictures.test_batches`; raises Stopped in between."""
    with contextlib.closing(super().test_batches(**options)) as test_batches:
      for batch in test_batches:
        if self.stopping.requested():
          self.stopping.stop()
        yield batch


def make_evaluation(parts: Run, book: Logbook, stopping: Stopping) -> Callable | None:
  """Returns evaluate(state) -> kNN figures of the held-out pictures; None where it cannot be done.

  The neighbours are the rows of the bank; without a bank, the trunk's features of the training pictures. It raises
  Stopped where it is asked to.
  """
  config = parts.config
  if not config.evaluate.every_epochs:
    return None
  if missing := unlabelled(parts):
    book.say(f"no kNN during the run: {missing}")
    return None
  train_set, test_set = (StoppablePictures(**vars(test_pictures(parts, source)), stopping=stopping)
                         for source in (parts.train, parts.test))

  def evaluate_features(state):
    model = Model(parts.network, {"params": state.params, "batch_stats": state.batch_stats})
    return knn.measure_knn(model, train_set, test_set, mesh=parts.mesh, layer="pooled", k=config.evaluate.k,
                           temperature=config.evaluate.temperature).figures

  if not system.has_bank(config):
    return evaluate_features
  on_every_device = jax.jit(lambda x: x, out_shardings=mesh_lib.whole(parts.mesh))

  @functools.cache  # at the first evaluation: a TFDS set has to be read once from end to end for its labels
  def row_labels():
    if config.data.source == "tfds":
      book.say(f"reading the labels of {len(parts.train):,} pictures, once")
    labels = parts.train.labels()
    by_row = np.full(parts.layout.num_rows, -1, np.int32)
    by_row[parts.layout.row_of(np.arange(len(labels)))] = labels
    return by_row

  def embed(variables, image):
    return memory_bank.normalise(parts.network.apply(variables, image, method="embed_image"))

  def evaluate(state):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    test = features.extract_features(embed, variables, test_set.test_batches(), parts.mesh)
    voting = np.where(np.asarray(on_every_device(state.usable)), row_labels(), -1)
    return knn.accuracy(state.bank, voting, test.features, test.labels, mesh=parts.mesh, k=config.evaluate.k,
                        temperature=config.evaluate.temperature)

  return evaluate


def finish(parts: Run, state: TrainState, book: Logbook) -> None:
  """Ends the run: the table of what was learnt, the curves, and a list of everything written."""
  config = parts.config
  first = jax.process_index() == 0
  if first:
    with book.tolerant("curves.png"):
      pictures.save_curves(parts.workdir / "curves.png", book.rows)
  book.say(book.summary())
  if config.evaluate.learning and not unlabelled(parts):
    table = measure_learning(parts, state)
    book.say(learning.format_table(table))
    if first:
      with book.tolerant("learning.json"):
        write_json(parts.workdir / "results" / "learning.json", table)
  book.say("written:")
  for path in sorted(parts.workdir.iterdir()):
    names = ", ".join(sorted(child.name for child in path.iterdir())) if path.is_dir() else ""
    book.say(f"  {path}{'/' if names else ''} {names}".rstrip())


def measure_learning(parts: Run, state: TrainState) -> dict[str, Any]:
  """Returns kNN on raw pixels, the untrained and the trained network."""
  config = parts.config
  initial = parts.initial_state()

  def pooled(variables, image):
    return parts.network.apply(variables, image, method="features")["pooled"]

  variables = [{"params": s.params, "batch_stats": s.batch_stats} for s in (initial, state)]
  return learning.measure_learning(
    test_pictures(parts, parts.train).test_batches, test_pictures(parts, parts.test).test_batches, forward_fn=pooled,
    stats_fn=batch_stats_fn(parts),
    untrained=variables[0], trained=variables[1], momentum=BATCH_NORM_MOMENTUM, mesh=parts.mesh, k=config.evaluate.k,
    temperature=config.evaluate.temperature,
    settings={"seed": config.seed, "step": int(state.step), "image_size": config.data.image_size,
              "crop_fraction": config.evaluate.crop_fraction, "train": parts.train.description,
              "test": parts.test.description, "train_fingerprint": parts.train.fingerprint,
              "test_fingerprint": parts.test.fingerprint})


def batch_stats_fn(parts: Run) -> Callable:
  """Returns stats_fn(variables, image) -> batch statistics, for `calibrate_batch_stats`."""
  def batch_stats(variables, image):
    _, updated = parts.parallel_network.apply(variables, image, train=True, method="features",
                                              mutable=["batch_stats"])
    # Those of a head stay as they are: whoever takes features does not see it.
    return {**variables["batch_stats"], **updated["batch_stats"]}
  return batch_stats
