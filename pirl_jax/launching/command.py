"""Code of launch.py and the command pirl-jax: --config=CONFIG[:VARIANT] [--workdir=DIR] [--config.FIELD=VALUE ...]

Reads the flags and the config, and runs the job that the config names (`jobs`).
"""

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from pirl_jax.configs.base import get_base
from pirl_jax.configs.data_sets import CHOSEN, leave_open
from pirl_jax.errors import UserError
from pirl_jax.launching import config_files, jobs, usage
from pirl_jax.launching.ending import leave
from pirl_jax.runtime import compiling, memory, speaking
from pirl_jax.storage.settings import field_problem, flatten

CONFIG = config_files.define_flag()
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; each job has a default of its own.")
COMPILATION_CACHE = flags.DEFINE_string(
  "compilation_cache", None, "Folder in which compiled programs are kept for later runs, unless "
  "JAX_COMPILATION_CACHE_DIR names one; --compilation_cache= for none. Default: ~/.cache/pirl_jax/xla.")
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, for processes started by hand.")
KEEP_MEMORY = flags.DEFINE_bool("keep_memory", True, "Linux: the process keeps memory that it frees, a CPU is faster.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes; 1: this one alone.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on.")

FLAGS = (CONFIG, WORKDIR, COMPILATION_CACHE, KEEP_MEMORY, COORDINATOR, NUM_PROCESSES, PROCESS_ID)


def parse_flags(argv: list[str]) -> list[str]:
  """Returns the arguments that are not flags: the program's name and nothing else.

  Raises:
    UserError: the flags, the config file or an override is wrong; the message is one line.
  """
  if any(argument in usage.ASKED for argument in argv[1:]):
    print(_help([argument for argument in argv if argument not in usage.ASKED]))
    sys.exit(0)
  argv, left_open = _without_auto(argv)
  try:
    rest = flags.FLAGS(argv)
    # If the config file could not be loaded, the error is raised here, at the first access to the config.
    config = CONFIG.value
  except Exception as error:  # of absl or ml_collections; or anything that a config file raises
    raise _one_line(error, argv) from error
  if config is None:
    raise UserError("no config; for a first run: python launch.py --config=configs/pirl.py")
  if not isinstance(config, ConfigDict) or "job" not in config:
    raise UserError(f"--config={_config_argument(argv)}: get_config must return a ConfigDict with a field job; start "
                    "from a config of this package")
  leave_open(CONFIG.value, left_open)
  if rest[1:]:
    raise UserError(f"unexpected argument {rest[1]!r}; overrides look like --config.batch_size=256")
  return rest


def _without_auto(argv: list[str]) -> tuple[list[str], list[str]]:
  """Returns the arguments but for those of the form --config.FIELD=auto, and the FIELDs of these.

  Raises:
    UserError: the program cannot choose such a field.
  """
  found = {argument: match[1] for argument in argv if (match := re.fullmatch(r"--?config\.([\w.]+)=auto", argument))}
  for field in found.values():
    if field not in CHOSEN:
      raise UserError(f"{field}=auto is not possible; the program chooses these fields: {', '.join(CHOSEN)}")
  return [argument for argument in argv if argument not in found], list(found.values())


def _help(argv: list[str]) -> str:
  """Returns the text of --help, for the config that `argv` names if it names one.

  Raises:
    UserError: the flags, the config file or an override is wrong.
  """
  given = _config_argument(argv)
  if not given:
    return usage.overview(tuple(flag.name for flag in FLAGS))
  try:
    argv, left_open = _without_auto(argv)
    flags.FLAGS(argv)
    leave_open(CONFIG.value, left_open)
    settings = CONFIG.value.to_dict()
  except Exception as error:  # see parse_flags
    problem = _one_line(error, argv)
    # A config file that needs a variant says so itself; its variants are listed then.
    if ":" in given or problem is not _root(error):
      raise problem from error
    settings = None
  return usage.of_config(given, settings)


def _config_argument(argv: list[str]) -> str:
  """Returns the value of the flag --config, or "" if it is not given."""
  for argument, following in zip(argv, [*argv[1:], ""], strict=True):
    name, equals, value = argument.partition("=")
    if name in ("--config", "-config"):
      return value if equals else following
  return ""


