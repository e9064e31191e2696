"""The package as it is installed, and the configs that come with it."""

import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
from launching import ROOT
from packaging.requirements import Requirement

from pirl_jax.errors import UserError
from pirl_jax.launching import config_files

WITHOUT_JAX = "import sys; sys.modules['jax'] = sys.modules['flax'] = None; "
"""An import of either is an ImportError from here on."""

LOADS_ALL = WITHOUT_JAX + """
import importlib
from pirl_jax.launching import config_files
for name in config_files.names():
  module = importlib.import_module(f"pirl_jax.configs.{name}")
  print(name, len([module.get_config(variant) for variant in module.VARIANTS]))
"""

MISSPELT = WITHOUT_JAX + "from pirl_jax.launching.command import start; start()"


def python(*arguments, cwd=ROOT, **environment):
  return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120,
                        env={"PATH": "", **environment})


def test_every_config_loads_without_jax():
  result = python("-c", LOADS_ALL)
  assert result.returncode == 0, result.stderr
  counted = dict(line.split() for line in result.stdout.splitlines())
  assert counted.keys() == set(config_files.names()) and sum(map(int, counted.values())) > 60


def test_a_misspelt_field_is_answered_without_jax():
  result = python("-c", MISSPELT, "--config=pirl:folder", "--config.batchsize=2")
  assert result.returncode == 2
  assert result.stderr == "error: there is no config field batchsize; did you mean batch_size?\n"


@pytest.mark.parametrize("written, variant", [
  ("pirl", ""), ("pirl:folder", ":folder"), ("configs/pirl.py", ""), ("configs/pirl.py:folder", ":folder")])
def test_a_config_of_the_package_is_found_from_any_folder(tmp_path, monkeypatch, written, variant):
  monkeypatch.chdir(tmp_path)
  assert config_files.locate(written) == f"{ROOT / 'configs' / 'pirl.py'}{variant}"


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
  (tmp_path / "configs").mkdir()
  for name in ("own.py", "configs/pirl.py"):
    (tmp_path / name).write_text("")
  monkeypatch.chdir(tmp_path)
  for written in ("own.py", "own.py:big", "configs/pirl.py:folder", f"{tmp_path}/own.py"):
    assert config_files.locate(written) == written
  assert config_files.locate("pirl") == str(ROOT / "configs" / "pirl.py")


@pytest.mark.parametrize("written", ["", "pril", "pirl.py", "configs/pirl", "configs/none.py:x", "base", "__init__"])
def test_what_is_no_config_is_refused_with_those_there_are(tmp_path, monkeypatch, written):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="choose from checkpoints, evaluate, .*, pirl, .* or give the path"):
    config_files.locate(written)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """A folder with what the wheel puts on the path, and nothing of the checkout."""
  root = tmp_path_factory.mktemp("wheel")
  built = subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                          "--wheel-dir", root, ROOT], capture_output=True, text=True, timeout=120)
  assert built.returncode == 0, built.stderr
  wheel, = root.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(root / "site")
  return root / "site"


def test_the_wheel_has_one_package_with_every_config_and_a_licence(installed):
  info, = installed.glob("pirl_jax-*.dist-info")
  assert set(installed.iterdir()) == {installed / "pirl_jax", info}
  shipped = {path.name for path in (installed / "pirl_jax" / "configs").glob("*.py")}
  assert shipped == {path.name for path in (ROOT / "configs").glob("*.py")}
  assert (installed / "pirl_jax" / "py.typed").exists() and not (installed / "pirl_jax" / "configs.py").exists()
  assert "pirl-jax = pirl_jax.launching.command:start" in (info / "entry_points.txt").read_text()
  assert "Apache License" in (info / "licenses" / "LICENSE").read_text()


def test_the_installed_package_finds_its_configs_beside_a_strangers(installed, tmp_path):
  for stranger in ("configs", "launch"):
    (tmp_path / f"{stranger}.py").write_text("raise AssertionError('a module of the user')")
  result = python("-m", "pirl_jax", "--config=npid:imagenet", "--config.no_such=1", cwd=tmp_path,
                  PYTHONPATH=str(installed))
  assert (result.returncode, result.stderr) == (2, "error: there is no config field no_such\n")
  own = tmp_path / "own.py"
  own.write_text("from pirl_jax.configs import pirl\n\ndef get_config():\n  config = pirl.get_config('folder')\n"
                 "  config.job = 'dance'\n  return config\n")
  result = python("-m", "pirl_jax", "--config=own.py", cwd=tmp_path, PYTHONPATH=str(installed))
  assert result.returncode == 2 and "job='dance' is unknown" in result.stderr


def test_the_tested_versions_lie_within_the_ranges_that_are_asked_for():
  exact = dict(line.split("#")[0].strip().lower().split("==") for line in
               (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  extras = project["optional-dependencies"]
  asked = [Requirement(text) for text in project["dependencies"] + extras["dev"] + extras["docs"]]
  for requirement in asked:
    assert requirement.specifier.contains(exact[requirement.name.lower()]), requirement


def test_the_lock_file_has_every_exact_version_and_a_hash_for_each():
  def pins(text):
    return {found["name"].lower().replace("_", "-"): found["version"]
            for found in re.finditer(r"^(?P<name>[\w.\-]+)==(?P<version>[\w.+]+)", text, re.MULTILINE)}
  exact, lock = ((ROOT / name).read_text() for name in ("requirements.txt", "requirements.lock"))
  locked = pins(lock)
  assert pins(exact).items() <= locked.items(), "renew requirements.lock, see CONTRIBUTING.md"
  assert len(pins(exact)) > 30 and len(locked) > 100
  for entry in re.split(r"\n(?=\w)", lock.partition("absl-py==")[2]):
    assert "--hash=sha256:" in entry, entry
