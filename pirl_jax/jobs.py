"""What a config can ask for: the jobs by name, and what goes round every one of them.

A job is a module with `run(config, workdir)`. One that saves what it has when it is asked to stop says `TRAINS = True`.
"""

import importlib
from contextlib import nullcontext

from ml_collections import ConfigDict

from pirl_jax.errors import UserError
from pirl_jax.runtime.quieting import quiet
from pirl_jax.training import stopping

JOBS = {"pretrain": "pirl_jax.training.pretrain", "evaluate": "pirl_jax.evaluation.evaluate",
        "study": "pirl_jax.studies.study", "checkpoints": "pirl_jax.runs"}
"""Modules by the `job` of a config, by name: a mistake in the flags is answered before JAX has loaded."""


def carry_out(config: ConfigDict, workdir: str, by_hand: tuple[str, int | None, int | None]) -> None:
  """Runs the job of the config, as one of the processes of the run if there are several.

  Args:
    config: of any job.
    workdir: folder of the run; "": the job's default.
    by_hand: the arguments of `processes.processes`.

  Raises:
    UserError: there is no such job; or see the job's `run`.
    Stopped, KeyboardInterrupt: by a signal.
  """
  if config.job not in JOBS:
    raise UserError(f"job={config.job!r} is unknown; choose from {', '.join(JOBS)}")
  quiet()
  settle = stopping.note_sigterm()  # JAX takes seconds to load, and only then the job says what the signal is to it
  jax, processes, job = (importlib.import_module(name) for name in (
    "jax", "pirl_jax.runtime.processes", JOBS[config.job]))
  trains = getattr(job, "TRAINS", False)
  settle(trains)
  # Of several processes JAX takes the signal for itself and tells the others.
  jax.config.update("jax_enable_preemption_service", trains)
  with processes.processes(*by_hand), stopping.Stopping() if trains and processes.alone() else nullcontext():
    job.run(config, workdir)
