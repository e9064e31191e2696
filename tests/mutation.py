"""Changes the program in one place at a time and says which changes no test notices.

  python tests/mutation.py measure                # once, and after a change of tests: which test runs which line
  python tests/mutation.py run --per_file=25      # goes on where it was cut
  python tests/mutation.py run --again            # those that survived, after a new test
  python tests/mutation.py table                  # for docs/testing.md, and every mutant that is left

A mutant is the text of one file with one expression or statement changed. The tests that run the changed line are run
on it until one fails. `pytest` and the libraries are imported once; each mutant is a fork of this
process, on a copy of the tree. What is known lies in `.cache/mutation`. docs/testing.md says how to read the table.
"""

import argparse
import collections
import contextlib
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
from mutants import mutants_of

ROOT = Path(__file__).parents[1]
KNOWN = ROOT / ".cache" / "mutation"
EXPLAINED = Path(__file__).parent / "stored" / "explained_mutants.json"
"""{mutant: why no test can or should notice it}."""

SCOPE = ("method/*.py", "views/*.py", "models/*.py",
         *(f"evaluation/protocols/{name}.py" for name in ("invariance", "knn", "linear", "svm")),
         "storage/checkpoints.py", "storage/checksums.py")
TESTS = ("tests/views", "tests/models", "tests/storage", "tests/method", "tests/test_properties.py",
         *(f"tests/evaluation/{name}.py" for name in ("protocols/test_invariance", "protocols/test_knn",
                                                      "protocols/test_linear", "protocols/test_svm",
                                                      "protocols/test_semi_supervised", "test_evaluate",
                                                      "test_protocols", "test_layers")), "tests/test_formats.py")
LIBRARIES = ("jax", "jax.numpy", "flax.linen", "optax", "orbax.checkpoint", "numpy", "scipy.stats", "cv2", "PIL.Image",
             "sklearn.svm", "hypothesis", "ml_collections", "absl.flags", "matplotlib.pyplot", "tensorflow_datasets",
             "tensorboardX", "grain", "safetensors.numpy", "threadpoolctl")


class Measure:
  """Notes which lines of the package each test runs, and how long the test takes."""

  def __init__(self):
    self.tests, self._lines = {}, set()

  def pytest_sessionstart(self):
    self._root = os.getcwd()  # a test may go elsewhere

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
      lines[os.path.relpath(file, self._root)].append(line)
    self.tests[item.nodeid] = {"seconds": time.monotonic() - self._begin, "lines": lines}

  def pytest_runtest_logreport(self, report):
    if report.failed:  # without a mutant: it would fail with each of them
      self.tests.pop(report.nodeid, None)

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
  """Runs the tests of these names alone, in their order, and notes which one fails."""

  def __init__(self, names):
    self.order = {name: number for number, name in enumerate(names)}

  def pytest_runtest_logreport(self, report):
    if report.failed:
      (KNOWN / "failed").write_text(report.nodeid)

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


def tests_of(mutant, tests, results, limit):
  """Returns the names of the tests that run the mutant's lines, and their seconds, up to a limit.

  Those that killed another mutant of the file come first, then the quickest. A line that runs when the module is
  imported belongs to all tests of the files in which a test runs any line of the module.
  """
  ran = {name: set(test["lines"].get(mutant.file, ())) for name, test in tests.items()}
  names = [name for name, lines in ran.items() if lines & set(mutant.lines)]
  if not names:
    files = {name.split("::")[0] for name, lines in ran.items() if lines}
    names = [name for name in tests if name.split("::")[0] in files]
  killers = {result.removeprefix("killed: ") for name, result in results.items() if name.startswith(mutant.file)}
  names.sort(key=lambda name: (name not in killers, tests[name]["seconds"]))
  total, kept = 0.0, []
  for name in names:
    if not kept or total + tests[name]["seconds"] <= limit:
      kept.append(name)
      total += tests[name]["seconds"]
  return kept, total


def replace(path, content):
  """Writes a JSON file that is whole at any time."""
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(content, indent=0))
  partial.replace(path)


