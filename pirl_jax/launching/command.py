"""Code of launch.py and the command pirl-jax: --config=CONFIG[:VARIANT] [--workdir=DIR] [--config.FIELD=VALUE ...]

Reads the flags and the config, and runs the job that the config names (`jobs`).
"""

import sys
from collections.abc import Callable

from absl import app, flags

from pirl_jax.errors import UserError
from pirl_jax.launching import config_files, jobs
from pirl_jax.runtime import memory
from pirl_jax.storage.settings import field_problem

CONFIG = config_files.define_flag()
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; each job has a default of its own.")
COMPILATION_CACHE = flags.DEFINE_string(
  "compilation_cache", None, "Folder in which compiled programs are kept for later runs, unless "
  "JAX_COMPILATION_CACHE_DIR names one; --compilation_cache= for none. Default: ~/.cache/pirl_jax/xla.")
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, for processes started by hand.")
KEEP_MEMORY = flags.DEFINE_bool("keep_memory", True, "Linux: the process keeps memory that it frees, a CPU is faster.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes; 1: this one alone.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on.")


def parse_flags(argv: list[str]) -> list[str]:
  """Returns the arguments that are not flags: the program's name and nothing else.

  Raises:
    UserError: the flags, the config file or an override is wrong; the message is one line.
  """
  try:
    rest = flags.FLAGS(argv)
    # If the config file could not be loaded, the error is raised here, at the first access to the config.
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
  """Returns a UserError with the message of the first error; the libraries wrap it and add its traceback."""
  chain: list[BaseException] = [error]
  while following := chain[-1].__cause__ or chain[-1].__context__:
    chain.append(following)
  if isinstance(chain[-1], UserError):
    return chain[-1]
  problems = []
  if any(isinstance(part, KeyError) for part in chain):  # the libraries' message has only the last part of the name
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
  jobs.carry_out(CONFIG.value, WORKDIR.value, (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value),
                 COMPILATION_CACHE.value)


def start(main: Callable[[list[str]], None] = main) -> None:
  """Parses the flags and calls `main`, by default to run the job that the config names.

  A UserError is printed in one line and ends the program with exit code 2. Ctrl-C ends it with 130. A job that trains
  ends with 0 after SIGTERM.
  """
  # --help shows the flags of the program that was called.
  for flag in (CONFIG, WORKDIR, COMPILATION_CACHE, KEEP_MEMORY, COORDINATOR, NUM_PROCESSES, PROCESS_ID):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])
  try:
    app.run(main, flags_parser=parse_flags)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("interrupted; the same command resumes", file=sys.stderr)
    sys.exit(130)
