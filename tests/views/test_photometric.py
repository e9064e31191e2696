"""The photometric operations against PIL, hue against colorsys, the draws against their probabilities."""

import colorsys
import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from pirl_jax.errors import UserError
from pirl_jax.views import operations, photometric
from pirl_jax.views.photometric import apply_photometric, draw_photometric
from pirl_jax.views.recipe import BASE, GBLUR, Recipe

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 17, 23


def random_images(num=6):
  """Noise, noise in a narrow band, a ramp with edges, and flat ones: u8[num, H, W, 3]."""
  noise = RNG.integers(0, 256, (num - 4, HEIGHT, WIDTH, 3), np.uint8)
  narrow = RNG.integers(100, 140, (1, HEIGHT, WIDTH, 3), np.uint8)
  ramp = np.minimum(np.arange(HEIGHT * WIDTH * 3).reshape(1, HEIGHT, WIDTH, 3) // 4, 255).astype(np.uint8)
  flat = np.full((2, HEIGHT, WIDTH, 3), [[[[0]]], [[[255]]]], np.uint8)
  return np.concatenate([noise, narrow, ramp, flat])


IMAGES = random_images()


def planes(images):
  return jnp.asarray(np.moveaxis(images, -1, -3), jnp.float32)


def apply_all(operation, images, *parameters):
  """u8 images and one parameter each -> u8 images, by `operation` under jit and vmap; whole levels are checked."""
  out = np.asarray(jax.jit(jax.vmap(operation))(planes(images), *map(jnp.asarray, parameters)))
  np.testing.assert_array_equal(out, np.rint(out))
  assert out.min() >= 0 and out.max() <= 255
  return np.moveaxis(out, -3, -1).astype(np.uint8)


def against_pil(operation, pil_operation, parameters):
  """Returns the absolute differences over all images x parameters, i32[parameters, images, H, W, 3]."""
  differences = []
  for value in parameters:
    ours = apply_all(operation, IMAGES, np.full(len(IMAGES), value, np.float32))
    theirs = np.stack([np.asarray(pil_operation(Image.fromarray(p), value)) for p in IMAGES])
    differences.append(np.abs(ours.astype(int) - theirs))
  return np.stack(differences)


def hue_oracle(image, turns):
  """colorsys in float64, one pixel at a time, back to whole levels by torchvision's rule."""
  out = np.empty_like(image)
  for place in np.ndindex(image.shape[:2]):
    hue, saturation, value = colorsys.rgb_to_hsv(*(image[place] / 255.0))
    out[place] = [math.floor(c * 255.999 + 1e-9) for c in colorsys.hsv_to_rgb((hue + turns) % 1.0, saturation, value)]
  return out


GRID_FACTORS = [0.0, 0.5, 1.0, 1.5, 2.0, *(RNG.integers(0, 8193, 12) / 4096)]


@pytest.mark.parametrize(
  ("operation", "enhancer"),
  [
    (operations.adjust_brightness, ImageEnhance.Brightness),
    (operations.adjust_contrast, ImageEnhance.Contrast),
    (operations.adjust_saturation, ImageEnhance.Color),
    (operations.adjust_sharpness, ImageEnhance.Sharpness),
  ],
)
def test_blends_equal_pil(operation, enhancer):
  # Exact for the factors that are ever drawn; any other factor may round the other way at a whole level.
  assert against_pil(operation, lambda p, f: enhancer(p).enhance(f), GRID_FACTORS).max() == 0
  other = against_pil(operation, lambda p, f: enhancer(p).enhance(f), [0.1, 1 / 3, 0.7, 1.1, 1.9])
  assert other.max() <= 1
  assert (other > 0).mean() < 0.1


def test_every_blend_of_two_levels_equals_pil():
  levels = np.arange(256, dtype=np.uint8)
  image, target = np.meshgrid(levels, levels)
  blend = jax.jit(operations.blend)
  for factor in [0.0, 0.25, 1.0, 2.0, *(RNG.integers(0, 8193, 60) / 4096)]:
    ours = blend(jnp.asarray(target, jnp.float32), jnp.asarray(image, jnp.float32), jnp.float32(factor))
    theirs = Image.blend(Image.fromarray(target), Image.fromarray(image), factor)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=f"factor {factor}")


def test_contrast_rounds_a_mean_of_one_half_up():
  image = np.full((2, 2, 3), 10, np.uint8)
  image[0] = 11
  ours = apply_all(operations.adjust_contrast, image[None], np.zeros(1, np.float32))
  np.testing.assert_array_equal(ours[0], 11)


