"""Every system as a tiny run from its config, by the command a user types: what it writes, which fields it reads.

One device and a trunk of one block: what has to compile here is the systems.
"""

import dataclasses
import functools
import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from pirl_jax import runs, system
from pirl_jax.configs import evaluate as evaluate_config
from pirl_jax.configs.base import get_base
from pirl_jax.errors import UserError
from pirl_jax.evaluation import evaluate
from pirl_jax.launching import command, jobs
from pirl_jax.method import losses
from pirl_jax.method.negatives import Scores
from pirl_jax.models import resnet
from pirl_jax.models.heads import ClassHead, ImageHead
from pirl_jax.runtime import caching, compiling
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.storage.rows import read_rows
from pirl_jax.storage.settings import flatten
from pirl_jax.training import guards, pretrain
from pirl_jax.training import parts as parts_lib
from pirl_jax.views import normalisation, two_views
from pirl_jax.views.pretext import Pretext

NUM_IMAGES = 72
KNN = {"data.source": "embedded", "evaluate.split": "test", "evaluate.every_epochs": 1}
UNLABELLED = {"data.source": "folder", "data.num_images": 0, "data.split": "", "evaluate.split": ""}

SYSTEMS = {
  "pirl": ("pirl", KNN),
  "pirl_rotation": ("pirl", {"pretext": "rotation", "model.head": "mlp", "model.dtype": "bfloat16", **UNLABELLED}),
  "pirl_rotation_jigsaw": ("pirl", {"pretext": "rotation_jigsaw", "negative_sampling": "per_image",
                                    "bank.dtype": "bfloat16", "model.batch_norm": "groups",
                                    "model.batch_norm_group": 12}),
  "npid": ("npid", {"loss": "nce", **UNLABELLED}),
  "npid_softmax": ("npid", {"num_negatives": 0, "optimizer.schedule": "steps", "optimizer.decay_biases": True}),
  "jigsaw": ("jigsaw", {"jigsaw.num_permutations": 5, "jigsaw.augment": "crop", "checkpoint.every_steps": 1,
                        "model.batch_norm": "groups", "model.batch_norm_group": 18, **UNLABELLED}),
  "rotnet": ("rotnet", UNLABELLED),
  "supervised": ("supervised", KNN),
  "random_init": ("random_init", {}),
}
"""(Config file, changes) by name. Those on a folder without labels have no held-out images either."""


