"""The embedded data set: ten families of procedural textures, near-grey.

A first run has to show learning in minutes without a download. A texture is told by its local structure (does
a line end in a T, an X or a Y?), which neither raw pixels nor random features see, while scale, orientation,
phase, polarity, contrast, light and colour say nothing about the family because every family draws them
alike.

Letters: N images, n of them drawn together, S side in pixels.

Record i is a function of (split, i) alone: its numbers come from a hash of the two (no generator that
would have to be advanced), and pixels are computed with the operations that IEEE 754 rounds exactly (no
library sine or exponential), so that the image is the same on every machine and in every set that is long
enough to hold it.
"""

import math
import zlib
from collections.abc import Callable

import numpy as np

FAMILIES = ("stripes", "checks", "dots", "rings", "blobs", "veins", "bricks", "waves", "grid", "hexagons")

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_EXTENT = 32.0  # an image is 32 units wide, whatever its size in pixels: a bigger one shows the same finer
_NUM_WAVES = 7  # plane waves in the random field behind blobs and veins
_NUM_DRAWS = 40 + 2 * _NUM_WAVES
_CHUNK_PIXELS = 1 << 16  # images drawn together: small enough for the temporaries to stay in cache


def create_textures(
  num_images: int, *, size: int = 32, split: str
) -> tuple[np.ndarray, np.ndarray]:
  """Draws the first `num_images` textures of a split.

  Args:
    num_images: N.
    size: S, side of the square images in pixels.
    split: any name ("train", "test"); splits have nothing in common but the families.

  Returns:
    (images u8[N, S, S, 3], labels i32[N]); label i is i % 10, an index into `FAMILIES`.
  """
  labels = (np.arange(num_images) % len(FAMILIES)).astype(np.int32)
  images = np.empty((num_images, size, size, 3), np.uint8)
  hashes = _record_hashes(num_images, split)
  chunk = max(1, _CHUNK_PIXELS // size**2)
  for family, pattern_fn in enumerate(_PATTERNS):
    rows = np.flatnonzero(labels == family)
    for start in range(0, len(rows), chunk):
      some = rows[start : start + chunk]
      images[some] = _draw(pattern_fn, hashes[some], size)
  return images, labels


_Pattern = Callable[[np.ndarray, np.ndarray, np.ndarray, "_Draws"], np.ndarray]
"""pattern(u, v, period, draws) -> depth f32[n, S, S]; u and v are the plane of the family."""


def _draw(pattern_fn: _Pattern, hashes: np.ndarray, size: int) -> np.ndarray:
  """Returns u8[n, S, S, 3]: the images of one family whose records have these hashes."""
  draws = _Draws(_uniforms(hashes, _NUM_DRAWS))
  centres = ((np.arange(size) + 0.5) * (_EXTENT / size) - _EXTENT / 2).astype(np.float32)
  x, y = centres[None, None, :], centres[None, :, None]

  # A smooth warp, then the family's own plane: rotated and scaled, so that a period is 1.
  period = draws.log_uniform(5.0, 9.0)
  warp, wavelength = draws.uniform(0.3, 1.1), draws.uniform(18, 32)
  bends = [_sine(axis / wavelength + draws.uniform(0, 1)) for axis in (x, y, x, y)]
  x, y = x + warp * (bends[1] + 0.5 * bends[0]), y + warp * (bends[2] + 0.5 * bends[3])
  angle = draws.uniform(0, 1)
  cosine, sine = _sine(angle + 0.25) / period, _sine(angle) / period
  u, v = cosine * x + sine * y, cosine * y - sine * x
  depth = period * pattern_fn(u, v, period, draws)  # units inside (> 0) or outside (< 0) the figure
  softness = draws.uniform(0.6, 0.9)
  figure = np.clip(depth / softness, -1, 1)

  # Tones: figure and ground swap at random, light falls from one side, film has grain.
  polarity = np.where(draws.uniform(0, 1) < 0.5, -1, 1).astype(np.float32)
  contrast = draws.log_uniform(28, 50)
  grey = draws.uniform(75, 180) + contrast * polarity * figure
  light, angle = draws.uniform(0, 30) / (_EXTENT / 2), draws.uniform(0, 1)
  grey += light * (_sine(angle) * centres[None, None, :] + _sine(angle + 0.25) * centres[None, :, None])
  grey += draws.uniform(7, 9) * _grain(hashes, size)
  tint = np.stack([draws.uniform(0.985, 1.015) for _ in range(3)], axis=-1)  # [n, 1, 1, 3]
  return np.clip(np.rint(grey[..., None] * tint), 0, 255).astype(np.uint8)


# The families. Each takes the plane f32[n, S, S] in periods and returns the signed depth inside its figure,
# in periods.


def _stripes(u: np.ndarray, v: np.ndarray, period: np.ndarray, draws: "_Draws") -> np.ndarray:
  return draws.uniform(0.16, 0.34) - _off_integer(u + draws.uniform(0, 1))


def _checks(u: np.ndarray, v: np.ndarray, period: np.ndarray, draws: "_Draws") -> np.ndarray:
  a = 0.25 - _off_integer(0.7 * u + draws.uniform(0, 1))
  b = 0.25 - _off_integer(0.7 * v + draws.uniform(0, 1))
  # Depth in a union of squares: the nearer of the two edges, positive where both signs agree.
  return np.minimum(np.abs(a), np.abs(b)) * np.sign(a) * np.sign(b) / np.float32(0.7)


def _dots(u: np.ndarray, v: np.ndarray, period: np.ndarray, draws: "_Draws") -> np.ndarray:
  u, v = _off_integer(u + draws.uniform(0, 1)), _off_integer(v + draws.uniform(0, 1))
  return draws.uniform(0.22, 0.38) - np.sqrt(u * u + v * v)


def _rings(u: np.ndarray, v: np.ndarray, period: np.ndarray, draws: "_Draws") -> np.ndarray:
  u = u + draws.uniform(-9, 9) / period
  v = v + draws.uniform(-9, 9) / period
  return draws.uniform(0.16, 0.34) - _off_integer(np.sqrt(u * u + v * v) + draws.uniform(0, 1))


def _blobs(u: np.ndarray, v: np.ndarray, period: np.ndarray, draws: "_Draws") -> np.ndarray:
  return 0.3 * (_random_field(u, v, draws) - draws.uniform(-0.4, 0.4))


def _veins(u: np.ndarray, v: np.ndarray, period: np.ndarray, draws: "_Draws") -> np.ndarray:
  return draws.uniform(0.6, 1.0) / period - 0.3 * np.abs(_random_field(u, v, draws))


def _bricks(u: np.ndarray, v: np.ndarray, period: np.ndarray, draws: "_Draws") -> np.ndarray:
  v = 1.1 * v + draws.uniform(0, 1)
  u = 0.55 * u + 0.5 * np.floor(v) + draws.uniform(0, 1)
  return (
    np.minimum(_off_integer(v) / np.float32(1.1), _off_integer(u) / np.float32(0.55))
    - draws.uniform(0.5, 0.9) / period
  )


def _waves(u: np.ndarray, v: np.ndarray, period: np.ndarray, draws: "_Draws") -> np.ndarray:
  swing = draws.uniform(0.35, 0.6) * _sine(v / draws.uniform(1.3, 2.2) + draws.uniform(0, 1))
  return draws.uniform(0.16, 0.34) - _off_integer(u + swing + draws.uniform(0, 1))


def _grid(u: np.ndarray, v: np.ndarray, period: np.ndarray, draws: "_Draws") -> np.ndarray:
  u, v = u + draws.uniform(0, 1), v + draws.uniform(0, 1)
  return np.minimum(_off_integer(u), _off_integer(v)) - draws.uniform(0.5, 0.9) / period


def _hexagons(u: np.ndarray, v: np.ndarray, period: np.ndarray, draws: "_Draws") -> np.ndarray:
  u, v = u + draws.uniform(0, 1), v + draws.uniform(0, 2)
  # Centres form two rectangular lattices, one shifted by half a cell: the nearer centre of the two owns the
  # point.
  height = np.float32(1.7320508)
  u1, v1 = u - np.rint(u), v - height * np.rint(v / height)
  u2, v2 = u - np.floor(u) - 0.5, v - height * (np.floor(v / height) + 0.5)
  nearer = u1 * u1 + v1 * v1 < u2 * u2 + v2 * v2
  u, v = np.abs(np.where(nearer, u1, u2)), np.abs(np.where(nearer, v1, v2))
  return 0.5 - np.maximum(u, 0.5 * u + 0.5 * height * v) - draws.uniform(0.5, 0.9) / period


_PATTERNS = (_stripes, _checks, _dots, _rings, _blobs, _veins, _bricks, _waves, _grid, _hexagons)


def _random_field(u: np.ndarray, v: np.ndarray, draws: "_Draws") -> np.ndarray:
  """Returns f32[n, S, S] of about unit variance: plane waves of about one period in random directions."""
  field = np.zeros((), np.float32)
  for _ in range(_NUM_WAVES):
    angle, frequency = draws.uniform(0, 1), np.float32(0.62)
    field = field + _sine(frequency * (_sine(angle) * u + _sine(angle + 0.25) * v) + draws.uniform(0, 1))
  return field * np.float32((2 / _NUM_WAVES) ** 0.5)


def _off_integer(u: np.ndarray) -> np.ndarray:
  """Distance to the nearest integer, in [0, 0.5]."""
  return np.abs(u - np.rint(u))


def _sine(turns: np.ndarray) -> np.ndarray:
  """Sine of an angle in turns within 0.0011, by products alone: a library's last digit depends on the
  machine."""
  turns = turns - np.rint(turns)
  parabola = turns * (8 - 16 * np.abs(turns))
  return parabola + np.float32(0.225) * (parabola * np.abs(parabola) - parabola)


class _Draws:
  """Hands out the uniform numbers of n records one by one, each as f32[n, 1, 1]."""

  def __init__(self, uniforms: np.ndarray) -> None:
    self._columns = iter(uniforms.T)

  def uniform(self, low: float, high: float) -> np.ndarray:
    return (low + (high - low) * next(self._columns)).astype(np.float32)[:, None, None]

  def log_uniform(self, low: float, high: float) -> np.ndarray:
    # Only about log-uniform: half of the draws on either side of the geometric mean, without a library
    # exponential.
    uniform = next(self._columns)
    middle = math.sqrt(low * high)
    below = low + (middle - low) * (2 * uniform)
    above = middle + (high - middle) * (2 * uniform - 1)
    return np.where(uniform < 0.5, below, above).astype(np.float32)[:, None, None]


def _mix(x: np.ndarray) -> np.ndarray:
  """The finaliser of splitmix64 (Steele, Lea, Flood 2014): u64 -> u64, every bit depends on every bit."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def _record_hashes(num_images: int, split: str) -> np.ndarray:
  """Returns u64[N], one for each record of the split."""
  stream = np.array([zlib.crc32(split.encode())], np.uint64)
  return _mix(_mix(stream) + np.arange(1, num_images + 1, dtype=np.uint64) * _GOLDEN)


def _uniforms(hashes: np.ndarray, num: int) -> np.ndarray:
  """Returns f64[n, num], uniform in [0, 1): the splitmix64 stream that starts at each hash."""
  bits = _mix(hashes[:, None] + np.arange(1, num + 1, dtype=np.uint64) * _GOLDEN)
  return (bits >> np.uint64(11)) * 2.0**-53


def _grain(hashes: np.ndarray, size: int) -> np.ndarray:
  """Returns f32[n, S, S] of zero mean and unit variance: independent from pixel to pixel, a sum of four
  uniform bytes."""
  start = _mix(hashes + np.uint64(1))[:, None]
  bits = _mix(start + np.arange(1, size * size // 2 + 2, dtype=np.uint64) * _GOLDEN)
  # Each 64-bit word serves two pixels, four bytes each.
  sums = bits.view(np.uint8).reshape(len(hashes), -1, 4).sum(axis=-1, dtype=np.int32)[:, : size * size]
  return ((sums - 510).astype(np.float32) / np.float32(147.8)).reshape(-1, size, size)
