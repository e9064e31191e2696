"""The texts of --help, made from the docstrings and comments of the config files; JAX is not loaded."""

import ast
import importlib
import shlex
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from pirl_jax.launching import config_files
from pirl_jax.storage.meanings import field_meanings
from pirl_jax.storage.settings import flatten

ASKED = ("--help", "-help", "--helpshort", "-h", "-?")
"""The arguments that ask for help."""

NAME = 29
"""Columns for the name of a config or variant."""

USAGE = "python launch.py --config=CONFIG[:VARIANT] [--workdir=DIR] [--config.FIELD=VALUE ...]"


def overview(flag_names: tuple[str, ...]) -> str:
  """Returns the help without a config: usage, the configs of the package with their variants, and the flags.

  Args:
    flag_names: the flags to list, all defined in absl's FLAGS.
  """
  lines = [f"usage: {USAGE}", "",
           "The installed command pirl-jax takes the same arguments. This lists the fields of a config:", "",
           "  python launch.py --config=configs/pirl.py:folder --help", "", "configs:"]
  for name in config_files.names():
    lines += ["", _line(f"configs/{name}.py", _summary(config_files.package_file(name)), 2), *_variants(name)]
  lines += ["", "flags:"]
  for name in flag_names:
    lines += [f"  --{name}", *_below(flags.FLAGS[name].help or "")]
  return "\n".join(lines)


def of_config(argument: str, settings: Mapping[str, Any] | None) -> str:
  """Returns the help for one config: its docstring, its variants, and every field with its value and its meaning.

  Args:
    argument: the value of --config.
    settings: the config, with the overrides of the command line; None if the config needs a variant and has none.

  Raises:
    UserError: there is no such config.
  """
  path = Path(config_files.locate(argument).partition(":")[0])
  lines = [ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or argument]
  if path.resolve() == config_files.package_file(path.stem).resolve() and (variants := _variants(path.stem)):
    lines += ["", "variants:", *variants]
  if settings is None:
    return "\n".join([*lines, "", "Name a variant to see its fields."])
  # A run has the fields of configs/base.py, a plan has them in the group `run`, and an evaluation has some of them.
  base = field_meanings(config_files.package_file("base"))
  meanings = base | {f"run.{field}": meaning for field, meaning in base.items()} | field_meanings(path)
  lines += ["", f"fields of {argument}, with the values that they have for this command:"]
  fields, group, chooses = flatten(settings), "", settings["job"] in ("pretrain", "plan")
  for field in _in_order(fields, meanings):
    value, meaning = fields[field], meanings.get(field, "")
    if value is None and (not meaning or field.count(".") > 1):
      continue  # a study can set every field of every run and every evaluation, and has no value for most of them
    if field.rpartition(".")[0] != group:
      group = field.rpartition(".")[0]
      lines += ["", *textwrap.wrap(f"{group}: {meanings[group]}" if meanings.get(group) else f"{group}:", _columns())]
    typed = f"={shlex.quote(str(value))}"
    if value is None:
      typed = "=auto" if chooses else "  (without a value)"
    lines += [f"  --config.{field}{typed}", *_below(meaning)]
  return "\n".join(lines)


def _in_order(fields: Iterable[str], meanings: Mapping[str, str]) -> list[str]:
  """Returns the fields without a group, then group by group, in the order in which the source has them."""
  place = {field: number for number, field in enumerate(meanings)}
  ordered = sorted(fields, key=lambda field: place.get(field, len(place)))
  groups = list(dict.fromkeys(["", *(field.rpartition(".")[0] for field in ordered)]))
  return sorted(ordered, key=lambda field: groups.index(field.rpartition(".")[0]))


def _variants(name: str) -> list[str]:
  """Returns a line for each variant of a config of the package, none if it has no variants."""
  variants = importlib.import_module(f"pirl_jax.configs.{name}").VARIANTS
  if not isinstance(variants, Mapping):
    return []
  return [_line(f":{variant}" if variant else "(no variant)", (setting.__doc__ or "").partition("\n")[0], 4)
          for variant, setting in variants.items()]


def _summary(path: Path) -> str:
  """Returns the first line of a config file's docstring, without the command."""
  text = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
  return text.partition(": python ")[0]


def _line(name: str, text: str, indent: int) -> str:
  """Returns one line with a name and as much of its description as fits."""
  start = f"{' ' * indent}{name:<{NAME - indent}} "
  return start + textwrap.shorten(text, max(_columns() - len(start), 20), placeholder=" ...")


def _below(text: str) -> list[str]:
  return textwrap.wrap(" ".join(text.split()), _columns(), initial_indent=" " * 6, subsequent_indent=" " * 6)


def _columns() -> int:
  return min(max(shutil.get_terminal_size((120, 24)).columns, 60), 120)