@pytest.fixture(scope="module", autouse=True)
def small():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(resnet.ARCHITECTURES, "resnet4", (False, (1,), 8))
    patch.setattr(mesh_lib, "create_mesh", functools.partial(mesh_lib.create_mesh, 1))
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder of images and nothing else."""
  root = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for i in range(NUM_IMAGES):
    cv2.imwrite(str(root / f"{i}.png"), rng.integers(0, 256, (16, 18, 3), dtype=np.uint8))
  return root


def tiny(name, folder, **changes):
  """Returns the config of a system, with the network and the images made small: two steps in all."""
  config = importlib.import_module(f"pirl_jax.configs.{name}").get_config()
  config.update_from_flattened_dict({
    "num_epochs": min(config.num_epochs, 1), "batch_size": NUM_IMAGES // 2, "num_negatives": 16,
    "data.num_images": NUM_IMAGES, "data.root": str(folder), "data.image_size": 16, "data.num_threads": 1,
    "jigsaw.crop_size": 18, "jigsaw.patch_size": 5, "model.arch": "resnet4", "model.dim": 8,
    "optimizer.warmup_epochs": 0, "evaluate.num_images": 20, "evaluate.every_epochs": 0, "evaluate.batch_size": 20,
    "evaluate.learning": False, "report": False, "export": False, "checkpoint.every_steps": 100, "log.every_steps": 1,
    # Brightness stands for the whole list, which takes long to compile.
    **{f"photometric.{field}": 0.0 for field in ("contrast", "saturation", "hue", "group_probability",
                                                 "grayscale_probability")}, **changes})
  return config


class Recorded:
  """A config that notes the fields that are read from it: not those that `to_dict` copies for a file or a comparison.

  `**config.group` reads every field of the group: a keyword that nothing takes is a TypeError.
  """

  def __init__(self, config, read, prefix=""):
    self._config, self._read, self._prefix = config, read, prefix

  def __getitem__(self, name):
    value, path = self._config[name], self._prefix + name
    if isinstance(value, ConfigDict):
      return Recorded(value, self._read, f"{path}.")
    self._read.add(path)
    return value

  def __getattr__(self, name):
    return self[name]

  def keys(self):
    return self._config.keys()

  def to_dict(self):
    return self._config.to_dict()


def launched(config, workdir, patch):
  """Runs the config as launch.py does, and returns the names of the fields that were read.

  The checks of the values do not count: what is only checked has no effect.
  """
  parts_lib.check_config(config)
  read = set()
  patch.setattr(pretrain, "check_config", lambda config: None)
  patch.setattr(command, "CONFIG", SimpleNamespace(value=Recorded(config, read)))
  patch.setattr(command, "WORKDIR", SimpleNamespace(value=workdir))
  for flag, value in (("COORDINATOR", ""), ("NUM_PROCESSES", 1), ("PROCESS_ID", None),
                      ("KEEP_MEMORY", False), ("COMPILATION_CACHE", None)):
    patch.setattr(command, flag, SimpleNamespace(value=value))
  patch.setattr(caching, "keep_compiled", lambda folder: None)  # the tests have a cache of their own
  patch.setattr(compiling, "compile_for_cpu", lambda: None)  # it sets the environment of all tests
  patch.setattr(jobs, "quiet", lambda: None)
  command.main(["launch.py"])
  return read


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, folder):
  """Returns run_of(name) -> (config, workdir, fields read) of a system's run, which is made once."""
  base = tmp_path_factory.mktemp("systems")

  @functools.cache
  def run_of(name):
    config_file, changes = SYSTEMS[name]
    config = tiny(config_file, folder, **changes)
    with pytest.MonkeyPatch.context() as patch:
      patch.chdir(base)
      config.name = name  # without --workdir the run's folder has its name
      read = launched(config, "", patch)
    return config, base / "runs" / name, read
  return run_of


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_trains_writes_its_run_and_is_evaluated(name, run_of):
  config, workdir, _ = run_of(name)
  names = {path.name for path in workdir.iterdir()}
  assert {"config.json", "checkpoints", "metrics.jsonl", "curves.png"} <= names
  assert json.loads((workdir / "config.json").read_text()) == json.loads(json.dumps(config.to_dict()))
  steps = 0 if name == "random_init" else 2
  rows = read_rows(workdir / "metrics.jsonl")
  assert [row["step"] for row in rows] == [*range(1, steps + 1)]
  assert all(row["loss"] is not None and row["loss"] > 0 for row in rows)  # null: not finite
  assert ("views.png" in names) == (steps > 0)
  assert ("knn_top1" in (rows or [{}])[-1]) == (name in ("pirl", "supervised"))
  assert ("loss_pretext" in (rows or [{}])[-1]) == name.startswith("pirl")

  run = runs.open_run(workdir, name, 0, mesh_lib.create_mesh())
  assert run.step == steps
  heads = {"pirl": {"image_head", "pretext_head"}, "jigsaw": {"pretext_head"}, "rotnet": {"pretext_head"},
           "npid": {"image_head"}, "supervised": {"image_head"}, "random_init": {"image_head", "pretext_head"}}
  assert set(run.model.variables["params"]) == {"trunk", *heads[SYSTEMS[name][0]]}

  evaluation = evaluate_config.get_config("features")
  evaluation.checkpoint = str(workdir)
  evaluate.run(evaluation, "")
  (path,) = workdir.glob("results/features-[at][lr]*.npz")  # "all" or "train"
  with np.load(path) as exported:
    assert exported["features"].shape == (NUM_IMAGES, 8) and np.isfinite(exported["features"]).all()
    assert np.ptp(exported["features"], axis=0).max() > 1e-3


