"""What a run tries in its folder before anything compiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults import Faults
from launching import ROOT

from pirl_jax.errors import UserError
from pirl_jax.storage import probing
from pirl_jax.storage.probing import PROBE, probe


@pytest.fixture(params=[True, False], ids=["alone", "one of several"])
def alone(request, monkeypatch):
  monkeypatch.setattr(probing, "alone", lambda: request.param)
  return request.param


@pytest.mark.parametrize("folder", [".", "checkpoints"])
def test_nothing_of_the_probe_is_left(tmp_path, alone, folder):
  (tmp_path / folder).mkdir(exist_ok=True)
  of_a_killed_run = f"{PROBE}1-a"
  for name in ("4", of_a_killed_run):
    (tmp_path / folder / name / "model").mkdir(parents=True)
  probe(tmp_path)
  assert {path.name for path in (tmp_path / folder).iterdir()} == ({"4"} if alone else {"4", of_a_killed_run})


def test_a_path_that_is_no_utf8(tmp_path, alone):
  folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run\xff"))
  folder.mkdir()
  with pytest.raises(UserError, match="its name is not in UTF-8.*--workdir"):
    probe(folder)


OBSTACLES = [("create", "EROFS"), ("create", "ENOSPC"), ("write", "ENOSPC"), ("write", "EDQUOT"), ("write", "EIO"),
             ("rename", "EACCES"), ("lock", "ENOLCK")]
PROGRAM = """
import json, sys
from pathlib import Path
from faults import Faults
from pirl_jax.errors import UserError
from pirl_jax.storage.probing import probe
schedule, run, obstacles = json.loads(sys.argv[1])
faults, said = Faults(schedule, RUN=run), []
for operation, fault in obstacles:
  faults.begin((operation, fault, "RUN/*"))
  try:
    probe(Path(run))
    said.append("")
  except UserError as error:
    said.append(str(error))
  faults.end()
probe(Path(run))
print(json.dumps([said, sorted(path.name for path in Path(run).iterdir())]))
"""


def test_whatever_a_checkpoint_will_meet_is_told_at_the_start(tmp_path):
  run = tmp_path / "run"
  run.mkdir()
  given = json.dumps([str(tmp_path / "schedule"), str(run), OBSTACLES])
  environment = os.environ | Faults(tmp_path / "schedule").environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
  ended = subprocess.run([sys.executable, "-c", PROGRAM, given], env=environment, capture_output=True, text=True)
  assert ended.returncode == 0, ended.stderr
  said, left = json.loads(ended.stdout)
  assert all(text.startswith(f"no checkpoint can be written to {run} (") for text in said), said
  assert not left
