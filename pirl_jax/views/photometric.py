"""The photometric augmentations of a view: which operations are drawn, how strongly, and in which order they come.

`Recipe` says how often and how strongly, `draw_photometric` draws the parameters of one image, and
`apply_photometric` applies them. The operations are those of `operations`. Letters: H W height and width.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pirl_jax.runtime.platforms import by_platform
from pirl_jax.views.operations import (
  adjust_brightness,
  adjust_hue,
  adjust_sharpness,
  autocontrast,
  blend,
  gaussian_blur,
  grayscale,
  luma,
  mean_level,
  on_grid,
  on_levels,
  posterize,
  solarize,
)
from pirl_jax.views.randaugment import Drawn, apply_randaugment, draw_randaugment
from pirl_jax.views.recipe import Recipe

# The rows of `places`.
_CONTRAST, _SATURATION, _HUE = 1, 2, 3


class Photometric(NamedTuple):
  """The parameters drawn for one image; None where the recipe leaves the operation out.

  A coin that came up tails is stored as the operation's identity: factor 1, hue 0, 8 bits, threshold 256, radius 0.
  """

  brightness: jax.Array | None  # f32 factor; also contrast, saturation, sharpness
  contrast: jax.Array | None
  saturation: jax.Array | None
  hue: jax.Array | None  # f32 turns
  places: jax.Array  # i32[4], a permutation of 0..3: the turns of brightness, contrast, saturation, hue
  bits: jax.Array | None  # i32 in 4..8
  sharpness: jax.Array | None
  threshold: jax.Array | None  # i32 in 0..256
  autocontrast: jax.Array | None  # bool
  grayscale: jax.Array | None  # bool
  radius: jax.Array | None  # f32 pixels
  randaugment: Drawn | None
  flip: jax.Array | None  # bool


def draw_photometric(key: jax.Array, *, recipe: Recipe) -> Photometric:
  """Returns the parameters for one image, drawn as `recipe` says from a single key.

  Each parameter has its own place among the uniform numbers: to switch one operation off leaves the draws of the
  others as they were. Factors are multiples of 2^-12.
  """
  draws = jax.random.uniform(key, (17,))  # one hash for all of them: small patches would feel a call for each
  u_brightness, u_contrast, u_saturation, u_hue, u_jitter = draws[:5]
  u_group, u_bits, u_sharpness, u_threshold, u_gray, u_blur, u_radius, u_flip = draws[5:13]
  jitter = u_jitter < recipe.jitter_probability
  group = u_group < recipe.group_probability

  def jitter_factor(u: jax.Array, strength: float) -> jax.Array | None:
    if not strength or not recipe.jitter_probability:
      return None
    low = max(0.0, 1.0 - strength)
    return jnp.where(jitter, on_grid(low + (1.0 + strength - low) * u), 1.0)

  def of_group(value: jax.Array, identity: float) -> jax.Array | None:
    return jnp.where(group, value, identity) if recipe.group_probability else None

  def coin(u: jax.Array, probability: float) -> jax.Array | None:
    return u < probability if probability else None

  hue = radius = randaugment = None
  if recipe.hue and recipe.jitter_probability:
    hue = jnp.where(jitter, recipe.hue * (2.0 * u_hue - 1.0), 0.0)
  if recipe.blur_probability:
    low, high = recipe.blur_radius
    radius = jnp.where(u_blur < recipe.blur_probability, low + (high - low) * u_radius, 0.0)
  if recipe.randaugment_operations:
    # The counters 0..16 of this key gave the numbers above, and 17 is the next.
    randaugment = draw_randaugment(jax.random.fold_in(key, draws.size), count=recipe.randaugment_operations,
                                   magnitude=recipe.randaugment_magnitude, deviation=recipe.randaugment_deviation)
  return Photometric(
    brightness=jitter_factor(u_brightness, recipe.brightness),
    contrast=jitter_factor(u_contrast, recipe.contrast),
    saturation=jitter_factor(u_saturation, recipe.saturation),
    hue=hue,
    places=ranks(draws[13:]),
    bits=of_group(4 + jnp.floor(5 * u_bits).astype(jnp.int32), 8),
    sharpness=of_group(on_grid(0.1 + 1.8 * u_sharpness), 1.0),
    threshold=of_group(jnp.floor(257 * u_threshold).astype(jnp.int32), 256),
    autocontrast=coin(u_group, recipe.group_probability),
    grayscale=coin(u_gray, recipe.grayscale_probability),
    radius=radius,
    randaugment=randaugment,
    flip=coin(u_flip, recipe.flip_probability),
  )


# In a step `jit` changes nothing of the compiled program, but JAX keeps what it has traced. To trace these operations
# took two fifths of the time before XLA sees a step: once for views.png, and again for each step of the process.
@jax.jit
def apply_photometric(image: jax.Array, drawn: Photometric) -> jax.Array:
  """Returns `image` (f32[3, H, W], whole levels) after every operation in `drawn`, same shape and range.

  The order is jitter, posterize, sharpness, solarize, autocontrast, grayscale, blur, flip. vissl's blur list flips
  first: a flip changes places with every other operation without a trace, so one order serves both lists. With
  RandAugment grayscale comes last before the flip: blur, RandAugment, grayscale, flip, as in PyContrast's InfoMin. This
  one flips first, too; as turns and shifts to both sides are equally likely, the flip may come last.
  """
  def in_bytes(image: jax.Array, drawn: Photometric) -> jax.Array:
    return _in_order(image.astype(jnp.uint8), drawn).astype(image.dtype)

  # A GPU is bound by its memory, and between two operations an image of bytes is a quarter of one in float32. On two
  # CPU cores that would be 12 to 20 % slower, and on a v5e, whose vectors are of four bytes, 25 % (estimated).
  return by_platform(image, drawn, gpu=in_bytes, default=_in_order)


def _in_order(image: jax.Array, drawn: Photometric) -> jax.Array:
  """Returns the image after every operation, in its own dtype."""
  image = color_jitter(
    image,
    brightness=drawn.brightness,
    contrast=drawn.contrast,
    saturation=drawn.saturation,
    hue=drawn.hue,
    places=drawn.places,
  )
  if drawn.bits is not None:
    assert drawn.sharpness is not None and drawn.threshold is not None and drawn.autocontrast is not None
    image = posterize(image, drawn.bits)
    image = adjust_sharpness(image, drawn.sharpness)
    image = solarize(image, drawn.threshold)
    image = jnp.where(drawn.autocontrast, autocontrast(image), image)
  if drawn.grayscale is not None and drawn.randaugment is None:
    image = jnp.where(drawn.grayscale, grayscale(image), image)
  if drawn.radius is not None:
    image = gaussian_blur(image, drawn.radius)
  if drawn.randaugment is not None:
    image = apply_randaugment(image, drawn.randaugment)
    if drawn.grayscale is not None:
      image = jnp.where(drawn.grayscale, grayscale(image), image)
  if drawn.flip is not None:
    image = jnp.where(drawn.flip, image[:, :, ::-1], image)
  return image


def ranks(values: jax.Array) -> jax.Array:
  """Returns i32[n]: how many of `values` (f32[n]) come before each one. Of independent draws, a random permutation.

  Equal values keep their order. For few values the n x n comparisons are cheaper than a sort, above all under vmap.
  """
  index = jnp.arange(values.shape[0])
  mine, other = values[:, None], values[None, :]
  before = (other < mine) | ((other == mine) & (index[None, :] < index[:, None]))
  return jnp.sum(before, axis=1, dtype=jnp.int32)


def color_jitter(
  image: jax.Array,
  *,
  brightness: jax.Array | None,
  contrast: jax.Array | None,
  saturation: jax.Array | None,
  hue: jax.Array | None,
  places: jax.Array,
) -> jax.Array:
  """Returns `image` (f32[3, H, W]) after those of the four adjustments that are not None, ordered by `places`.

  `places` (i32[4], a permutation) holds the turns of brightness, contrast, saturation and hue, which torchvision's
  ColorJitter draws at random. Equal to the plain sequence in all 24 orders, to the last level.
  """
  factors = {i: f for i, f in enumerate((brightness, contrast, saturation)) if f is not None}
  # Three of the four are blends that differ in their target only, so one slot can be any of them: a pass of three
  # slots goes before hue and one after, and a blend has factor 1, the identity, in the pass that is not its own. Hue
  # is computed once. 64 x (224 px + 9 of 64 px) on 2 cores: 158 ms; the plain operations in one fixed order 226, a
  # choice of four in each of four turns 406, `lax.switch` over the 24 orders 2219 (`benchmarks/views.py`).
  slots = []
  for turn in range(len(factors)):
    # Chosen is the blend that has `turn` other blends before it.
    chosen = {i: sum((places[j] < places[i]).astype(jnp.int32) for j in factors) == turn for i in factors}
    factor = sum(jnp.where(chosen[i], factors[i], 0.0) for i in factors)
    place = sum(jnp.where(chosen[i], places[i], 0) for i in factors)
    never = jnp.zeros((), bool)
    slots.append((factor, place, chosen.get(_CONTRAST, never), chosen.get(_SATURATION, never)))

  def slot(image: jax.Array, drawn: Sequence[jax.Array]) -> tuple[jax.Array, None]:
    factor, is_contrast, is_saturation = drawn
    if contrast is None and saturation is None:
      return adjust_brightness(image, factor), None
    return blended(image, factor, is_contrast, is_saturation), None

  @on_levels
  def blended(image: jax.Array, factor: jax.Array, is_contrast: jax.Array, is_saturation: jax.Array) -> jax.Array:
    grey = luma(image)
    target = jnp.where(is_contrast, mean_level(grey), jnp.where(is_saturation, grey, 0.0))
    return blend(target, image, factor)

  def blend_pass(image: jax.Array, is_now: Callable[[Any], Any]) -> jax.Array:
    if not slots:
      return image
    drawn = [(jnp.where(is_now(place), factor, 1.0), *kinds) for factor, place, *kinds in slots]
    # A loop, not three slots in a row: XLA fuses a row into an expression that computes a pixel again for each of its
    # readers. 1152 patches of 10 px on 2 cores: 10 ms in a row, 3 to 4 ms in the loop, and half the compile time.
    return jax.lax.scan(slot, image, jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn),
                        unroll=image.dtype == jnp.uint8)[0]

  if hue is None:
    return blend_pass(image, lambda place: True)
  image = blend_pass(image, lambda place: place < places[_HUE])
  image = adjust_hue(image, hue)
  return blend_pass(image, lambda place: place > places[_HUE])