def test_contrast_of_a_large_image_is_exact():
  # 300 x 300 levels sum to more than 2^24, where float32 sums round; the mean is 1 / 90,000 short of 200.5.
  image = np.full((300, 300, 3), 201, np.uint8)
  image.reshape(-1, 3)[:45_001] = 200
  ours = apply_all(operations.adjust_contrast, image[None], np.zeros(1, np.float32))[0]
  np.testing.assert_array_equal(ours, np.asarray(ImageEnhance.Contrast(Image.fromarray(image)).enhance(0.0)))
  assert ours[0, 0, 0] == 200


@pytest.mark.parametrize("bits", [1, 4, 5, 6, 7, 8])
def test_posterize_equals_pil(bits):
  ours = apply_all(operations.posterize, IMAGES, np.full(len(IMAGES), bits, np.int32))
  theirs = np.stack([np.asarray(ImageOps.posterize(Image.fromarray(p), bits)) for p in IMAGES])
  np.testing.assert_array_equal(ours, theirs)


def test_solarize_equals_pil():
  thresholds = [0, 1, 100, 128, 255, 256]
  assert against_pil(operations.solarize, lambda p, t: ImageOps.solarize(p, int(t)), thresholds).max() == 0
  unchanged = apply_all(operations.solarize, IMAGES, np.full(len(IMAGES), 256, np.int32))
  np.testing.assert_array_equal(unchanged, IMAGES)


def test_grayscale_equals_pil():
  colours = RNG.integers(0, 256, (1, 256, 256, 3), np.uint8)
  ours = apply_all(operations.grayscale, colours)[0]
  theirs = np.asarray(Image.fromarray(colours[0]).convert("L"))
  np.testing.assert_array_equal(ours, np.repeat(theirs[:, :, None], 3, axis=2))


def test_autocontrast_equals_pil_over_every_range():
  # One row an image: all levels of low..high, all 32640 ranges. PIL is one less in some of the whole quotients.
  low, high = np.triu_indices(256, k=1)
  rows = np.clip(np.arange(256)[None], low[:, None], high[:, None])
  image = jnp.broadcast_to(jnp.asarray(rows, jnp.float32)[:, None, None, :], (len(low), 3, 1, 256))
  ours = np.asarray(jax.jit(jax.vmap(operations.autocontrast))(image))[:, 0, 0]
  exact = (255 * (rows - low[:, None])) // (high - low)[:, None]
  np.testing.assert_array_equal(ours, exact)
  for i in RNG.integers(0, len(low), 500):
    theirs = np.asarray(ImageOps.autocontrast(Image.fromarray(rows[i : i + 1].astype(np.uint8))))[0]
    behind = ours[i] - theirs
    assert set(np.unique(behind)) <= {0, 1}
    whole = (255 * (rows[i] - low[i])) % (high[i] - low[i]) == 0
    assert not behind[~whole].any()


def test_autocontrast_of_images_equals_pil():
  ours = apply_all(operations.autocontrast, IMAGES).astype(int)
  theirs = np.stack([np.asarray(ImageOps.autocontrast(Image.fromarray(p))) for p in IMAGES])
  assert np.abs(ours - theirs).max() <= 1
  np.testing.assert_array_equal(ours[-2:], IMAGES[-2:])  # flat channels stay


@pytest.mark.parametrize("turns", [-0.5, -0.2, -1 / 6, 0.0, 0.1, 1 / 3, 0.4999, 0.5])
def test_hue_equals_float_hsv(turns):
  ours = apply_all(operations.adjust_hue, IMAGES, np.full(len(IMAGES), turns, np.float32)).astype(int)
  theirs = np.stack([hue_oracle(p, float(np.float32(turns))) for p in IMAGES])
  assert np.abs(ours - theirs).max() <= 1
  assert (ours != theirs).mean() < 1e-3


def test_hue_of_zero_changes_no_colour():
  colours = np.stack(np.meshgrid(*[np.arange(0, 256, 5, dtype=np.uint8)] * 3), axis=-1).reshape(1, 52, -1, 3)
  np.testing.assert_array_equal(apply_all(operations.adjust_hue, colours, np.zeros(1, np.float32)), colours)


