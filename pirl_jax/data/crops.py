"""Decoding and the random resized crop: all that the host does to an image.

Letters: H W height and width of the image, S side of the crop; every image is u8[H, W, 3], RGB.
"""

import io
import math
import struct

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

# One image a thread: OpenCV's own threads would only fight with the loader's.
cv2.setNumThreads(1)
# Broken images are counted and named by us; OpenCV need not tell each on stderr as well.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

_MAX_PIXELS = 2**28  # 0.8 GB once decoded: no photograph, but perhaps a decompression bomb
# RGB, and stored orientation: the EXIF tag is ignored, as PIL's usual loader does, whose images the method
# was tuned on.
_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


class BrokenImage(Exception):
  """These bytes cannot be made into an image."""


def decode(image: bytes | np.ndarray) -> np.ndarray:
  """Returns u8[H, W, 3], RGB, of an encoded image; an array u8[H, W, 3] comes back as it is.

  Grey, palette, CMYK and YCCK become RGB, alpha is dropped (as PIL's `convert("RGB")` does), 16 bits are cut
  to the upper 8 and the EXIF orientation is ignored. The format is told by the content. OpenCV decodes
  ordinary JPEG and PNG, Pillow the rest.

  Raises:
    BrokenImage: not an image, damaged, cut short, or of more than 2**28 pixels.
  """
  if isinstance(image, np.ndarray):
    return image
  if image[:2] == b"\xff\xd8":
    height, width, components, scan = _jpeg_header(image)
    # OpenCV fills what is missing with grey and only prints a warning. The marker of the end cannot occur
    # inside the scan, so a file without one behind the first scan has been cut short.
    if image.rfind(b"\xff\xd9", scan) < 0:
      raise BrokenImage("JPEG is cut short")
    opencv = components in (1, 3)
  elif image[:8] == b"\x89PNG\r\n\x1a\n":
    if len(image) < 33:
      raise BrokenImage("PNG is cut short")
    width, height = struct.unpack(">II", image[16:24])
    if image.rfind(b"IEND") < 0:
      raise BrokenImage("PNG is cut short")
    opencv = True
  else:
    return _decode_with_pillow(image)
  if height * width > _MAX_PIXELS:
    raise BrokenImage(f"{width} x {height} pixels are too many")
  if not opencv:
    return _decode_with_pillow(image)
  try:
    decoded = cv2.imdecode(np.frombuffer(image, np.uint8), _FLAGS)
  except cv2.error as error:
    raise BrokenImage(str(error)) from error
  if decoded is None:
    raise BrokenImage("OpenCV cannot decode it")
  return decoded


def _decode_with_pillow(image: bytes) -> np.ndarray:
  try:
    with Image.open(io.BytesIO(image), formats=("JPEG", "PNG", "WEBP", "BMP")) as opened:
      if opened.width * opened.height > _MAX_PIXELS:
        raise BrokenImage(f"{opened.width} x {opened.height} pixels are too many")
      return np.asarray(opened.convert("RGB"))
  except BrokenImage:
    raise
  except UnidentifiedImageError as error:  # its own message shows an address in memory
    raise BrokenImage("neither JPEG, PNG, WebP nor BMP") from error
  except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged bytes
    raise BrokenImage(str(error)) from error


def _jpeg_header(image: bytes) -> tuple[int, int, int, int]:
  """Returns (height, width, number of components, offset of the first scan), read from the markers (ITU T.81,
  annex B)."""
  offset, frame = 2, None
  while offset + 4 <= len(image):
    if image[offset] != 0xFF:
      break
    marker = image[offset + 1]
    if marker == 0xFF:  # fill bytes may precede a marker
      offset += 1
      continue
    if marker == 0xDA and frame:
      return *frame, offset
    (length,) = struct.unpack_from(">H", image, offset + 2)
    # Start of frame: C0..CF but DHT (C4), JPG (C8) and DAC (CC).
    if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and offset + 10 <= len(image):
      frame = struct.unpack_from(">HHB", image, offset + 5)
    offset += 2 + length
  raise BrokenImage("JPEG without a readable header")


def crop_box(
  rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
  """Returns (top, left, height, width) of a random crop by the rule of torchvision's
  `RandomResizedCrop.get_params`.

  The area is uniform in `scale` (shares of the image), the aspect ratio log-uniform in `ratio`; after ten
  boxes that do not fit, the largest central box of an allowed ratio. Four draws a try that fits, two a try
  that does not.
  """
  log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(*log_ratio))
    crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < crop_width <= width and 0 < crop_height <= height:
      top = int(rng.integers(height - crop_height, endpoint=True))
      left = int(rng.integers(width - crop_width, endpoint=True))
      return top, left, crop_height, crop_width
  crop_width, crop_height = width, height
  if width / height < ratio[0]:
    crop_height = round(width / ratio[0])
  elif width / height > ratio[1]:
    crop_width = round(height * ratio[1])
  return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def random_resized_crop(
  rng: np.random.Generator,
  image: np.ndarray,
  *,
  size: int,
  scale: tuple[float, float],
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
  """Returns u8[S, S, 3]: a random box of `image` (see `crop_box`), resized to `size`."""
  top, left, height, width = crop_box(rng, image.shape[0], image.shape[1], scale, ratio)
  return _resize(image[top : top + height, left : left + width], size, size)


def centre_crop(image: np.ndarray, *, size: int, fraction: float) -> np.ndarray:
  """Returns u8[S, S, 3], the test crop: shorter side resized to round(size / fraction), then the central
  square.

  `fraction` is 224/256 for ImageNet, 1.0 for small images.
  """
  height, width = image.shape[:2]
  shorter = round(size / fraction)
  if height <= width:
    height, width = shorter, max(shorter, int(shorter * width / height))
  else:
    height, width = max(shorter, int(shorter * height / width)), shorter
  top, left = round((height - size) / 2), round((width - size) / 2)
  return np.ascontiguousarray(_resize(image, height, width)[top : top + size, left : left + size])


def squash_resize(image: np.ndarray, *, size: int, fraction: float) -> np.ndarray:
  """Returns u8[S, S, 3], the whole image with its aspect changed.

  In two steps: the shorter side to round(size / fraction), as for `centre_crop`, then both sides to `size`. With
  224/256 that is what vissl does for its SVMs. With 1.0 it is one step, straight to the square, as for its low-shot
  SVMs, and a small square image stays as it is.
  """
  height, width = image.shape[:2]
  if fraction < 1:
    shorter = round(size / fraction)
    image = _resize(image, shorter * height // min(height, width), shorter * width // min(height, width))
  return _resize(image, size, size)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """Returns u8[height, width, 3], bilinear and free of aliasing.

  Torchvision on PIL images uses a triangle as wide as the shrinking factor s, of variance s^2 / 6. Up to s
  = 2 a bilinear look-up (variance 1 / 6) after three taps that bring the rest comes as close to that as
  OpenCV's INTER_AREA does, in less than half the time: on photographs 0.9 to 1.0 grey levels away on average,
  where plain bilinear is 2.1 away.
  """
  if image.shape[:2] == (height, width):
    return image.copy()
  factors = image.shape[0] / height, image.shape[1] / width
  if max(factors) > 2:
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
  if max(factors) > 1:
    taps_y, taps_x = (_three_taps(max(factor**2 - 1, 0) / 6) for factor in factors)
    image = cv2.sepFilter2D(image, -1, taps_x, taps_y, borderType=cv2.BORDER_REPLICATE)
  return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def _three_taps(variance: float) -> np.ndarray:
  return np.array([variance / 2, 1 - variance, variance / 2], np.float32)
