"""Settings in nested groups, JSON values: as flat names, compared, and with what an older program did not know yet."""

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
  """Returns (field, value before, value now) of the first field, by its name, that differs; None if none does.

  Args:
    before: nested settings.
    now: the others; a field that one of the two lacks is None there.
    free: fields that may differ; a name that ends with a dot stands for its whole group.
  """
  before, now = flatten(before), flatten(now)
  for field in sorted(before.keys() | now.keys()):
    may_differ = any(field == name or name.endswith(".") and field.startswith(name) for name in free)
    if not may_differ and before.get(field) != now.get(field):
      return field, before.get(field), now.get(field)
  return None


def with_defaults(stored: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `stored` with the default of every field, and of every field of a group, that is missing there.

  Fields without a default stay.

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
