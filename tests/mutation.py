"""Changes the program in one place at a time and says which changes no test notices.

  python -m tests.mutation measure                # once, and after a change of tests: which test runs which line
  python -m tests.mutation run --per_file=25      # goes on where it was cut
  python -m tests.mutation run --again            # those that survived, after a new test
  python -m tests.mutation table                  # for docs/testing.md, and every mutant that is left

A mutant is the text of one file with one expression or statement changed. The tests that run the changed line are run
on it, the quickest first, until one fails. `pytest` and the libraries are imported once; each mutant is a fork of this
process, on a copy of the tree. What is known lies in `.cache/mutation`. docs/testing.md says how to read the table.
"""

import argparse
import ast
import collections
import contextlib
import copy
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KNOWN = ROOT / ".cache" / "mutation"
EXPLAINED = Path(__file__).parent / "stored" / "explained_mutants.json"
"""{mutant: why no test can or should notice it}."""

SCOPE = ("method/*.py", "views/*.py", "models/*.py", "evaluation/protocols/knn.py", "evaluation/protocols/linear.py",
         "evaluation/protocols/svm.py", "storage/checkpoints.py", "storage/checksums.py")
TESTS = ("tests/views", "tests/models", "tests/storage", "tests/method", "tests/test_properties.py",
         *(f"tests/evaluation/{name}.py" for name in ("protocols/test_knn", "protocols/test_linear",
                                                      "protocols/test_svm", "test_protocols", "test_layers")))
LIBRARIES = ("jax", "jax.numpy", "flax.linen", "optax", "orbax.checkpoint", "numpy", "scipy.stats", "cv2", "PIL.Image",
             "sklearn.svm", "hypothesis", "ml_collections", "absl.flags", "matplotlib.pyplot", "tensorflow_datasets",
             "tensorboardX", "grain", "safetensors.numpy", "threadpoolctl")
SECONDS = 60
"""Of tests for a mutant, as long as they take on the program as it is; a mutant that takes four times as long hangs."""

SWAPPED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
           ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub,
           ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
           ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift,
           ast.RShift: ast.LShift, ast.MatMult: ast.Mult, ast.And: ast.Or, ast.Or: ast.And}

COMMUTE = ("minimum", "maximum", "min", "max", "logical_and", "logical_or")

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
        if keyword.arg:
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
    case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
      yield node, ast.Pass()
    case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
      yield node, ast.Pass()


def children(node):
  """Yields the nodes below that may change: no annotations, decorators, docstrings, and nothing that is a message."""
  if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
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


def mutants_of(path):
  """Returns the mutants of a file that Python can read, each with a name that stays if the file changes elsewhere."""
  source, file = path.read_text(), path.relative_to(ROOT).as_posix()
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


class Measure:
  """Notes which lines of the package each test runs, and how long the test takes."""

  def __init__(self):
    self.tests, self._lines = {}, set()

  def pytest_runtest_setup(self, item):
    import jax
    jax.clear_caches()  # else a function that an earlier test has traced is not run again
    self._lines = set()
    self._begin = time.monotonic()
    threading.settrace(self._enter)
    sys.settrace(self._enter)

  def pytest_runtest_teardown(self, item):
    sys.settrace(None)
    threading.settrace(None)
    lines = collections.defaultdict(list)
    for file, line in sorted(self._lines):
      lines[os.path.relpath(file)].append(line)
    self.tests[item.nodeid] = {"seconds": time.monotonic() - self._begin, "lines": lines}

  def pytest_runtest_logfinish(self):
    if len(self.tests) % 10 == 0:
      self.pytest_sessionfinish()

  def pytest_sessionfinish(self):
    path = KNOWN / "tests.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    replace(path, {**known, **self.tests})

  def _enter(self, frame, event, arg):
    return self._step if "/pirl_jax/" in frame.f_code.co_filename else None

  def _step(self, frame, event, arg):
    self._lines.add((frame.f_code.co_filename, frame.f_lineno))
    return self._step


class Only:
  """Runs the tests of these names alone, in their order."""

  def __init__(self, names):
    self.order = {name: number for number, name in enumerate(names)}

  def pytest_collection_modifyitems(self, items):
    items[:] = sorted((item for item in items if item.nodeid in self.order), key=lambda one: self.order[one.nodeid])


def in_fork(tree, arguments, plugin, *, limit=None, log=None):
  """Returns the exit code of pytest in a fork of this process, in that folder; None: it took too long."""
  child = os.fork()
  if not child:
    code = 99
    try:
      os.setsid()
      os.chdir(tree)
      sys.path[:0] = [str(tree), str(tree / "tests")]
      out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
      os.dup2(out, 1)
      os.dup2(out, 2)
      code = int(pytest.main(["-q", "-p", "no:cacheprovider", f"--basetemp={tree.parent / 'temporary'}", *arguments],
                             plugins=[plugin]))
    finally:
      os._exit(code)
  end = time.monotonic() + (limit or 1e9)
  while time.monotonic() < end:
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
      return os.waitstatus_to_exitcode(status)
    time.sleep(0.02)
  os.killpg(child, signal.SIGKILL)
  os.waitpid(child, 0)
  return None


