"""Both views of a batch, on the device: the image, and its transformed version for the pretext task.

Letters: B batch, H W the image's sides, S side of the pretext crop, P pretext views of an image, h w their sides.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pirl_jax.errors import UserError
from pirl_jax.views.jigsaw import Jigsaw
from pirl_jax.views.normalisation import normalise_image
from pirl_jax.views.photometric import apply_photometric, draw_photometric
from pirl_jax.views.pretext import Pretext
from pirl_jax.views.recipe import Recipe
from pirl_jax.views.rotation import Rotation
from pirl_jax.views.rotation_jigsaw import RotationJigsaw

PRETEXTS: dict[str, type[Pretext]] = {"jigsaw": Jigsaw, "rotation": Rotation, "rotation_jigsaw": RotationJigsaw}


def create_pretext(name: str, *, image_size: int, image_scale: tuple[float, float],
                   settings: Any) -> Pretext:
  """Returns the transform of that name.

  Args:
    name: a key of `PRETEXTS`.
    image_size: pixels, and image_scale: of the image view's crop, for transforms without a crop of their own.
    settings: groups of keyword arguments by name; a transform takes the one that its class names.

  Raises:
    UserError: an unknown name, or settings that do not fit.
  """
  if name not in PRETEXTS:
    raise UserError(f"pretext={name!r} is unknown; choose from {', '.join(PRETEXTS)}")
  pretext = PRETEXTS[name]
  own = settings[pretext.settings] if pretext.settings else {}
  arguments: dict[str, Any] = {"crop_size": image_size, "crop_scale": image_scale, **own}
  return pretext(**arguments | {"crop_scale": tuple(arguments["crop_scale"])})


def make_views(pretext: Pretext | None, *, recipe: Recipe, pretext_recipe: Recipe) -> Callable:
  """Returns views_fn(keys, image_crop, pretext_crop) -> (image f32[B, H, W, 3], pretext f32[B, P, h, w, 3], label).

  `keys` are B typed keys, `image_crop` is u8[B, H, W, 3], `pretext_crop` u8[B, S, S, 3]; of a crop that is None no view
  is made, and None stands in its place. `label` i32[B] tells the transform, see `Pretext`. What comes out is
  normalised, and depends on the image's own key and pixels alone, not on its place in the batch.

  Args:
    pretext: the transform; None where there is no pretext view at all.
    recipe: the photometric list of the image.
    pretext_recipe: that of the pretext views. It is drawn anew for each of them, as the official code does, unless the
      transform augments the crop as a whole.
  """
  def view(key: jax.Array, crop: jax.Array, recipe: Recipe) -> jax.Array:
    image = jnp.moveaxis(crop, -1, 0).astype(float)  # [3, H, W]; float32, unless JAX_ENABLE_X64 is set
    image = apply_photometric(image, draw_photometric(key, recipe=recipe))
    return normalise_image(jnp.moveaxis(image, 0, -1))

  def both_views(key: jax.Array, image_crop: jax.Array | None,
                 pretext_crop: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    image_key, transform_key, pretext_key = jax.random.split(key, 3)
    image = None if image_crop is None else view(image_key, image_crop, recipe)
    if pretext is None or pretext_crop is None:
      return image, None, None

    def augment(crops: jax.Array) -> jax.Array:
      keys = jax.random.split(pretext_key, len(crops))
      return jax.vmap(lambda key, crop: view(key, crop, pretext_recipe))(keys, crops)

    return image, *pretext(transform_key, pretext_crop, augment)

  return jax.vmap(both_views)