def _root(error: Exception) -> BaseException:
  """Returns the first error; the libraries wrap it and add its traceback."""
  root: BaseException = error
  while following := root.__cause__ or root.__context__:
    root = following
  return root


def _one_line(error: Exception, argv: list[str]) -> UserError:
  """Returns a UserError with the message of the first error, and the nearest right name for a misspelt one."""
  root = _root(error)
  if isinstance(root, UserError):
    return root
  if isinstance(error, flags.UnrecognizedFlagError):
    return _unknown_flag(error.flagname, argv)
  if place := _line_of_config(root, argv):
    return UserError(f"{place}: {type(root).__name__}: {' '.join(str(root).split())}")
  problems = []
  if isinstance(root, KeyError):  # the libraries' message has only the last part of the name
    given = [argument.partition("=")[0].lstrip("-").removeprefix("no") for argument in argv if argument.startswith("-")]
    fields = [name.removeprefix("config.") for name in given if name.startswith("config.")]
    problems = [problem for field in fields if (problem := field_problem(field, _settings(argv)))]
  return UserError(problems[0] if problems else " ".join(str(error).split()))


def _line_of_config(error: BaseException, argv: list[str]) -> str:
  """Returns "FILE, line N" of the line of the config file that raised the error, or "" if it was not raised there."""
  file = _config_argument(argv).partition(":")[0]
  if isinstance(error, SyntaxError) and error.filename and os.path.basename(error.filename) == os.path.basename(file):
    return f"{file}, line {error.lineno}"
  frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(".py")]
  lines = [frame.lineno for frame in frames if os.path.realpath(frame.filename) == os.path.realpath(file)]
  return f"{file}, line {lines[-1]}" if lines else ""


def _unknown_flag(name: str, argv: list[str]) -> UserError:
  """Returns the error for a flag that does not exist; the fields of the config are candidates for what was meant."""
  if name.startswith("config.") and not _config_argument(argv):
    return UserError(f"--{name} needs a config before it; for example --config=configs/pirl.py")
  settings = _settings(argv) if _config_argument(argv) else get_base().to_dict()
  candidates = [*(flag.name for flag in FLAGS), *(f"config.{field}" for field in flatten(settings))]
  last = {candidate: candidate.rpartition(".")[2] for candidate in candidates}
  near = [candidate for candidate in candidates if last[candidate] == name]
  near = near or difflib.get_close_matches(name, candidates, n=1) or [
    candidate for match in difflib.get_close_matches(name, last.values(), n=1)
    for candidate in candidates if last[candidate] == match]
  meant = f"; did you mean {' or '.join(f'--{candidate}' for candidate in near)}?" if near else (
    "; --help lists the flags, and with --config=CONFIG the fields")
  return UserError(f"there is no flag --{name}{meant}")


def _settings(argv: list[str]) -> dict[str, Any]:
  """Returns the config that `argv` names, without overrides."""
  config = config_files.define_flag(alone := flags.FlagValues(), sys_argv=argv[:1])
  alone(argv, known_only=True)
  return config.value.to_dict()


def main(_: list[str]) -> None:
  """Runs the job that the config names."""
  if KEEP_MEMORY.value:
    memory.keep_freed()
  compiling.compile_for_cpu()
  workdir = os.path.expanduser(WORKDIR.value)  # shells leave the ~ of --workdir=~/runs as it is
  if workdir.startswith("~"):
    raise UserError(f"--workdir={workdir}: there is no such user; ./{workdir} is a folder of that name")
  jobs.carry_out(CONFIG.value, workdir, (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value),
                 COMPILATION_CACHE.value)


def start(main: Callable[[list[str]], None] = main) -> None:
  """Parses the flags and calls `main`, by default to run the job that the config names.

  A UserError is printed in one line and ends the program with exit code 2. Ctrl-C ends it with 130. A job that trains
  ends with 0 after SIGTERM.
  """
  speaking.never_fail()
  code: Any = 0
  try:
    app.run(main, flags_parser=parse_flags)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    code = 2
  except KeyboardInterrupt:
    print("interrupted; the same command resumes", file=sys.stderr)
    code = 130
  except SystemExit as ended:
    code = ended.code
  leave(code)
