"""Images as the networks take them, and back."""

import jax
import numpy as np

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
"""Of the channels of ImageNet's images in [0, 1], as the official runs normalise (torchvision)."""


def normalise_image(image: jax.Array) -> jax.Array:
  """Returns the image as the network takes it, f32[..., 3], from its levels in [0, 255]."""
  channels = (1,) * (image.ndim - 1) + (3,)
  scale, shift = 1 / (255 * STD), -MEAN / STD
  return image.astype(float) * scale.reshape(channels) + shift.reshape(channels)


def denormalise(view: jax.Array | np.ndarray) -> np.ndarray:
  """Returns the levels u8[..., 3] behind a normalised `view` (f32[..., 3]), on the host, for plots."""
  return np.clip(np.rint(255 * (np.asarray(view, np.float32) * STD + MEAN)), 0, 255).astype(np.uint8)
