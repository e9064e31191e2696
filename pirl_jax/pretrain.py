"""A pre-training run from its config: build, restore, loop, log, evaluate, save.

The config stops here: the rooms below are handed plain values.
"""

import dataclasses
import functools
import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from ml_collections import ConfigDict

from pirl_jax import losses, memory_bank, pictures
from pirl_jax import mesh as mesh_lib
from pirl_jax.checkpoints import Checkpoints
from pirl_jax.data import batches, sources
from pirl_jax.errors import UserError
from pirl_jax.evaluation import features, knn, learning
from pirl_jax.logbook import Logbook, flatten, write_json
from pirl_jax.models.network import Network, create_network
from pirl_jax.models.resnet import BATCH_NORM_MOMENTUM
from pirl_jax.optimizer import cosine_schedule, create_optimizer
from pirl_jax.state import TrainState, create_state
from pirl_jax.step import make_train_step, view_keys
from pirl_jax.views.jigsaw import check_jigsaw
from pirl_jax.views.photometric import Recipe
from pirl_jax.views.two_views import denormalise, make_views

FREE_ON_RESUME = ("num_epochs", "checkpoint.", "evaluate.", "log.", "data.num_threads")
"""Fields that may change when a run goes on; a name that ends with a dot stands for its whole group."""

STEPS_IN_FLIGHT = 2
"""Steps that the devices may be behind the host: enough to keep them busy, and no pile of batches in memory."""

