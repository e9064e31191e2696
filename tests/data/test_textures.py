"""The embedded textures: what a record depends on, and that pixels alone do not tell the families."""

import hashlib

import numpy as np
import pytest

from pirl_jax.data.textures import FAMILIES, create_textures


def test_shapes_and_balanced_labels():
  images, labels = create_textures(40, size=32, split="train")
  assert images.shape == (40, 32, 32, 3) and images.dtype == np.uint8
  assert labels.dtype == np.int32
  assert np.bincount(labels).tolist() == [4] * len(FAMILIES)


@pytest.mark.parametrize("size", [32, 64, 96])
def test_a_bigger_set_starts_with_the_smaller_one(size):
  small, _ = create_textures(13, size=size, split="train")
  # 137 crosses the border between the chunks in which images are drawn.
  large, _ = create_textures(137 if size > 32 else 1370, size=size, split="train")
  np.testing.assert_array_equal(small, large[:13])


def test_no_image_is_in_two_splits():
  sets = [create_textures(300, size=32, split=split)[0] for split in ("train", "test")]
  pixels = [image.tobytes() for images in sets for image in images]
  assert len(set(pixels)) == len(pixels)


def test_pixels_are_the_same_on_every_machine():
  images, _ = create_textures(100, size=32, split="train")
  # Recorded from this code. A change here is a new data set: count `_VERSION` of data/embedded.py up.
  assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "86227980641957f2"


def test_the_same_texture_in_more_detail():
  small, _ = create_textures(100, size=32, split="train")
  large, _ = create_textures(100, size=64, split="train")
  shrunk = large.reshape(100, 32, 2, 32, 2, 3).mean(axis=(2, 4))
  same = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(small, shrunk, strict=True)]
  other = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(small, shrunk[10:], strict=False)]
  assert np.median(same) > 0.9 and abs(np.median(other)) < 0.3


def test_colour_tells_nothing():
  images, labels = create_textures(2000, size=32, split="train")
  means = images.mean(axis=(1, 2))
  ratio = means[:, :2] / means.mean(axis=1, keepdims=True)
  by_family = np.stack([ratio[labels == family].mean(axis=0) for family in range(len(FAMILIES))])
  # The spread of the families' mean tints is that of means of 200 draws each, not more.
  assert np.all(by_family.std(axis=0) < 2 * ratio.std(axis=0) / np.sqrt(200))


def test_nearest_pixels_do_not_tell_the_family():
  train, train_labels = create_textures(4096, size=32, split="train")
  test, test_labels = create_textures(1024, size=32, split="test")
  train, test = ((x.reshape(len(x), -1).astype(np.float32) / 255 - 0.45) / 0.225 for x in (train, test))
  train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
  similarity = test @ train.T
  nearest = np.argpartition(-similarity, 200, axis=1)[:, :200]
  weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / 0.07)
  votes = np.stack(
    [(weights * (train_labels[nearest] == family)).sum(axis=1) for family in range(10)], axis=1
  )
  assert 0.08 < (votes.argmax(axis=1) == test_labels).mean() < 0.28  # chance is 0.1
