"""A run's network leaves as files that other programs load, and comes back bit for bit."""

import gzip
import json
import pickle
import re
import sys
import types

import cv2
import jax
import numpy as np
import pytest
from flax.serialization import msgpack_restore
from networks import arrays_of, pirl_model, renamed, trunk_model
from safetensors.numpy import load_file, save_file
from torch_files import write_zip

import pirl_jax
from pirl_jax.choosing.arranging import arrange
from pirl_jax.configs import evaluate as evaluate_configs
from pirl_jax.configs import export as export_configs
from pirl_jax.configs import pirl
from pirl_jax.errors import UserError
from pirl_jax.models.resnet import create_resnet
from pirl_jax.runs import Run
from pirl_jax.runtime.mesh import create_mesh
from pirl_jax.storage.files import write_json
from pirl_jax.training import pretrain
from pirl_jax.weights import export, hub, peers
from pirl_jax.weights.equality import largest_differences, relative_difference
from pirl_jax.weights.names import COUNTER, to_torch
from pirl_jax.weights.opening import locate_weights, open_any


def own(root, **changes):
  config = pirl.get_config("folder_small")
  config.update_from_flattened_dict({
    "data.root": str(root), "num_epochs": 0, "batch_size": 16, "num_negatives": 16, "data.image_size": 16,
    "jigsaw.crop_size": 18, "jigsaw.patch_size": 5, "evaluate.batch_size": 16, "evaluate.every_epochs": 0,
    "evaluate.learning": False, "model.dim": 16, "report": False, **changes})
  return config


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  folder = tmp_path_factory.mktemp("private") / "pets"
  rng = np.random.default_rng(0)
  for number in range(40):
    path = folder / "ab"[number % 2] / f"{number:02}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), rng.integers(0, 256, (20, 26, 3), dtype=np.uint8))
  return folder


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
  """A run, which has exported itself at its end."""
  return pirl_jax.pretrain(own(images), tmp_path_factory.mktemp("runs") / "run")


def exported(checkpoint, workdir="", **changes):
  config = export_configs.get_config()
  config.update(checkpoint=str(checkpoint), **changes)
  export.run(config, str(workdir))


PHOTOGRAPHS = [np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8) for number in range(5)]


def test_a_run_ends_with_a_folder_that_gives_its_features_bit_for_bit(run):
  assert {path.name for path in (run / "export").iterdir()} == {"model.safetensors", "card.json", "README.md"}
  first, again = pirl_jax.load(run), pirl_jax.load(run / "export")
  assert again.step == first.step and again.config["model"] == first.config["model"]
  assert again.layers == first.layers[:-1]  # the heads were not asked for
  for layer in again.layers:
    np.testing.assert_array_equal(again(PHOTOGRAPHS, layer=layer), first(PHOTOGRAPHS, layer=layer))


def test_heads_and_bank_on_request(run, tmp_path):
  exported(run, tmp_path / "all", heads=True, bank=True)
  first, again = pirl_jax.load(run), pirl_jax.load(tmp_path / "all")
  jax.tree.map(np.testing.assert_array_equal, again.model.variables, first.model.variables)
  assert again.model.network == first.model.network
  bank = load_file(tmp_path / "all" / "bank.safetensors")["bank"]
  assert bank.shape == (40, 16) and np.allclose(np.linalg.norm(bank, axis=1), 1, atol=1e-5)
  names = gzip.decompress((tmp_path / "all" / "pictures.txt.gz").read_bytes()).decode().split("\n")
  assert len(names) == 40 and names[0].endswith("a/00.png")
  exported(run, tmp_path / "all")  # without heads: those of before would stay
  assert not pirl_jax.load(tmp_path / "all").model.network.has_embedding