def test_gaussian_blur_equals_pil():
  # With 0.5, 1 and 2 many sums lie half way between two levels; at the root of 2 the box grows to 5 pixels.
  radii = [0.0, 0.1, 0.5, 1.0, 1.3, 1.41, 2**0.5, 1.42, 1.7, 2.0, 2.4, *RNG.uniform(0.1, 2.0, 6)]
  off = against_pil(operations.gaussian_blur, lambda p, r: p.filter(ImageFilter.GaussianBlur(float(r))), radii)
  assert off.max() <= 1
  assert (off > 0).mean() < 1e-3


def test_jitter_equals_the_plain_sequence_in_all_24_orders():
  factors = np.asarray([1.375, 0.625, 1.25])
  turns = 0.15
  steps = [
    lambda p: np.asarray(ImageEnhance.Brightness(Image.fromarray(p)).enhance(factors[0])),
    lambda p: np.asarray(ImageEnhance.Contrast(Image.fromarray(p)).enhance(factors[1])),
    lambda p: np.asarray(ImageEnhance.Color(Image.fromarray(p)).enhance(factors[2])),
    lambda p: hue_oracle(p, float(np.float32(turns))),
  ]
  image = IMAGES[0]
  orders = list(itertools.permutations(range(4)))
  expected = []
  for order in orders:
    current = image
    for step in order:
      current = steps[step](current)
    expected.append(current)
  # Any two orders differ widely, so a wrong one cannot pass for the few values where float32 hue is one level off.
  assert min((a != b).mean() for a, b in itertools.combinations(expected, 2)) > 0.02

  def jitter(image, places):
    return photometric.color_jitter(
      image,
      brightness=jnp.float32(factors[0]),
      contrast=jnp.float32(factors[1]),
      saturation=jnp.float32(factors[2]),
      hue=jnp.float32(turns),
      places=places,
    )

  places = np.argsort(np.asarray(orders), axis=1).astype(np.int32)
  ours = apply_all(jitter, np.repeat(image[None], 24, axis=0), places)
  off = np.abs(ours.astype(int) - np.stack(expected))
  assert off.max() <= 2
  assert (off > 0).reshape(24, -1).mean(axis=1).max() < 3e-3


@pytest.mark.parametrize("present", [(0,), (2, 3), (0, 2), (0, 1, 2), (0, 1, 2, 3), (3,), ()])
def test_jitter_of_some_operations_equals_their_sequence(present):
  steps = [
    (operations.adjust_brightness, 1.25),
    (operations.adjust_contrast, 0.5),
    (operations.adjust_saturation, 1.75),
    (operations.adjust_hue, 0.125),
  ]
  names = ("brightness", "contrast", "saturation", "hue")
  parameters = {name: jnp.float32(steps[i][1]) if i in present else None for i, name in enumerate(names)}
  image = planes(IMAGES)[0]
  for order in [(3, 2, 1, 0), (1, 3, 0, 2)]:
    expected = image
    for i in order:
      expected = steps[i][0](expected, jnp.float32(steps[i][1])) if i in present else expected  # not jitted
    places = jnp.asarray(np.argsort(order), jnp.int32)
    jitter = jax.jit(photometric.color_jitter)
    np.testing.assert_array_equal(jitter(image, **parameters, places=places), expected)


def replay(pixels, drawn, index):
  """The list of operations by PIL, one after the other, for number `index` of many draws."""
  value = {name: None if v is None else np.asarray(v)[index] for name, v in drawn._asdict().items()}
  image = Image.fromarray(pixels)
  for step in np.argsort(value["places"]):
    if step == 3:
      image = Image.fromarray(hue_oracle(np.asarray(image), float(value["hue"])))
    else:
      enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step]
      image = enhancer(image).enhance(float(value[("brightness", "contrast", "saturation")[step]]))
  if value["bits"] is not None and value["autocontrast"]:  # the coin of the group
    image = ImageOps.posterize(image, int(value["bits"]))
    image = ImageEnhance.Sharpness(image).enhance(float(value["sharpness"]))
    image = ImageOps.autocontrast(ImageOps.solarize(image, int(value["threshold"])))
  if value["grayscale"]:
    image = image.convert("L").convert("RGB")
  if value["radius"] is not None and value["radius"] > 0:
    image = image.filter(ImageFilter.GaussianBlur(float(value["radius"])))
  if value["flip"]:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return np.asarray(image)


