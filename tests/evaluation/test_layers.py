"""Pooling against vissl's kernels and PyTorch's cells in float64, and which features a layer's name stands for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pirl_jax.errors import UserError
from pirl_jax.evaluation import layers
from pirl_jax.evaluation.layers import check_layers, layer_features, layer_names, pool
from pirl_jax.models.heads import ImageHead, PatchesHead
from pirl_jax.models.network import Network, create_variables, variable_shapes
from pirl_jax.models.resnet import create_resnet

# vissl's table: (H, C) of the map, kernel, stride, padding, points a side. ResNet-50 at 224 pixels, then twice as wide.
VISSL = [
  (112, 64, 10, 10, 4, 12),
  (56, 256, 16, 8, 0, 6),
  (28, 512, 13, 5, 0, 4),
  (14, 1024, 8, 3, 0, 3),
  (7, 2048, 6, 1, 0, 2),
  (112, 128, 20, 13, 4, 8),
  (56, 512, 32, 8, 0, 4),
  (28, 1024, 13, 7, 0, 3),
  (14, 2048, 8, 6, 0, 2),
]


def random_map(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def average_pool(x, kernel, stride, padding):
  """PyTorch's AvgPool2d in float64: the zeros of the padding count, what the last window does not reach is left out."""
  height, width = x.shape[1:3]
  padded = np.zeros((len(x), height + 2 * padding, width + 2 * padding, x.shape[3]))
  padded[:, padding:padding + height, padding:padding + width] = x
  rows = [padded[:, i:i + kernel].sum(axis=1) for i in range(0, height + 2 * padding - kernel + 1, stride)]
  cells = [[row[:, j:j + kernel].sum(axis=1) / kernel**2 for j in range(0, width + 2 * padding - kernel + 1, stride)]
           for row in rows]
  return np.array(cells).transpose(2, 0, 1, 3)


def adaptive_pool(x, rows, columns):
  """PyTorch's AdaptiveAvgPool2d in float64: cells that overlap where the sides do not divide."""
  height, width = x.shape[1:3]
  out = np.zeros((len(x), rows, columns, x.shape[3]))
  for i in range(rows):
    for j in range(columns):
      top, bottom = math.floor(i * height / rows), math.ceil((i + 1) * height / rows)
      left, right = math.floor(j * width / columns), math.ceil((j + 1) * width / columns)
      out[:, i, j] = x[:, top:bottom, left:right].astype(np.float64).mean(axis=(1, 2))
  return out


@pytest.mark.parametrize(("side", "channels", "kernel", "stride", "padding", "points"), VISSL)
def test_maps_that_vissl_knows_have_its_kernels(side, channels, kernel, stride, padding, points):
  x = random_map(2, side, side, channels)
  found = pool(x)
  assert found.shape == (2, points, points, channels)
  np.testing.assert_allclose(found, average_pool(x, kernel, stride, padding), atol=2e-6)


def test_the_zeros_of_the_padding_count():
  found = np.asarray(pool(np.ones((1, 112, 112, 64), np.float32)))[0, :, :, 0]
  inner = np.ones(12)
  inner[0] = 0.6  # 4 of the first window's 10 rows are padding; the last one ends with the 116 of 4 + 112
  inner[-1] = 0.6
  np.testing.assert_allclose(found, np.outer(inner, inner), rtol=1e-6)


@pytest.mark.parametrize(("height", "width", "channels", "rows", "columns"), [
  (32, 32, 64, 12, 12),  # ResNet-18 on 32 pixels; 32 / 12 leaves a rest
  (17, 25, 64, 12, 12),
  (9, 30, 64, 9, 12),  # one side is small enough
  (8, 8, 512, 4, 4),
  (14, 14, 512, 4, 4),
  (7, 7, 4096, 2, 1),  # res5 of ResNet-50 w2, of which vissl says the cells
  (112, 112, 256, 6, 6), (56, 56, 1024, 3, 3), (28, 28, 2048, 2, 2), (14, 14, 4096, 1, 2), (7, 7, 8192, 1, 1),  # w4
  (7, 9, 4096, 1, 1),
  (5, 5, 10_000, 1, 1),  # more channels than numbers allowed
])
def test_other_maps_have_pytorchs_adaptive_cells(height, width, channels, rows, columns):
  x = random_map(2, height, width, channels)
  found = pool(x)
  assert found.shape == (2, rows, columns, channels)
  np.testing.assert_allclose(found, adaptive_pool(x, rows, columns), atol=2e-6)


def test_cells_by_hand():
  # torch.nn.functional.adaptive_avg_pool1d(arange(5), 3) is [0.5, 2, 3.5]: cells 0-1, 1-3 and 3-4.
  x = np.broadcast_to(np.arange(5, dtype=np.float32)[None, :, None, None], (1, 5, 5, 1000))
  np.testing.assert_allclose(np.asarray(pool(x))[0, :, :, 0], np.repeat([[0.5], [2], [3.5]], 3, axis=1))


def test_a_small_map_stays_as_it_is():
  x = random_map(2, 16, 16, 36)  # 9,216 numbers
  np.testing.assert_array_equal(pool(x), x)
  rounded = jnp.asarray(x, jnp.bfloat16)
  found = pool(rounded)
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, rounded.astype(jnp.float32))


