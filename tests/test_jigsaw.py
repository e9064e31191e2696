"""The jigsaw: undone it is the picture; offsets and orders are uniform; too large a patch is refused."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pirl_jax.errors import UserError
from pirl_jax.views.jigsaw import Jigsaw, cut_patches, draw_jigsaw


def jigsaw_patches(key, crop, *, grid=3, patch_size):
  """The patches with their pixels as they are."""
  jigsaw = Jigsaw(crop_size=crop.shape[0], crop_scale=(0.6, 1.0), grid=grid, patch_size=patch_size)
  return jigsaw(key, crop, lambda patches: patches)[0]


RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("size", "grid", "patch"), [(12, 3, 4), (13, 2, 6), (10, 1, 10), (255, 3, 85)])
def test_undone_it_is_the_picture(size, grid, patch):
  # Patches as large as their cells: nothing is lost, so the order alone must bring every pixel back.
  crop = RNG.integers(0, 256, (size, size, 3), np.uint8)
  key = jax.random.key(4)
  offsets, permutation, _ = draw_jigsaw(key, size=size, grid=grid, patch_size=patch)
  patches = np.asarray(jigsaw_patches(key, jnp.asarray(crop), grid=grid, patch_size=patch))
  assert patches.dtype == np.uint8 and not np.asarray(offsets).any()
  back = np.zeros_like(crop)
  for patch_pixels, cell in zip(patches, np.asarray(permutation), strict=True):
    y, x = patch * (cell // grid), patch * (cell % grid)
    back[y : y + patch, x : x + patch] = patch_pixels
  whole = grid * patch
  np.testing.assert_array_equal(back[:whole, :whole], crop[:whole, :whole])


@pytest.mark.parametrize(("size", "grid", "patch"), [(255, 3, 64), (36, 3, 10), (33, 2, 9)])
def test_every_patch_lies_at_its_offset_in_its_cell(size, grid, patch):
  crops = RNG.integers(0, 256, (5, size, size, 3), np.uint8)
  keys = jax.random.split(jax.random.key(0), 5)
  patches = jax.jit(jax.vmap(lambda k, c: jigsaw_patches(k, c, grid=grid, patch_size=patch)))(keys, crops)
  cell = size // grid
  for i in range(5):
    offsets, permutation, _ = draw_jigsaw(keys[i], size=size, grid=grid, patch_size=patch)
    assert sorted(np.asarray(permutation)) == list(range(grid * grid))
    for j in range(grid * grid):
      y = int(permutation[j]) // grid * cell + int(offsets[j, 0])
      x = int(permutation[j]) % grid * cell + int(offsets[j, 1])
      np.testing.assert_array_equal(patches[i, j], crops[i, y : y + patch, x : x + patch])


def test_rows_come_before_columns():
  crop = jnp.arange(4, dtype=jnp.float32).reshape(2, 2, 1) + jnp.zeros((1, 1, 3))
  patches = cut_patches(crop, jnp.zeros((4, 2), jnp.int32), jnp.asarray([1, 0, 2, 3]), grid=2, patch_size=1)
  np.testing.assert_array_equal(patches[:, 0, 0, 0], [1, 0, 2, 3])


def test_offsets_are_uniform_over_0_to_20():
  count = 3000
  keys = jax.random.split(jax.random.key(1), count)
  offsets, _, _ = jax.jit(jax.vmap(lambda k: draw_jigsaw(k, size=255, grid=3, patch_size=64)))(keys)
  values, counts = np.unique(np.asarray(offsets), return_counts=True)
  np.testing.assert_array_equal(values, np.arange(21))  # 21 itself is the exclusive bound
  expected = offsets.size / 21
  assert ((counts - expected) ** 2 / expected).sum() < 52.4  # chi-square, 20 degrees, 0.9999
  # Rows and columns, and neighbouring patches, are drawn apart.
  flat = np.asarray(offsets).reshape(count, 18)
  correlation = np.corrcoef(flat.T) - np.eye(18)
  assert np.abs(correlation).max() < 5 / math.sqrt(count)


def test_one_pixel_of_room_leaves_one_place():
  offsets, _, _ = draw_jigsaw(jax.random.key(0), size=33, grid=3, patch_size=10)
  assert not np.asarray(offsets).any()


def test_all_orders_are_equally_likely():
  count = 24_000
  keys = jax.random.split(jax.random.key(2), count)
  _, permutations, _ = jax.jit(jax.vmap(lambda k: draw_jigsaw(k, size=8, grid=2, patch_size=4)))(keys)
  orders, counts = np.unique(np.asarray(permutations), axis=0, return_counts=True)
  assert {tuple(o) for o in orders} == set(itertools.permutations(range(4)))
  assert ((counts - 1000) ** 2 / 1000).sum() < 58.6  # chi-square, 23 degrees, 0.99995


def test_orders_of_nine_are_uniform_in_every_place_and_seldom_repeat():
  count = 9000
  keys = jax.random.split(jax.random.key(3), count)
  _, permutations, _ = jax.jit(jax.vmap(lambda k: draw_jigsaw(k, size=9, grid=3, patch_size=3)))(keys)
  permutations = np.asarray(permutations)
  table = np.stack([np.bincount(permutations[:, j], minlength=9) for j in range(9)])
  assert np.abs(table - count / 9).max() < 5 * math.sqrt(count * 8 / 81)
  # Of 9000 draws out of 9! = 362,880, 112 pairs are expected to coincide (standard deviation 11).
  distinct = len(np.unique(permutations, axis=0))
  assert count - 112 - 60 < distinct < count - 112 + 60


@pytest.mark.parametrize(
  ("size", "grid", "patch", "words"),
  [
    (255, 3, 86, "patch_size=86.*85.*258"),
    (32, 3, 16, "patch_size=16.*10.*48"),
    (32, 0, 4, "grid=0"),
    (32, 3, 0, "patch_size=0"),
  ],
)
def test_impossible_sizes_are_refused(size, grid, patch, words):
  with pytest.raises(UserError, match=words):
    jigsaw_patches(jax.random.key(0), jnp.zeros((size, size, 3)), grid=grid, patch_size=patch)
