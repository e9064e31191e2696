"""Both views: shapes, normalisation, and that an image's views depend on its own key and pixels alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pirl_jax.errors import UserError
from pirl_jax.views.jigsaw import Jigsaw
from pirl_jax.views.normalisation import denormalise
from pirl_jax.views.recipe import GBLUR, Recipe
from pirl_jax.views.two_views import create_pretext, make_views

RNG = np.random.default_rng(0)
NOTHING = Recipe(
  brightness=0, contrast=0, saturation=0, hue=0, group_probability=0, grayscale_probability=0, flip_probability=0
)
FLIP_ONLY = Recipe(brightness=0, contrast=0, saturation=0, hue=0, group_probability=0, grayscale_probability=0)
B = 8
IMAGES = RNG.integers(0, 256, (B, 14, 15, 3), np.uint8)
CROPS = RNG.integers(0, 256, (B, 27, 27, 3), np.uint8)


def jigsaw_views(recipe, *, patch_size, size=27):
  jigsaw = Jigsaw(crop_size=size, crop_scale=(0.6, 1.0), grid=3, patch_size=patch_size)
  return jax.jit(make_views(jigsaw, recipe=recipe, pretext_recipe=recipe))


KEYS = jax.random.split(jax.random.key(0), B)


@pytest.mark.parametrize("recipe", [pytest.param(Recipe(), id="base"),
                                    pytest.param(GBLUR, id="gblur", marks=pytest.mark.slow)])
def test_views_depend_on_their_own_key_and_pixels_alone(recipe):
  views = jigsaw_views(recipe, patch_size=7)
  image, pretext, _ = views(KEYS, IMAGES, CROPS)
  assert image.shape == (B, 14, 15, 3) and pretext.shape == (B, 9, 7, 7, 3)
  assert image.dtype == pretext.dtype == jnp.float32
  # Normalisation is the one inexact step, and a batch of one may round it differently.
  for i in range(B):
    alone = views(KEYS[i : i + 1], IMAGES[i : i + 1], CROPS[i : i + 1])
    np.testing.assert_allclose(alone[0][0], image[i], atol=1e-6)
    np.testing.assert_allclose(alone[1][0], pretext[i], atol=1e-6)
  order = RNG.permutation(B)
  moved = views(KEYS[order], IMAGES[order], CROPS[order])
  np.testing.assert_array_equal(moved[0], image[order])
  np.testing.assert_array_equal(moved[1], pretext[order])


def test_without_operations_the_views_are_the_normalised_crops():
  views = jigsaw_views(NOTHING, patch_size=9)
  image, pretext, _ = views(KEYS, IMAGES, CROPS)
  mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
  np.testing.assert_allclose(image, (IMAGES / 255 - mean) / std, atol=2e-6)
  np.testing.assert_array_equal(denormalise(image), IMAGES)
  # 27 = 3 x 9 without room: the patches of every image are its nine cells in some order.
  cells = CROPS.reshape(B, 3, 9, 3, 9, 3).transpose(0, 1, 3, 2, 4, 5).reshape(B, 9, 9, 9, 3)
  levels = denormalise(pretext)
  orders = set()
  for i in range(B):
    order = [next(c for c in range(9) if np.array_equal(levels[i, j], cells[i, c])) for j in range(9)]
    assert sorted(order) == list(range(9))
    orders.add(tuple(order))
  assert len(orders) == B


def test_image_and_patches_flip_apart():
  count = 400
  ramp = np.broadcast_to(np.arange(9, dtype=np.uint8)[None, None, :, None], (count, 9, 9, 3))
  views = jigsaw_views(FLIP_ONLY, patch_size=3, size=9)
  image, pretext, _ = views(jax.random.split(jax.random.key(6), count), ramp, ramp)
  flips = np.concatenate(
    [
      np.asarray(image[:, 0, 0, 0] > image[:, 0, -1, 0])[:, None],
      np.asarray(pretext[:, :, 0, 0, 0] > pretext[:, :, 0, -1, 0]),
    ],
    axis=1,
  )  # [count, 1 + P]
  assert np.abs(flips.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(count)
  correlation = np.corrcoef(flips.T) - np.eye(10)
  assert np.abs(correlation).max() < 5 / np.sqrt(count)


def test_colour_is_drawn_anew_for_every_patch():
  flat = np.full((1, 27, 27, 3), (200, 100, 50), np.uint8)
  recipe = Recipe(group_probability=0, grayscale_probability=0)
  image, pretext, _ = jigsaw_views(recipe, patch_size=7)(KEYS[:1], flat, flat)
  colours = {tuple(denormalise(v)[0, 0]) for v in (image[0], *pretext[0])}
  assert len(colours) == 10


def test_colour_does_not_change_what_is_cut():
  _, plain, _ = jigsaw_views(NOTHING, patch_size=7)(KEYS, IMAGES, CROPS)
  grey = Recipe(
    brightness=0, contrast=0, saturation=0, hue=0, group_probability=0, grayscale_probability=1, flip_probability=0
  )
  _, coloured, _ = jigsaw_views(grey, patch_size=7)(KEYS, IMAGES, CROPS)
  red, green, blue = np.moveaxis(denormalise(plain).astype(int), -1, 0)
  luma = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
  np.testing.assert_array_equal(denormalise(coloured), np.repeat(luma[..., None], 3, axis=-1))


@pytest.mark.parametrize(("transform", "image", "crop"), [
  (True, True, False), (True, False, True), (False, True, True)])
def test_without_its_crop_or_a_transform_a_view_is_none(transform, image, crop):
  jigsaw = Jigsaw(crop_size=27, crop_scale=(0.6, 1.0), grid=3, patch_size=7) if transform else None
  views = make_views(jigsaw, recipe=Recipe(), pretext_recipe=Recipe())
  found = jax.eval_shape(views, KEYS, IMAGES if image else None, CROPS if crop else None)
  assert [view is not None for view in found[:2]] == [image, transform and crop]
  assert transform and crop or found[2] is None


def test_a_transform_has_its_own_settings_or_the_crop_of_the_image():
  settings = {"jigsaw": {"crop_size": 30, "crop_scale": [0.6, 1.0], "grid": 2, "patch_size": 9}, "other": {"grid": 5}}
  options = {"image_size": 32, "image_scale": (0.2, 0.9), "settings": settings}
  jigsaw, rotation = (create_pretext(name, **options) for name in ("jigsaw", "rotation"))
  assert (jigsaw.crop_size, jigsaw.crop_scale, jigsaw.grid, jigsaw.patch_size) == (30, (0.6, 1.0), 2, 9)
  assert (rotation.crop_size, rotation.crop_scale) == (32, (0.2, 0.9))


def test_what_cannot_be_is_refused():
  with pytest.raises(UserError, match="pretext='puzzle'.*jigsaw, rotation, rotation_jigsaw"):
    create_pretext("puzzle", image_size=8, image_scale=(0.2, 1), settings={})


def test_denormalise_rounds_and_clips():
  levels = np.array([[-3.0, 127.4, 300.0]])
  view = (levels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  np.testing.assert_array_equal(denormalise(view), [[0, 127, 255]])
