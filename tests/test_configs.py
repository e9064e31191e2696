"""Every config file and every variant of it, found by themselves: it loads, is possible, and its network can be built.

By shapes alone, at the real widths and sizes. A new file or variant needs no change here.
"""

import functools
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pirl_jax import system
from pirl_jax.choosing.arranging import arrange
from pirl_jax.choosing.choices import choose_settings, open_fields
from pirl_jax.choosing.facts import facts_of_chips
from pirl_jax.configs import data_sets
from pirl_jax.data.batches import steps_per_epoch
from pirl_jax.data.sources import DECODING
from pirl_jax.errors import UserError
from pirl_jax.evaluation import evaluate
from pirl_jax.evaluation.protocols import PROTOCOLS
from pirl_jax.method import memory_bank
from pirl_jax.method.optimizer import create_optimizer
from pirl_jax.runtime.chips import CHIPS
from pirl_jax.storage.settings import flatten
from pirl_jax.training import parts as parts_lib

MODULES = {}
for path in sorted((Path(__file__).parents[1] / "configs").glob("*.py")):
  module = importlib.import_module(f"pirl_jax.configs.{path.stem}")
  if hasattr(module, "get_config"):
    MODULES[path.stem] = module
CONFIGS = {f"{name}:{variant}": (name, variant) for name, module in MODULES.items() for variant in module.VARIANTS}
JOBS = {key: MODULES[name].get_config(variant).job for key, (name, variant) in CONFIGS.items()}
PRETRAIN = [key for key, job in JOBS.items() if job == "pretrain"]
EVALUATE = [key for key, job in JOBS.items() if job == "evaluate"]

NUM_IMAGES = {"cifar10": 50_000, "stl10": 100_000, "imagenet2012": 1_281_167}
"""Of the training split, by TFDS's name; a folder is taken to be as large as ImageNet."""

NUM_CLASSES = 10
B = 2


def config_of(key):
  name, variant = CONFIGS[key]
  config = MODULES[name].get_config(variant)
  return chosen_for(config, "h100") if JOBS[key] == "pretrain" and open_fields(config) else config


def chosen_for(config, chip, num_images=1_281_167):
  """Returns the config of a folder of photographs with the fields that are chosen on eight chips."""
  facts = facts_of_chips(CHIPS[chip], 8, num_images=num_images, num_classes=NUM_CLASSES)
  return choose_settings(arrange(config)[0], facts)[0]


@functools.cache  # tracing a ResNet takes a second, and many variants have the same
def network_shapes(used):
  """Returns (names of the parameter groups, shapes of what both heads give for the views)."""
  config = json.loads(used)
  network = system.network_of(config, num_classes=NUM_CLASSES)

  def outputs():
    inputs = [None if x is None else jnp.zeros((B, *x.shape[1:])) for x in system.network_inputs(config)]
    return network.init_with_output(jax.random.key(0), *inputs, train=True)

  found, variables = jax.eval_shape(outputs)
  return set(variables["params"]), tuple(None if x is None else x.shape for x in found)


@functools.cache
def view_shapes(used):
  """Returns the shapes of the image view, the pretext view and the label; None for what is not there."""
  config = json.loads(used)
  crops = {name: jax.ShapeDtypeStruct((B, size, size, 3), np.uint8)
           for name, (size, _) in system.crops_of(config).items()}
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
  views = jax.eval_shape(system.views_of(config), keys, crops.get("image_crop"), crops.get("pretext_crop"))
  return tuple(None if x is None else x.shape for x in views)


def used_for(config, *groups):
  """Returns what tells one network or one list of views from another, as JSON."""
  names = "objective", "pretext", "pretext_weight", "angle_weight", "jigsaw", *groups
  sizes = {"image_size": config.data.image_size, "image_scale": config.data.image_scale}
  return json.dumps({"data": sizes, **{name: config.to_dict()[name] for name in names}}, sort_keys=True)