def create(arch, *, size, width=1, stem="imagenet", dtype=jnp.float32):
  """A network, the shapes of its variables, and those of its layers at `size` pixels."""
  network = Network(create_resnet(arch, width=width, stem=stem, dtype=dtype), ImageHead(128), PatchesHead(128))
  variables = variable_shapes(network, jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 9, 32, 32, 3)))
  forward_fn = layer_features(network, (*layer_names(network), "embedding"))
  return network, {layer: x.shape for layer, x in jax.eval_shape(
    forward_fn, variables, jax.ShapeDtypeStruct((5, size, size, 3), jnp.float32)).items()}


@pytest.mark.parametrize(("width", "dims"), [
  (1, {"conv1": 9216, "res2": 9216, "res3": 8192, "res4": 9216, "res5": 8192, "pooled": 2048, "embedding": 128}),
  (2, {"conv1": 8192, "res2": 8192, "res3": 9216, "res4": 8192, "res5": 8192, "pooled": 4096, "embedding": 128}),
  (4, {"conv1": 9216, "res2": 9216, "res3": 8192, "res4": 8192, "res5": 8192, "pooled": 8192, "embedding": 128}),
])
def test_dimensions_of_resnet50_are_those_of_vissl(width, dims):
  network, found = create("resnet50", size=224, width=width)
  assert layer_names(network) == ("conv1", "res2", "res3", "res4", "res5", "pooled")
  assert found == {layer: (5, dim) for layer, dim in dims.items()}


@pytest.mark.parametrize(("arch", "size", "stem"), [("resnet18", 32, "3x3"), ("resnet8", 32, "3x3s2"),
                                                    ("resnet18", 128, "imagenet"), ("resnet34", 96, "3x3")])
def test_no_layer_is_longer_than_allowed(arch, size, stem):
  for layer, (count, dim) in create(arch, size=size, stem=stem)[1].items():
    assert count == 5 and dim <= layers.SIZE, layer


@pytest.fixture(scope="module")
def tiny():
  network = Network(create_resnet("resnet8", stem="3x3"), ImageHead(24), PatchesHead(24))
  variables = create_variables(
    network, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 9, 8, 8, 3)))
  rng = np.random.default_rng(0)
  stats = jax.tree.map(lambda x: x + 0.2 * rng.random(x.shape, np.float32), variables["batch_stats"])
  return network, {"params": variables["params"], "batch_stats": stats}


def test_features_are_those_of_the_network_with_running_statistics(tiny):
  network, variables = tiny
  image = random_map(3, 32, 32, 3)
  names = (*layer_names(network), "embedding")
  assert names == ("conv1", "res2", "res3", "res4", "pooled", "embedding")
  maps = network.apply(variables, image, train=False, method="features")
  flat = layer_features(network, names)(variables, image)
  square = layer_features(network, names, flat=False)(variables, image)
  # conv1 has 32 x 32 x 16 numbers: too many, so 24 a side; the other maps are small enough.
  assert square["conv1"].shape == (3, 24, 24, 16)
  np.testing.assert_allclose(square["conv1"], adaptive_pool(np.asarray(maps["conv1"]), 24, 24), atol=1e-5)
  for layer in ("res3", "res4", "pooled"):
    np.testing.assert_allclose(square[layer], maps[layer], atol=1e-5)
  np.testing.assert_allclose(square["embedding"], network.apply(variables, image, method="embed_image"), atol=1e-5)
  for layer in names:
    assert flat[layer].dtype == jnp.float32
    np.testing.assert_array_equal(flat[layer], np.reshape(square[layer], (3, -1)))
  # Each image alone: no statistics of the batch.
  alone = layer_features(network, names)(variables, image[1:2])
  for layer in names:
    np.testing.assert_allclose(alone[layer][0], flat[layer][1], atol=1e-4)


def test_only_what_is_asked_for(tiny):
  network, variables = tiny
  assert set(layer_features(network, ("res3", "embedding"))(variables, random_map(1, 32, 32, 3))) == {
    "res3", "embedding"}


def test_the_same_function_for_equal_networks(tiny):
  # What traces it is kept by the function: another one at each call would compile at each call.
  network, _ = tiny
  again = Network(create_resnet("resnet8", stem="3x3"), ImageHead(24), PatchesHead(24))
  assert layer_features(network, ("res2",)) is layer_features(again, ("res2",))
  assert layer_features(network, ("res2",)) is not layer_features(network, ("res3",))


def test_a_layer_that_is_not_there(tiny):
  network, _ = tiny
  check_layers(network, ("conv1", "res4", "pooled", "embedding"), field="linear.layers")
  with pytest.raises(UserError, match="linear.layers names the layer 'res5'; this network has conv1, res2, res3, res4, "
                                      "pooled, embedding"):
    check_layers(network, ("res2", "res5"), field="linear.layers")


def test_without_a_head_there_is_no_embedding(tiny):
  network = tiny[0].clone(image_head=None)
  check_layers(network, ("conv1", "res4", "pooled"), field="knn.layer")
  with pytest.raises(UserError, match="knn.layer names the layer 'embedding'; this network has conv1, .*, pooled$"):
    check_layers(network, ("embedding",), field="knn.layer")
