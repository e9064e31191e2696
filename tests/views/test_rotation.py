"""Rotations: numpy's quarter turns, labels that tell what was really done, and the jigsaw of a turned crop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pirl_jax.views.permutations import permutation_subset
from pirl_jax.views.rotation import Rotation, rotate
from pirl_jax.views.rotation_jigsaw import RotationJigsaw

RNG = np.random.default_rng(0)


def mirror(images):
  """An augmentation that does not commute with a turn."""
  return images[:, :, ::-1]


def unlike_pixels(size):
  """An image u8[S, S, 3] in which no two pixels are equal; S is at most 16."""
  values = np.arange(size * size, dtype=np.uint8).reshape(size, size)
  return np.stack([values, values[::-1], values.T], axis=-1)


@pytest.mark.parametrize("side", [5, 6])
def test_rotate_is_numpys_rot90(side):
  images = RNG.integers(0, 256, (8, side, side, 3), np.uint8)
  turns = np.array([0, 1, 2, 3, 3, 2, 1, 0])
  together = jax.jit(jax.vmap(rotate))(images, turns)
  for image, count, turned in zip(images, turns, together, strict=True):
    np.testing.assert_array_equal(turned, np.rot90(image, count))
    np.testing.assert_array_equal(rotate(image, count), np.rot90(image, count))


def test_the_label_of_a_rotation_is_the_turn_of_the_augmented_image():
  rotation = Rotation(crop_size=6, crop_scale=(0.2, 1.0))
  assert rotation.view_shape == (1, 6, 6, 3) and rotation.num_labels == 4
  crop = unlike_pixels(6)
  keys = jax.random.split(jax.random.key(0), 4000)
  views, labels = jax.jit(jax.vmap(lambda key: rotation(key, crop, mirror)))(keys)
  assert views.shape == (4000, *rotation.view_shape) and labels.dtype == jnp.int32
  views, labels = np.asarray(views), np.asarray(labels)
  for turns in range(4):
    expected = np.rot90(crop[:, ::-1], turns)  # augmented first, turned last
    np.testing.assert_array_equal(views[labels == turns, 0], np.broadcast_to(
      expected, (np.count_nonzero(labels == turns), *expected.shape)))
  counts = np.bincount(labels, minlength=4)
  assert len(counts) == 4
  assert ((counts - 1000) ** 2 / 1000).sum() < 21.1  # chi-square, 3 degrees, 0.9999


@pytest.mark.parametrize("augment", ["patches", "crop"])
def test_the_label_of_both_tells_the_turn_of_the_crop_and_the_order_of_its_patches(augment):
  num_orders, cell = 3, 4
  transform = RotationJigsaw(crop_size=12, crop_scale=(0.6, 1.0), grid=3, patch_size=cell, augment=augment,
                             num_permutations=num_orders)
  assert transform.view_shape == (9, 4, 4, 3) and transform.num_labels == 12
  crop = unlike_pixels(12)
  count = 2400
  keys = jax.random.split(jax.random.key(1), count)
  views, labels = jax.jit(jax.vmap(lambda key: transform(key, crop, mirror)))(keys)
  views, labels = np.asarray(views), np.asarray(labels)

  for label in range(12):
    turned = np.rot90(crop, label // num_orders)
    order = permutation_subset(num_orders, num_patches=9)[label % num_orders]
    if augment == "crop":
      turned = turned[:, ::-1]
    patches = np.stack([turned[cell * (i // 3):][:cell, cell * (i % 3):][:, :cell] for i in order.tolist()])
    if augment == "patches":
      patches = patches[:, :, ::-1]
    found = views[labels == label]
    np.testing.assert_array_equal(found, np.broadcast_to(patches, found.shape))
  counts = np.bincount(labels, minlength=12)
  assert len(counts) == 12
  assert ((counts - count / 12) ** 2 / (count / 12)).sum() < 37.4  # chi-square, 11 degrees, 0.9999


def test_of_all_orders_there_is_no_label():
  transform = RotationJigsaw(crop_size=12, crop_scale=(0.6, 1.0), grid=3, patch_size=4)
  assert transform.num_labels == 0
  _, label = transform(jax.random.key(0), unlike_pixels(12), mirror)
  assert label == -1
