"""RandAugment by Pillow's own functions, as PyContrast's datasets/RandAugment.py calls them."""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

FILL = (124, 116, 104)
ENHANCERS = {"color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast, "brightness": ImageEnhance.Brightness,
             "sharpness": ImageEnhance.Sharpness}


def transformed(image, matrix):
  """Returns a PIL image after the transform with a matrix of `pirl_jax.views.affine`."""
  return image.transform(image.size, Image.Transform.AFFINE, [*np.divide(matrix, [1024, 1024, 2048] * 2)],
                         Image.Resampling.BILINEAR, fillcolor=FILL)


def stretched(image):
  """Returns autocontrast in exact arithmetic: PIL's own is one level less for some of the whole quotients."""
  levels = np.asarray(image).astype(int)
  low, high = levels.min((0, 1)), levels.max((0, 1))
  exact = np.where(low < high, 255 * (levels - low) // np.maximum(high - low, 1), levels)
  return Image.fromarray(exact.astype(np.uint8))


def applied(image, name, share, matrix):
  """Returns a PIL image after one operation; `share` is np.float32, `matrix` the one of operations that have one."""
  if name in ENHANCERS:
    factor = np.round((np.float32(0.1) + np.float32(1.8) * share) * 4096) / 4096
    return ENHANCERS[name](image).enhance(float(factor))
  if name == "posterize":
    bits = int(4 * share)
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)  # Pillow refuses to keep no bit
  if name == "solarize":
    return ImageOps.solarize(image, int(256 * share))
  if name == "solarize_add":
    add = int(np.float32(110) * share)
    return image.point([min(255, level + add) if level < 128 else level for level in range(256)] * 3)
  if name == "autocontrast":
    return stretched(image)
  if name in ("invert", "equalize"):
    return getattr(ImageOps, name)(image)
  return transformed(image, matrix)
