"""What may be changed in a file of Python so that its tests should notice: one expression or statement at a time.

Not changed are docstrings, annotations, decorators, assertions, what an error says, that a line is printed, and whether
`zip` is strict, which is an assertion, too.
"""

import ast
import collections
import contextlib
import copy

SWAPPED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
           ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub,
           ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
           ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift,
           ast.RShift: ast.LShift, ast.MatMult: ast.Mult, ast.And: ast.Or, ast.Or: ast.And}

COMMUTE = ("promote_types", "minimum", "maximum", "min", "max", "logical_and", "logical_or")

Mutant = collections.namedtuple("Mutant", "name file lines text")


def with_fields(node, **fields):
  other = copy.copy(node)
  for name, value in fields.items():
    setattr(other, name, value)
  return other


def changes(node):
  """Yields (node that is replaced, what takes its place) for a node without its children."""
  match node:
    case ast.Compare(ops=[op]):
      yield node, with_fields(node, ops=[SWAPPED[type(op)]()])
      for one in ast.walk(node):
        if isinstance(one, ast.Constant) and isinstance(one.value, str):
          yield one, ast.Constant(one.value + "_")
    case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in SWAPPED:
      yield node, with_fields(node, op=SWAPPED[type(op)]())
    case ast.UnaryOp(op=ast.Not() | ast.USub()):
      yield node, node.operand
    case ast.Constant(value=bool()):
      yield node, ast.Constant(not node.value)
    case ast.Constant(value=int()):
      yield node, ast.Constant(node.value + 1)
    case ast.Constant(value=float()):
      yield node, ast.Constant(node.value * 2 or 1.0)
    case ast.Call():
      for keyword in node.keywords:
        if keyword.arg not in (None, "strict"):
          yield node, with_fields(node, keywords=[one for one in node.keywords if one is not keyword])
      if len(node.args) > 1 and not any(isinstance(one, ast.Starred) for one in node.args[:2]) and (
          ast.unparse(node.func).split(".")[-1] not in COMMUTE):
        yield node, with_fields(node, args=[node.args[1], node.args[0], *node.args[2:]])
    case ast.IfExp():
      yield node, with_fields(node, body=node.orelse, orelse=node.body)
    case ast.If() | ast.While():
      yield node.test, ast.UnaryOp(ast.Not(), node.test)
    case ast.Subscript(slice=ast.Slice() as part):
      for bound in ("lower", "upper"):
        if getattr(part, bound):
          yield node, with_fields(node, slice=with_fields(part, **{bound: None}))
    case ast.Expr(value=ast.Call(func=ast.Name(id="print"))):
      pass
    case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
      yield node, ast.Pass()
    case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
      yield node, ast.Pass()


def children(node):
  """Yields the nodes below that may change: no annotations, decorators, docstrings, and nothing that is a message."""
  if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
    return
  if isinstance(node, ast.keyword) and node.arg == "strict":
    return
  if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
    return
  for field, value in ast.iter_fields(node):
    if field not in ("annotation", "returns", "decorator_list"):
      yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, ast.AST))


def found_in(node, place=""):
  """Yields (qualified name of the function, node, what takes its place) of a whole tree."""
  if isinstance(node, ast.FunctionDef | ast.ClassDef):
    place = f"{place}.{node.name}".lstrip(".")
  yield from ((place, *change) for change in changes(node))
  for child in children(node):
    yield from found_in(child, place)


def mutants_of(source, file):
  """Returns the mutants that Python can read of the text of a file.

  A mutant's name stays if the file changes elsewhere; `lines` are those of the text that it changes.
  """
  begins = [0]
  for line in source.encode().splitlines(keepends=True):
    begins.append(begins[-1] + len(line))
  found, seen = [], collections.Counter()
  for place, old, new in found_in(ast.parse(source)):
    start, end = begins[old.lineno - 1] + old.col_offset, begins[old.end_lineno - 1] + old.end_col_offset
    after = ast.unparse(new)
    whole = f"({after})" if isinstance(old, ast.expr) and not isinstance(old, ast.Constant) else after
    text = (source.encode()[:start] + whole.encode() + source.encode()[end:]).decode()
    with contextlib.suppress(SyntaxError):
      compile(text, file, "exec")
      name = f"{file} {place}: {' '.join(ast.unparse(old).split())} -> {' '.join(after.split())}"
      seen[name] += 1
      lines = range(old.lineno, old.end_lineno + 1)
      found.append(Mutant(name + (f" #{seen[name]}" if seen[name] > 1 else ""), file, lines, text))
  return found
