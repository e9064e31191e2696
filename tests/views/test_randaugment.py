"""RandAugment against PIL, in all forms, and its draws against their probabilities."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pil_randaugment
import pytest
from PIL import Image, ImageFilter, ImageOps

from pirl_jax.views import randaugment, tables
from pirl_jax.views.photometric import apply_photometric, draw_photometric
from pirl_jax.views.randaugment import NUMBERS, Drawn
from pirl_jax.views.recipe import BASE, Recipe

NAMES = ["none", *NUMBERS]


def random_images(num, height, width):
  """Returns u8[num, H, W, 3]: noise, noise in a narrow band, few levels, and one flat image."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (num, height, width, 3), np.uint8)
  images[1::3] = images[1::3] // 4 + 90
  images[2::3] = images[2::3] // 80 * 80
  images[-1] = 7
  return images


def planes(images, dtype=jnp.float32):
  return jnp.moveaxis(jnp.asarray(images), -1, 1).astype(dtype)


def replayed(pixels, drawn, index):
  """Returns u8[H, W, 3] after the operations of number `index` of many draws, by PIL one after the other."""
  image = Image.fromarray(pixels)
  for number, share, sign in zip(*(np.asarray(of)[index] for of in drawn), strict=True):
    name = NAMES[number]
    if name != "none":
      matrix = randaugment._OF_PLACES[name](share * sign, image.height, image.width) if (
        name in randaugment._OF_PLACES) else None
      image = pil_randaugment.applied(image, name, share, matrix)
  return np.asarray(image)


def every_pair(rng):
  """Returns draws in which every operation is first and second, with the smallest, the largest and other magnitudes."""
  first = np.tile(np.arange(16), 6)
  number = np.stack([first, rng.permutation(first)], axis=1).astype(np.int32)
  share = rng.uniform(0, 1, number.shape).astype(np.float32)
  share[:16], share[16:32], share[32:64] = 0, 1, 0.9 + share[32:64] / 10
  return Drawn(number, share, rng.choice(np.float32([-1, 1]), number.shape))


@pytest.mark.parametrize(("form", "dtype", "size"), [
  ("_alone", jnp.float32, (17, 23)), ("_in_groups", jnp.float32, (17, 23)), ("_in_groups", jnp.uint8, (32, 32))])
def test_every_sequence_of_two_equals_pil(form, dtype, size):
  drawn = every_pair(np.random.default_rng(4))
  images = random_images(len(drawn.number), *size)
  found = jax.jit(jax.vmap(getattr(randaugment, form)))(planes(images, dtype), Drawn(*map(jnp.asarray, drawn)))
  assert found.dtype == dtype
  expected = planes(np.stack([replayed(image, drawn, i) for i, image in enumerate(images)]))
  wrong = np.any(np.asarray(found) != expected, axis=(1, 2, 3))
  assert not wrong.any(), [NAMES[number] for number in drawn.number[wrong].ravel()]


@pytest.mark.parametrize("size", [(16, 20), (300, 9)])
def test_forms_of_tables_agree_and_equalize_equals_pil(size):
  images = random_images(7, *size)
  images[0, :, :, 1] = np.arange(images[0, :, :, 1].size).reshape(size) % 2 * 200  # two levels
  images[3] = np.minimum(np.arange(images[3].size).reshape(images[3].shape) // 9, 255)  # a table with values above 255
  levels = planes(images)
  counted = np.stack([[np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(image, -1, 0)]
                      for image in images])
  for form in (tables._count_by_scatter, tables._count_by_comparisons):
    np.testing.assert_array_equal(jax.jit(jax.vmap(form))(levels), counted)
  table = jnp.asarray(np.random.default_rng(1).integers(0, 256, (3, 256)))
  expected = np.stack([np.asarray(table)[c][images[..., c]] for c in range(3)], axis=1)
  for form in (tables._by_gather, tables._by_selects):
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda image, form=form: form(image, table)))(levels), expected)
  equalized = planes(np.stack([np.asarray(ImageOps.equalize(Image.fromarray(image))) for image in images]))
  np.testing.assert_array_equal(jax.jit(jax.vmap(tables.equalize))(levels), equalized)


