"""A data source that the program has never heard of: the worked example of docs/extending.md, as it stands there."""

import dataclasses
import json
import re
import sys
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from pirl_jax.configs import base, data_sets, pirl
from pirl_jax.configs import evaluate as evaluate_config
from pirl_jax.data import records, sources
from pirl_jax.data.sources import DataSettings, open_source
from pirl_jax.errors import UserError
from pirl_jax.evaluation import evaluate
from pirl_jax.models import resnet
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage import formats
from pirl_jax.training import pretrain

GUIDE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


@dataclasses.dataclass(frozen=True)
class LongerSettings(DataSettings):
  """`DataSettings` after the line of the example."""

  ramp_classes: int = 4


@pytest.fixture
def ramps(monkeypatch):
  """Makes the changes of the example: a file, a name, a field and its default."""
  section = GUIDE.split("## A new data source")[1].split("\n## ")[0]
  module = types.ModuleType("ramps_of_the_guide")
  vars(module).update(np=np, ClassVar=ClassVar, Source=records.Source, Record=records.Record)
  exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], vars(module))
  monkeypatch.setitem(sys.modules, module.__name__, module)
  monkeypatch.setitem(sources.SOURCES, "ramps", f"{module.__name__}:Ramps")
  monkeypatch.setattr(sources, "DataSettings", LongerSettings)
  names = tuple(field.name for field in dataclasses.fields(LongerSettings) if field.name not in sources.READING)
  monkeypatch.setattr(evaluate, "SOURCE_FIELDS", names)
  monkeypatch.setattr(evaluate, "DATA_FIELDS", (*names, "test_split", "test_num_images"))

  def longer_base(real=base.get_base):
    config = real()
    config.data.ramp_classes = 4
    return config
  for module_with_base in (data_sets, formats):
    monkeypatch.setattr(module_with_base, "get_base", longer_base)
  monkeypatch.setattr(evaluate_config, "get_run_base", longer_base)


def tiny(**changes):
  config = pirl.get_config()
  config.update_from_flattened_dict({
    "num_epochs": 1, "batch_size": 16, "num_negatives": 16, "data.num_images": 32, "data.image_size": 16,
    "jigsaw.crop_size": 18, "jigsaw.patch_size": 5, "data.num_threads": 1, "optimizer.warmup_epochs": 0,
    "evaluate.num_images": 16, "evaluate.every_epochs": 1, "evaluate.batch_size": 16, "evaluate.learning": False,
    "report": False, "export": False, "log.every_steps": 1, "model.arch": "resnet4", "model.dim": 8, **changes})
  return config


def test_a_new_source_trains_is_evaluated_and_leaves_older_runs_as_they_were(ramps, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(resnet.ARCHITECTURES, "resnet4", (False, (1,), 8))
  create_mesh = mesh_lib.create_mesh
  monkeypatch.setattr(mesh_lib, "create_mesh", lambda: create_mesh(1))
  config = tiny(**{"data.source": "ramps", "data.ramp_classes": 3})
  pretrain.run(config, str(tmp_path / "new"))
  output = capsys.readouterr().out
  assert "training images: ramps, split train: 32 images of 16 x 16 px, 3 classes" in output
  assert "held-out images: ramps, split test: 16 images" in output and "reading the labels" not in output
  assert "knn_top1" in json.loads((tmp_path / "new" / "metrics.jsonl").read_text().splitlines()[-1])

  # The run of an older program, which had no such field: it goes on, and is judged on its own images and on new ones.
  pretrain.run(tiny(), str(tmp_path / "old"))
  stored = json.loads((tmp_path / "old" / "config.json").read_text())
  assert stored["data"].pop("ramp_classes") == 4
  (tmp_path / "old" / "config.json").write_text(json.dumps(stored))
  with pytest.raises(UserError, match=r"holds a run with data.ramp_classes=4, and now it is 5"):
    pretrain.run(tiny(**{"data.ramp_classes": 5}), str(tmp_path / "old"))
  pretrain.run(tiny(num_epochs=2), str(tmp_path / "old"))
  assert "resumes from step 2 of 4" in capsys.readouterr().out
  judged = evaluate_config.get_config("knn")
  judged.update_from_flattened_dict({"checkpoint": str(tmp_path / "old"), "knn.k": 5})
  evaluate.run(judged, "")
  path = tmp_path / "old" / "results" / "knn.json"
  result = json.loads(path.read_text())
  assert result["settings"]["data"].pop("ramp_classes") == 4
  path.write_text(json.dumps(result))
  evaluate.run(judged, "")  # the result that an older program wrote is that of the same evaluation
  judged.data.update(source="ramps", ramp_classes=2)
  evaluate.run(judged, "")
  path, = (tmp_path / "old" / "results").glob("knn-ramps-*.json")
  data = json.loads(path.read_text())["settings"]["data"]
  assert data["ramp_classes"] == 2 and data["num_images"] == 1_000 and data["test_num_images"] == 200


def test_the_source_of_the_guide_offers_what_a_source_must(ramps):
  settings = LongerSettings("ramps", num_images=12, image_size=16)
  source = open_source(settings)
  assert len(source) == 12 and source.labels().tolist() == [0, 1, 2, 3] * 3
  assert [source[i].label for i in range(12)] == source.labels().tolist()
  np.testing.assert_array_equal(source[3].image, open_source(settings)[3].image)
  changes = ({}, {"split": "test"}, {"num_images": 13}, {"image_size": 17}, {"ramp_classes": 3})
  assert len({open_source(dataclasses.replace(settings, **change)).fingerprint for change in changes}) == 5


def test_settings_are_the_config_field_by_field():
  data = base.get_base().data
  assert dataclasses.asdict(DataSettings()) == data.to_dict()
  assert DataSettings.of(json.loads(json.dumps(data.to_dict()))) == DataSettings.of(data) == DataSettings()
  assert set(data) <= set(evaluate_config.get_config("knn").data) | {"image_scale", "max_bad_fraction", "grown"}
