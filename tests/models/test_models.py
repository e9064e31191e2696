from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ModifyScopeVariableError

from pirl_jax.errors import UserError
from pirl_jax.models.heads import ImageHead, PatchesHead
from pirl_jax.models.network import Network, create_variables, variable_shapes
from pirl_jax.models.resnet import ResNet, create_resnet


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def shapes(network, image_size, patch_size, patches=9):
  return variable_shapes(network, jnp.zeros((1, image_size, image_size, 3)),
                         jnp.zeros((1, patches, patch_size, patch_size, 3)))["params"]


class Counting(nn.Module):
  """A layer that notes each time that its code runs."""

  note: Callable

  @nn.compact
  def __call__(self, image, pretext, *, train):
    self.note(train)
    return nn.Dense(2)(image)


def test_the_code_of_a_network_runs_once_for_its_shapes_and_its_variables():
  ran, image = [], jnp.zeros((1, 3))
  network, key = Counting(ran.append), jax.random.key(3)
  found = variable_shapes(network, image, None)
  assert found["params"]["Dense_0"]["kernel"].shape == (3, 2) and ran == [False]
  inside = jax.jit(lambda key: create_variables(network, key, image, None))(key)
  alone = create_variables(network, key, image, None)
  assert variable_shapes(network, image, None) == found and ran == [False]
  expected = network.init(key, image, None, train=False)
  for one in (inside, alone):
    jax.tree.map(np.testing.assert_array_equal, one, expected)
  assert variable_shapes(network, jnp.zeros((1, 5)), None)["params"]["Dense_0"]["kernel"].shape == (5, 2)


@pytest.mark.parametrize("arch, trunk", [
  # torchvision's counts less the fc layer of 1,000 classes.
  ("resnet18", 11_689_512 - 513_000), ("resnet34", 21_797_672 - 513_000), ("resnet50", 25_557_032 - 2_049_000),
  ("resnet101", 44_549_160 - 2_049_000)])
def test_number_of_parameters(arch, trunk):
  params = shapes(Network(create_resnet(arch), ImageHead(128), PatchesHead(128)), 224, 64)
  assert count(params["trunk"]) == trunk
  if arch == "resnet50":
    assert count(params["image_head"]) == 262_272
    assert count(params["pretext_head"]) == 409_856


def test_mlp_heads_have_a_hidden_layer_as_wide_as_the_trunk():
  params = shapes(Network(create_resnet("resnet50"), ImageHead(128, mlp=True), PatchesHead(128, mlp=True)), 64, 64)
  hidden = 2048 * 2048 + 2048
  assert count(params["image_head"]) == hidden + 262_272
  assert count(params["pretext_head"]) == hidden + 409_856


def test_width_multiplies_every_layer():
  network = create_resnet("resnet50", width=2)
  params = variable_shapes(network, jnp.zeros((1, 64, 64, 3)))["params"]
  assert params["conv1"]["kernel"].shape == (7, 7, 3, 128)
  features = jax.eval_shape(lambda: network.init_with_output(
    jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False))[0]
  assert features["pooled"].shape == (1, 4096)


@pytest.mark.parametrize("arch, stem, size, expected", [
  ("resnet50", "imagenet", 224, {"conv1": (112, 64), "res2": (56, 256), "res3": (28, 512), "res4": (14, 1024),
                                 "res5": (7, 2048)}),
  ("resnet50", "imagenet", 64, {"conv1": (32, 64), "res5": (2, 2048)}),
  ("resnet18", "3x3", 32, {"conv1": (32, 64), "res2": (32, 64), "res5": (4, 512)}),
  ("resnet8", "3x3s2", 32, {"conv1": (16, 16), "res2": (16, 16), "res4": (4, 64)})])