def test_the_card_says_everything_but_where_things_are(run, images, tmp_path):
  write_json(run / "results" / "learning.json", {
    "protocol": "learning", "k": 7, "temperature": 0.07, "trained": 0.8125})
  write_json(run / "results" / "linear.json", {
    "protocol": "linear", "step": 0, "checkpoint": str(run), "settings": {"data": str(images)},
    "figures": {"top1": 0.53, "best_layer": "res4", "written": [str(run / "x.npz")], "queries": [
      {"name": str(images / "a")}]}})
  exported(run, tmp_path)
  card = json.loads((tmp_path / "card.json").read_text())
  readme = (tmp_path / "README.md").read_text()
  assert card["seeds"] == {"run": 0} and card["data"]["num_images"] == 40 and card["step"] == 0
  assert card["config"]["jigsaw"]["patch_size"] == 5 and card["config"]["data"]["root"] == "pets"
  assert card["program"]["jax"] == jax.__version__
  assert card["figures"]["results"]["linear"]["figures"] == {"top1": 0.53, "best_layer": "res4"}
  for place in (str(images.parent), str(run.parent)):
    assert place not in json.dumps(card) and place not in readme
  assert readme.startswith("---\ntags:\n") and "license: unknown" in readme
  assert "| kNN top-1 of the trained network | 0.8125 | k = 7, temperature 0.07 |" in readme
  assert "| linear, top1 | 0.53 | step 0 |" in readme and "[0.485, 0.456, 0.406]" in readme


@pytest.mark.parametrize("format_", ["torchvision", "flax"])
def test_other_formats_hold_the_same_arrays(format_, run, tmp_path):
  exported(run, tmp_path, format=format_, license="cc-by-4.0")
  trunk = {kind: tree["trunk"] for kind, tree in pirl_jax.load(run).model.variables.items()}
  if format_ == "flax":
    jax.tree.map(np.testing.assert_array_equal, msgpack_restore((tmp_path / "model.msgpack").read_bytes()), trunk)
  else:
    jax.tree.map(np.testing.assert_array_equal, load_file(tmp_path / "model.safetensors"), to_torch(trunk))
  assert "license: cc-by-4.0" in (tmp_path / "README.md").read_text()


def small_resnet18():
  """Returns a ResNet-18 opened as a run; a ResNet-50 would take ten times as long."""
  model = trunk_model(create_resnet("resnet18"))
  config = json.loads(json.dumps(pirl.get_config("imagenet").to_dict()))
  config["model"]["arch"] = "resnet18"
  return Run("eighteen", locate_weights(__file__), 3, True, {"config": config, "num_classes": 0, "data": "x"}, model)


@pytest.fixture(scope="module")
def eighteen():
  return small_resnet18()


def detectron2_names(blocks, bottleneck):
  """Returns the names of Detectron2's own ResNet, which its code builds: stem, shortcut, norm."""
  norm = ("weight", "bias", "running_mean", "running_var")
  names = {"stem.conv1.weight", *(f"stem.conv1.norm.{part}" for part in norm)}
  for stage, count in enumerate(blocks, 2):
    for block in range(count):
      convs = [f"conv{number}" for number in range(1, 4 if bottleneck else 3)]
      if not block and (stage > 2 or bottleneck):
        convs.append("shortcut")
      for conv in convs:
        names |= {f"res{stage}.{block}.{conv}.weight", *(f"res{stage}.{block}.{conv}.norm.{part}" for part in norm)}
  return names


def test_detectron2_has_a_place_for_every_array(eighteen, tmp_path):
  lines = export.export(eighteen, tmp_path, export.WeightsSettings(format="detectron2"))
  content = pickle.loads((tmp_path / "model.pkl").read_bytes())
  assert content["__author__"] == "pirl_jax" and content["matching_heuristics"] is True
  assert content["model"].keys() == detectron2_names((2, 2, 2, 2), bottleneck=False)
  trunk = eighteen.model.variables
  np.testing.assert_array_equal(content["model"]["res3.0.shortcut.norm.running_mean"],
                                trunk["batch_stats"]["trunk"]["res3_0"]["downsample_bn"]["mean"])
  np.testing.assert_array_equal(content["model"]["res4.1.conv2.weight"],
                                trunk["params"]["trunk"]["res4_1"]["conv2"]["kernel"].transpose(3, 2, 0, 1))
  text = "\n".join(lines)
  for setting in ('FORMAT: "RGB"', "STRIDE_IN_1X1: False", "PIXEL_MEAN: [123.675, 116.28, 103.53]", "DEPTH: 18"):
    assert setting in text