@contextlib.contextmanager
def copied_tree():
  """Yields a copy of the tree, whose libraries and compiled programs are at hand for forks of this process."""
  KNOWN.mkdir(parents=True, exist_ok=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(KNOWN / "jax")
  os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # of a mutant, that is
  for library in LIBRARIES:
    importlib.import_module(library)
  with tempfile.TemporaryDirectory() as folder:
    tree = Path(folder) / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".cache", ".venv", "runs", "site"))
    sys.dont_write_bytecode = True
    yield tree


def tests_of(mutant, tests):
  """Returns the names of the tests that run the mutant's lines, the quickest first, and their seconds.

  A line that runs when the module is imported belongs to the tests that run any line of the file.
  """
  ran = {name: set(test["lines"].get(mutant.file, ())) for name, test in tests.items()}
  names = [name for name, lines in ran.items() if lines & set(mutant.lines)] or [
    name for name, lines in ran.items() if lines]
  names.sort(key=lambda name: tests[name]["seconds"])
  total, kept = 0.0, []
  for name in names:
    if total + tests[name]["seconds"] <= SECONDS:
      kept.append(name)
      total += tests[name]["seconds"]
  return kept, total


def replace(path, content):
  """Writes a JSON file that is whole at any time."""
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(content, indent=0))
  partial.replace(path)


def scope(patterns):
  return sorted(path for pattern in patterns for path in (ROOT / "pirl_jax").glob(pattern)
                if path.name != "__init__.py")


def run(arguments):
  """Runs the mutants that no result is known of, and writes each result when it is there."""
  path = KNOWN / "results.json"
  results = json.loads(path.read_text()) if path.exists() else {}
  tests = json.loads((KNOWN / "tests.json").read_text())
  chosen = []
  for file in scope(arguments.files or SCOPE):
    mutants = mutants_of(file)
    random.Random(f"{arguments.seed} {file.name}").shuffle(mutants)
    chosen += [(number, one) for number, one in enumerate(mutants) if number < arguments.per_file
               or one.name in results]
  explained = json.loads(EXPLAINED.read_text())
  with copied_tree() as tree:
    # All files advance together, so that a run that is cut says something of each.
    for number, (_, mutant) in enumerate(sorted(chosen, key=lambda one: one[0])):
      if results.get(mutant.name, "survived" if arguments.again else None) != (
          "survived" if arguments.again else None) or mutant.name in explained:
        continue
      names, seconds = tests_of(mutant, tests)
      place, begin = tree / mutant.file, time.monotonic()
      original = place.read_text()
      place.write_text(mutant.text)
      os.utime(place, (number, number))  # no compiled file of another mutant has this time
      files = dict.fromkeys(name.split("::")[0] for name in names)
      code = in_fork(tree, ["-x", *files], Only(names), limit=4 * seconds + 30, log=KNOWN / "log") if names else 0
      place.write_text(original)
      results[mutant.name] = {0: "survived", None: "killed: too slow"}.get(code, "killed")
      print(f"{results[mutant.name]:8} {time.monotonic() - begin:5.1f} s {len(names):3} tests  "
            f"{mutant.file}:{mutant.lines[0]} {mutant.name.split(' ', 1)[1]}"[:220], flush=True)
      replace(path, results)


def table(arguments):
  """Prints the table of docs/testing.md, and what is left."""
  results, explained = json.loads((KNOWN / "results.json").read_text()), json.loads(EXPLAINED.read_text())
  rows, left = collections.defaultdict(collections.Counter), []
  for name, result in results.items():
    kind = "killed" if result.startswith("killed") else "explained" if name in explained else "left"
    rows[name.split()[0].removeprefix("pirl_jax/")][kind] += 1
    left += [name] if kind == "left" else []
  print("| file | mutants | killed | explained | left |\n|---|---|---|---|---|")
  for file, row in [*sorted(rows.items()), ("all", sum(rows.values(), collections.Counter()))]:
    print(f"| {file} | {row.total()} | {row['killed']} | {row['explained']} | {row['left']} |")
  print("", *left, sep="\n")


def measure(arguments):
  """Runs the tests once, traced."""
  with copied_tree() as tree:
    print("exit code", in_fork(tree, arguments.files or TESTS, Measure(), log=KNOWN / "log"))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("command", choices=["measure", "run", "table"])
  parser.add_argument("files", nargs="*", help="of the package, as method/*.py; to measure: of tests")
  parser.add_argument("--per_file", type=int, default=25)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--again", action="store_true")
  given = parser.parse_args()
  {"measure": measure, "run": run, "table": table}[given.command](given)