@pytest.mark.parametrize("recipe", [BASE, GBLUR], ids=["base", "gblur"])
def test_a_whole_recipe_equals_pil_with_the_same_draws(recipe):
  count = 48
  images = np.random.default_rng(4).integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8)
  drawn = jax.jit(jax.vmap(lambda k: draw_photometric(k, recipe=recipe)))(jax.random.split(jax.random.key(3), count))
  ours = np.moveaxis(np.asarray(jax.jit(jax.vmap(apply_photometric))(planes(images), drawn)), -3, -1)
  theirs = np.stack([replay(images[i], drawn, i) for i in range(count)])
  off = np.abs(ours - theirs.astype(int))
  # A level lost by hue or by PIL's autocontrast may be stretched or inverted later, but there are hardly any: of six
  # drawn sets of images 1.1e-3 to 2.8e-3, never by two levels.
  assert (off > 0).mean() < 4e-3
  assert not (off > 1).any()


def test_draws_have_their_probabilities_and_ranges():
  count = 20_000
  keys = jax.random.split(jax.random.key(5), count)

  def near(values, probability):
    # Five standard deviations of the mean of `count` coins.
    assert abs(np.mean(values) - probability) < 5 * math.sqrt(probability * (1 - probability) / count)

  def uniform(values, low, high):
    assert values.min() >= low - 1 / 8192 and values.max() <= high + 1 / 8192  # factors lie on a grid of 1 / 4096
    share = np.histogram(np.clip(values, low, high), bins=8, range=(low, high))[0] / len(values)
    assert np.abs(share - 1 / 8).max() < 5 * math.sqrt(7 / 64 / len(values))

  base = jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda k: draw_photometric(k, recipe=BASE)))(keys))
  for factor in (base.brightness, base.contrast, base.saturation):
    uniform(factor, 0.6, 1.4)
    np.testing.assert_array_equal(factor * 4096, np.rint(factor * 4096))  # the exact ones
  uniform(base.hue, -0.2, 0.2)
  for coin, probability in ((base.autocontrast, 0.66), (base.grayscale, 0.2), (base.flip, 0.5)):
    near(coin, probability)
  assert base.radius is None
  group = base.autocontrast
  np.testing.assert_array_equal(base.bits[~group], 8)
  np.testing.assert_array_equal(base.sharpness[~group], 1)
  np.testing.assert_array_equal(base.threshold[~group], 256)
  uniform(base.sharpness[group], 0.1, 1.9)
  near_share = np.bincount(base.bits[group], minlength=9)[4:] / group.sum()
  assert len(near_share) == 5 and np.abs(near_share - 0.2).max() < 0.02
  assert np.array_equal(np.unique(base.threshold[group]), np.arange(257))
  # The coins of one image do not hang together.
  near(base.grayscale & base.flip, 0.1)
  near(base.autocontrast & base.grayscale, 0.132)
  orders = np.unique(base.places, axis=0, return_counts=True)[1]
  assert len(orders) == 24
  assert ((orders - count / 24) ** 2 / (count / 24)).sum() < 58.6  # chi-square, 23 degrees, 0.99995

  blur = jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda k: draw_photometric(k, recipe=GBLUR)))(keys))
  jittered = blur.hue != 0
  near(jittered, 0.8)
  np.testing.assert_array_equal(blur.brightness[~jittered], 1)
  uniform(blur.brightness[jittered], 0.2, 1.8)
  near(blur.radius > 0, 0.5)
  uniform(blur.radius[blur.radius > 0], 0.1, 2.0)
  assert blur.bits is None and blur.threshold is None


@pytest.mark.parametrize("recipe", [BASE, GBLUR], ids=["base", "gblur"])
def test_parameters_of_an_image_are_drawn_independently(recipe):
  drawn = jax.jit(jax.vmap(lambda k: draw_photometric(k, recipe=recipe)))(jax.random.split(jax.random.key(7), 20_000))
  drawn = {name: np.float64(value) for name, value in drawn._asdict().items() if value is not None}
  places = drawn.pop("places")
  coins = {name: drawn.pop(name) for name in ("autocontrast", "grayscale", "flip") if name in drawn}
  if recipe.jitter_probability < 1:
    coins["jitter"] = drawn["hue"] != 0
  if recipe.blur_probability:
    coins["blur"] = drawn["radius"] > 0
  shared = np.logical_and.reduce([coin > 0 for name, coin in coins.items() if name not in ("grayscale", "flip")])

  def unrelated(columns):
    found = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(found).max() < 5 / math.sqrt(len(columns[0])), np.round(found, 2)

  unrelated([*coins.values()])
  for turns in places.T:  # one at a time: the places of a permutation are not independent
    unrelated([value[shared] for value in (*drawn.values(), coins["grayscale"], coins["flip"], turns)])


