"""Features against a plain forward pass, batch statistics against numpy, whatever the batches and devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pirl_jax.errors import UserError
from pirl_jax.evaluation.features import calibrate_batch_stats, extract_features, unit_norm
from pirl_jax.runtime.mesh import create_mesh
from pirl_jax.views.normalisation import normalise_image

SIDE = 6


def images(num):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (num, SIDE, SIDE, 3), np.uint8), rng.integers(-1, 4, num).astype(np.int32)


def batches(image, label, batch_size, broken=()):
  for start in range(0, len(image), batch_size):
    count = min(batch_size, len(image) - start)
    index = np.full(batch_size, -1, np.int32)
    index[:count] = np.arange(start, start + count)
    valid = (index >= 0) & ~np.isin(index, broken)
    pad = batch_size - count
    padded = np.concatenate([image[start:start + count], np.zeros((pad, SIDE, SIDE, 3), np.uint8)])
    padded[~valid] = 0
    yield {"image": padded, "index": index, "valid": valid,
           "label": np.concatenate([label[start:start + count], np.full(pad, -1, np.int32)])}


class Net(nn.Module):
  """A convolution with batch norm, the average over the image as feature."""

  axis_name: str | None = None

  @nn.compact
  def __call__(self, image, *, train):
    x = nn.Conv(5, (3, 3), name="conv")(image)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name, name="bn")(x)
    return jnp.mean(nn.relu(x), axis=(1, 2))


def forward(variables, image):
  return Net().apply(variables, image, train=False)


def both(variables, image):
  return {"net": forward(variables, image), "pixels": jnp.reshape(image, (image.shape[0], -1))}


@pytest.fixture(scope="module")
def variables():
  variables = Net().init(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)), train=False)
  stats = {"bn": {"mean": jnp.linspace(-0.5, 0.5, 5), "var": jnp.linspace(0.5, 2, 5)}}
  return {"params": variables["params"], "batch_stats": stats}


@pytest.mark.parametrize(("batch_size", "num_devices"), [(8, 1), (8, 8), (24, 4), (64, 2)])
def test_features_equal_a_plain_forward_pass(variables, batch_size, num_devices):
  image, label = images(43)
  broken = (0, 7, 20, 42)
  found = extract_features(both, variables, batches(image, label, batch_size, broken),
                           create_mesh(num_devices))
  kept = np.setdiff1d(np.arange(43), broken)
  assert found.num_broken == 4
  np.testing.assert_array_equal(found.index, kept)
  np.testing.assert_array_equal(found.labels, label[kept])
  pixels = (image[kept] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  np.testing.assert_allclose(found.features["pixels"], pixels.reshape(len(kept), -1), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found.features["net"], forward(variables, jnp.asarray(pixels, jnp.float32)),
                             rtol=1e-5, atol=1e-5)


def test_features_come_in_the_order_of_the_index(variables):
  image, label = images(20)
  shuffled = list(batches(image, label, 8))[::-1]
  found = extract_features(forward, variables, shuffled, create_mesh(4))
  np.testing.assert_array_equal(found.index, np.arange(20))
  expected = forward(variables, normalise_image(jnp.asarray(image)))
  np.testing.assert_allclose(found.features, expected, rtol=1e-5, atol=1e-6)


def test_the_same_function_is_traced_once(variables):
  image, label = images(20)
  traces = []

  def counting(variables, image):
    traces.append(image.shape)
    return forward(variables, image)

  for _ in range(3):
    extract_features(counting, variables, batches(image, label, 8), create_mesh(2))
  assert traces == [(4, SIDE, SIDE, 3)]


def test_what_cannot_be_is_refused(variables):
  image, label = images(9)
  with pytest.raises(UserError, match="9 images cannot be split over 8 devices"):
    extract_features(forward, variables, batches(image, label, 9), create_mesh(8))
  for run in (lambda b: extract_features(forward, variables, b, create_mesh(1)),
              lambda b: calibrate_batch_stats(stats, variables, b, create_mesh(1), momentum=0.9)):
    with pytest.raises(UserError, match="no image"):
      run(batches(image, label, 4, broken=range(9)))


def stats(variables, image):
  return Net().apply(variables, image, train=True, mutable=["batch_stats"])[1]["batch_stats"]


def global_stats(variables, image):
  return Net("data").apply(variables, image, train=True, mutable=["batch_stats"])[1]["batch_stats"]


def oracle_stats(variables, groups):
  """Mean over the groups of images of mean and variance of the convolution's output, in float64."""
  kernel = np.asarray(variables["params"]["conv"]["kernel"], np.float64)
  means, variances = [], []
  for group in groups:
    x = (group / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = sum(x[:, i:i + SIDE, j:j + SIDE] @ kernel[i, j] for i in range(3) for j in range(3))
    means.append(out.mean(axis=(0, 1, 2)))
    variances.append(out.var(axis=(0, 1, 2)))
  return np.mean(means, axis=0), np.mean(variances, axis=0)


@pytest.mark.parametrize(("stats_fn", "num_devices"), [(stats, 1), (global_stats, 1), (global_stats, 8)])
def test_batch_stats_are_the_mean_of_the_batches(variables, stats_fn, num_devices):
  image, label = images(45)
  broken = (0, 1, 17)
  image[9:16] //= 4  # batches that differ, so that a weighing of them would show
  found = calibrate_batch_stats(stats_fn, variables, batches(image, label, 8, broken),
                                create_mesh(num_devices), momentum=0.9)
  # The 42 images that can be read make 5 full batches; the last two have no part.
  kept = image[np.setdiff1d(np.arange(45), broken)][:40]
  mean, var = oracle_stats(variables, kept.reshape(5, 8, SIDE, SIDE, 3))
  np.testing.assert_allclose(found["batch_stats"]["bn"]["mean"], mean, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found["batch_stats"]["bn"]["var"], var, rtol=1e-4, atol=1e-5)
  assert found["params"] is variables["params"]


def test_batch_stats_of_each_device_are_averaged(variables):
  image, label = images(16)
  found = calibrate_batch_stats(stats, variables, batches(image, label, 16), create_mesh(4), momentum=0.9)
  mean, var = oracle_stats(variables, image.reshape(4, 4, SIDE, SIDE, 3))
  np.testing.assert_allclose(found["batch_stats"]["bn"]["mean"], mean, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found["batch_stats"]["bn"]["var"], var, rtol=1e-4, atol=1e-5)


def test_fewer_images_than_a_batch_are_repeated(variables):
  image, label = images(4)
  found = calibrate_batch_stats(stats, variables, batches(image, label, 8), create_mesh(1), momentum=0.9)
  mean, var = oracle_stats(variables, [image])  # twice each: the same mean and variance
  np.testing.assert_allclose(found["batch_stats"]["bn"]["mean"], mean, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found["batch_stats"]["bn"]["var"], var, rtol=1e-4, atol=1e-5)


def test_unit_norm():
  rows = unit_norm(np.float32([[3, 4], [0, 0], [-1e-10, 0]]))
  np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0], [-1, 0]], rtol=1e-6)
  assert rows.dtype == np.float32
