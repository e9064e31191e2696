"""Weights that others publish are read whole, or refused with the names of what does not fit."""

import jax
import numpy as np
import pytest
from networks import (
  CHANNELS,
  VISSL,
  VISSL_MLP,
  arrays_of,
  linear,
  pirl_model,
  randomised,
  renamed,
  shapes,
  small_trunk,
  trunk_model,
  vissl_tree,
)
from safetensors.numpy import save_file
from torch_files import WRITERS

import pirl_jax
from pirl_jax.errors import UserError
from pirl_jax.models.heads import ClassHead, PatchesClassHead
from pirl_jax.models.network import Model, Network
from pirl_jax.weights.containers import read_tree
from pirl_jax.weights.names import COUNTER
from pirl_jax.weights.publishers import network_of_tree


def read(path, tree, container="zip", **options):
  WRITERS[container](path, tree)
  return network_of_tree(read_tree(path), path.name, **options)


def assert_same(found, model, *, parts=("trunk", "image_head", "pretext_head")):
  """The parts of the network have the variables of the model, bit for bit."""
  for kind, tree in model.variables.items():
    expected = {name: value for name, value in tree.items() if name in parts}
    jax.tree.map(np.testing.assert_array_equal, found.variables[kind], expected)
  for name in ("image_head", "pretext_head"):
    if name in parts:
      assert getattr(found.network, name) == getattr(model.network, name)
    else:
      assert getattr(found.network, name) is None


@pytest.fixture(scope="module", params=[False, True], ids=["linear", "mlp"])
def pirl(request):
  return pirl_model(mlp=request.param)


@pytest.mark.parametrize("container", WRITERS)
@pytest.mark.parametrize("meta", [True, False])
def test_pirl_of_vissl_with_its_heads_bank_and_z(container, meta, pirl, tmp_path):
  names = VISSL_MLP if pirl.network.image_head.mlp else VISSL
  found = read(tmp_path / "x.torch", vissl_tree(arrays_of(pirl), renamed(pirl, names), meta=meta), container)
  assert found.publisher == "VISSL" and not found.remarks
  assert_same(found, pirl)
  assert found.bank.shape == (5, 16) and np.all(found.bank.read() == 1)
  assert found.normaliser == pytest.approx(2876.5)
  assert found.settings["model.arch"] == "resnet8" and found.settings["model.dim"] == 16


def test_the_image_head_of_vissls_wide_networks_has_no_relu(tmp_path):
  model = pirl_model(mlp=True)
  layers = {name.replace("1.0.clf.2", "1.0.clf.1"): place for name, place in VISSL_MLP.items()}
  found = read(tmp_path / "x.torch", vissl_tree(arrays_of(model), renamed(model, layers)))
  features = np.random.default_rng(0).normal(size=(3, CHANNELS)).astype(np.float32)
  own = found.network.image_head.apply({"params": found.variables["params"]["image_head"]}, features)
  (first, first_bias), (second, second_bias) = (
    linear(model.variables["params"]["image_head"][name]) for name in ("hidden", "embedding"))
  np.testing.assert_allclose(own, (features @ first.T + first_bias) @ second.T + second_bias, atol=1e-4)


def test_files_of_older_and_newer_forms(pirl, tmp_path):
  trunk = arrays_of(pirl)
  for prefix, wrapper in (("base_model._feature_blocks.", "model_state_dict"), ("_feature_blocks.", "state_dict"),
                          ("_feature_blocks.", "")):
    arrays = {f"{prefix}{name}": value for name, value in trunk.items()}
    found = read(tmp_path / "x.torch", {wrapper: arrays} if wrapper else arrays)
    assert_same(found, pirl, parts=("trunk",))


def test_npid_rotnet_and_jigsaw_of_vissl(tmp_path):
  trunk = arrays_of(trunk_model(small_trunk()))
  heads = {"0.clf.0.weight": np.ones((128, CHANNELS), np.float32), "0.clf.0.bias": np.zeros(128, np.float32)}
  npid = read(tmp_path / "x.torch", vissl_tree(trunk, heads))
  assert npid.network.has_embedding and npid.settings["pretext_weight"] == 0
  rotnet = read(tmp_path / "x.torch", vissl_tree(trunk, {name: value[:4] for name, value in heads.items()}))
  assert rotnet.network.pretext_head == ClassHead(4) and rotnet.settings["pretext"] == "rotation"

  network = Network(small_trunk(), pretext_head=PatchesClassHead(20))
  model = Model(network, randomised(shapes(network, None, np.zeros((1, 9, 32, 32, 3), np.float32))))
  params, stats = (model.variables[kind]["pretext_head"] for kind in ("params", "batch_stats"))
  heads = {}
  for name, layer in (("0.clf.0", "patch"), ("2.clf.0", "logits")):
    heads[f"{name}.weight"], heads[f"{name}.bias"] = linear(params[layer])
  heads |= {"0.clf.1.weight": params["bn"]["scale"], "0.clf.1.bias": params["bn"]["bias"],
            "0.clf.1.running_mean": stats["bn"]["mean"], "0.clf.1.running_var": stats["bn"]["var"],
            f"0.clf.1.{COUNTER}": np.array(7, np.int64)}
  jigsaw = read(tmp_path / "x.torch", vissl_tree(arrays_of(model), heads))
  assert_same(jigsaw, model, parts=("trunk", "pretext_head"))


