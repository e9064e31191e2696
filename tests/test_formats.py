"""Runs stored by earlier versions of the program, for ever: they are read, with the figures of that version."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from pirl_jax import runs, system
from pirl_jax.configs import checkpoints as checkpoints_config
from pirl_jax.configs import evaluate as evaluate_configs
from pirl_jax.configs import pirl
from pirl_jax.configs.base import get_base
from pirl_jax.errors import UserError
from pirl_jax.evaluation import evaluate
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage import formats
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.storage.formats import FORMAT
from pirl_jax.training import parts as parts_lib
from pirl_jax.training import pretrain, resuming
from pirl_jax.views.photometric import Recipe

STORED = Path(__file__).parent / "stored"


@pytest.fixture
def run(request, tmp_path):
  """Returns a stored run of four steps on 64 textures."""
  with zipfile.ZipFile(STORED / f"format-{request.param}.zip") as archive:
    archive.extractall(tmp_path / "run")
  return tmp_path / "run"


def config():
  changed = pirl.get_config()
  changed.update_from_flattened_dict({
    "data.image_size": 16, "jigsaw.crop_size": 18, "jigsaw.patch_size": 5, "data.num_images": 64, "num_negatives": 16,
    "batch_size": 32, "num_epochs": 3, "log.every_steps": 1, "evaluate.learning": False, "report": False,
    "export": False, "evaluate.split": "", "model.dim": 8})
  return changed


@pytest.mark.parametrize("run", [1, 2], indirect=True)
def test_a_run_of_an_old_format_is_evaluated_as_by_its_own_version(run):
  changed = evaluate_configs.get_config("knn")
  changed.update_from_flattened_dict({
    "checkpoint": str(run), "data.source": "embedded", "data.num_images": 64, "data.test_num_images": 256,
    "data.test_split": "test"})
  evaluate.run(changed, "")
  result, = [json.loads(path.read_text()) for path in (run / "results").glob("*.json")]
  assert result["figures"]["top1"] == 0.11328125
  assert abs(result["figures"]["top5"] - 0.520) < 0.0005
  # A result that was written before these fields were there is the same evaluation.
  path, = (run / "results").glob("*.json")
  for group, field in (("model", "remat"), ("data", "max_bad_fraction")):
    del result["settings"]["run_config"][group][field]
  del result["settings"]["knn"]["temperature"]
  path.write_text(json.dumps(result))
  evaluate.run(changed, "")
  assert json.loads(path.read_text())["settings"]["run_config"]["model"]["remat"] is False


@pytest.mark.parametrize("run", [2], indirect=True)
def test_a_run_of_an_old_format_goes_on_as_in_its_own_version(run):
  pretrain.run(config(), str(run))
  found = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
  np.testing.assert_allclose(found[4:], [3.9118990898132324, 4.361735820770264], rtol=1e-4)


def with_new_fields(changed, *, factor=1.0):
  """Adds a group and a field of which no stored run has heard; the others are as they were."""
  with changed.unlocked():
    changed.zoom = ConfigDict({"factor": factor, "sides": (1, 2)})
    changed.photometric.vignette = 0.0
    changed.pretext_photometric.vignette = 0.0
  return changed


@pytest.mark.parametrize("run", [2], indirect=True)
def test_a_new_field_and_a_new_group_have_their_defaults_in_older_runs(run, monkeypatch, capsys):
  monkeypatch.setattr(formats, "get_base", lambda: with_new_fields(get_base()))
  monkeypatch.setattr(system, "Recipe", lambda *, vignette, **known: Recipe(**known))
  with pytest.raises(UserError, match=r"holds a run with zoom.factor=1.0, and now it is 2.0; .* give the old value"):
    pretrain.run(with_new_fields(config(), factor=2.0), str(run))
  job = checkpoints_config.get_config()
  job.checkpoint = str(run)
  runs.run(job, "")
  opened = runs.open_run(run, "run", 4, mesh_lib.create_mesh())
  assert opened.meta["config"]["zoom"] == {"factor": 1.0, "sides": [1, 2]}
  assert opened.meta["config"]["pretext_photometric"]["vignette"] == 0.0
  pretrain.run(with_new_fields(config()), str(run))
  assert "resumes from step 4 of 6" in capsys.readouterr().out
  assert json.loads((run / "config.json").read_text())["zoom"] == {"factor": 1.0, "sides": [1, 2]}


@pytest.mark.parametrize("run", [2], indirect=True)
@pytest.mark.parametrize("part", ["model", "log", "pretext_photometric", "checkpoint"])
def test_a_stored_config_that_lacks_a_group_is_the_same_run(run, part):
  path = run / "config.json"
  stored = json.loads(path.read_text())
  del stored[part]
  path.write_text(json.dumps(stored))
  upgraded = formats.upgrade_config(stored)
  assert set(upgraded[part]) == set(get_base()[part])
  if part != "model":  # of which the run has values of its own
    resuming.with_stored_choices(config(), run)


@pytest.mark.parametrize("run", [1], indirect=True)
def test_the_first_format_lacks_a_part_of_the_state_and_says_so(run):
  with pytest.raises(UserError, match="format 1, .* can be evaluated, but not resumed"):
    pretrain.run(config(), str(run))


@pytest.mark.parametrize("run", [2], indirect=True)
def test_a_later_format_is_refused_and_nothing_is_moved(run):
  meta = run / "checkpoints" / "4" / "meta" / "metadata"
  meta.write_text(meta.read_text().replace('"format": 2', f'"format": {FORMAT + 1}'))
  before = sorted(run.rglob("*"))
  with pytest.raises(UserError, match=f"has format {FORMAT + 1}, and this program reads formats 1 to {FORMAT}; use"):
    pretrain.run(config(), str(run))
  assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("run", [2], indirect=True)
def test_a_damaged_config_can_be_deleted_and_that_of_the_checkpoint_still_counts(run):
  (run / "config.json").write_text("{")
  with pytest.raises(UserError, match="config.json is damaged .* delete it to resume"):
    pretrain.run(config(), str(run))
  (run / "config.json").unlink()
  other = config()
  other.temperature = 0.2
  with pytest.raises(UserError, match="temperature=0.1, and now it is 0.2"):
    pretrain.run(other, str(run))


@pytest.mark.parametrize("run", [2], indirect=True)
def test_the_bank_of_an_old_format(run):
  parts = parts_lib.build(config(), run)
  with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
    bank = checkpoints.restore_bank(4, parts.layout)
  np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, rtol=1e-5)