def test_every_field_of_the_config_is_read_by_some_system(run_of, folder, tmp_path, monkeypatch):
  read = set().union(*(run_of(name)[2] for name in SYSTEMS))
  fields = set(flatten(get_base().to_dict()))
  assert not fields - read, f"nothing reads {', '.join(sorted(fields - read))}"

  # The record is none that cannot miss: these two are in a run's config.json and nobody asks for them.
  config = tiny("random_init", folder)
  with config.unlocked():
    config.forgotten, config.optimizer.forgotten = 1, 2
  read |= launched(config, str(tmp_path / "run"), monkeypatch)
  assert set(flatten(config.to_dict())) - read == {"forgotten", "optimizer.forgotten"}
  assert "forgotten" in json.loads((tmp_path / "run" / "config.json").read_text())
  with config.unlocked():
    config.jigsaw.forgotten = 3
  with pytest.raises(TypeError, match="forgotten"):
    system.pretext_of(config)


class Killed(BaseException):
  pass


def newest_state(config, workdir):
  """Returns the state of the newest checkpoint and its meta."""
  parts = parts_lib.build(config, workdir)
  with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
    step = checkpoints.steps()[-1]
    state = checkpoints.restore(step, jax.eval_shape(parts.initial_state), parts.mesh)
    return jax.device_get(state), checkpoints.read_meta(step)


def test_resumed_covariant_run_is_the_uninterrupted_one_bit_for_bit(run_of, tmp_path, monkeypatch):
  config, workdir, _ = run_of("jigsaw")

  class Deadly(guards.Broken):
    def note(self, step, batch):
      if step == 2:
        raise Killed
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(pretrain, "Broken", Deadly)
    pretrain.run(config, str(tmp_path / "run"))
  killed, _ = newest_state(config, tmp_path / "run")
  assert killed.step == 1
  pretrain.run(config, str(tmp_path / "run"))
  (state, meta), (expected, expected_meta) = (newest_state(config, path) for path in (tmp_path / "run", workdir))
  assert state.step == 2 and state.bank is None and meta == expected_meta
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  assert any((a != b).any() for a, b in zip(*(jax.tree.leaves(x.params) for x in (killed, state)), strict=True))
  rows = [[{name: row[name] for name in ("step", "loss", "top1", "learning_rate")}
           for row in read_rows(path / "metrics.jsonl")] for path in (tmp_path / "run", workdir)]
  assert rows[0] == rows[1]