def mutants_in(patterns):
  """Yields (path, mutants) of the files of the package with these names."""
  for path in sorted(path for pattern in patterns for path in (ROOT / "pirl_jax").glob(pattern)):
    yield path, mutants_of(path.read_text(), path.relative_to(ROOT).as_posix())


def run(arguments):
  """Runs the mutants that no result is known of, and writes each result when it is there."""
  path, failed = KNOWN / "results.json", KNOWN / "failed"
  results = json.loads(path.read_text()) if path.exists() else {}
  tests = json.loads((KNOWN / "tests.json").read_text())
  chosen = []
  for file, mutants in mutants_in(arguments.files or SCOPE):
    random.Random(f"{arguments.seed} {file.name}").shuffle(mutants)
    chosen += [(number, one) for number, one in enumerate(mutants) if number < arguments.per_file
               or one.name in results]
  explained = json.loads(EXPLAINED.read_text())
  with copied_tree() as tree:
    # All files advance together, so that a run that is cut says something of each.
    for number, (_, mutant) in enumerate(sorted(chosen, key=lambda one: one[0])):
      if results.get(mutant.name) != ("survived" if arguments.again else None) or mutant.name in explained:
        continue
      names, seconds = tests_of(mutant, tests, results, arguments.seconds)
      place, begin = tree / mutant.file, time.monotonic()
      original = place.read_text()
      place.write_text(mutant.text)
      os.utime(place, (number, number))  # no compiled file of another mutant has this time
      failed.unlink(missing_ok=True)
      files = dict.fromkeys(name.split("::")[0] for name in names)
      code = in_fork(tree, ["-x", *files], Only(names), limit=4 * seconds + 30, log=KNOWN / "run.log") if names else 0
      place.write_text(original)
      if code in (4, 5):
        raise SystemExit(f"pytest does not find {names}: measure again")
      by = "too slow" if code is None else failed.read_text() if failed.exists() else "not imported"
      results[mutant.name] = "survived" if code == 0 else f"killed: {by}"
      print(f"{results[mutant.name][:8]} {time.monotonic() - begin:5.1f} s {len(names):3} tests  "
            f"{mutant.file}:{mutant.lines[0]} {mutant.name.split(' ', 1)[1]}"[:220], flush=True)
      replace(path, results)


def table(arguments):
  """Prints the table of docs/testing.md, and what is left, each with its line."""
  results, explained = json.loads((KNOWN / "results.json").read_text()), json.loads(EXPLAINED.read_text())
  rows, left = collections.defaultdict(collections.Counter), []
  for path, mutants in mutants_in(arguments.files or SCOPE):
    lines = path.read_text().splitlines()
    for mutant in mutants:
      if result := results.get(mutant.name):
        kind = "explained" if mutant.name in explained else result.split(":")[0]
        rows[mutant.file.removeprefix("pirl_jax/")][kind] += 1
        if kind == "survived":
          left.append(f"{mutant.file}:{mutant.lines[0]}  {lines[mutant.lines[0] - 1].strip()}\n    {mutant.name}")
  print("| file | mutants | killed | explained | left |\n|---|---|---|---|---|")
  for file, row in [*sorted(rows.items()), ("all", sum(rows.values(), collections.Counter()))]:
    print(f"| {file} | {row.total()} | {row['killed']} | {row['explained']} | {row['survived']} |")
  print("", *left, sep="\n")


def measure(arguments):
  """Runs the tests once, traced."""
  with copied_tree() as tree:
    print("exit code", in_fork(tree, arguments.files or TESTS, Measure(), log=KNOWN / "measure.log"))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("command", choices=["measure", "run", "table"])
  parser.add_argument("files", nargs="*", help="of the package, as method/*.py; to measure: of tests")
  parser.add_argument("--per_file", type=int, default=25)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--seconds", type=int, default=60, help="of tests for a mutant, as measured")
  parser.add_argument("--again", action="store_true")
  given = parser.parse_intermixed_args()
  {"measure": measure, "run": run, "table": table}[given.command](given)
