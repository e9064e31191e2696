"""The commands and the file that the documentation shows, and that a study begun before finds its finished runs again.

A run is found by the name of its folder, and that is a digest of its config; tests/stored/study_digests.json has the
digests of runs as of November 2026.
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags
from launching import ROOT
from ml_collections import config_flags

from pirl_jax.configs import study as studies
from pirl_jax.studies import study
from pirl_jax.studies.points import create_trial, read_points

STORED = json.loads((ROOT / "tests" / "stored" / "study_digests.json").read_text())
SYSTEMS, EXTENDING = ((ROOT / "docs" / name).read_text() for name in ("systems.md", "extending.md"))
SWEEP = next(block for block in re.findall(r"```python\n(.*?)```", EXTENDING, re.DOTALL) if '"own"' in block)


def commands(text):
  """Returns the arguments of every command of a study in the code blocks of `text`; "..." stands for that of lambda."""
  found = []
  for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
    block = re.sub(r"^\.\.\.", "python launch.py --config=configs/study.py:lambda", block, flags=re.MULTILINE)
    for command in block.replace("\\\n", " ").split("python launch.py ")[1:]:
      found.append(shlex.split(command, comments=True))
  return [arguments for arguments in found if re.match("--config=(configs/study.py:[a-z]|sweep.py)", arguments[0])]


def config_of(monkeypatch, tmp_path, *arguments):
  """Returns the config that launch.py would read."""
  monkeypatch.chdir(ROOT)
  (tmp_path / "sweep.py").write_text(SWEEP)
  arguments = [argument.replace("--config=sweep.py", f"--config={tmp_path / 'sweep.py'}") for argument in arguments]
  monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", "", "", flag_values=values)
  flag = config_flags.DEFINE_config_file("config", flag_values=values)
  assert values(sys.argv) == ["launch.py"]
  return flag.value


def digests(config, tmp_path):
  trials = [create_trial(config, point, 0, tmp_path) for point in read_points(config)]
  return {trial.point.label: [trial.folder.name.removesuffix("-0"), trial.evaluation.name] for trial in trials}


@pytest.mark.parametrize("name", [name for name in studies.VARIANTS if name != "own"])
def test_a_study_of_the_paper_finds_the_runs_of_before(name, tmp_path):
  assert digests(studies.get_config(name), tmp_path) == STORED[name]


@pytest.mark.parametrize("name, more", [
  ("tiny", []),
  ("tiny_layers", ["--config.plot=layers", "--config.evaluation=linear_small",
                   "--config.evaluation_settings.linear.num_epochs=14",
                   "--config.evaluation_settings.linear.cached=True"]),
  ("tiny24", ['--config.points=[("PIRL (Jigsaw)", "", "pirl", {"num_epochs": 24}), ("NPID++", "", "npid", '
              '{"num_epochs": 24})]']),
  ("rate", [])])
def test_a_documented_study_finds_the_runs_of_before(monkeypatch, tmp_path, name, more):
  shown = re.sub("_layers|24", "", name)
  (arguments,) = (arguments for arguments in commands(SYSTEMS) if f"--config.name={shown}" in arguments)
  if name == "tiny24":
    arguments = [argument for argument in arguments if not argument.startswith("--config.points")]
  else:
    assert all(said in SYSTEMS for said in more)
  assert digests(config_of(monkeypatch, tmp_path, *arguments, *more), tmp_path) == STORED[name]


def test_more_points_and_other_images_find_the_runs_of_before(monkeypatch, tmp_path):
  found = commands(SYSTEMS)
  (more,) = (arguments for arguments in found if arguments[1:] and "more_points" in arguments[1])
  (folder,) = (arguments for arguments in found if "--config.settings.data.root=IMAGES" in arguments)
  config = config_of(monkeypatch, tmp_path, *more, "--config.evaluation=linear_small")
  assert digests(config, tmp_path) == STORED["more"]
  # The root is a part of the digest; when the digests were stored, the document called the folder PICTURES.
  folder = [argument.replace("root=IMAGES", "root=PICTURES") for argument in folder]
  assert digests(config_of(monkeypatch, tmp_path, *folder), tmp_path) == STORED["folder"]


@pytest.mark.parametrize("arguments", commands(SYSTEMS) + commands(EXTENDING), ids=lambda arguments: arguments[-1][:40])
def test_every_documented_command_is_a_study(monkeypatch, tmp_path, arguments):
  config = config_of(monkeypatch, tmp_path, *arguments)
  study.check_study(config, tmp_path)
  assert digests(config, tmp_path)


def test_the_documents_show_their_commands():
  assert len(commands(SYSTEMS)) == 10 and len(commands(EXTENDING)) == 3


@pytest.mark.slow
def test_the_sweep_of_the_documentation_runs_from_anywhere_and_goes_on(tmp_path):
  (tmp_path / "sweep.py").write_text(SWEEP)
  tiny = {"num_epochs": 2, "batch_size": 32, "num_negatives": 32, "data.num_images": 128, "data.image_size": 16,
          "jigsaw.crop_size": 18, "jigsaw.patch_size": 5, "model.dim": 16, "evaluate.num_images": 48,
          "evaluate.batch_size": 32}
  command = [
    sys.executable, str(ROOT / "launch.py"), f"--config={tmp_path / 'sweep.py'}", "--workdir=runs/study",
    "--config.seeds=(0,)", "--config.system_settings.npid.batch_size=32",
    *(f"--config.settings.{field}={value}" for field, value in tiny.items())]

  def launched(*more):
    result = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                            env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})
    assert result.returncode == 0, result.stderr
    return result.stdout

  # The point with 512 negatives is left out: there are 128 images.
  points = ('--config.points=[("PIRL", 0.05, "pirl", {"optimizer.learning_rate": 0.05}), '
            '("PIRL", 0.2, "pirl", {"optimizer.learning_rate": 0.2})]')
  assert "2 points, 2 runs, 0 of them done" in launched(points)
  said = launched(points, '--config.more_points=[("NPID++", 0.2, "npid", {})]')
  assert "3 points, 3 runs, 2 of them done" in said and "The rate after 12 epochs, seed 0" in said
  with open(tmp_path / "runs" / "study" / "rate" / "study.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert [(row["series"], row["x"]) for row in rows] == [("PIRL", "0.05"), ("PIRL", "0.2"), ("NPID++", "0.2")]
  stored = json.loads((tmp_path / "runs" / "study" / "rate" / "study.json").read_text())
  assert stored["config"]["settings.num_epochs"] == 2 and stored["config"]["evaluation_settings.knn.k"] == 20


@pytest.mark.parametrize("override, said", [
  ("points=PIRL | 0.5 | pirl pretext_weight=0.5", "as tuple"),
  ("settings.num_epoch=3", "there is no config field"),
  ("settings.num_epochs=three", "three"),
  ("system_settings.rotnt.num_epochs=3", "there is no config field"),
  ("settings.seed=3", "there is no config field"),
  ('points=[("PIRL", "", "pirl", {"loss": "nec"})]', "nce, infonce, eq4"),
])
def test_a_mistyped_study_is_answered_in_one_line(tmp_path, override, said):
  result = subprocess.run([sys.executable, "launch.py", "--config=configs/study.py:own", f"--config.{override}",
                           f"--workdir={tmp_path / 'study'}"], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert result.returncode == 2 and said in result.stderr, result.stderr
  assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
  assert not (tmp_path / "study").exists()
