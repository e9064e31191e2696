"""Reads what each field of a config means: the comments beside the fields in a file of configs/."""

import ast
import io
import tokenize
from pathlib import Path


def field_meanings(path: Path) -> dict[str, str]:
  """Returns {"group.field": meaning} of every field and group that has a comment in the file, in the file's order.

  The meaning is the comment above the assignment, then the comment at its end. If a field is assigned several times,
  the first comment counts.

  Args:
    path: a Python file that assigns `config.FIELD = VALUE`, `config.GROUP = group = ConfigDict()` and
      `group.FIELD = VALUE`.
  """
  source = path.read_text(encoding="utf-8")
  lines = source.splitlines()
  comments = {token.start[0]: token.string.lstrip("# ") for token in tokenize.generate_tokens(
    io.StringIO(source).readline) if token.type == tokenize.COMMENT}
  prefixes, found = {"config": ""}, {}
  assignments = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign)]
  for node in sorted(assignments, key=lambda node: node.lineno):
    names = [name for target in node.targets if (name := _field(target, prefixes))]
    if not names:
      continue
    prefixes |= {target.id: f"{names[0]}." for target in node.targets if isinstance(target, ast.Name)}
    above, line = [], node.lineno - 1
    while line in comments and lines[line - 1].lstrip().startswith("#"):
      above.insert(0, comments[line])
      line -= 1
    meaning = " ".join([*above, *filter(None, [comments.get(node.end_lineno or node.lineno)])])
    if meaning:
      found.setdefault(names[0], meaning)
  return found


def _field(target: ast.expr, prefixes: dict[str, str]) -> str:
  """Returns "group.field" for the target config.group.field or group.field, or "" if it is something else."""
  parts = []
  while isinstance(target, ast.Attribute):
    parts.insert(0, target.attr)
    target = target.value
  if not parts or not isinstance(target, ast.Name) or target.id not in prefixes:
    return ""
  return prefixes[target.id] + ".".join(parts)