def test_the_largest_moves_are_those_of_pycontrast():
  """30 degrees, 0.3 of the distance from the upper or left edge, and 0.45 of the image's own side."""
  found = {name: matrix(jnp.float32(-1), 40, 60) for name, matrix in randaugment._OF_PLACES.items()}
  cos, sin, across, down = (1024 * math.cos(math.pi / 6), 512, -2048 * 0.45 * 60, -2048 * 0.45 * 40)
  expected = {"shear_x": [1024, -307.2, 0, 0, 1024, 0], "shear_y": [1024, 0, 0, -307.2, 1024, 0],
              "translate_x": [1024, 0, across, 0, 1024, 0], "translate_y": [1024, 0, 0, 0, 1024, down],
              "rotate": [cos, sin, (1024 - cos) * 60 - sin * 40, -sin, cos, (1024 - cos) * 40 + sin * 60]}
  assert found.keys() == expected.keys()
  for name, matrix in expected.items():  # c and f of the rotation have the rounded cosine, times a side
    assert (np.abs(found[name] - np.array(matrix)) <= 0.5001 * np.array([1, 1, 60, 1, 1, 60])).all(), name


def test_draws_have_their_probabilities():
  count = 20_000
  draw = jax.jit(jax.vmap(lambda key: randaugment.draw_randaugment(key, count=2, magnitude=9.0, deviation=0.5)))
  drawn = Drawn(*(np.asarray(of) for of in draw(jax.random.split(jax.random.key(0), count))))

  def near(values, probability):
    np.testing.assert_allclose(np.mean(values, axis=0), probability,
                               atol=5 * math.sqrt(probability * (1 - probability) / count))

  near(drawn.number == 0, 0.5)
  for number in NUMBERS.values():
    near(drawn.number == number, 0.5 / 15)
  assert set(np.unique(drawn.sign)) == {-1, 1}
  near(drawn.sign > 0, 0.5)
  assert drawn.share.min() > 0 and drawn.share.max() == 1
  for magnitude, below in ((8.5, 0.158655), (9.0, 0.5), (9.5, 0.841345), (9.999, 0.977142)):  # of a normal one
    near(drawn.share < magnitude / 10, below)
  columns = [*(drawn.number > 0).T, *drawn.share.T, *drawn.sign.T, *(drawn.number % 5).T]
  assert np.abs(np.corrcoef(columns) - np.eye(8))[:6, :6].max() < 5 / math.sqrt(count)
  # With replacement: of the pairs that are both applied, 1 in 15 is of one operation.
  both = drawn.number.min(axis=1) > 0
  near(both & (drawn.number[:, 0] == drawn.number[:, 1]), 0.25 / 15)


def test_without_deviation_the_magnitude_is_the_mean():
  drawn = randaugment.draw_randaugment(jax.random.key(0), count=9, magnitude=7.5, deviation=0.0)
  np.testing.assert_array_equal(drawn.share, np.full(9, 0.75, np.float32))


def test_randaugment_leaves_the_other_draws_as_they_were():
  key = jax.random.key(8)
  plain, more = (draw_photometric(key, recipe=recipe) for recipe in (BASE, Recipe(randaugment_operations=2)))
  assert plain.randaugment is None and more.randaugment.number.shape == (2,)
  for name, value in plain._asdict().items():
    if value is not None:
      np.testing.assert_array_equal(value, getattr(more, name))


def test_randaugment_comes_between_blur_and_grayscale():
  recipe = Recipe(brightness=0, contrast=0, saturation=0, hue=0, group_probability=0, blur_probability=1,
                  grayscale_probability=1, randaugment_operations=2, randaugment_magnitude=5, randaugment_deviation=2)
  images = random_images(40, 17, 23)
  drawn = jax.jit(jax.vmap(lambda key: draw_photometric(key, recipe=recipe)))(jax.random.split(jax.random.key(3), 40))
  found = np.asarray(jax.jit(jax.vmap(apply_photometric))(planes(images), drawn))
  expected = []
  for i, pixels in enumerate(images):
    blurred = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(float(drawn.radius[i]))))
    image = Image.fromarray(replayed(blurred, drawn.randaugment, i)).convert("L").convert("RGB")
    expected.append(np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if drawn.flip[i] else image))
  # A level that the blur's fixed point rounds differently can be moved further by a table.
  assert (found != planes(np.stack(expected))).mean() < 2e-3


def test_a_program_has_the_form_of_its_platform():
  drawn = Drawn(jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 2)), jnp.ones((3, 2)))
  traced = jax.jit(jax.vmap(randaugment.apply_randaugment)).trace(jnp.zeros((3, 3, 8, 8)), drawn)
  cpu, tpu, gpu = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu", "cuda"))
  # On a CPU and a TPU the images come one after the other; neither a TPU nor a GPU has what it is slow at.
  assert "stablehlo.while" in cpu and "stablehlo.while" in tpu and "stablehlo.while" not in gpu
  assert "stablehlo.scatter" in cpu and "stablehlo.scatter" not in tpu and "stablehlo.scatter" not in gpu
  assert '"stablehlo.gather"' in cpu and '"stablehlo.gather"' not in tpu and '"stablehlo.gather"' in gpu