def test_recipes_have_vissls_numbers():
  """VISSL's configs/config/pretrain/pirl/pirl_jigsaw_4node_resnet50.yaml and transforms/photo_gblur.yaml."""
  common = {"grayscale_probability": 0.2, "blur_radius": (0.1, 2.0), "flip_probability": 0.5,
            "randaugment_operations": 0, "randaugment_magnitude": 10.0, "randaugment_deviation": 0.5}
  base = dict.fromkeys(("brightness", "contrast", "saturation"), 0.4) | {
    "hue": 0.2, "jitter_probability": 1.0, "group_probability": 0.66, "blur_probability": 0.0}
  blurred = dict.fromkeys(("brightness", "contrast", "saturation"), 0.8) | {
    "hue": 0.2, "jitter_probability": 0.8, "group_probability": 0.0, "blur_probability": 0.5}
  assert dataclasses.asdict(BASE) == base | common and dataclasses.asdict(GBLUR) == blurred | common


def test_a_strength_above_one_starts_at_zero():
  recipe = Recipe(brightness=1.5)
  keys = jax.random.split(jax.random.key(1), 2000)
  factors = np.asarray(jax.jit(jax.vmap(lambda k: draw_photometric(k, recipe=recipe).brightness))(keys))
  assert 0 <= factors.min() < 0.01 and 2.49 < factors.max() <= 2.5


def test_zeros_leave_the_image_alone_and_nothing_in_the_program():
  nothing = Recipe(brightness=0, contrast=0, saturation=0, hue=0, group_probability=0, grayscale_probability=0,
                   flip_probability=0)
  image = planes(IMAGES)[0]

  def run(key, image):
    return apply_photometric(image, draw_photometric(key, recipe=nothing))

  assert "floor" not in str(jax.make_jaxpr(lambda d, i: apply_photometric(i, d))(
    draw_photometric(jax.random.key(0), recipe=nothing), image))
  np.testing.assert_array_equal(run(jax.random.key(0), image), image)


def test_switching_one_operation_off_leaves_the_other_draws():
  key = jax.random.key(8)
  full = draw_photometric(key, recipe=BASE)
  less = draw_photometric(key, recipe=Recipe(contrast=0, grayscale_probability=0))
  assert less.contrast is None and less.grayscale is None
  for name in ("brightness", "saturation", "hue", "places", "bits", "threshold", "flip"):
    np.testing.assert_array_equal(getattr(full, name), getattr(less, name))


@pytest.mark.parametrize("recipe", [BASE, GBLUR], ids=["base", "gblur"])
def test_jit_and_vmap_agree(recipe):
  def run(key, image):
    return apply_photometric(image, draw_photometric(key, recipe=recipe))

  keys = jax.random.split(jax.random.key(2), 3)
  images = planes(IMAGES[:3])
  together = jax.jit(jax.vmap(run))(keys, images)
  jitted = jax.jit(run)
  for i in range(3):
    np.testing.assert_array_equal(jitted(keys[i], images[i]), together[i])


def test_ranks_put_equal_values_in_order():
  np.testing.assert_array_equal(photometric.ranks(jnp.asarray([0.5, 0.1, 0.5, 0.9, 0.1])), [2, 0, 3, 4, 1])


@pytest.mark.parametrize(
  "wrong",
  [
    {"flip_probability": 1.2},
    {"group_probability": -0.1},
    {"jitter_probability": float("nan")},
    {"hue": 0.6},
    {"hue": -0.1},
    {"brightness": -1.0},
    {"contrast": float("nan")},
    {"blur_radius": (0.1, 3.0)},
    {"blur_radius": (2.0, 0.1)},
    {"blur_radius": (1.0,)},
    {"randaugment_operations": -1},
    {"randaugment_operations": 1.5},
    {"randaugment_magnitude": 11.0},
    {"randaugment_magnitude": float("nan")},
    {"randaugment_deviation": -0.5},
    {"randaugment_deviation": float("inf")},
  ],
)
def test_impossible_recipes_are_refused(wrong):
  with pytest.raises(UserError, match=next(iter(wrong))):
    Recipe(**wrong)
