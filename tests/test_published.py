"""The configs and constants have the values of tests/published.json, and the rest those of tests/own_choices.json.

published.json has every value with its source, own_choices.json the values that no source publishes. Together they name
every field of every config: a new field, a new variant and any changed value fail until the tables have them, too.
"""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pirl_jax import configs
from pirl_jax.evaluation import layers
from pirl_jax.evaluation.protocols import svm
from pirl_jax.storage.settings import flatten
from pirl_jax.views import recipe

PUBLISHED, OWN = (json.loads((Path(__file__).parent / name).read_text())
                  for name in ("published.json", "own_choices.json"))
MODULES = {}
for path in sorted((Path(__file__).parents[1] / "configs").glob("*.py")):
  module = importlib.import_module(f"{configs.__name__}.{path.stem}")
  if hasattr(module, "get_config"):
    MODULES[path.stem] = module
CONFIGS = [f"{name}:{variant}" for name, module in MODULES.items() for variant in module.VARIANTS]

ENTRIES = {f"{key} {field}": entry for key, config in PUBLISHED["configs"].items()
           for field, entry in config["fields"].items()}
ENTRIES |= PUBLISHED["constants"] | PUBLISHED["svm"]
ENTRIES |= {f"{network} {layer}": entry for network, found in PUBLISHED["pooling"].items()
            for layer, entry in found.items()}


def parents(key):
  """Returns the configuration whose fields `key` has, too, as a list of one name or none."""
  return [table[key]["like"] for table in (PUBLISHED["configs"], OWN) if "like" in table.get(key, {})]


def fields_of_tables(key):
  """Returns {"group.field": value} of a configuration, except for the fields that follow from others."""
  fields = {}
  for parent in parents(key):
    fields |= fields_of_tables(parent)
  fields |= {field: entry["value"] for field, entry in PUBLISHED["configs"].get(key, {"fields": {}})["fields"].items()}
  return fields | OWN.get(key, {}).get("fields", {})


def fields_of_config(key):
  """Returns {"group.field": value} of the resolved config, with JSON's types.

  A study can set the fields of every run and evaluation; those that it leaves open are left out.
  """
  name, _, variant = key.partition(":")
  config = MODULES[name].get_config(variant) if variant else MODULES[name].get_config()
  fields = json.loads(json.dumps(flatten(config.to_dict())))
  return {field: value for field, value in fields.items() if value is not None or name != "study"}


def expected_fields(key):
  """Returns what `fields_of_config` must return.

  Not in the tables are a run's name, the run of a plan, and fields of the pretext views' augmentation that are those of
  the image's.
  """
  name, _, variant = key.partition(":")
  fields = fields_of_tables(key)
  photometric = {f"pretext_{field}": value for field, value in fields.items() if field.startswith("photometric.")}
  fields = photometric | fields
  if fields["job"] == "pretrain":
    fields["name"] = f"{name}-{variant}" if variant else name
  if fields["job"] in ("evaluate", "study"):
    fields["name"] = variant
  if fields["job"] == "plan":
    fields |= {f"run.{field}": value for field, value in expected_fields("pirl:imagenet").items()}
  return fields


def as_json(fields):
  """Returns the fields as JSON: 1, 1.0 and True are different values."""
  return {field: json.dumps(value, sort_keys=True) for field, value in fields.items()}


@pytest.mark.parametrize("key", CONFIGS)
def test_config_has_the_values_of_the_tables(key):
  found, expected = as_json(fields_of_config(key)), as_json(expected_fields(key))
  wrong = {field: f"config {found.get(field, 'without it')}, tables {expected.get(field, 'without it')}"
           for field in found.keys() | expected.keys() if found.get(field) != expected.get(field)}
  assert not wrong, wrong


def test_tables_name_every_config_and_no_other():
  named = PUBLISHED["configs"].keys() | OWN.keys()
  assert set(CONFIGS) <= named
  assert named - set(CONFIGS) <= {parent for key in named for parent in parents(key)}


def test_field_stands_in_one_table():
  for key, config in PUBLISHED["configs"].items():
    assert not config["fields"].keys() & OWN.get(key, {}).get("fields", {}).keys(), key
  assert all(len(parents(key)) <= 1 for key in PUBLISHED["configs"].keys() | OWN.keys())


def test_every_value_has_a_source_and_every_difference_a_reason():
  assert {file.split()[0] for file in PUBLISHED["files"].values()} <= PUBLISHED["repositories"].keys()
  used = set()
  for name, entry in ENTRIES.items():
    assert entry.keys() <= {"value", "published", "differs", "reason", "source", "map", "pooled"}, name
    assert ("differs" in entry) == ("reason" in entry), name
    assert entry["source"], name
    for source in entry["source"].split(", "):
      line = re.fullmatch(r"(\S+):\d+(-\d+)?", source)
      section = re.fullmatch(r"((paper|npid_paper) )?(section [\d.]+|appendix [A-Z][\d.]*)|torchvision", source)
      assert section or line and line[1] in PUBLISHED["files"], (name, source)
      used |= {line[1]} if line else set()
  assert used == PUBLISHED["files"].keys()


@pytest.mark.parametrize("name", PUBLISHED["constants"])
def test_constant_has_the_published_value(name):
  entry = PUBLISHED["constants"][name]
  path, constant, *key = name.split(":")
  found = getattr(importlib.import_module(path), constant)
  for part in key:
    found = found[part]
  if isinstance(found, np.ndarray):
    np.testing.assert_array_equal(found, np.float32(entry["value"]))
  else:
    assert json.dumps(found) == json.dumps(entry["value"])


def test_recipes_have_the_published_values():
  for recipe_of, key in ((recipe.BASE, "pirl:imagenet"), (recipe.GBLUR, "pirl:imagenet_gblur")):
    fields = {f"photometric.{name}": value for name, value in dataclasses.asdict(recipe_of).items()}
    expected = as_json(fields_of_tables(key))
    assert as_json(fields) == {field: expected[field] for field in fields}


def test_svm_has_the_published_settings(monkeypatch):
  given = {}

  def record(**settings):
    given.update(settings)
    raise InterruptedError

  monkeypatch.setattr(svm, "LinearSVC", record)
  with pytest.raises(InterruptedError):
    svm.fit(np.zeros((2, 1)), np.array([True, False]), (1.0,), seed=0)
  assert as_json({name: given[name] for name in PUBLISHED["svm"]}) == as_json(
    {name: entry["value"] for name, entry in PUBLISHED["svm"].items()})


@pytest.mark.parametrize("network", PUBLISHED["pooling"])
def test_maps_are_pooled_to_the_published_size(network):
  for layer, entry in PUBLISHED["pooling"][network].items():
    height, _, channels = entry["map"]
    pooled = jax.eval_shape(layers.pool, jax.ShapeDtypeStruct((1, *entry["map"]), jnp.float32))
    assert pooled.shape == (1, *entry["pooled"], channels), layer
    kernel = layers.KERNELS.get((height, channels))
    assert kernel == (entry["value"] and tuple(entry["value"])), layer
