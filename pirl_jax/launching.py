"""What launch.py and the command pirl-jax do: --config=CONFIG[:VARIANT] [--workdir=DIR] [--config.FIELD=VALUE ...]

Reads the flags and the config, joins the other processes of the run, if there are any, and hands the config to the job
that `config.job` names.
"""

import importlib
import signal
import sys
from contextlib import nullcontext

from absl import app, flags

from pirl_jax import config_files
from pirl_jax.errors import UserError
from pirl_jax.runtime.quieting import quiet

JOBS = {"pretrain": "pirl_jax.training.pretrain", "evaluate": "pirl_jax.evaluation.evaluate",
        "study": "pirl_jax.studies.study", "checkpoints": "pirl_jax.runs"}

CONFIG = config_files.define_flag()
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; each job has a default of its own.")
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, for processes started by hand.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes; 1: this one alone.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on.")


def parse_flags(argv: list[str]) -> list[str]:
  """Returns the arguments that are no flags (the program's name, and nothing else).

  Raises:
    UserError: whatever is wrong with the flags, the config file or an override, in one line.
  """
  try:
    rest = flags.FLAGS(argv)
    # A file that failed to load says so only now, when its config is first looked at.
    named = CONFIG.value is not None and "job" in CONFIG.value
  # absl and ml_collections raise all of these for a misspelt field, a value of another type or an unknown file.
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
    raise _one_line(error) from error
  if not named:
    raise UserError("no config; for a first run: python launch.py --config=configs/pirl.py")
  if rest[1:]:
    raise UserError(f"unexpected argument {rest[1]!r}; overrides look like --config.batch_size=256")
  return rest


def _one_line(error):
  """Returns the UserError that a config file raised, or one with the text of whatever went wrong with the flags."""
  # The libraries wrap the first error in others and paste its traceback into their message.
  chain = [error]
  while chain[-1].__cause__ or chain[-1].__context__:
    chain.append(chain[-1].__cause__ or chain[-1].__context__)
  if isinstance(chain[-1], UserError):
    return chain[-1]
  fields = [str(part.args[0]) for part in chain if isinstance(part, KeyError)]
  if fields:  # the longest has the name that was meant
    return UserError("there is no config field " + " ".join(max(fields, key=len).split()))
  return UserError(" ".join(str(error).split()))


def main(argv: list[str]) -> None:
  """Runs the job of the config."""
  del argv
  quiet()
  config = CONFIG.value
  if config.job not in JOBS:
    raise UserError(f"job={config.job!r} is unknown; choose from {', '.join(JOBS)}")
  # A job that trains ends with 0 after SIGTERM. A verification that is broken off must not pass for one that found
  # nothing.
  trains = config.job in ("pretrain", "study")
  if trains:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
  # Imported by name, so that a mistyped flag is answered before JAX has loaded.
  jax, processes = importlib.import_module("jax"), importlib.import_module("pirl_jax.runtime.processes")
  # Of several processes JAX takes the signal for itself and tells the others.
  jax.config.update("jax_enable_preemption_service", trains)
  with processes.processes(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value):
    run = importlib.import_module(JOBS[config.job]).run
    stopping = importlib.import_module("pirl_jax.training.stopping")
    with stopping.Stopping() if trains and processes.alone() else nullcontext():
      run(config, WORKDIR.value)


def start() -> None:
  """Parses the flags, runs the job, and ends with exit code 2 and one line where the user can mend what is wrong, with
  130 after Ctrl-C, and where it trains with 0 after SIGTERM.
  """
  # --help shows the flags of the program that was called.
  for flag in (CONFIG, WORKDIR, COORDINATOR, NUM_PROCESSES, PROCESS_ID):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])
  try:
    app.run(main, flags_parser=parse_flags)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("interrupted; the same command goes on", file=sys.stderr)
    sys.exit(130)
