"""Finds the file that `--config` names: a config of the package, by its name, or a file of the user."""

import re
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections.config_flags import config_flags

from pirl_jax import configs
from pirl_jax.errors import UserError

PARTS = ("__init__", "base", "data_sets")
"""Files of configs/ that other configs use; they do not describe a job."""


class _Parser(config_flags.ConfigFileFlagParser):
  """Loads the config that `locate` finds."""

  def parse(self, path: str) -> Any:
    return super().parse(locate(path))


def define_flag(values: flags.FlagValues = flags.FLAGS, **options: Any) -> flags.FlagHolder:
  """Defines the flag --config and returns the holder of its value.

  Args:
    values: the flags to which --config is added; by default the flags of the program.
    options: of `config_flags.DEFINE_config_file`.
  """
  holder = config_flags.DEFINE_config_file(
    "config", None, "What to run: pirl:imagenet, or a file, my_config.py.", flag_values=values, **options)
  values["config"].parser = _Parser("config")
  return holder


def names() -> list[str]:
  """Returns the names of the configs that come with the package, sorted."""
  return sorted(path.stem for path in _folder().glob("*.py") if path.stem not in PARTS)


def locate(argument: str) -> str:
  """Returns FILE[:VARIANT] with the path of an existing file, for the value of `--config=`.

  Args:
    argument: NAME[:VARIANT] for a config of the package, or FILE.py[:VARIANT] for a file of the user. `configs/NAME.py`
      is a config of the package if the current folder has no such file.

  Raises:
    UserError: there is no such config.
  """
  path, colon, variant = argument.partition(":")
  if path.endswith(".py") and Path(path).is_file():
    return argument
  name = re.fullmatch(r"configs/(\w+)\.py|(\w+)", path)
  if name and (name[1] or name[2]) in names():
    return f"{package_file(name[1] or name[2])}{colon}{variant}"
  raise UserError(f"--config={argument}: {path!r} is no config's name and no Python file; choose from "
                  f"{', '.join(names())}, or give the path of a file of your own")


def package_file(name: str) -> Path:
  """Returns the path of NAME.py among the configs of the package, whether there is such a file or not."""
  return _folder() / f"{name}.py"


def _folder() -> Path:
  return Path(configs.__path__[0])
