"""Settings in nested groups of JSON values: flattens and compares them, and adds defaults that older runs lack."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns {"group.field": value} of nested dicts."""
  flat = {}
  for name, value in tree.items():
    flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return flat


def difference(before: Mapping[str, Any], now: Mapping[str, Any], *, free: Sequence[str] = ()) -> (
    tuple[str, Any, Any] | None):
  """Returns (field, value before, value now) of the first field that differs, in alphabetical order; None if none does.

  Args:
    before: nested settings.
    now: the settings to compare with; a field that is missing in one of the two counts as None there.
    free: fields that may differ; a name that ends with a dot stands for its whole group.
  """
  before, now = flatten(before), flatten(now)
  for field in sorted(before.keys() | now.keys()):
    may_differ = any(field == name or name.endswith(".") and field.startswith(name) for name in free)
    if not may_differ and before.get(field) != now.get(field):
      return field, before.get(field), now.get(field)
  return None


def field_problem(field: str, settings: Mapping[str, Any]) -> str:
  """Returns "" if `field` is the name of a field ("group.field") or group, else a message with the nearest name."""
  known = flatten(settings)
  if field in known or any(name.startswith(f"{field}.") for name in known):
    return ""
  groups = {name: name.rpartition(".") for name in known}
  group, _, last = field.rpartition(".")
  nearest = difflib.get_close_matches(last, sorted({name for *_, name in groups.values()}), n=1)
  near = [name for name in known if groups[name][2] in nearest]
  near = [name for name in near if groups[name][0] == group] or near  # prefer a field of the group that was given
  return f"there is no config field {field}" + (f"; did you mean {' or '.join(near)}?" if near else "")


def with_defaults(stored: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `stored` with defaults added for all missing fields, also within groups.

  Fields without a default stay as they are.

  Raises:
    TypeError, AttributeError: a group of `defaults` is a single value in `stored`.
  """
  filled = dict(stored)
  for name, default in defaults.items():
    if isinstance(default, dict):
      filled[name] = with_defaults(stored.get(name, {}), default)
    else:
      filled.setdefault(name, default)
  return filled
