"""The names of PyTorch, and the check that exported arrays compute what the network computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import arrays_of, randomised, small_bottleneck, small_trunk, trunk_model

from pirl_jax.errors import UserError
from pirl_jax.models.network import variable_shapes
from pirl_jax.models.resnet import create_resnet
from pirl_jax.weights import equality
from pirl_jax.weights.names import COUNTER, from_torch, shapes_in_torch, to_torch

TRUNKS = {"imagenet": lambda: small_trunk(), "3x3": lambda: small_trunk("3x3"), "3x3s2": lambda: small_trunk("3x3s2"),
          "bottleneck": small_bottleneck}


def torch_features(arrays, image, *, stride, pool):
  """Returns the features by layer of f32[N, 3, H, W], computed by PyTorch from arrays with torchvision's names."""
  import torch
  from torch.nn import functional

  given = {name: torch.tensor(value) for name, value in arrays.items()}

  def conv_norm(x, conv, norm, stride):
    weight = given[f"{conv}.weight"]
    x = functional.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
    return functional.batch_norm(x, *(given[f"{norm}.{part}"] for part in (
      "running_mean", "running_var", "weight", "bias")))

  x = torch.relu(conv_norm(torch.tensor(image), "conv1", "bn1", stride))
  found = {"conv1": x}
  x = functional.max_pool2d(x, 3, 2, 1) if pool else x
  for stage in range(1, 5):
    for block in range(100):
      name = f"layer{stage}.{block}"
      if f"{name}.conv1.weight" not in given:
        break
      strides = [1, 1]
      strides[-2 if f"{name}.conv3.weight" not in given else -1] = 2 if stage > 1 and not block else 1
      strides = strides if f"{name}.conv3.weight" not in given else [*strides, 1]
      y = x
      for number, step in enumerate(strides, 1):
        y = conv_norm(y, f"{name}.conv{number}", f"{name}.bn{number}", step)
        y = torch.relu(y) if number < len(strides) else y
      if f"{name}.downsample.0.weight" in given:
        x = conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", max(strides))
      x = torch.relu(x + y)
    if f"layer{stage}.0.conv1.weight" in given:
      found[f"res{stage + 1}"] = x
  found["pooled"] = x.mean((2, 3))
  return {layer: value.numpy() for layer, value in found.items()}


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_arrays_compute_what_the_network_computes(trunk):
  model = trunk_model(TRUNKS[trunk]())
  differences = equality.largest_differences(model, arrays_of(model))
  assert list(differences) == ["conv1", *(f"res{stage + 2}" for stage in range(len(model.network.trunk.blocks))),
                               "pooled"]
  assert max(differences.values()) < 1e-12
  assert "pooled" in equality.check_equal(differences, what="x")


@pytest.mark.parametrize("trunk, size", [("imagenet", 224), ("bottleneck", 77), ("3x3s2", 33)])
def test_pytorch_computes_the_same(trunk, size):
  pytest.importorskip("torch")
  model = trunk_model(TRUNKS[trunk]())
  image = np.random.default_rng(1).normal(size=(1, size, size + 2, 3)).astype(np.float32)
  ours = jax.jit(functools.partial(model.network.apply, method="features"))(model.variables, image)
  theirs = torch_features(arrays_of(model), np.ascontiguousarray(image.transpose(0, 3, 1, 2)),
                          stride=1 if trunk == "3x3" else 2, pool="3x3" not in trunk)
  assert ours.keys() == theirs.keys()
  for layer, value in theirs.items():
    assert equality.relative_difference(np.moveaxis(np.asarray(ours[layer]), -1, 1), value) < 1e-5, layer


def test_exchanged_and_transposed_arrays_are_refused():
  model = trunk_model(small_bottleneck())
  right = arrays_of(model)
  name, other = "layer1.0.conv2.weight", "layer1.1.conv2.weight"
  assert right[name].shape == right[other].shape
  for wrong in (right | {name: right[other], other: right[name]},
                right | {name: np.ascontiguousarray(right[name].transpose(0, 1, 3, 2))},
                right | {name: np.ascontiguousarray(right[name].transpose(1, 0, 2, 3))},
                right | {"bn1.weight": right["bn1.bias"], "bn1.bias": right["bn1.weight"]}):
    with pytest.raises(UserError, match="does not compute what the run computes.*pooled"):
      equality.check_equal(equality.largest_differences(model, wrong), what="x")


def test_features_that_are_not_finite_are_refused():
  with pytest.raises(UserError, match="nan"):
    equality.check_equal({"conv1": 0.0, "pooled": float("nan")}, what="x")


@pytest.mark.parametrize("arch, num_arrays, num_parameters", [
  ("resnet50", 318, 23_508_032), ("resnet18", 120, 11_176_512)])
def test_the_names_and_sizes_are_torchvisions(arch, num_arrays, num_parameters):
  trunk = create_resnet(arch)
  like = variable_shapes(trunk, jnp.zeros((1, 64, 64, 3)))
  names = shapes_in_torch(like)
  counters = {name.rpartition(".")[0] for name in names if name.endswith("running_var")}
  assert len(names) + len(counters) == num_arrays
  assert sum(np.prod(shape) for name, shape in names.items() if "running" not in name) == num_parameters
  assert names["layer2.0.downsample.0.weight"] == ((512, 256, 1, 1) if arch == "resnet50" else (128, 64, 1, 1))
  assert names["layer1.0.conv1.weight"] == ((64, 64, 1, 1) if arch == "resnet50" else (64, 64, 3, 3))
  assert names["layer4.0.downsample.1.running_mean"] == ((2048,) if arch == "resnet50" else (512,))


def test_the_way_out_and_in_is_bit_equal():
  trunk = small_bottleneck()
  like = variable_shapes(trunk, jnp.zeros((1, 64, 64, 3)))
  variables = randomised(like)
  arrays = to_torch(variables)
  assert all(value.dtype == np.int64 and value.shape == () for name, value in arrays.items() if name.endswith(COUNTER))
  back = from_torch(arrays, like)
  jax.tree.map(np.testing.assert_array_equal, back, variables)
  kernel = variables["params"]["res2_0"]["conv2"]["kernel"]
  np.testing.assert_array_equal(arrays["layer1.0.conv2.weight"][3, 5], kernel[:, :, 5, 3])
