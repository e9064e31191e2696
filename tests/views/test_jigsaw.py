"""The jigsaw: undone it is the image; offsets and orders are uniform; labels; what is refused."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pirl_jax.errors import UserError
from pirl_jax.views import jigsaw as jigsaw_lib
from pirl_jax.views.jigsaw import Jigsaw, check_jigsaw, cut_patches, draw_jigsaw
from pirl_jax.views.normalisation import denormalise
from pirl_jax.views.permutations import permutation_subset
from pirl_jax.views.recipe import Recipe
from pirl_jax.views.two_views import make_views


def jigsaw_patches(key, crop, *, grid=3, patch_size):
  """The patches with their pixels as they are."""
  jigsaw = Jigsaw(crop_size=crop.shape[0], crop_scale=(0.6, 1.0), grid=grid, patch_size=patch_size)
  return jigsaw(key, crop, lambda patches: patches)[0]


def numbered_cells():
  """A crop of 3 x 3 cells of two pixels a side, whose levels are the numbers of the cells."""
  cells = np.arange(9, dtype=np.uint8).reshape(3, 3, 1).repeat(3, axis=2)
  return cells.repeat(2, axis=0).repeat(2, axis=1)


RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("size", "grid", "patch"), [(12, 3, 4), (13, 2, 6), (10, 1, 10), (255, 3, 85)])
def test_undone_it_is_the_image(size, grid, patch):
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


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(("size", "grid", "patch"), [(255, 3, 64), (36, 3, 10), (33, 2, 9), (10, 1, 10), (47, 4, 11)])
def test_products_cut_what_slices_cut(size, grid, patch, dtype):
  """To the bit: on a TPU the patches are cut by products, elsewhere by slices."""
  crops = RNG.integers(0, 256, (3, size, size, 3), np.uint8)
  if dtype == np.float32:  # any bits: denormal numbers, infinities and NaNs among them
    crops = RNG.integers(0, 2**32, crops.shape, np.uint32).view(np.float32)
  offsets, permutation, _ = jax.vmap(lambda key: draw_jigsaw(key, size=size, grid=grid, patch_size=patch))(
    jax.random.split(jax.random.key(7), 3))
  found, expected = (
    np.asarray(jax.jit(jax.vmap(functools.partial(cut, grid=grid, cell=size // grid, patch_size=patch)))(
      crops, offsets, permutation)) for cut in (jigsaw_lib._cut_by_products, jigsaw_lib._cut_by_slices))
  assert found.dtype == expected.dtype == dtype and found.shape == (3, grid * grid, patch, patch, 3)
  np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize(("platform", "is_gather"), [("tpu", False), ("cuda", True), ("cpu", True)])
def test_the_cut_of_a_platform_is_compiled_for_it_alone(platform, is_gather):
  def cut(*arrays):
    return jax.vmap(functools.partial(cut_patches, grid=3, patch_size=10))(*arrays)

  shapes = (jax.ShapeDtypeStruct((4, 36, 36, 3), jnp.uint8), jax.ShapeDtypeStruct((4, 9, 2), jnp.int32),
            jax.ShapeDtypeStruct((4, 9), jnp.int32))
  text = jax.jit(cut).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
  assert ("stablehlo.gather" in text, "stablehlo.dot_general" in text) == (is_gather, not is_gather)


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


@pytest.mark.parametrize(("size", "grid", "patch"), [(1, 1, 1), (3, 3, 1), (32, 3, 10)])
def test_the_smallest_and_the_largest_patch_are_possible(size, grid, patch):
  check_jigsaw(size, grid=grid, patch_size=patch)


@pytest.mark.parametrize("subset", ["max_avg", "max_min"])
def test_the_label_is_the_number_of_the_order_really_applied(subset):
  num_orders, count = 12, 2400
  orders = permutation_subset(num_orders, num_patches=9, subset=subset)
  jigsaw = Jigsaw(crop_size=6, crop_scale=(0.6, 1.0), grid=3, patch_size=2, num_permutations=num_orders,
                  permutation_subset=subset)
  assert jigsaw.num_labels == num_orders
  keys = jax.random.split(jax.random.key(5), count)
  patches, labels = jax.jit(jax.vmap(lambda key: jigsaw(key, numbered_cells(), lambda images: images)))(keys)
  assert labels.dtype == jnp.int32
  labels = np.asarray(labels)
  np.testing.assert_array_equal(patches, np.broadcast_to(orders[labels][:, :, None, None, None], (count, 9, 2, 2, 3)))
  counts = np.bincount(labels, minlength=num_orders)
  assert ((counts - 200) ** 2 / 200).sum() < 37.4  # chi-square, 11 degrees, 0.9999


def test_the_other_subset_has_other_orders():
  first, second = (permutation_subset(12, num_patches=9, subset=subset) for subset in ("max_avg", "max_min"))
  assert (first != second).any(), "the test above tells nothing apart"


def test_offsets_do_not_depend_on_the_order_drawn():
  orders = permutation_subset(4, num_patches=4)
  keys = jax.random.split(jax.random.key(7), 4000)
  offsets, _, labels = jax.vmap(lambda k: draw_jigsaw(k, size=40, grid=2, patch_size=10, orders=orders))(keys)
  for label in range(4):
    mean = np.asarray(offsets)[np.asarray(labels) == label].mean(axis=0)  # [4, 2]; uniform in 0..9
    assert np.abs(mean - 4.5).max() < 5 * 2.88 / math.sqrt(1000)


def test_a_single_order_is_the_image_in_its_own():
  jigsaw = Jigsaw(crop_size=6, crop_scale=(0.6, 1.0), grid=3, patch_size=2, num_permutations=1)
  for seed in range(5):
    patches, label = jigsaw(jax.random.key(seed), numbered_cells(), lambda images: images)
    assert label == 0
    np.testing.assert_array_equal(patches[:, 0, 0, 0], np.arange(9))


def test_of_all_orders_there_is_no_label():
  jigsaw = Jigsaw(crop_size=6, crop_scale=(0.6, 1.0), grid=3, patch_size=2)
  assert jigsaw.num_labels == 0
  assert jigsaw(jax.random.key(0), numbered_cells(), lambda images: images)[1] == -1


@pytest.mark.parametrize("augment, draws", [("patches", 9), ("crop", 1)])
def test_the_photometric_list_is_drawn_for_each_patch_or_for_the_crop(augment, draws):
  """Red rises to the right within every cell, so a patch tells whether it was flipped; green tells the brightness."""
  count = 300
  crop = np.zeros((9, 9, 3), np.uint8)
  crop[..., 0] = [40, 50, 60] * 3
  crop[..., 1] = 100
  jigsaw = Jigsaw(crop_size=9, crop_scale=(0.6, 1.0), grid=3, patch_size=3, augment=augment)
  recipe = Recipe(brightness=0.4, contrast=0, saturation=0, hue=0, group_probability=0, grayscale_probability=0)
  views_fn = jax.jit(make_views(jigsaw, recipe=recipe, pretext_recipe=recipe))
  crops = np.broadcast_to(crop, (count, 9, 9, 3))
  image, pretext, _ = views_fn(jax.random.split(jax.random.key(8), count), crops, crops)
  image, pretext = denormalise(image)[:, None], denormalise(pretext)
  flipped, image_flipped = (x[..., 0, 0, 0] > x[..., 0, 2, 0] for x in (pretext, image))  # [count, 9], [count, 1]
  green, image_green = (x[..., 1, 1, 1] for x in (pretext, image))
  if augment == "crop":
    assert (flipped == flipped[:, :1]).all() and (green == green[:, :1]).all()
  else:
    assert (flipped != flipped[:, :1]).any(axis=1).mean() > 0.95
    assert np.mean([len(set(row)) for row in green.tolist()]) > 7  # of nine draws out of about 80 levels
  flips = np.concatenate([flipped[:, :draws], image_flipped], axis=1)
  assert np.abs(flips.mean(axis=0) - 0.5).max() < 5 * 0.5 / math.sqrt(count)
  assert np.abs(np.corrcoef(flips.T) - np.eye(draws + 1)).max() < 5 / math.sqrt(count)  # the image view is apart
  assert (green[:, :1] != image_green).mean() > 0.9
  assert len(np.unique(green)) > 40


@pytest.mark.parametrize("changes, words", [
  ({"augment": "both"}, "jigsaw.augment='both'.*patches, crop"),
  ({"num_permutations": 5, "permutation_subset": "max_max"}, "jigsaw.permutation_subset='max_max'"),
  ({"num_permutations": 362_881}, "jigsaw.num_permutations=362881")])
def test_unknown_choices_are_refused(changes, words):
  with pytest.raises(UserError, match=words):
    Jigsaw(**{"crop_size": 9, "crop_scale": (0.6, 1.0), "grid": 3, "patch_size": 3, **changes})