def test_the_names_of_a_resnet50_are_those_of_detectron2():
  names = {f"{name}.weight" for name in ("conv1", "bn1")}
  for stage, count in enumerate((3, 4, 6, 3), 1):
    for block in range(count):
      parts = [f"{kind}{number}" for kind in ("conv", "bn") for number in (1, 2, 3)]
      parts += ["downsample.0", "downsample.1"] if not block else []
      names |= {f"layer{stage}.{block}.{part}.weight" for part in parts}
  expected = {name for name in detectron2_names((3, 4, 6, 3), bottleneck=True) if name.endswith(".weight")}
  assert {peers.detectron2_name(name) for name in names} == expected


def test_a_timm_folder(eighteen, tmp_path):
  export.export(eighteen, tmp_path, export.WeightsSettings(licence="mit"))
  config = json.loads((tmp_path / "config.json").read_text())
  assert (config["architecture"], config["num_features"], config["num_classes"]) == ("resnet18", 512, 0)
  assert config["pretrained_cfg"]["input_size"] == [3, 224, 224] and config["pretrained_cfg"]["crop_pct"] == 0.875
  arrays = load_file(tmp_path / "model.safetensors")
  assert len(arrays) == 120 and not any(name.startswith("fc.") for name in arrays)
  with open(tmp_path / "model.safetensors", "rb") as file:
    assert b'"__metadata__":{"format":"pt"}' in file.read(200)
  assert "library_name: timm" in (tmp_path / "README.md").read_text()
  # Without the card it is anyone's folder for timm, with its sizes.
  (tmp_path / "card.json").unlink()
  config["pretrained_cfg"] |= {"input_size": [3, 64, 64], "crop_pct": 1.0}
  (tmp_path / "config.json").write_text(json.dumps(config))
  encoder = pirl_jax.load(tmp_path)
  assert (encoder.image_size, encoder.crop_fraction, encoder.config["model"]["arch"]) == (64, 1.0, "resnet18")
  config["pretrained_cfg"]["mean"] = [0.5, 0.5, 0.5]
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match=r"wants images with mean \[0.5, 0.5, 0.5\]"):
    pirl_jax.load(tmp_path)


def test_timm_loads_the_folder(eighteen, tmp_path):
  timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
  export.export(eighteen, tmp_path, export.WeightsSettings())
  model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
  image = np.random.default_rng(0).normal(size=(1, 3, 97, 97)).astype(np.float32)
  ours = eighteen.model.network.apply(eighteen.model.variables, image.transpose(0, 2, 3, 1), method="features")
  with torch.no_grad():
    assert relative_difference(np.asarray(ours["pooled"]), model(torch.tensor(image)).numpy()) < 1e-5


@pytest.mark.parametrize("arch, width, stem", [
  ("resnet8", 1, "3x3s2"), ("resnet18", 1, "imagenet"), ("resnet18", 1, "3x3"), ("resnet18", 2, "imagenet")])
def test_torchvision_runs_the_code_of_the_card(arch, width, stem, tmp_path, monkeypatch):
  pytest.importorskip("torchvision")
  torch = pytest.importorskip("torch")
  model = trunk_model(create_resnet(arch, width=width, stem=stem))
  save_file(arrays_of(model), tmp_path / "model.safetensors")
  monkeypatch.chdir(tmp_path)
  names = {}
  exec("\n".join(peers.torchvision_code({"arch": arch, "width": width, "stem": stem})), names)
  image = np.random.default_rng(0).normal(size=(1, 3, 45, 47)).astype(np.float32)
  ours = jax.jit(lambda variables, x: model.network.apply(variables, x, method="features"))(
    model.variables, image.transpose(0, 2, 3, 1))
  with torch.no_grad():
    assert relative_difference(np.asarray(ours["pooled"]), names["model"](torch.tensor(image)).numpy()) < 1e-5