NAMED_BROKEN = 20
"""Broken pictures named in the log one by one; beyond them only the count goes on."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


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
    axis = mesh_lib.AXIS if self.config.model.batch_norm == "global" else None
    return self.network.clone(trunk=self.network.trunk.clone(batch_norm_axis=axis))

  def initial_state(self) -> TrainState:
    """Returns the state before the first step; the same at every call."""
    config = self.config
    num_patches, patch_size = config.jigsaw.grid**2, config.jigsaw.patch_size
    return create_state(
      config.seed, self.network, self.optimizer, self.layout, mesh=self.mesh, dim=config.model.dim,
      bank_dtype=DTYPES[config.bank.dtype], image_shape=(config.data.image_size, config.data.image_size, 3),
      pretext_shape=(num_patches, patch_size, patch_size, 3))


def run(config: ConfigDict, workdir: str) -> None:
  """Pre-trains as `config` says and writes everything into `workdir`; goes on where an earlier run there stopped.

  Without a `workdir` ("") the folder is runs/NAME.

  Raises:
    UserError: the config, the data or what lies in `workdir` does not allow it. Nothing has been compiled or written.
  """
  check_config(config)
  workdir = Path(workdir or f"runs/{config.name}")
  check_same_config(config, workdir)
  parts = build(config, workdir)
  with Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
    state = restore(parts, checkpoints) if checkpoints.steps() else parts.initial_state()
    start_step = int(state.step)
    write_json(workdir / "config.json", config.to_dict())
    print(parameter_overview.get_parameter_overview(state.params, include_stats=False))
    with Logbook(workdir, start_step=start_step, total_steps=parts.total_steps,
                 steps_per_epoch=parts.steps_per_epoch, batch_size=config.batch_size,
                 enabled=jax.process_index() == 0) as book:
      if start_step:
        book.say(f"goes on from step {start_step} of {parts.total_steps}")
      state = train(parts, state, checkpoints, book)
      finish(parts, state, book)


def check_config(config: ConfigDict) -> None:
  """Raises UserError for a value that no data could make possible."""
  def require(holds, field, rule):
    if not holds:
      raise UserError(f"{field}={_get(config, field)!r} is not possible: {rule}")

  for field in ("num_epochs", "batch_size", "data.image_size", "data.pretext_size", "data.num_threads", "jigsaw.grid",
                "jigsaw.patch_size", "model.dim", "checkpoint.every_steps", "checkpoint.keep", "evaluate.k",
                "evaluate.batch_size", "log.every_steps"):
    require(_get(config, field) >= 1, field, "a whole number from 1 is needed")
  require(config.evaluate.every_epochs >= 0, "evaluate.every_epochs", "0 (never) or more is needed")
  for field in ("pretext_weight", "bank.momentum", "optimizer.momentum"):
    require(0 <= _get(config, field) <= 1, field, "it lies in [0, 1]")
  for field in ("optimizer.learning_rate", "optimizer.weight_decay", "optimizer.end_factor",
                "optimizer.warmup_epochs"):
    require(0 <= _get(config, field) < float("inf"), field, "a finite number from 0 is needed")
  require(0 < config.evaluate.temperature < float("inf"), "evaluate.temperature", "a number above 0 is needed")
  require(0 < config.evaluate.crop_fraction <= 1, "evaluate.crop_fraction", "it lies in (0, 1]")
  for field in ("data.image_scale", "data.pretext_scale"):
    scale = _get(config, field)
    require(len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1, field, "it is (smallest, largest), within (0, 1]")
  for field, choices in (("model.dtype", DTYPES), ("bank.dtype", DTYPES), ("model.head", ("linear", "mlp")),
                         ("model.batch_norm", ("global", "device")),
                         ("optimizer.update_interval", ("step", "epoch"))):
    require(_get(config, field) in choices, field, f"choose from {', '.join(choices)}")


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
    stored = flatten(json.loads(path.read_text()))
  except ValueError as error:
    raise UserError(f"{path} is not readable as JSON ({error}); choose another --workdir") from error
  now = flatten(json.loads(json.dumps(config.to_dict())))
  for field in sorted(stored.keys() | now.keys()):
    free = any(field == name or (name.endswith(".") and field.startswith(name)) for name in FREE_ON_RESUME)
    if not free and stored.get(field) != now.get(field):
      raise UserError(f"{workdir} holds a run with {field}={stored.get(field)!r}, and now it is {now.get(field)!r}; "
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
  check_jigsaw(config.data.pretext_size, **config.jigsaw)
  views_fn = make_views(recipe=Recipe(**config.photometric), pretext=config.pretext, **config.jigsaw)
  network = create_network(**{name: value for name, value in config.model.items() if name != "batch_norm"})

  train, test = open_data(config)
  steps_per_epoch = batches.steps_per_epoch(len(train), config.batch_size)
  layout = memory_bank.create_layout(len(train), num_devices=num_devices, num_negatives=config.num_negatives)
  losses.make_loss(config.loss, temperature=config.temperature, num_images=len(train),
                   num_negatives=config.num_negatives)
  schedule = cosine_schedule(
    base_rate=config.optimizer.learning_rate * config.batch_size / 1024, end_factor=config.optimizer.end_factor,
    num_steps=config.num_epochs * steps_per_epoch,
    warmup_steps=round(config.optimizer.warmup_epochs * steps_per_epoch),
    hold_steps=steps_per_epoch if config.optimizer.update_interval == "epoch" else 1)
  optimizer = create_optimizer(schedule, momentum=config.optimizer.momentum,
                               weight_decay=config.optimizer.weight_decay)
  return Run(config, workdir, mesh, train, test, layout, network, optimizer, schedule, views_fn, steps_per_epoch)


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
    for name, now in expected.items():
      if meta.get(name) != now:
        raise UserError(f"the checkpoint in {parts.workdir} has {name} {meta.get(name)!r}, and this run {now!r}; "
                        "choose another --workdir")
    if meta["step"] > parts.total_steps:
      raise UserError(f"{parts.workdir} has already done {meta['step']} steps, and num_epochs="
                      f"{parts.config.num_epochs} is {parts.total_steps}; raise num_epochs")

  return checkpoints.restore_newest(check, jax.eval_shape(parts.initial_state), parts.mesh, say=print)


def run_meta(parts: Run) -> dict[str, Any]:
  """Returns what must be the same for a checkpoint to belong to this run, JSON values."""
  return {
    "data": parts.train.fingerprint, "num_images": parts.layout.num_images, "num_strata": parts.layout.num_strata,
    "model": parts.config.model.to_dict()}


def train(parts: Run, state: TrainState, checkpoints: Checkpoints, book: Logbook) -> TrainState:
  """Returns the state after the last step."""
  config, start_step = parts.config, int(state.step)
  loss_fn = losses.make_loss(config.loss, temperature=config.temperature, num_images=parts.layout.num_images,
                             num_negatives=config.num_negatives)
  train_step = make_train_step(
    parts.parallel_network, parts.optimizer, parts.views_fn, loss_fn, parts.layout, parts.mesh,
    num_negatives=config.num_negatives, temperature=config.temperature, pretext_weight=config.pretext_weight,
    bank_momentum=config.bank.momentum, seed=config.seed)
  evaluate = make_evaluation(parts, book)
  data = config.data
  stream = batches.train_batches(
    parts.train, batch_size=config.batch_size, image_size=data.image_size, image_scale=data.image_scale,
    pretext_size=data.pretext_size, pretext_scale=data.pretext_scale, seed=config.seed, start_step=start_step,
    process_index=jax.process_index(), process_count=jax.process_count(), num_threads=data.num_threads)

  waited, in_flight, broken = 0.0, deque(), Broken(parts.train, book)
  for step in range(start_step + 1, parts.total_steps + 1):
    started = time.perf_counter()
    batch = next(stream)
    waited += time.perf_counter() - started
    broken.note(step, batch)
    if step == 1:
      with book.paused():
        save_views(parts, batch)
    state, metrics = train_step(state, batches.place(batch, parts.mesh))
    in_flight.append(metrics)
    if len(in_flight) > STEPS_IN_FLIGHT:
      jax.block_until_ready(in_flight.popleft())

    last = step == parts.total_steps
    if step % config.log.every_steps == 0 or last:
      # The schedule counts steps from 0: this is the rate of the step just taken.
      figures = {**jax.device_get(metrics), "learning_rate": float(parts.schedule(step - 1))}
      book.log(step, figures, data_wait_seconds=waited)
      waited = 0.0
      check_finite(parts, step, figures["loss"])
    measured = evaluate is not None and (last or step % (config.evaluate.every_epochs * parts.steps_per_epoch) == 0)
    if measured or last or step % config.checkpoint.every_steps == 0:
      with book.paused():
        check_finite(parts, step, jax.device_get(metrics["loss"]))  # never over a good checkpoint
        knn_top1 = evaluate(state)["top1"] if measured else None
        if measured:
          book.record(step, {"knn_top1": knn_top1})
        checkpoints.save(step, state, {**run_meta(parts), "step": step, "config": config.to_dict()},
                         knn_top1=knn_top1)
  stream.close()
  return state


def check_finite(parts: Run, step: int, loss: np.ndarray) -> None:
  """Raises UserError when the loss f32[] is not a finite number."""
  if not np.isfinite(loss):
    raise UserError(f"the loss is {loss} at step {step}; checkpoints from before are in "
                    f"{parts.workdir / 'checkpoints'}; a lower optimizer.learning_rate may help, in another --workdir")


class Broken:
  """Counts and names the pictures that could not be read, each once."""

  def __init__(self, source: sources.Source, book: Logbook):
    self._source, self._book, self._seen = source, book, set()

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


def save_views(parts: Run, batch: dict[str, np.ndarray]) -> None:
  """Saves a picture of the first images of the batch as the network sees them, views.png."""
  shown = {name: value[:8] for name, value in batch.items()}
  keys = view_keys(parts.config.seed, 0, jnp.asarray(shown["index"]))
  views = jax.jit(parts.views_fn)(keys, shown["image_crop"], shown["pretext_crop"])
  pictures.save_views_picture(parts.workdir / "views.png", *(np.asarray(denormalise(view)) for view in views))


def eval_batches(parts: Run, source: sources.Source) -> Callable:
  """Returns a function that opens the pictures of a source under the test transform."""
  config = parts.config
  return lambda: batches.eval_batches(
    source, batch_size=config.evaluate.batch_size, image_size=config.data.image_size,
    crop_fraction=config.evaluate.crop_fraction, num_threads=config.data.num_threads)


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


def make_evaluation(parts: Run, book: Logbook) -> Callable | None:
  """Returns evaluate(state) -> kNN figures of the held-out pictures against the bank; None where it cannot be done."""
  config = parts.config
  if not config.evaluate.every_epochs:
    return None
  if missing := unlabelled(parts):
    book.say(f"no kNN during the run: {missing}")
    return None
  open_test = eval_batches(parts, parts.test)
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
    test = features.extract_features(embed, variables, open_test(), parts.mesh)
    voting = np.where(np.asarray(on_every_device(state.usable)), row_labels(), -1)
    return knn.accuracy(state.bank, voting, test.features, test.labels, mesh=parts.mesh, k=config.evaluate.k,
                        temperature=config.evaluate.temperature)

  return evaluate


def finish(parts: Run, state: TrainState, book: Logbook) -> None:
  """Ends the run: the table of what was learnt, the curves, and a list of everything written."""
  config = parts.config
  if jax.process_index() == 0:
    pictures.save_curves(parts.workdir / "curves.png", parts.workdir / "metrics.jsonl")
  book.say(book.summary())
  if config.evaluate.learning and not unlabelled(parts):
    book.say(learning.format_table(measure_learning(parts, state)))
  book.say("written:")
  for path in sorted(parts.workdir.iterdir()):
    names = ", ".join(sorted(child.name for child in path.iterdir())) if path.is_dir() else ""
    book.say(f"  {path}{'/' if names else ''} {names}".rstrip())


def measure_learning(parts: Run, state: TrainState) -> dict[str, Any]:
  """Returns, and writes to results/learning.json, kNN on raw pixels, the untrained and the trained network."""
  config = parts.config
  initial = parts.initial_state()

  def pooled(variables, image):
    return parts.network.apply(variables, image, method="features")["pooled"]

  def batch_stats(variables, image):
    _, updated = parts.parallel_network.apply(variables, image, train=True, method="features",
                                              mutable=["batch_stats"])
    # Both heads are without batch norm: the trunk's statistics are all there are.
    return updated["batch_stats"]

  variables = [{"params": s.params, "batch_stats": s.batch_stats} for s in (initial, state)]
  return learning.measure_learning(
    eval_batches(parts, parts.train), eval_batches(parts, parts.test), forward_fn=pooled, stats_fn=batch_stats,
    untrained=variables[0], trained=variables[1], momentum=BATCH_NORM_MOMENTUM, mesh=parts.mesh, k=config.evaluate.k,
    temperature=config.evaluate.temperature, path=parts.workdir / "results" / "learning.json",
    settings={"seed": config.seed, "step": int(state.step), "image_size": config.data.image_size,
              "crop_fraction": config.evaluate.crop_fraction, "train": parts.train.description,
              "test": parts.test.description, "train_fingerprint": parts.train.fingerprint,
              "test_fingerprint": parts.test.fingerprint})
