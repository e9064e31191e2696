"""Both views of a batch, on the device: the image, and its transformed version for the pretext task.

Letters: B batch, H W the image's sides, S side of the pretext crop, P pretext views of an image, h w their sides.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pirl_jax.errors import UserError
from pirl_jax.views.jigsaw import jigsaw_patches
from pirl_jax.views.photometric import BASE, Recipe, apply_photometric, draw_photometric

MEAN = np.float32([0.485, 0.456, 0.406])
STD = np.float32([0.229, 0.224, 0.225])
"""Of the channels of ImageNet's pictures in [0, 1], as the official runs normalise (torchvision)."""

# Each is called as f(key, crop [S, S, 3], grid=, patch_size=) -> [P, h, w, 3], same levels as the crop.
PRETEXTS: dict[str, Callable[..., jax.Array]] = {"jigsaw": jigsaw_patches}


def make_views(
  *, recipe: Recipe = BASE, pretext: str = "jigsaw", grid: int = 3, patch_size: int = 64
) -> Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """Returns views_fn(keys, image_crop, pretext_crop) -> (image f32[B, H, W, 3], pretext f32[B, P, h, w, 3]).

  `keys` are B typed keys, `image_crop` is u8[B, H, W, 3], `pretext_crop` u8[B, S, S, 3]. The photometric list is drawn
  anew for the image and for each pretext view, flip and grayscale included, as the official code does. What comes out
  is normalised, and depends on the image's own key and pixels alone, not on its place in the batch.

  Raises `UserError` for an unknown `pretext`, and in its first call when a patch is larger than its cell.
  """
  if pretext not in PRETEXTS:
    raise UserError(f"pretext={pretext!r} is unknown; choose from: {', '.join(sorted(PRETEXTS))}")

  def view(key, crop):
    image = jnp.moveaxis(crop, -1, 0).astype(jnp.float32)  # [3, H, W]
    image = apply_photometric(image, draw_photometric(key, recipe=recipe))
    return normalise(jnp.moveaxis(image, 0, -1))

  def both_views(key, image_crop, pretext_crop):
    image_key, cut_key, pretext_key = jax.random.split(key, 3)
    pieces = PRETEXTS[pretext](cut_key, pretext_crop, grid=grid, patch_size=patch_size)
    pretext_keys = jax.random.split(pretext_key, pieces.shape[0])
    return view(image_key, image_crop), jax.vmap(view)(pretext_keys, pieces)

  return jax.vmap(both_views)


def normalise(image: jax.Array) -> jax.Array:
  """Returns the picture as the network takes it, f32[..., 3], from its levels in [0, 255]."""
  channels = (1,) * (image.ndim - 1) + (3,)
  scale, shift = 1 / (255 * STD), -MEAN / STD
  return image.astype(jnp.float32) * scale.reshape(channels) + shift.reshape(channels)


def denormalise(view: jax.Array | np.ndarray) -> np.ndarray:
  """Returns the levels u8[..., 3] behind a normalised `view` (f32[..., 3]), on the host, for pictures."""
  return np.clip(np.rint(255 * (np.asarray(view, np.float32) * STD + MEAN)), 0, 255).astype(np.uint8)
