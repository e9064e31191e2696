"""Settings in nested groups, as flat names."""

from typing import Any


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns {"group.field": value} of nested dicts."""
  flat = {}
  for name, value in tree.items():
    flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return flat


def first_difference(stored: dict[str, Any], now: dict[str, Any]) -> str:
  """Returns "field=old, and now it is new" of the first field, by name, that differs; "" if none does.

  Args:
    stored: {"group.field": value}; a field that is missing counts as None.
    now: the same.
  """
  for field in sorted(stored.keys() | now.keys()):
    if stored.get(field) != now.get(field):
      return f"{field}={stored.get(field)!r}, and now it is {now.get(field)!r}"
  return ""
