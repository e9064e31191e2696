"""The protocols' table: settings and config agree, nobody knows one by name, and a new one needs no other file."""

import ast
import dataclasses
import importlib
import json
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_evaluate import small_run

import pirl_jax.configs.evaluate
from pirl_jax.configs import study as study_config
from pirl_jax.data.sources import DataSettings, open_source
from pirl_jax.errors import UserError
from pirl_jax.evaluation import evaluate, protocols, training
from pirl_jax.evaluation.protocols import PROTOCOLS, protocol_of
from pirl_jax.evaluation.subjects import open_subjects
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.studies import report, study
from pirl_jax.views.normalisation import normalise_image

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("variant", pirl_jax.configs.evaluate.VARIANTS)
def test_the_group_of_a_variant_is_the_settings_field_by_field(variant):
  config = pirl_jax.configs.evaluate.get_config(variant)
  settings = protocol_of(config.protocol).settings
  assert set(config[config.protocol]) == {field.name for field in dataclasses.fields(settings)}
  assert dataclasses.asdict(settings(**config[config.protocol])) == config[config.protocol].to_dict()
  assert settings.__dataclass_params__.frozen


def code_of(module):
  """Returns the module's code without what only looks at whether a value is possible."""
  tree = ast.parse(Path(module.__file__).read_text())
  for node in ast.walk(tree):
    if isinstance(node, ast.ClassDef):
      node.body = [part for part in node.body if getattr(part, "name", "") != "__post_init__"] or [ast.Pass()]
  return ast.unparse(tree)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_setting_is_read(name):
  module = importlib.import_module(f"{protocols.__name__}.{PROTOCOLS[name]}")
  settings = protocol_of(name).settings
  code = code_of(module) + (code_of(training) if issubclass(settings, training.TrainingSettings) else "")
  unread = [field.name for field in dataclasses.fields(settings)
            if not re.search(rf"(settings|self)\.{field.name}\b", code)]
  assert not unread


def test_an_unknown_protocol_is_refused_with_those_there_are():
  with pytest.raises(UserError, match="config.protocol='rank' is unknown; choose from knn, linear, svm, "):
    protocol_of("rank")


def test_no_room_asks_for_a_protocol_by_name():
  asked = []
  for path in (ROOT / "pirl_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Compare):
        names = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
        if "protocol" in ast.unparse(node) and names & PROTOCOLS.keys():
          asked.append(f"{path.name}: {ast.unparse(node)}")
  assert not asked


# The example of docs/extending.md.

NAME = "effective_rank"


@pytest.fixture
def example(tmp_path, monkeypatch):
  """Adds the example's three blocks, as they stand in the docs, to where the text says that they belong."""
  text = (ROOT / "docs" / "extending.md").read_text().split("## A new protocol")[1].split("\n## ")[0]
  file, line, variant = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
  (tmp_path / "protocols").mkdir()
  (tmp_path / "protocols" / f"{NAME}.py").write_text(file)
  monkeypatch.setattr(protocols, "__path__", [*protocols.__path__, str(tmp_path / "protocols")])
  for name, module in ast.literal_eval(f"{{{line}}}").items():
    monkeypatch.setitem(PROTOCOLS, name, module)
    monkeypatch.delitem(sys.modules, f"{protocols.__name__}.{module}", raising=False)
  names = dict(vars(pirl_jax.configs.evaluate))
  exec(variant, names)
  assert isinstance(names[NAME], types.FunctionType)
  monkeypatch.setitem(pirl_jax.configs.evaluate.VARIANTS, NAME, names[NAME])


def test_a_new_protocol_needs_its_file_its_line_and_its_variant_and_nothing_else(example, tmp_path):
  run = small_run(tmp_path / "run")
  config = pirl_jax.configs.evaluate.get_config(NAME)
  config.data.crop_fraction = 1.0  # the whole image
  config.checkpoint = f"{run},{run}+{small_run(tmp_path / 'other', seed=1)}"
  evaluate.run(config, str(tmp_path / "both"))
  stored = json.loads((tmp_path / "both" / "results" / f"{NAME}.json").read_text())
  assert stored["protocol"] == NAME and list(stored["runs"]) == ["run", "run+other"]
  found = stored["runs"]["run"]
  assert found["settings"][NAME] == {"layer": "pooled", "epsilon": 1e-7}

  (subject,) = open_subjects(str(run), 0, mesh_lib.create_mesh(1))
  source = open_source(DataSettings("embedded", image_size=16, num_images=128))
  image = np.stack([source[i].image for i in range(128)])
  features = jax.jit(lambda x: subject.model.network.apply(subject.model.variables, x, method="features")["pooled"])(
    normalise_image(jnp.asarray(image)))
  values = np.linalg.svd(np.float64(features), compute_uv=False)
  share = values / values.sum()
  assert found["figures"]["effective_rank"] == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-3)
  assert found["figures"]["num_images"] == 128

  assert report.read_figures(NAME, found["figures"]) == {("effective rank", ""): found["figures"]["effective_rank"]}
  of_study = study_config.get_config("lambda")
  of_study.evaluation = NAME
  study.check_study(of_study, tmp_path)
  config.effective_rank.epsilon = 0.0
  with pytest.raises(UserError, match="effective_rank.epsilon=0.0; choose a number above 0"):
    evaluate.run(config, str(tmp_path / "again"))
