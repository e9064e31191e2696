"""The evaluation job: runs, images, result files, and every mistake a user can make. The protocols have own files."""

import dataclasses
import json
import os
import shutil

import cv2
import jax
import numpy as np
import pytest
from orbax.checkpoint import CheckpointManager, args

import pirl_jax.configs.evaluate
from pirl_jax.configs import pirl
from pirl_jax.errors import UserError
from pirl_jax.evaluation import evaluate
from pirl_jax.evaluation.protocols import PROTOCOLS, knn
from pirl_jax.evaluation.subjects import Subject, check_same_layers, open_subjects
from pirl_jax.models.network import Model, Network
from pirl_jax.models.resnet import create_resnet
from pirl_jax.reporting.meanings import FIGURES
from pirl_jax.runs import Run
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.storage.checksums import checksums, json_checksum
from pirl_jax.storage.formats import FORMAT
from pirl_jax.storage.settings import flatten
from pirl_jax.training import pretrain


def small_run(folder, *, seed=0, num_epochs=2, **data):
  config = pirl.get_config()
  config.update(seed=seed, num_epochs=num_epochs, batch_size=32, num_negatives=32)
  config.data.update(num_images=128, image_size=16, **data)
  config.jigsaw.update(crop_size=18, patch_size=5)
  config.model.dim = 16
  config.optimizer.learning_rate = 0.1
  config.checkpoint.every_steps = 4
  config.evaluate.update(num_images=48, every_epochs=0, batch_size=32, learning=False)
  config.report = config.export = False
  pretrain.run(config, str(folder))
  return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Two runs and the files of the first as they were."""
  root = tmp_path_factory.mktemp("runs")
  return [small_run(root / "a"), small_run(root / "b", seed=1)]


@pytest.fixture
def run(runs, tmp_path):
  return shutil.copytree(runs[0], tmp_path / "run")


def config_of(variant, *checkpoints, **fields):
  config = pirl_jax.configs.evaluate.get_config(variant)
  config.checkpoint = ",".join(map(str, checkpoints))
  config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
  return config


def result_of(folder, name):
  return json.loads((folder / "results" / f"{name}.json").read_text())


QUICK = {
  "knn": {"knn__k": 20},
  "linear": {"linear__num_epochs": 2, "linear__batch_size": 32},
  "svm": {"svm__costs": "vissl"},
  "low_shot": {"low_shot__shots": (1, 2), "low_shot__num_draws": 2},
  "semi_supervised": {"semi_supervised__fractions": (0.25,), "semi_supervised__num_epochs": 2},
  "invariance": {"invariance__num_pictures": 24, "invariance__num_transforms": 2},
  "retrieval": {"retrieval__num_queries": 16},
  "features": {},
}
TOLERANCE = {"semi_supervised": 0.05, "svm": 0.01, "low_shot": 0.01}
"""Where float32 sums in another order may tell an image or two of the 48 otherwise, or rank two of them."""


@pytest.mark.parametrize("protocol", QUICK)
def test_every_protocol_writes_its_result_and_gives_the_same_on_one_device(run, monkeypatch, capsys, protocol):
  evaluate.run(config_of(protocol, run, **QUICK[protocol]), "")
  result = result_of(run, protocol)
  assert result["protocol"] == protocol and result["step"] == 8 and result["seed"] == 0
  assert result["figures"].keys() - FIGURES.keys() == set()  # the glossary has all of them
  assert result["settings"]["run_config"]["num_epochs"] == 2
  assert not (run / "results" / "unfinished").exists()
  assert f"written: {run / 'results' / protocol}.json" in capsys.readouterr().out

  before = (run / "config.json").read_bytes()
  monkeypatch.setattr(mesh_lib, "create_mesh", lambda num_devices=1, create=mesh_lib.create_mesh: create(num_devices))
  evaluate.run(config_of(protocol, run, **QUICK[protocol]), "")
  one, eight = (flatten(found["figures"]) for found in (result_of(run, protocol), result))
  assert (run / "config.json").read_bytes() == before
  assert one.keys() == eight.keys()
  for name, value in eight.items():
    if isinstance(value, float) and "second" not in name:
      assert one[name] == pytest.approx(value, rel=1e-3, abs=TOLERANCE.get(protocol, 1e-3)), name


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "..", "a/../../b", "c\0d", "e\nf", "~"])
def test_names_of_data_sets_stay_in_the_folder_of_the_results(name, tmp_path):
  for data in ({"name": name, "root": "", "source": "tfds"},
               {"name": "", "root": f"/images/{name}", "source": "folder"}):
    path = tmp_path / "results" / f"{evaluate.dated_name(config_of('knn', 'x'), data, 7)}.json"
    assert os.path.normpath(path) == str(path) and path.parent == tmp_path / "results"
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")


def test_several_runs_give_one_table_and_one_plot_and_leave_their_folders_alone(runs, tmp_path, capsys):
  before = [sorted(folder.rglob("*")) for folder in runs]
  evaluate.run(config_of("knn", *runs, knn__k=20), str(tmp_path / "both"))
  result = result_of(tmp_path / "both", "knn")
  assert set(result["runs"]) == {"a", "b"}
  assert (tmp_path / "both" / "results" / "knn.png").exists()
  assert [sorted(folder.rglob("*")) for folder in runs] == before
  table = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("top-1")]
  assert f"{result['runs']['a']['figures']['top1']:.1%}" in table[0]
  assert f"{result['runs']['b']['figures']['top1']:.1%}" in table[0]


# Ensembles.

def test_an_ensemble_stands_beside_its_runs_in_one_table(runs, tmp_path, capsys):
  checkpoint = f"{runs[0]},{runs[1]},{runs[0]}+{runs[1]}"
  evaluate.run(config_of("linear", checkpoint, **QUICK["linear"], linear__layers="res4,pooled"), str(tmp_path))
  found = result_of(tmp_path, "linear")["runs"]
  assert list(found) == ["a", "b", "a+b"]
  layers = {label: result["figures"]["layers"] for label, result in found.items()}
  for layer in ("res4", "pooled"):
    assert layers["a+b"][layer]["dim"] == layers["a"][layer]["dim"] + layers["b"][layer]["dim"]
  assert found["a+b"]["checkpoint"] == f"{runs[0]}+{runs[1]}" and found["a+b"]["step"] == "8+8"
  assert found["a+b"]["settings"]["run_config"] == {
    label: found[label]["settings"]["run_config"] for label in ("a", "b")}
  header, *rows = capsys.readouterr().out.split("linear, ")[-1].splitlines()[1:]
  assert header.split() == ["a", "b", "a+b"]
  best = next(row for row in rows if row.startswith("  best layer, top-1"))
  assert best.split()[-1] == f"{found['a+b']['figures']['top1']:.1%}"


@pytest.mark.parametrize("protocol, dim", [
  ("knn", "dim"), ("svm", "layers.pooled.dim"), ("low_shot", "layers.pooled.dim"), ("retrieval", "dim")])
def test_protocols_of_features_judge_an_ensemble(runs, tmp_path, monkeypatch, protocol, dim):
  monkeypatch.chdir(tmp_path)
  evaluate.run(config_of(protocol, f"{runs[0]}+{runs[1]}", **QUICK[protocol]), "")
  result = result_of(tmp_path / "runs" / "a+b", protocol)
  assert result["settings"]["ensemble"] == ["a", "b"] and result["step"] == "8+8"
  assert not (tmp_path / "runs" / "a+b" / "results" / "unfinished").exists()
  assert flatten(result["figures"])[dim] == 2 * 64


def test_what_is_exported_of_an_ensemble_is_what_its_runs_have_side_by_side(runs, tmp_path):
  names = f"{runs[0]},{runs[1]},{runs[0]}+{runs[1]}"
  evaluate.run(config_of("features", names), str(tmp_path))
  a, b, both = (np.load(tmp_path / "results" / f"features-{label}-test.npz")["features"]
                for label in ("a", "b", "a+b"))
  assert np.abs(a - b).max() > 0.01
  np.testing.assert_allclose(both, np.concatenate([a, b], axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant, fields, said", [
  ("semi_supervised", {}, "semi_supervised with these settings needs .* and a.b is an ensemble"),
  ("invariance", {"invariance__representation": "trunk"}, "invariance with these settings needs .* a.b is an ensemble"),
  ("retrieval", {"retrieval__gallery": "bank"}, "retrieval with these settings .* memory bank .* a.b is an ensemble"),
  ("knn", {"knn__layer": "embedding"}, "knn.layer names the layer 'embedding'; this ensemble has conv1"),
  ("linear", {"linear__layers": "res4,embedding"}, "linear.layers names the layer 'embedding'; this ensemble has"),
])
def test_what_needs_more_than_features_refuses_an_ensemble_before_anything_is_judged(runs, tmp_path, monkeypatch,
                                                                                     variant, fields, said):
  monkeypatch.setattr(evaluate, "measure", lambda _: pytest.fail("judged the first run"))
  with pytest.raises(UserError, match=said):
    evaluate.run(config_of(variant, runs[0], f"{runs[0]}+{runs[1]}", **fields), str(tmp_path / "both"))
  assert not (tmp_path / "both").exists()


@pytest.mark.parametrize("group, field", [("data", "image_size"), ("evaluate", "crop_fraction")])
def test_the_runs_of_an_ensemble_see_images_of_one_size(runs, tmp_path, monkeypatch, group, field):
  real = Checkpoints.read_meta

  def read_meta(self, step):
    meta = real(self, step)
    if meta["config"]["seed"] == 1:
      meta["config"][group][field] = {"image_size": 24, "crop_fraction": 0.5}[field]
    return meta

  monkeypatch.setattr(Checkpoints, "read_meta", read_meta)
  given = {"image_size": 16, "crop_fraction": 0.9}[field]
  with pytest.raises(UserError, match=rf"data.{field} is .* in a and .* in b; choose one, --config.data.{field}="):
    evaluate.run(config_of("knn", f"{runs[0]}+{runs[1]}", **QUICK["knn"]), str(tmp_path))
  evaluate.run(config_of("knn", f"{runs[0]}+{runs[1]}", **QUICK["knn"], **{f"data__{field}": given}), str(tmp_path))
  assert result_of(tmp_path, "knn")["settings"][field] == given


def test_the_runs_of_an_ensemble_are_judged_on_the_same_images(runs, tmp_path, monkeypatch):
  real = Checkpoints.read_meta

  def read_meta(self, step):
    meta = real(self, step)
    meta["config"]["data"]["split"] = "other" if meta["config"]["seed"] else "train"
    return meta

  monkeypatch.setattr(Checkpoints, "read_meta", read_meta)
  with pytest.raises(UserError, match="data.split: 'train' in a, 'other' in b"):
    evaluate.run(config_of("knn", f"{runs[0]}+{runs[1]}", **QUICK["knn"]), str(tmp_path))


def test_the_networks_of_an_ensemble_need_the_same_layers():
  def run_of(label, arch):
    return Run(label, None, 8, True, {}, Model(Network(create_resnet(arch), None, None), {}))

  check_same_layers(Subject((run_of("a", "resnet18"), run_of("b", "resnet50"))))
  with pytest.raises(UserError, match=r"a\+b: .* a has conv1, .* res4, res5, pooled, b conv1, .*res4, pooled$"):
    check_same_layers(Subject((run_of("a", "resnet18"), run_of("b", "resnet8"))))


def test_an_ensemble_does_not_replace_the_result_of_a_run_nor_of_another_ensemble(runs, tmp_path):
  evaluate.run(config_of("knn", runs[0], **QUICK["knn"]), str(tmp_path))
  with pytest.raises(UserError, match=r"ensemble=None, and now it is \['a', 'b'\]; --config\.name=NAME keeps both"):
    evaluate.run(config_of("knn", f"{runs[0]}+{runs[1]}", **QUICK["knn"]), str(tmp_path))
  evaluate.run(config_of("knn", f"{runs[0]}+{runs[1]}", name="both", **QUICK["knn"]), str(tmp_path))
  with pytest.raises(UserError, match=r"ensemble=\['a', 'b'\], and now it is \['b', 'a'\]; --config\.name=NAME"):
    evaluate.run(config_of("knn", f"{runs[1]}+{runs[0]}", name="both", **QUICK["knn"]), str(tmp_path))


def test_a_plus_may_be_in_the_name_of_a_run(run):
  folder = run.with_name("a+b")
  run.rename(folder)
  for name in (folder, folder / "checkpoints"):
    (subject,) = open_subjects(str(name), 0, mesh_lib.create_mesh(1))
    assert subject.label == "a+b" and not subject.is_ensemble and subject.folder == folder


def test_a_run_without_heads_f_and_g_is_refused_before_another_is_judged(runs, tmp_path, monkeypatch):
  def without_head(*args, **kwargs):
    subjects = open_subjects(*args, **kwargs)
    model = subjects[1].model
    bare = dataclasses.replace(model, network=model.network.clone(pretext_head=None))
    return [subjects[0], Subject((dataclasses.replace(subjects[1].runs[0], model=bare),))]

  monkeypatch.setattr(evaluate, "open_subjects", without_head)
  with monkeypatch.context() as patch, pytest.raises(UserError, match="--config.invariance.representation=trunk"):
    patch.setattr(evaluate, "measure", lambda _: pytest.fail("judged the first run"))
    evaluate.run(config_of("invariance", *runs, **QUICK["invariance"]), str(tmp_path))
  evaluate.run(config_of("invariance", *runs, **QUICK["invariance"], invariance__representation="trunk"), str(tmp_path))
  found = result_of(tmp_path, "invariance")["runs"]
  assert {label: result["figures"]["representation"] for label, result in found.items()} == {"a": "trunk", "b": "trunk"}


def test_an_image_is_harder_to_know_again_under_the_colours_of_the_run(run, tmp_path):
  separation = {}
  for augmented in (False, True):
    name = f"augmented-{augmented}"
    evaluate.run(config_of("invariance", run, name=name, invariance__representation="trunk", invariance__centred=True,
                           invariance__num_transforms=2, invariance__augmented=augmented), str(tmp_path))
    separation[augmented] = result_of(tmp_path, name)["figures"]["separation"]
  assert separation[True] < separation[False] - 0.02


def test_running_out_of_memory_is_one_line_with_flags(run, monkeypatch):
  def exhausted(_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.")
  monkeypatch.setattr(evaluate, "measure", exhausted)
  with pytest.raises(UserError, match=r"out of memory .*asked for 8.00 GiB.*--config.data.batch_size=8.*num_threads=1"):
    evaluate.run(config_of("knn", run), "")


def test_an_interrupted_comparison_does_not_judge_the_first_run_again(runs, tmp_path, monkeypatch):
  judged, real = [], knn.PROTOCOL.measure

  def measure(evaluation):
    judged.append(evaluation.subject.label)
    if len(judged) == 2:
      raise KeyboardInterrupt
    return real(evaluation)

  monkeypatch.setattr(knn, "PROTOCOL", dataclasses.replace(knn.PROTOCOL, measure=measure))
  config = config_of("knn", *runs, knn__k=20)
  with pytest.raises(KeyboardInterrupt):
    evaluate.run(config, str(tmp_path))
  evaluate.run(config, str(tmp_path))
  assert judged == ["a", "b", "b"]
  assert not (tmp_path / "results" / "unfinished").exists()
  evaluate.run(config_of("knn", runs[0], knn__k=20), str(tmp_path / "alone"))
  alone, both = result_of(tmp_path / "alone", "knn"), result_of(tmp_path, "knn")["runs"]["a"]
  assert alone["figures"]["top1"] == both["figures"]["top1"]


def test_an_older_step_and_other_data_have_files_of_their_own(run):
  evaluate.run(config_of("knn", run, knn__k=20), "")
  evaluate.run(config_of("knn", run, step=4, knn__k=20), "")
  evaluate.run(config_of("knn", run / "checkpoints", knn__k=20, data__test_split="other"), "")
  evaluate.run(config_of("knn", run, knn__k=5, name="nearest"), "")
  assert sorted(path.name for path in (run / "results").glob("*.json")) == [
    "knn-embedded-4.json", "knn-embedded-8.json", "knn.json", "nearest.json"]
  assert result_of(run, "knn-embedded-4")["step"] == 4


def test_a_result_with_other_settings_is_not_lost(run):
  evaluate.run(config_of("knn", run, knn__k=20), "")
  with pytest.raises(UserError, match=r"knn\.k=20, and now it is 5; --config\.name=NAME keeps both"):
    evaluate.run(config_of("knn", run, knn__k=5), "")
  assert result_of(run, "knn")["settings"]["knn"]["k"] == 20


@pytest.mark.slow
def test_runs_of_one_config_and_other_weights_keep_their_own_figures(runs, run, tmp_path, monkeypatch, capsys):
  """As two machines or versions make them: nothing but the weights tells them apart."""
  copy, *others = open_subjects(f"{run},{runs[0]},{runs[1]}", 0, mesh_lib.create_mesh(1))
  assert copy.weights == others[0].weights != others[1].weights
  computed = checksums(dict(copy.model.variables))
  assert copy.weights == json_checksum(computed)  # also without those of the checkpoint
  twin = shutil.copytree(run, tmp_path / "twin")
  monkeypatch.setattr(Run, "weights", property(lambda self: self.folder.name))
  evaluate.run(config_of("knn", run, twin, knn__k=20), str(tmp_path / "compare"))
  assert "done before" not in capsys.readouterr().out
  evaluate.run(config_of("knn", run, knn__k=20), "")
  monkeypatch.setattr(Run, "weights", "of another training")
  with pytest.raises(UserError, match="same settings and step but of other weights; --config.name=NAME keeps both"):
    evaluate.run(config_of("knn", run, knn__k=20), "")
  path = run / "results" / "knn.json"
  stored = json.loads(path.read_text())
  del stored["settings"]["weights"]  # as older versions stored it
  path.write_text(json.dumps(stored))
  evaluate.run(config_of("knn", run, knn__k=20), "")


def test_when_the_run_has_gone_on_the_result_of_the_earlier_step_keeps_a_name_of_its_own(tmp_path):
  folder = small_run(tmp_path / "run")
  evaluate.run(config_of("knn", folder, knn__k=20), "")
  first = result_of(folder, "knn")
  small_run(folder, num_epochs=3)
  evaluate.run(config_of("knn", folder, knn__k=20), "")
  assert result_of(folder, "knn")["step"] == 12
  assert result_of(folder, "knn-embedded-8") == first
  assert (folder / "results" / "knn-embedded-8.png").exists()


@pytest.mark.parametrize("checkpoint, said", [
  ("", "config.checkpoint is empty"),
  ("{run}/nothing", "no such folder"),
  ("{run}/results", "not the folder of a run"),
  ("{run}/checkpoints/4", "give the folder of its run, .*/run, and step=4"),
  ("{run},{run}", "twice"),
  ("{run}+{run}", "twice"),
  ("{run}+", "nothing on one side of a plus"),
  ("{run}+{run}/nothing", "run/nothing: there is no such folder"),
])
def test_what_is_no_run(run, checkpoint, said):
  (run / "results").mkdir()
  with pytest.raises(UserError, match=said):
    evaluate.run(config_of("knn", checkpoint.format(run=run)), "")


@pytest.mark.parametrize("fields, said", [
  ({"step": 5}, "no checkpoint of step 5; there are 4, 8"),
  ({"knn__layer": "res9"}, "knn.layer names the layer 'res9'"),
  ({"knn__k": 0}, "k"),
  ({"knn__temperature": 0.0}, "temperature"),
  ({"data__batch_size": 12}, "--config.data.batch_size=8"),
  ({"data__image_size": 0}, "image_size"),
  ({"data__crop_fraction": 1.5}, "crop_fraction"),
  ({"data__source": "folder"}, "data.root is empty"),
  ({"data__test_split": ""}, "--config.data.test_split"),
  ({"name": "../../knn"}, "part of file names"),
])
def test_impossible_values(run, fields, said):
  before = sorted(run.rglob("*"))
  with pytest.raises(UserError, match=said):
    evaluate.run(config_of("knn", run, **fields), "")
  assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("variant", pirl_jax.configs.evaluate.VARIANTS)
def test_every_variant_loads_and_has_an_adapter(variant):
  config = pirl_jax.configs.evaluate.get_config(variant)
  assert config.protocol in PROTOCOLS and variant.startswith(config.protocol)
  assert config.protocol in config and config.name == variant


def test_no_protocol():
  with pytest.raises(UserError, match="needs a protocol.*knn, linear"):
    pirl_jax.configs.evaluate.get_config("")


def test_runs_on_different_images_are_not_compared(runs, tmp_path):
  other = small_run(tmp_path / "c", split="other")
  with pytest.raises(UserError, match="data.split: 'train' in a, 'other' in c"):
    evaluate.run(config_of("knn", runs[0], other), str(tmp_path / "both"))
  evaluate.run(config_of("knn", runs[0], other, knn__k=20, data__source="embedded", data__num_images=64,
                         data__test_num_images=32), str(tmp_path / "both"))
  assert set(result_of(tmp_path / "both", "knn")["runs"]) == {"a", "c"}


@pytest.mark.parametrize("protocol", ["knn", "linear", "svm", "low_shot", "semi_supervised"])
def test_images_without_labels_are_refused(run, tmp_path, protocol):
  for split in ("train", "test"):
    (tmp_path / "images" / split / "kind").mkdir(parents=True)
    for i in range(16):
      image = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
      cv2.imwrite(str(tmp_path / "images" / split / "kind" / f"{i}.png"), image)
  with pytest.raises(UserError, match="labels"):
    evaluate.run(config_of(protocol, run, data__source="folder", data__root=str(tmp_path / "images"),
                           data__labels="none", data__batch_size=8), "")


def stored_variables(folder, step=8):
  (subject,) = open_subjects(str(folder), step, mesh_lib.create_mesh(1))
  return subject.model.variables


def test_the_restored_network_is_the_trained_one_on_any_number_of_devices(run):
  one, (eight,) = stored_variables(run), open_subjects(str(run), 0, mesh_lib.create_mesh(8))
  jax.tree.map(np.testing.assert_array_equal, one, eight.model.variables)
  older = stored_variables(run, step=4)
  changed = [not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(older), strict=True)]
  assert all(changed)


@pytest.mark.parametrize("field, value, said", [
  ("width", 2, "has shape"), ("arch", "resnet18", "is missing"), ("head", "mlp", "is missing"), ("dim", 8, "has shape"),
])
def test_parameters_that_do_not_fit_are_named(run, monkeypatch, field, value, said):
  real = Checkpoints.read_meta

  def read_meta(self, step):
    meta = real(self, step)
    meta["config"]["model"][field] = value
    return meta

  monkeypatch.setattr(Checkpoints, "read_meta", read_meta)
  with pytest.raises(UserError, match=f"do not fit the network of their config: .*(params|batch_stats)/.*{said}"):
    stored_variables(run)


def test_a_damaged_checkpoint_is_named_with_the_others(run):
  for path in (run / "checkpoints" / "8" / "model").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  with pytest.raises(UserError, match=r"checkpoints/8 cannot be read.*choose another step, there are 4"):
    stored_variables(run, step=0)


@pytest.mark.parametrize("meta", ["gone", "foreign"])
def test_a_checkpoint_of_another_program(run, meta):
  shutil.rmtree(run / "checkpoints" / "8" / "meta")
  if meta == "foreign":
    manager = CheckpointManager(run / "foreign" / "checkpoints")
    manager.save(8, args=args.Composite(meta=args.JsonSave({"format": FORMAT, "made_by": "something else"})))
    manager.close()
    run = run / "foreign"
  with pytest.raises(UserError, match="checkpoints/8 is not a checkpoint of this program"):
    stored_variables(run)


def test_values_that_are_not_finite_are_refused(run, monkeypatch):
  real = Checkpoints.restore_model

  def restore_model(*args):
    variables = real(*args)
    variables["params"]["trunk"]["conv1"]["kernel"] = variables["params"]["trunk"]["conv1"]["kernel"].at[0].set(np.nan)
    return variables

  monkeypatch.setattr(Checkpoints, "restore_model", restore_model)
  with pytest.raises(UserError, match="not finite, in params/trunk/conv1/kernel"):
    stored_variables(run)