def test_stages_have_names_and_sizes(arch, stem, size, expected):
  network = create_resnet(arch, stem=stem)
  features = jax.eval_shape(lambda: network.init_with_output(
    jax.random.key(0), jnp.zeros((2, size, size, 3)), train=False))[0]
  for name, (side, channels) in expected.items():
    assert features[name].shape == (2, side, side, channels)
  assert features["pooled"].shape == (2, list(expected.values())[-1][1])


def test_weights_start_as_in_pytorch():
  network = Network(create_resnet("resnet18"), ImageHead(128), PatchesHead(128))
  params = create_variables(
    network, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 9, 32, 32, 3)))["params"]
  for layer, fan_in in ((params["trunk"]["conv1"]["kernel"], 7 * 7 * 3),
                        (params["trunk"]["res4_0"]["conv2"]["kernel"], 3 * 3 * 256),
                        (params["image_head"]["embedding"]["kernel"], 512),
                        (params["image_head"]["embedding"]["bias"], 512),
                        (params["pretext_head"]["embedding"]["kernel"], 9 * 128),
                        (params["pretext_head"]["embedding"]["bias"], 9 * 128)):
    bound = fan_in**-0.5
    assert np.abs(layer).max() <= bound
    np.testing.assert_allclose(np.std(layer), bound / 3**0.5, rtol=0.15)
    np.testing.assert_allclose(np.abs(layer).max(), bound, rtol=0.05)


def test_network_joins_trunk_and_heads_patches_first():
  network = Network(create_resnet("resnet8", stem="3x3s2"), ImageHead(8), PatchesHead(8))
  rng = np.random.default_rng(0)
  image = rng.normal(size=(4, 12, 12, 3)).astype(np.float32)
  pretext = rng.normal(size=(4, 9, 8, 8, 3)).astype(np.float32)
  variables = create_variables(network, jax.random.key(0), image, pretext)
  (image_emb, pretext_emb), updated = network.apply(variables, image, pretext, train=True, mutable=["batch_stats"])

  params = variables["params"]
  trunk = {"params": params["trunk"], "batch_stats": variables["batch_stats"]["trunk"]}
  patches, stats = network.trunk.apply(trunk, pretext.reshape(36, 8, 8, 3), train=True, mutable=["batch_stats"])
  pooled, stats = network.trunk.apply({**trunk, **stats}, image, train=True, mutable=["batch_stats"])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updated["batch_stats"]["trunk"],
               stats["batch_stats"])

  def linear(x, layer):
    return np.asarray(x, np.float64) @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])
  head = params["pretext_head"]
  joined = np.stack([linear(patches["pooled"][9 * i:9 * i + 9], head["patch"]).reshape(-1) for i in range(4)])
  np.testing.assert_allclose(pretext_emb, linear(joined, head["embedding"]), atol=1e-5)
  np.testing.assert_allclose(image_emb, linear(pooled["pooled"], params["image_head"]["embedding"]), atol=1e-5)


@pytest.mark.parametrize("method", ["embed_image", "embed_pretext", "features"])
def test_unless_told_otherwise_a_network_does_not_train(method):
  network = Network(create_resnet("resnet8", stem="3x3s2"), ImageHead(8), PatchesHead(8))
  view = jnp.zeros((2, 4, 8, 8, 3) if method == "embed_pretext" else (2, 8, 8, 3))
  variables = variable_shapes(network, jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 4, 8, 8, 3)))
  jax.eval_shape(lambda variables: network.apply(variables, view, method=method), variables)
  with pytest.raises(ModifyScopeVariableError):  # it would move the running statistics
    jax.eval_shape(lambda variables: network.apply(variables, view, train=True, method=method), variables)