def test_pycontrast(tmp_path):
  model = pirl_model()
  layers = {"module.head.0": ("image_head", "embedding"), "module.head_jig.fc1": ("pretext_head", "patch"),
            "module.head_jig.fc2": ("pretext_head", "embedding")}
  arrays = {f"module.encoder.{name}": value for name, value in arrays_of(model).items()} | renamed(model, layers)
  tree = {"model": arrays, "contrast": {"memory": np.ones((3, 2), np.float32)}, "epoch": 200}
  assert_same(read(tmp_path / "x.pth", tree), model)
  # Its MLP for patches ends without a ReLU, which no head of this program does.
  other = {name.replace("head_jig.fc1", "head_jig.fc1.2"): value for name, value in arrays.items()}
  found = read(tmp_path / "x.pth", {"model": other})
  assert_same(found, model, parts=("trunk",))
  assert "head_jig.fc1.2.weight (16, 64)" in found.remarks[0]


@pytest.mark.parametrize("mlp", [False, True])
def test_moco(mlp, tmp_path):
  model = pirl_model(mlp=mlp)
  layers = {"fc.0": ("image_head", "hidden"), "fc.2": ("image_head", "embedding")} if mlp else {
    "fc": ("image_head", "embedding")}
  own = {**arrays_of(model), **renamed(model, layers)}
  arrays = {f"module.encoder_{which}.{name}": value * (which == "q") for name, value in own.items() for which in "kq"}
  tree = {"state_dict": arrays | {"module.queue": np.ones((16, 8), np.float32), "module.queue_ptr": np.zeros(
    1, np.int64)}, "optimizer": {"state": {}}}
  assert_same(read(tmp_path / "x.pth", tree), model, parts=("trunk", "image_head"))


def test_a_classifier_of_torchvision_or_timm_is_left_out_by_name(tmp_path):
  model = trunk_model(small_trunk())
  arrays = arrays_of(model) | {"fc.weight": np.ones((10, CHANNELS), np.float32), "fc.bias": np.ones(10, np.float32)}
  save_file(arrays, tmp_path / "x.safetensors")
  found = network_of_tree(read_tree(tmp_path / "x.safetensors"), "x")
  assert_same(found, model, parts=("trunk",))
  assert found.publisher == "torchvision or timm" and "fc.weight (10, 64)" in found.remarks[0]


def test_a_trunk_that_does_not_fit_is_refused_by_name_with_counts(tmp_path):
  right = arrays_of(trunk_model(small_trunk()))
  num = sum(not name.endswith(COUNTER) for name in right)
  without = {name: value for name, value in right.items() if name != "layer2.0.conv2.weight"}
  path = tmp_path / "x.pth"
  for wrong, counts in (
      (without, rf"{num - 1} of {num} fit, 1 missing \(layer2.0.conv2.weight\)"),
      (right | {"layer2.0.extra.weight": np.ones(3, np.float32)}, r"1 left over \(layer2.0.extra.weight\)"),
      (right | {"layer1.0.bn1.bias": np.ones(5, np.float32)},
       rf"{num - 1} of {num} fit, 1 of another shape \(layer1.0.bn1.bias \(5,\) instead of \(16,\)\)")):
    with pytest.raises(UserError, match=f"x.pth: the arrays are not those of the trunk resnet8: .*{counts}.*nothing"):
      read(path, wrong)
  with pytest.raises(UserError, match=r"1 arrays are left over that no trunk has \(neck.weight\)"):
    read(path, right | {"neck.weight": np.ones(3, np.float32)})
  with pytest.raises(UserError, match="layer1.0.bn1.bias holds values that are not finite"):
    read(path, right | {"layer1.0.bn1.bias": np.full(16, np.nan, np.float32)})
  with pytest.raises(UserError, match=r"a ResNet with \(2, 1, 1\) basic blocks"):
    read(path, right | {"layer1.1.conv1.weight": right["layer1.0.conv1.weight"]})
  with pytest.raises(UserError, match="no ResNet under the names of"):
    read(path, {"blocks.0.attn.qkv.weight": np.ones(3, np.float32)})


def test_a_head_that_is_not_complete_is_refused_by_name(tmp_path):
  model = pirl_model()
  heads = renamed(model, VISSL)
  del heads["0.2.clf.0.bias"]
  with pytest.raises(UserError, match=r"the heads: 5 of 6 fit, 1 missing \(pretext_head.embedding.bias\)"):
    read(tmp_path / "x.torch", vissl_tree(arrays_of(model), heads))


def test_a_small_stem_must_be_told(tmp_path):
  model = trunk_model(small_trunk("3x3s2"))
  with pytest.raises(UserError, match="3 x 3 stem, and the file does not say its stride"):
    read(tmp_path / "x.pth", arrays_of(model))
  assert_same(read(tmp_path / "x.pth", arrays_of(model), stem="3x3s2"), model, parts=("trunk",))


def test_pirl_jax_loads_a_file(tmp_path, capsys):
  model = pirl_model()
  WRITERS["legacy"](tmp_path / "x.torch", vissl_tree(arrays_of(model), renamed(model, VISSL)))
  encoder = pirl_jax.load(tmp_path / "x.torch", batch_size=8)
  assert encoder.layers == ("conv1", "res2", "res3", "res4", "pooled", "embedding") and encoder.image_size == 224
  said = capsys.readouterr().out
  assert "resnet8, under the names of VISSL, heads: image, pretext, memory bank (5, 16), Z 2876.5" in said
  assert encoder(np.zeros((30, 30, 3), np.uint8)).shape == (1, CHANNELS)
  with pytest.raises(UserError, match="one network only"):
    pirl_jax.load(tmp_path / "x.torch", step=7)