def test_an_onnx_graph(tmp_path, run):
  pytest.importorskip("onnx")
  exported(run, tmp_path, format="onnx")
  assert (tmp_path / "model.onnx").stat().st_size > 300_000


def test_a_file_that_computes_something_else_gets_no_name(run, tmp_path, monkeypatch):
  right = export.to_torch

  def wrong(variables):
    arrays = right(variables)
    return arrays | {"layer1.0.bn1.weight": arrays["layer1.0.bn1.weight"] * np.float32(1.001)}

  monkeypatch.setattr(export, "to_torch", wrong)
  for format_ in ("timm", "flax"):
    with pytest.raises(UserError, match="does not compute what the run computes"):
      exported(run, tmp_path / format_, format=format_)
    assert not (tmp_path / format_).exists()


@pytest.mark.parametrize("changes, problem", [
  ({"format": "keras"}, "format='keras' is unknown; choose from timm"),
  ({"format": "detectron2"}, "Detectron2 has no resnet8 with the stem 3x3s2"),
  ({"checkpoint": ""}, "config.checkpoint is empty"),
  ({"checkpoint": "nowhere"}, "there is no such folder"),
  ({"push": "me"}, "push='me' is not possible: give USER/REPO"),
  ({"push": "me/it", "format": "flax"}, "format='flax' is given")])
def test_wrong_flags_are_answered_in_a_line(changes, problem, run, tmp_path):
  with pytest.raises(UserError, match=problem):
    exported(**{"checkpoint": run, "workdir": tmp_path / "out", **changes})
  assert not (tmp_path / "out").exists()


def test_without_a_network_the_folder_is_complete_and_the_message_says_so(run, tmp_path, monkeypatch):
  class Offline:
    def create_repo(self, *_, **__):
      raise ConnectionError("no route to host")

  fake = types.ModuleType("huggingface_hub")
  fake.HfApi = Offline
  monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
  monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: fake)
  with pytest.raises(UserError, match="is complete, but was not uploaded to me/it.*no route to host.*hf upload me/it"):
    exported(run, tmp_path, push="me/it")
  assert (tmp_path / "model.safetensors").exists()
  monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match="pip install huggingface_hub"):
    exported(run, tmp_path, push="me/it")


def test_a_run_starts_from_a_file(images, run, tmp_path, capsys):
  model = pirl_model()  # of another stem
  path = tmp_path / "x.pth"
  write_zip(path, {f"module.encoder_q.{name}": value for name, value in (
    arrays_of(model) | renamed(model, {"fc": ("image_head", "embedding")})).items()})
  config = own(images, init_from=str(path), **{"model.stem": "imagenet", "data.image_size": 32})
  state = pretrain.first_state(pretrain.prepare(config, tmp_path / "run"))
  for name in ("trunk", "image_head"):
    jax.tree.map(np.testing.assert_array_equal, state.params[name], model.variables["params"][name])
  assert "takes image_head, trunk; new, because" in capsys.readouterr().out
  config.model.stem = "3x3s2"
  with pytest.raises(UserError, match=r"1 of another shape \(conv1/kernel\); take that network: .*model.stem=imagenet"):
    pretrain.first_state(pretrain.prepare(config, tmp_path / "run"))
  again = pretrain.first_state(pretrain.prepare(own(images, init_from=str(run / "export")), tmp_path / "run"))
  jax.tree.map(np.testing.assert_array_equal, again.params["trunk"],
               pirl_jax.load(run).model.variables["params"]["trunk"])


