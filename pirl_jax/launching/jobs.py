"""The jobs that a config can name, and the set-up that all jobs share.

A job is a module with `run(config, workdir)`. A job that saves its state when it is asked to stop sets `TRAINS = True`.
"""

import importlib
from contextlib import nullcontext

from ml_collections import ConfigDict

from pirl_jax.errors import Unreadable, UserError
from pirl_jax.runtime.quieting import quiet
from pirl_jax.training import stopping

JOBS = {"pretrain": "pirl_jax.training.pretrain", "evaluate": "pirl_jax.evaluation.evaluate",
        "study": "pirl_jax.studies.study", "prepare": "pirl_jax.data.prepare", "plan": "pirl_jax.planning.plan",
        "checkpoints": "pirl_jax.runs", "report": "pirl_jax.reporting.report",
        "export": "pirl_jax.weights.export"}
"""The module of each `job` of a config. Modules are named, not imported, so that errors in the flags are reported
before JAX is loaded."""


def carry_out(config: ConfigDict, workdir: str, by_hand: tuple[str, int | None, int | None],
              compilation_cache: str | None) -> None:
  """Runs the job of the config, as one of the processes of the run if there are several.

  Args:
    config: of any job.
    workdir: folder of the run; "" for the job's default.
    by_hand: the arguments of `processes.processes`.
    compilation_cache: the argument of `caching.keep_compiled`.

  Raises:
    UserError: there is no such job; a file could not be read or written; or see the job's `run`.
    Stopped, KeyboardInterrupt: raised after a signal.
  """
  if config.job not in JOBS:
    raise UserError(f"job={config.job!r} is unknown; choose from {', '.join(JOBS)}")
  quiet()
  settle = stopping.note_signals()  # loading JAX takes seconds; only then is it known what a signal means for the job
  jax, caching, processes, job = (importlib.import_module(name) for name in (
    "jax", "pirl_jax.runtime.caching", "pirl_jax.runtime.processes", JOBS[config.job]))
  trains = getattr(job, "TRAINS", False)
  settle(trains)
  # With several processes JAX itself receives the signal and informs the other processes.
  jax.config.update("jax_enable_preemption_service", trains)
  with processes.processes(*by_hand), stopping.Stopping() if trains and processes.alone() else nullcontext():
    caching.keep_compiled(compilation_cache)
    try:
      job.run(config, workdir)
    except OSError as error:
      if error.errno is None:  # a library's own error
        raise
      where = f"{error.filename}: " if error.filename else ""
      raise Unreadable(f"{where}{error.strerror}; when the disk or the network works again, the same command goes "
                       "on") from error