@pytest.mark.parametrize("key", PRETRAIN)
def test_every_variant_of_a_pre_training_run_can_be_built(key):
  config = config_of(key)
  name, variant = CONFIGS[key]
  assert config.name == (f"{name}-{variant}" if variant else name)
  parts_lib.check_config(config)

  image, pretext, label = view_shapes(used_for(config, "photometric", "pretext_photometric", "bank"))
  side, transform = config.data.image_size, system.pretext_of(config)
  crops = system.crops_of(config)
  groups, outputs = network_shapes(used_for(config, "model"))
  if config.objective == "supervised":
    assert outputs == ((B, NUM_CLASSES), None) and groups == {"trunk", "image_head"}
  elif config.objective == "covariant":
    assert outputs == (None, (B, transform.num_labels)) and groups == {"trunk", "pretext_head"}
  else:
    embedding = B, config.model.dim
    assert outputs == (embedding, embedding if config.pretext_weight else None)
    assert groups == {"trunk", "image_head", *(["pretext_head"] if config.pretext_weight else [])}
  assert image == (None if outputs[0] is None else (B, side, side, 3))
  assert pretext == (None if outputs[1] is None else (B, *transform.view_shape))
  assert label == (None if outputs[1] is None else (B,))
  views = {"image_crop": image, "pretext_crop": pretext, "second_crop": config.bank.encoder_momentum > 0}
  assert set(crops) == {name for name, view in views.items() if view}
  if variant != "" and config.data.image_size > 96:  # the paper's sizes
    assert side == 224 and config.jigsaw.crop_size == 255 and config.jigsaw.patch_size == 64

  num_images = config.data.num_images or NUM_IMAGES.get(config.data.name, 1_281_167)
  layout = memory_bank.create_layout(num_images, num_devices=8,
                                     num_negatives=config.num_negatives if system.has_bank(config) else 0)
  assert callable(parts_lib.loss_of(config, layout))
  epoch = steps_per_epoch(num_images, config.batch_size)
  schedule = parts_lib.make_schedule(config, epoch)
  rates = np.array([schedule(round(share * max(1, config.num_epochs) * epoch)) for share in (0, 0.02, 0.3, 0.999)])
  base = config.optimizer.learning_rate * config.batch_size / 1024
  assert np.isfinite(rates).all() and (rates >= 0).all() and 0.3 * base < rates[:3].max() <= base * (1 + 1e-6)
  assert 0 < rates[3] < 0.02 * base or not config.num_epochs
  optimizer = create_optimizer(schedule, momentum=config.optimizer.momentum,
                               weight_decay=config.optimizer.weight_decay,
                               decay_biases=config.optimizer.decay_biases)
  assert jax.tree.leaves(jax.eval_shape(optimizer.init, {"kernel": jnp.zeros((2, 2))}))


@pytest.mark.parametrize("name", sorted({CONFIGS[key][0] for key in PRETRAIN}))
def test_every_system_has_the_data_sets_that_need_no_setting_up(name):
  assert {*data_sets.LABELLED, "imagenet"} <= set(MODULES[name].VARIANTS)


@pytest.mark.parametrize("key", EVALUATE)
def test_every_variant_of_an_evaluation_has_its_protocol(key):
  config = config_of(key)
  assert config.protocol in PROTOCOLS and config.name == CONFIGS[key][1]
  assert len(config[config.protocol]) > 0
  assert [name for name in PROTOCOLS if name in config] == [config.protocol]


def test_the_config_files_are_found_and_every_one_has_a_job():
  assert {"pirl", "npid", "jigsaw", "rotnet", "supervised", "random_init", "evaluate"} <= MODULES.keys()
  assert len(PRETRAIN) >= 40 and len(EVALUATE) >= 15


@pytest.mark.parametrize("name", sorted(MODULES))
def test_an_unknown_variant_is_refused_with_those_there_are(name):
  module = MODULES[name]
  with pytest.raises(UserError, match=f"configs/{name}.py .*'nonesuch'") as error:
    module.get_config("nonesuch")
  for variant in module.VARIANTS:
    assert variant in str(error.value)
  assert "\n" not in str(error.value)


def test_the_table_of_systems_names_every_imagenet_config():
  table = (Path(__file__).parents[1] / "docs" / "systems.md").read_text()
  for key in PRETRAIN:
    name, variant = CONFIGS[key]
    if variant.startswith(("imagenet", "yfcc")):
      assert f"{name}.py:{variant}`" in table or f", `{variant}`" in table, f"docs/systems.md lacks {key}"


@pytest.mark.parametrize("name, rooms", [
  ("evaluate", ["evaluation/evaluate.py", "evaluation/protocol.py"]),
  ("study", ["studies/study.py", "studies/points.py", "studies/report.py"]), ("checkpoints", ["runs.py"]),
  ("report", ["reporting/report.py"]),
  ("plan", ["planning/plan.py"])])
def test_every_field_of_any_other_job_is_read_by_its_job(name, rooms):
  """By its name in the job's files; tests/evaluation/test_protocols.py looks at the group of a protocol."""
  package = Path(system.__file__).parent
  source = "".join((package / room).read_text() for room in rooms) + (package / "launching" / "jobs.py").read_text()
  handed_on = {*PROTOCOLS, "settings", "system_settings", "evaluation_settings", "embedded", "run"}
  images = {f"data.{name}" for name in (*evaluate.SOURCE_FIELDS, *DECODING)}  # handed on whole, as `DataSettings`
  fields = {field for variant in MODULES[name].VARIANTS
            for field in flatten(MODULES[name].get_config(variant).to_dict())}
  unread = [field for field in fields if field.split(".")[0] not in handed_on
            and field not in images
            and not any(quoted in source for quoted in (f".{field.split('.')[-1]}", f'"{field.split(".")[-1]}"'))]
  assert not unread