def test_without_epochs_it_is_the_initial_network_with_measured_statistics(run_of):
  config, workdir, _ = run_of("random_init")
  initial = jax.device_get(parts_lib.build(config, workdir).initial_state())
  state, meta = newest_state(config, workdir)
  assert state.step == meta["step"] == 0
  jax.tree.map(np.testing.assert_array_equal, state.params, initial.params)
  measured, fresh = (jax.tree.leaves(x.batch_stats["trunk"]) for x in (state, initial))
  assert all(np.isfinite(x).all() and (x != y).all() for x, y in zip(measured, fresh, strict=True))
  # Of the first layer they can be said by hand: the mean of what it gives for the images as the test sees them.
  batches = parts_lib.test_images(SimpleNamespace(config=config), parts_lib.open_data(config)[0]).test_batches()
  images = np.concatenate([batch["image"][batch["valid"]] for batch in batches])[:60]  # what fills whole batches
  conv = jax.lax.conv_general_dilated(
    normalisation.normalise_image(jnp.asarray(images)), state.params["trunk"]["conv1"]["kernel"], (2, 2),
    ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
  np.testing.assert_allclose(state.batch_stats["trunk"]["bn1"]["mean"], np.mean(conv, axis=(0, 1, 2)), atol=1e-5)

  def contents():
    # The card of an export has the results that came in the meantime.
    return {path: path.read_bytes() for path in workdir.rglob("*")
            if path.is_file() and ".tfevents." not in path.name and "export" not in path.parts}
  before = contents()
  checkpoints = {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}
  pretrain.run(config, str(workdir))
  assert contents() == before
  assert {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")} == checkpoints


def test_supervised_on_images_without_labels_is_refused(folder, tmp_path):
  with pytest.raises(UserError, match="objective=supervised needs labels.*--config.data.labels=folder") as error:
    pretrain.run(tiny("supervised", folder, **UNLABELLED, **{"data.labels": "none"}), str(tmp_path / "run"))
  assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@dataclasses.dataclass(frozen=True)
class UpsideDown(Pretext):
  """A transform that the program has never heard of."""

  crop_size: int
  crop_scale: tuple[float, float]
  head: ClassVar = ImageHead
  covariant_head: ClassVar = ClassHead
  settings: ClassVar = "upside_down"
  share: float = 0.5

  @property
  def view_shape(self):
    return 1, self.crop_size, self.crop_size, 3

  @property
  def num_labels(self):
    return 2

  def __call__(self, key, crop, augment):
    label = jax.random.bernoulli(key, self.share).astype(jnp.int32)
    view = augment(crop[None])
    return jnp.where(label == 1, view[:, ::-1], view), label


@pytest.mark.parametrize("system_name", ["pirl", "rotnet"])
def test_a_new_transform_needs_its_class_and_its_name_and_nothing_else(system_name, folder, tmp_path, monkeypatch):
  monkeypatch.setitem(two_views.PRETEXTS, "upside_down", UpsideDown)
  config = tiny(system_name, folder, pretext="upside_down", batch_size=NUM_IMAGES)
  with config.unlocked():
    config.upside_down = ConfigDict({"share": 0.25})
  parts_lib.check_config(config)
  pretrain.run(config, str(tmp_path / "run"))
  (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
  assert row["loss"] is not None and ("loss_pretext" in row) == (system_name == "pirl")
  network = runs.open_run(tmp_path / "run", "run", 0, mesh_lib.create_mesh()).model.network
  assert network.pretext_head == (ImageHead(8) if system_name == "pirl" else ClassHead(2))


def test_a_new_loss_needs_its_function_and_its_name_and_nothing_else(folder, tmp_path, monkeypatch):
  """That of docs/extending.md, as it stands there."""
  text = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
  scope = dict(vars(losses))
  exec(re.search(r"```python\n(def logistic.*?)```", text, re.DOTALL)[1], scope)
  name, function = re.search(r'in `LOSSES`: `"(\w+)": (lambda .*?)`', text).groups()
  monkeypatch.setitem(losses.LOSSES, name, eval(function, scope))

  rng = np.random.default_rng(0)
  positive, negative = (rng.uniform(-9, 9, shape).astype(np.float32) for shape in ((5,), (5, 7)))
  weight = (rng.random((5, 7)) < 0.7).astype(np.float32)
  loss_fn = losses.make_loss("logistic", temperature=0.2, num_images=50, num_negatives=7)
  found, _ = loss_fn(positive, Scores(negative, weight), normaliser=jnp.float32(0))
  for b in range(5):
    each = [np.log1p(np.exp(float(negative[b, k]) - positive[b])) for k in range(7) if weight[b, k]]
    np.testing.assert_allclose(found[b], np.mean(each), rtol=1e-5)

  # At this temperature all scores lie within 0.01 of 0: log(1 + exp(0)) for each negative, whatever their number.
  pretrain.run(tiny("pirl", folder, loss="logistic", temperature=100.0), str(tmp_path / "run"))
  row, _ = read_rows(tmp_path / "run" / "metrics.jsonl")
  for view in ("image", "pretext"):
    np.testing.assert_allclose(row[f"loss_{view}"], np.log(2), atol=0.011)
