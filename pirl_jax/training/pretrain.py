"""A pre-training run from its config: build, restore, loop, log, evaluate, save.

Only the files of this folder read the config; the packages below get plain values.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from pirl_jax import system
from pirl_jax.data import batches
from pirl_jax.errors import Unreadable, UserError
from pirl_jax.evaluation.protocols import learning
from pirl_jax.evaluation.representation import rank_me
from pirl_jax.figures import plots
from pirl_jax.method.health import NOT_FINITE, NUM_USABLE
from pirl_jax.method.programs import VOID
from pirl_jax.method.randomness import view_keys
from pirl_jax.method.state import TrainState
from pirl_jax.models.network import Model
from pirl_jax.reporting import report
from pirl_jax.reporting.looking import Sight, look
from pirl_jax.runs import Run
from pirl_jax.runtime import caching, devices, out_of_memory, processes
from pirl_jax.runtime.environment import numeric_environment
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.storage.files import write_json
from pirl_jax.storage.formats import FORMAT
from pirl_jax.storage.logbook import Logbook
from pirl_jax.storage.probing import probe
from pirl_jax.storage.settings import flatten
from pirl_jax.training import resuming, verdict
from pirl_jax.training.beginning import note_saved
from pirl_jax.training.describing import ExpectedTime, describe, dry_run, way_out
from pirl_jax.training.guards import Broken, Guard
from pirl_jax.training.in_flight import InFlight
from pirl_jax.training.incoming import Incoming, interruptibly
from pirl_jax.training.measuring import Evaluations, calibrate, learning_of, make_evaluation, unlabelled
from pirl_jax.training.other_set import make_other_evaluation
from pirl_jax.training.parts import Parts, build, check_config, make_step, test_images
from pirl_jax.training.resuming import (
  begin,
  changed_schedule,
  check_beginning,
  check_images,
  hold,
  moved,
  other_root,
  restore,
  run_meta,
  save,
  with_stored_choices,
)
from pirl_jax.training.starting import first_state
from pirl_jax.training.stopping import Stopping
from pirl_jax.training.view_figures import ViewFigures, make_bank_rows
from pirl_jax.views.normalisation import denormalise
from pirl_jax.weights.export import WeightsSettings, export

BANK_ROWS = "bank_rows"
"""Name of the result of `make_bank_rows` among the metrics of a step that is logged."""

TRAINS = True
"""If this job is asked to stop, it saves its state and ends with exit code 0, see `launching.jobs`."""


def run(config: ConfigDict, workdir: str) -> None:
  """Pre-trains as `config` says and writes everything into `workdir`. A run in the same folder is resumed.

  If `workdir` is "", the folder is runs/NAME.

  Raises:
    UserError: the config or the data are wrong, or `workdir` holds something else. In this case nothing has been
      compiled or written.
    Stopped: by SIGTERM or Ctrl-C, after the state has been saved.
  """
  with Stopping() as stopping:
    pretrain_with(config, Path(workdir or f"runs/{config.name}"), stopping)


def pretrain_with(config: ConfigDict, workdir: Path, stopping: Stopping) -> None:
  """Pre-trains as `run` does, until the run is finished or `stopping` asks it to stop."""
  for line in devices.lines():
    print(line)
  parts = processes.together(prepare, config, workdir)
  for line in describe(parts):
    print(line)
  if parts.config.dry_run:
    print(dry_run(parts))
    return
  other = processes.together(make_other_evaluation, parts)
  with out_of_memory.told(lambda: way_out(parts)):
    _pretrain(parts, stopping, other)


def _pretrain(parts: Parts, stopping: Stopping, other: Callable | None) -> None:
  """Pre-trains, or resumes, the run of which these are the parts; `other` judges it on another set."""
  config, workdir = parts.config, parts.workdir
  processes.check_alike({
    "the folder of the run": str(workdir), **flatten(config.to_dict()),
    "the training images": parts.train.fingerprint,
    "the held-out images": parts.test and parts.test.fingerprint,
    **numeric_environment()["draws"], "the version of jax": jax.__version__, "the format of checkpoints": FORMAT})
  with processes.together(hold, workdir), Checkpoints(
      workdir / "checkpoints", keep=config.checkpoint.keep, note=partial(note_saved, workdir)) as checkpoints:
    processes.together(probe, workdir)
    steps = processes.together(checkpoints.steps)
    processes.check_alike({f"the list of the checkpoints in {workdir}": steps})
    if steps:
      state = restore(parts, checkpoints)
    else:
      processes.together(check_beginning, parts)
      state = first_state(parts)
    start_step = int(state.step)
    schedule = changed_schedule(parts, start_step) if start_step else ""
    processes.together(begin, parts, parameter_overview.get_parameter_overview(state.params, include_stats=False),
                       start_step if steps else None)
    number = parameter_overview.count_parameters(state.params)
    print(f"parameters: {number:,}, listed in {workdir / resuming.PARAMETERS}")
    with Logbook(workdir, start_step=start_step, total_steps=parts.total_steps,
                 steps_per_epoch=parts.steps_per_epoch, batch_size=config.batch_size,
                 enabled=jax.process_index() == 0) as book:
      if start_step:
        book.say(f"resumes from step {start_step} of {parts.total_steps}")
      if schedule:
        book.say(schedule)
      views = ViewFigures(parts, stopping) if config.evaluate.views and config.num_epochs else None
      if config.num_epochs:
        evaluations = Evaluations(parts, book, make_evaluation(parts, book, stopping), views, other)
        book.say("compiles the step, which takes up to some minutes; later starts take it from the cache")
        with stopping.held():
          state = train(parts, state, checkpoints, book, stopping, evaluations)
        stopping.check()
      elif not steps:
        state = calibrate(parts, state, test_images(parts, parts.train).test_batches())
        save(parts, state, checkpoints, knn_top1=None, surely=True, say=book.say, pause=stopping.pause)
      finish(parts, state, book, views)


def prepare(config: ConfigDict, workdir: Path) -> Parts:
  """Returns the parts of the run, see `build`, after all checks that a process can make by itself.

  Raises:
    UserError: see `check_config`, `with_stored_choices` and `build`.
  """
  check_config(config)
  config = with_stored_choices(config, workdir)
  try:
    return build(config, workdir, lambda train: None if config.data.grown else check_images(train, workdir))
  except UserError as error:
    if root := other_root(config, workdir):
      raise UserError(f"{workdir} holds a run on the images in {root}; give those in {config.data.root} another place, "
                      "--workdir=runs/NAME; or, if they are the same images, name their sub-folder, "
                      f"--config.data.split, to resume the run ({error})") from error
    if moved(config, workdir):
      raise UserError(f"{error}; if the images have been moved, --config.data.root=DIR with their new place resumes "
                      f"the run in {workdir}") from error
    raise


def train(parts: Parts, state: TrainState, checkpoints: Checkpoints, book: Logbook, stopping: Stopping,
          evaluations: Evaluations) -> TrainState:
  """Returns the state after the last step.

  Raises:
    Stopped: see `run`.
  """
  config, start_step = parts.config, int(state.step)
  train_step = make_step(parts)
  bank_rows = make_bank_rows(parts) if system.has_bank(config) else None

  if start_step and evaluations.missing(start_step):
    with stopping.held(False), book.paused():
      evaluations.measure(start_step, state)
  guard = Guard(parts.workdir, image_name=parts.train.image_name, say=book.say)
  broken, expected, waited, void = Broken(parts, book), ExpectedTime(parts.total_steps, book.say), 0.0, False

  def logs(step: int) -> bool:
    return step % config.log.every_steps == 0 or step == parts.total_steps

  def over(step: int, index: np.ndarray, metrics: dict[str, jax.Array]) -> None:
    nonlocal waited, void
    expected.note(step)
    guard.note(step, index, metrics.pop(NOT_FINITE))
    num_usable, rows = metrics.pop(NUM_USABLE), metrics.pop(BANK_ROWS, None)
    void = metrics.pop(VOID)
    if not logs(step) or void:
      return
    figures = jax.device_get(metrics)
    if rows is not None:
      figures["bank_rank"] = rank_me(np.asarray(rows))
    book.log(step, figures, data_wait_seconds=waited)
    waited = 0.0
    guard.check()
    broken.check(int(num_usable), state)
    if step > parts.steps_per_epoch:
      guard.warn_of_collapse(step, figures)

  in_flight, incoming, saved = InFlight(over), Incoming(parts, start_step, broken, stopping), start_step
  for step in range(start_step + 1, parts.total_steps + 1):
    batch, seconds = incoming.next(step)
    if batch is None:
      in_flight.drain()
      guard.check()
      end_early(parts, state, checkpoints, book, stopping, failure=incoming.failure, saved=saved)
    waited += seconds
    if step == 1 and jax.process_index() == 0:
      with book.paused(), book.tolerant("views.png"):
        save_views(parts, batch)
    state, metrics = train_step(state, batches.place(batch, parts.mesh))
    if step == start_step + 1 and (compiled := caching.compile_report()):
      book.say(compiled)
    if bank_rows and logs(step):
      metrics[BANK_ROWS] = bank_rows(state)  # now: the next step takes the memory of this state
    in_flight.submit(step, batch["index"], metrics)
    last = step == parts.total_steps
    stop = stopping.requested()
    if evaluations.due(step) or last or stop or step % config.checkpoint.every_steps == 0:
      in_flight.drain()
      with book.paused():
        guard.check()  # a bad state must never be saved in place of a good checkpoint
        if void:  # then so are all steps after this one, and all processes know it
          if stop or last:
            end_early(parts, state, checkpoints, book, stopping, failure=incoming.failure, saved=saved)
          continue
        knn_top1 = None
        if evaluations.due(step) and not stop:
          # An evaluation may take minutes, but after a signal there may be only seconds. Therefore a signal interrupts
          # the evaluation; when the run resumes, the evaluation is made up for.
          knn_top1, stop = interruptibly(stopping, evaluations.measure, step, state)
        save(parts, state, checkpoints, knn_top1=knn_top1, surely=stop or last, say=book.say, pause=stopping.pause)
      saved = step
    if stop:
      say_stopped(parts, book, step)
      stopping.stop()
  incoming.close()
  return state


def end_early(parts: Parts, state: TrainState, checkpoints: Checkpoints, book: Logbook, stopping: Stopping, *,
              failure: Unreadable | None, saved: int) -> NoReturn:
  """Ends the run before the next batch is there; saves its state, unless it is that of step `saved`.

  All processes call this together.

  Raises:
    UserError: `failure`, or that of another process: its images cannot be read.
    Stopped: the run was asked to stop.
  """
  step, text = int(state.step), processes.first_failure(str(failure or ""))
  if step > saved:
    save(parts, state, checkpoints, knn_top1=None, surely=not text, say=book.say, pause=stopping.pause)
  if text:
    raise UserError(text) from failure
  say_stopped(parts, book, step)
  stopping.stop()


def say_stopped(parts: Parts, book: Logbook, step: int) -> None:
  """Says after which step the run was stopped, and how it goes on."""
  where = f", saved in {parts.workdir / 'checkpoints' / str(step)}" if step else ""
  book.say(f"stopped after step {step}{where}; the same command resumes the run")


def save_views(parts: Parts, batch: dict[str, np.ndarray]) -> None:
  """Saves views.png, a plot of the first images of the batch as the network sees them."""
  shown = {name: value[:8] for name, value in batch.items()}
  keys = view_keys(parts.config.seed, 0, jnp.asarray(shown["index"]))
  image, pretext, _ = jax.jit(parts.views_fn)(keys, shown.get("image_crop"), shown.get("pretext_crop"))
  plots.save_views_plot(parts.workdir / "views.png", *(
    None if view is None else denormalise(view) for view in (image, pretext)))


def sight_of(parts: Parts, state: TrainState) -> Sight:
  """Returns what the network makes of some images, for the report.

  Raises:
    UserError: the run has several processes, of which only the first one writes a report.
  """
  if not processes.alone():
    raise UserError("the run has several processes; the command with --config=configs/report.py makes this section")
  model = Model(parts.network, {"params": state.params, "batch_stats": state.batch_stats})
  test = None if parts.test is None else test_images(parts, parts.test)
  return look(model, test_images(parts, parts.train), test, mesh=parts.mesh)


def export_end(parts: Parts, state: TrainState, book: Logbook) -> None:
  """Writes the folder export of a run that is over. If the weights are wrong, a warning says so."""
  model = Model(parts.network, {"params": state.params, "batch_stats": state.batch_stats})
  step, meta = int(state.step), {**run_meta(parts), "config": parts.config.to_dict()}
  try:
    lines = export(Run(parts.workdir.name, parts.workdir, step, True, meta, model), parts.workdir / "export",
                   WeightsSettings())
  except UserError as error:
    lines = [f"WARNING: {error}"]
  for line in lines[:2]:
    book.say(line)


def finish(parts: Parts, state: TrainState, book: Logbook, views: ViewFigures | None) -> None:
  """Ends the run: plots the curves, prints summary, table of `learning` and verdict, and lists everything written."""
  config = parts.config
  first = jax.process_index() == 0
  if first:
    with book.tolerant("curves.png"):
      plots.save_curves(parts.workdir / "curves.png", book.rows)
  book.say(book.summary(chance_loss=verdict.chance_loss(parts)))
  if config.evaluate.learning and not unlabelled(parts):
    table = learning_of(parts, state)
    book.say(learning.format_learning(table))
    if first:
      with book.tolerant("learning.json"):
        write_json(parts.workdir / "results" / "learning.json", table)
  if views:
    verdict.give(parts, book, views)
  if first and config.export:
    with book.tolerant("export"):
      export_end(parts, state, book)
  if first and config.report:
    with book.tolerant(report.NAME):
      found = report.read_run(parts.workdir.name, parts.workdir, lambda: sight_of(parts, state))
      report.write(parts.workdir / report.NAME, [found])
  with book.tolerant("this list of files"):
    book.say("written:")
    for path in sorted(parts.workdir.glob("[!.]*")):
      names = ", ".join(sorted(child.name for child in path.iterdir())) if path.is_dir() else ""
      book.say(f"  {path}{'/' if names else ''} {names}".rstrip())