def test_trunk_against_pytorch_operations_by_hand():
  """One basic block with stride and shortcut, in float64 loops over the positions."""
  network = create_resnet("resnet8", stem="3x3s2")
  rng = np.random.default_rng(0)
  image = rng.normal(size=(2, 9, 9, 3)).astype(np.float32)
  variables = create_variables(network, jax.random.key(0), image)
  variables = jax.tree.map(lambda x: x + 0.1 * np.abs(rng.normal(size=x.shape)).astype(np.float32), variables)
  features = network.apply(variables, image, train=False)

  def conv(x, kernel, stride, padding):
    kernel, side = np.asarray(kernel, np.float64), kernel.shape[0]
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    steps = range(0, x.shape[1] - side + 1, stride)
    return np.stack([np.stack([np.tensordot(x[:, i:i + side, j:j + side], kernel, 3) for j in steps], 1)
                     for i in steps], 1)

  def norm(x, *path):
    params, stats = variables["params"], variables["batch_stats"]
    for name in path:
      params, stats = params[name], stats[name]
    mean, var, scale, bias = (np.asarray(values, np.float64) for values in (
      stats["mean"], stats["var"], params["scale"], params["bias"]))
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

  def kernel(*path):
    params = variables["params"]
    for name in path:
      params = params[name]
    return params["kernel"]

  def relu(x):
    return np.maximum(x, 0)

  x = relu(norm(conv(image, kernel("conv1"), 2, 1), "bn1"))
  np.testing.assert_allclose(features["conv1"], x, rtol=1e-4, atol=1e-4)
  for block, stride in (("res2_0", 1), ("res3_0", 2), ("res4_0", 2)):
    y = relu(norm(conv(x, kernel(block, "conv1"), stride, 1), block, "bn1"))
    y = norm(conv(y, kernel(block, "conv2"), 1, 1), block, "bn2")
    if stride == 2:
      x = norm(conv(x, kernel(block, "downsample_conv"), 2, 0), block, "downsample_bn")
    x = relu(x + y)
    np.testing.assert_allclose(features[block[:4]], x, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(features["pooled"], x.mean((1, 2)), rtol=1e-3)


def test_bfloat16_keeps_parameters_statistics_and_pooled_features_in_float32():
  network = create_resnet("resnet8", stem="3x3", dtype=jnp.bfloat16)
  image = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
  variables = create_variables(network, jax.random.key(0), image)
  features, updated = network.apply(variables, image, train=True, mutable=["batch_stats"])
  assert features["res4"].dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves((variables, updated, features["pooled"]))} == {jnp.dtype("float32")}
  exact = create_resnet("resnet8", stem="3x3").apply(variables, image, train=True, mutable=["batch_stats"])[0]
  np.testing.assert_allclose(features["pooled"], exact["pooled"], atol=0.1)


@pytest.mark.parametrize("options", [dict(arch="resnet19"), dict(arch="resnet18", stem="5x5"),
                                     dict(arch="resnet18", width=0)])
def test_unknown_architecture_stem_and_width_are_refused(options):
  with pytest.raises(UserError, match="resnet50|imagenet|width"):
    create_resnet(**options)


@pytest.mark.slow
def test_rematerialisation_changes_memory_alone():
  """By the stage: same names, values and gradients; of a stage of four blocks its input is kept, and no block's."""
  plain = ResNet(blocks=(4, 4), bottleneck=False, channels=8, stem="3x3s2")
  image = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
  variables = create_variables(plain, jax.random.key(1), image)

  def loss(params, network):
    features, updated = network.apply({**variables, "params": params}, image, train=True, mutable=["batch_stats"])
    return jnp.sum(features["pooled"] ** 2), updated

  found, kept = [], []
  for network in (plain, plain.clone(remat=True)):
    grad_fn = jax.value_and_grad(loss, has_aux=True)
    found.append(jax.jit(grad_fn, static_argnums=1)(variables["params"], network))
    residuals = jax.eval_shape(lambda params, network=network: jax.vjp(
      lambda params: loss(params, network)[0], params)[1], variables["params"])
    kept.append(sum(x.size for x in jax.tree.leaves(residuals)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)
  assert kept[1] < kept[0] / 3
