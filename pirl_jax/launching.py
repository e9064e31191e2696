"""What launch.py and the command pirl-jax do: --config=CONFIG[:VARIANT] [--workdir=DIR] [--config.FIELD=VALUE ...]

Reads the flags and the config, and hands the config to the job that it names (`jobs`).
"""

import sys

from absl import app, flags

from pirl_jax import config_files, jobs
from pirl_jax.errors import UserError
from pirl_jax.runtime import memory
from pirl_jax.storage.settings import field_problem

CONFIG = config_files.define_flag()
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; each job has a default of its own.")
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, for processes started by hand.")
KEEP_MEMORY = flags.DEFINE_bool("keep_memory", True, "Linux: the process keeps memory that it frees, a CPU is faster.")
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
    raise _one_line(error, argv) from error
  if not named:
    raise UserError("no config; for a first run: python launch.py --config=configs/pirl.py")
  if rest[1:]:
    raise UserError(f"unexpected argument {rest[1]!r}; overrides look like --config.batch_size=256")
  return rest


def _one_line(error: Exception, argv: list[str]) -> UserError:
  """Returns what went wrong as a UserError: the libraries wrap the first error in others and paste its traceback."""
  chain: list[BaseException] = [error]
  while following := chain[-1].__cause__ or chain[-1].__context__:
    chain.append(following)
  if isinstance(chain[-1], UserError):
    return chain[-1]
  problems = []
  if any(isinstance(part, KeyError) for part in chain):  # of a field's name they tell the last part alone
    config = config_files.define_flag(alone := flags.FlagValues(), sys_argv=argv[:1])
    alone(argv, known_only=True)
    given = [argument.partition("=")[0].lstrip("-").removeprefix("no") for argument in argv if argument.startswith("-")]
    fields = [name.removeprefix("config.") for name in given if name.startswith("config.")]
    problems = [problem for field in fields if (problem := field_problem(field, config.value.to_dict()))]
  return UserError(problems[0] if problems else " ".join(str(error).split()))


def main(_: list[str]) -> None:
  """Runs the job that the config names."""
  if KEEP_MEMORY.value:
    memory.keep_freed()
  jobs.carry_out(CONFIG.value, WORKDIR.value, (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value))


def start() -> None:
  """Parses the flags, runs the job, and ends with exit code 2 and one line where the user can mend what is wrong, with
  130 after Ctrl-C, and where it trains with 0 after SIGTERM.
  """
  # --help shows the flags of the program that was called.
  for flag in (CONFIG, WORKDIR, KEEP_MEMORY, COORDINATOR, NUM_PROCESSES, PROCESS_ID):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])
  try:
    app.run(main, flags_parser=parse_flags)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("interrupted; the same command goes on", file=sys.stderr)
    sys.exit(130)
