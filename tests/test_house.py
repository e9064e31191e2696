"""What no single file can see: layers, the size of functions, and that a name means one thing."""

import ast
import collections
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {path.relative_to(ROOT / "pirl_jax"): ast.parse(path.read_text())
         for path in sorted((ROOT / "pirl_jax").rglob("*.py"))}
FUNCTIONS = [(f"{path}:{node.lineno} {node.name}", node) for path, tree in FILES.items() for node in ast.walk(tree)
             if isinstance(node, ast.FunctionDef)]

MAX_LINES = 80
MAX_PARAMETERS = 8
JOBS = {"run"}
"""What the module of every job has, see `pirl_jax.launching.jobs`."""


def layers():
  """Returns the height of each room, as CONTRIBUTING.md has them; two of one height do not see each other."""
  line = re.search(r"`errors`(.|\n)*?`launching`", (ROOT / "CONTRIBUTING.md").read_text())[0]
  return {room: height for height, group in enumerate(line.split("<")) for room in re.findall(r"`(\w+)`", group)}


def imported_rooms(tree):
  """Yields (line, room) of every import of the package itself, those inside of functions too."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    yield from ((node.lineno, name.split(".")[1]) for name in names if name.startswith("pirl_jax."))


def is_array(annotation):
  """Returns whether it is an array, or a tuple of arrays, or one of them that may be None."""
  words = set(re.findall(r"[\w.]+", ast.unparse(annotation))) if annotation else set()
  return bool(words & {"jax.Array", "np.ndarray"}) and words <= {"jax.Array", "np.ndarray", "tuple", "None"}


def test_imports_point_down():
  height = layers()
  top = max(height.values()) + 1  # the doors: they see every room, and no room sees them
  assert height["errors"] == 0 and len(height) > 10
  wrong = []
  for path, tree in FILES.items():
    room = path.parts[0].removesuffix(".py")
    for line, other in imported_rooms(tree):
      # Configs are no room: they are data, and import nothing of the package but errors and settings.
      if other not in (room, "configs") and height.get(other, top) >= height.get(room, top + 1):
        wrong.append(f"{path}:{line} imports {other}")
  allowed = {"__init__.py": {"launching"}, "__main__.py": {"launching"}}
  assert [text for text in wrong if text.split()[-1] not in allowed.get(text.split(":")[0], ())] == []


def test_functions_fit_on_a_page():
  lines = {name: node.end_lineno - node.lineno + 1 for name, node in FUNCTIONS}
  assert {name: count for name, count in lines.items() if count >= MAX_LINES} == {}


def test_functions_take_few_parameters_that_are_no_arrays():
  counts = {}
  for name, node in FUNCTIONS:
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    counts[name] = sum(one.arg not in ("self", "cls") and not is_array(one.annotation) for one in given)
  assert {name: count for name, count in counts.items() if count > MAX_PARAMETERS} == {}


def test_a_public_name_means_one_thing():
  places = collections.defaultdict(list)
  for path, tree in FILES.items():
    for node in tree.body:
      if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
        places[node.name].append(str(path))
  assert {name: found for name, found in places.items() if len(found) > 1 and name not in JOBS} == {}


def test_text_is_read_in_utf_8_whatever_the_locale_is():
  """Bytes are as well: JSON finds out its encoding."""
  wrong = []
  for path, tree in FILES.items():
    for node in ast.walk(tree):
      if isinstance(node, ast.Call) and "encoding" not in {keyword.arg for keyword in node.keywords}:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        mode = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)] or ["r"]
        null = "devnull" in ast.unparse(node)
        if name in ("read_text", "write_text") or isinstance(node.func, ast.Name) and name == "open" and (
            "b" not in mode[0]) and not null:
          wrong.append(f"{path}:{node.lineno}")
  assert wrong == []