def test_open_fields_are_those_of_the_first_weights(images, run, tmp_path):
  path = tmp_path / "x.pth"
  write_zip(path, arrays_of(pirl_model()))
  config = pirl.get_config("folder")
  config.data.root = str(images)
  for given, stem in ((path, "imagenet"), (run / "export", "3x3s2"), (run, "3x3s2")):
    config.init_from = str(given)
    chosen, made = arrange(config)
    assert (chosen.model.arch, chosen.model.stem) == ("resnet8", stem)
    assert [choice.why for choice in made if choice.field == "model.stem"] == [f"as in {given}"]


def evaluated(checkpoint, workdir, **changes):
  config = evaluate_configs.get_config("knn")
  config.update_from_flattened_dict({"checkpoint": str(checkpoint), **changes})
  return pirl_jax.evaluate(config, workdir)


def test_weights_are_evaluated_as_if_they_were_a_run(run, images, tmp_path):
  own_figures, = evaluated(run, tmp_path / "a", **{"data.root": str(images)}).values()
  figures, = evaluated(run / "export", tmp_path / "b", **{"data.root": str(images)}).values()
  assert own_figures.pop("seconds") >= 0 and figures.pop("seconds") >= 0
  assert figures == own_figures and figures["num_test"]
  path = tmp_path / "x.safetensors"
  save_file(arrays_of(pirl_model()), path)
  sizes = {"data.root": str(images), "data.image_size": 32, "data.batch_size": 16}
  found = evaluated(path, tmp_path / "c", **sizes)
  assert found["x.safetensors"]["num_test"] == figures["num_test"]
  result, = (tmp_path / "c" / "results").glob("*.json")
  assert re.fullmatch(r"x.safetensors-\w{12}", json.loads(result.read_text())["settings"]["run_config"]["name"])
  with pytest.raises(UserError, match="holds weights, and no word about images; name the images, --config.data.root="):
    evaluated(path, tmp_path / "d")


def test_a_damaged_card_is_told(run, tmp_path):
  folder = tmp_path / "copy"
  folder.mkdir()
  for path in (run / "export").iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  (folder / "card.json").write_text("{}")
  with pytest.raises(UserError, match="card.json is damaged"):
    pirl_jax.load(folder)


def test_the_export_of_published_weights(tmp_path):
  model = pirl_model()
  path = tmp_path / "x.pth"
  write_zip(path, arrays_of(model))
  exported(path, tmp_path / "out")
  back = open_any(tmp_path / "out", "x", 0, create_mesh())
  jax.tree.map(np.testing.assert_array_equal, back.model.variables["params"]["trunk"],
               model.variables["params"]["trunk"])
  assert max(largest_differences(back.model, load_file(tmp_path / "out" / "model.safetensors")).values()) < 1e-12
  assert not any(name.endswith(COUNTER) and value.any() for name, value in load_file(
    tmp_path / "out" / "model.safetensors").items())


def test_torchvisions_detector_takes_the_trunk(tmp_path):
  torch = pytest.importorskip("torch")
  torchvision = pytest.importorskip("torchvision")
  load = pytest.importorskip("safetensors.torch").load_file
  if not torchvision.extension._has_ops():  # a detector asks for them, although its trunk needs none
    pytest.skip("torchvision's operators in C++ are of another version of torch")
  model = trunk_model(create_resnet("resnet50"))
  save_file(arrays_of(model), tmp_path / "model.safetensors")
  detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
  found = detector.backbone.body.load_state_dict(load(tmp_path / "model.safetensors"), strict=False)
  assert not found.missing_keys and not found.unexpected_keys
  image = np.random.default_rng(0).normal(size=(1, 3, 97, 129)).astype(np.float32)
  ours = jax.jit(lambda variables, x: model.network.apply(variables, x, method="features"))(
    model.variables, image.transpose(0, 2, 3, 1))
  with torch.no_grad():
    for place, features in detector.backbone.body(torch.tensor(image)).items():
      own = np.moveaxis(np.asarray(ours[f"res{int(place) + 2}"]), -1, 1)
      assert relative_difference(own, features.numpy()) < 1e-5, place
    assert detector([torch.rand(3, 97, 129)])[0].keys() == {"boxes", "labels", "scores"}
