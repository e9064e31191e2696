"""Decoding against Pillow, the crop's box against an oracle of torchvision's rule, resizing."""

import io
import math
import tracemalloc

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from pirl_jax.data import crops
from pirl_jax.data.crops import (
  FORMATS,
  BrokenImage,
  Decoding,
  centre_crop,
  crop_box,
  decode,
  open_image,
  random_resized_crops,
  squash_resize,
)


def smooth(height=48, width=64, channels=3, seed=0):
  """Returns u8[height, width, channels] that looks enough like a photograph for JPEG."""
  noise = np.random.default_rng(seed).integers(0, 256, (8, 8, channels), dtype=np.uint8)
  return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)


def encoded(image, file_format, **options):
  file = io.BytesIO()
  image.save(file, file_format, **options)
  return file.getvalue()


RGB = Image.fromarray(smooth())
RGBA = Image.fromarray(smooth(channels=4))
TURNED = Image.Exif()
TURNED[0x0112] = 6

FILES = {
  "jpeg": encoded(RGB, "JPEG"),
  "jpeg 4:4:4": encoded(RGB, "JPEG", quality=95, subsampling=0),
  "jpeg progressive": encoded(RGB, "JPEG", progressive=True),
  "jpeg grey": encoded(RGB.convert("L"), "JPEG"),
  "jpeg cmyk": encoded(RGB.convert("CMYK"), "JPEG"),
  "jpeg turned by exif": encoded(RGB, "JPEG", exif=TURNED),
  "png": encoded(RGB, "PNG"),
  "png grey": encoded(RGB.convert("L"), "PNG"),
  "png 1 bit": encoded(RGB.convert("1"), "PNG"),
  "png grey alpha": encoded(RGBA.convert("LA"), "PNG"),
  "png alpha": encoded(RGBA, "PNG"),
  "png palette": encoded(RGB.convert("P"), "PNG"),
  "png palette 4 bit": encoded(RGB.quantize(7), "PNG"),
  "png palette transparent": encoded(RGB.convert("P"), "PNG", transparency=3),
  "png turned by exif": encoded(RGB, "PNG", exif=TURNED),
  "webp": encoded(RGB, "WEBP"),
  "webp alpha": encoded(RGBA, "WEBP"),
  "bmp": encoded(RGB, "BMP"),
  "bmp palette": encoded(RGB.convert("P"), "BMP"),
  "bmp grey": encoded(RGB.convert("L"), "BMP"),
}


@pytest.mark.parametrize("kind", FILES)
def test_decode_equals_pillow(kind):
  with Image.open(io.BytesIO(FILES[kind])) as image:
    expected = np.asarray(image.convert("RGB"))
  decoded = decode(FILES[kind])
  assert decoded.dtype == np.uint8 and decoded.shape == (48, 64, 3)
  # Exact where both use one libjpeg-turbo; another build may round the colour conversion otherwise.
  assert np.abs(decoded.astype(int) - expected).max() <= 2


def test_ycck_jpeg_equals_pillow():
  # Pillow writes CMYK without a transform: as YCCK the same file differs in one byte of Adobe's marker (2 =
  # YCCK).
  cmyk = bytearray(FILES["jpeg cmyk"])
  cmyk[cmyk.index(b"Adobe") + 11] = 2
  with Image.open(io.BytesIO(bytes(cmyk))) as image:
    expected = np.asarray(image.convert("RGB"))
  assert np.abs(expected.astype(int) - decode(FILES["jpeg cmyk"])).max() > 20  # the byte does matter
  np.testing.assert_array_equal(decode(bytes(cmyk)), expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_keep_the_upper_eight(channels):
  deep = np.random.default_rng(0).integers(0, 2**16, (20, 30, channels), dtype=np.uint16)
  _, file = cv2.imencode(".png", deep)  # OpenCV takes BGR(A)
  expected = np.broadcast_to(deep[..., :3][..., ::-1] >> 8, (20, 30, 3))
  np.testing.assert_array_equal(decode(file.tobytes()), expected)


def test_one_pixel_and_arrays():
  for file_format in ("JPEG", "PNG", "WEBP", "BMP"):
    assert decode(encoded(Image.new("RGB", (1, 1), (200, 200, 200)), file_format)).shape == (1, 1, 3)
  array = smooth()
  assert decode(array) is array


@pytest.mark.parametrize(
  "kind", ["jpeg", "jpeg progressive", "jpeg cmyk", "png", "png palette", "webp", "bmp"]
)
def test_a_file_cut_short_anywhere_is_broken(kind):
  data = FILES[kind]
  for length in {
    *range(0, len(data) - 1, max(1, len(data) // 40)),
    len(data) - 1,
    len(data) - 2,
    len(data) - 12,
  }:
    with pytest.raises(BrokenImage):
      decode(data[:length])


def test_a_thumbnail_in_the_header_does_not_hide_the_cut():
  inner = FILES["jpeg"]
  comment = b"\xff\xfe" + (len(inner) + 2).to_bytes(2, "big") + inner
  data = inner[:2] + comment + inner[2:]
  np.testing.assert_array_equal(decode(data), decode(inner))
  with pytest.raises(BrokenImage, match="cut short"):
    decode(data[:-200])


@pytest.mark.parametrize(
  "data", [b"", b"not an image", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF1234WEBP"]
)
def test_no_image_is_broken(data):
  with pytest.raises(BrokenImage):
    decode(data)


def test_damaged_png_is_broken():
  data = bytearray(FILES["png"])
  data[len(data) // 2] ^= 0xFF
  with pytest.raises(BrokenImage):
    decode(bytes(data))


def test_a_decompression_bomb_is_refused_by_its_header():
  for kind, offset in (("png", 16), ("jpeg", None)):
    data = bytearray(FILES[kind])
    if offset:
      data[offset : offset + 8] = (60000).to_bytes(4, "big") * 2
    else:
      frame = data.index(b"\xff\xc0")
      data[frame + 5 : frame + 9] = (60000).to_bytes(2, "big") * 2
    with pytest.raises(BrokenImage, match="60000 x 60000"):
      decode(bytes(data))


class Draws:
  """Stands in for a numpy Generator: hands out prepared numbers and notes what was asked."""

  def __init__(self, units):
    self.units = iter(units)

  def uniform(self, low, high):
    return low + (high - low) * next(self.units)

  def integers(self, high, endpoint):
    assert endpoint
    return min(int(next(self.units) * (high + 1)), high)


def oracle_box(units, height, width, scale, ratio):
  """torchvision's RandomResizedCrop.get_params, written out with the draws as numbers in [0, 1)."""
  units = iter(units)
  for _ in range(10):
    target = height * width * (scale[0] + (scale[1] - scale[0]) * next(units))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = math.exp(low + (high - low) * next(units))
    w = int(round(math.sqrt(target * aspect)))
    h = int(round(math.sqrt(target / aspect)))
    if 0 < w <= width and 0 < h <= height:
      top = min(int(next(units) * (height - h + 1)), height - h)
      left = min(int(next(units) * (width - w + 1)), width - w)
      return top, left, h, w
  if width / height < min(ratio):
    w, h = width, int(round(width / min(ratio)))
  elif width / height > max(ratio):
    w, h = int(round(height * max(ratio))), height
  else:
    w, h = width, height
  return (height - h) // 2, (width - w) // 2, h, w


def test_box_equals_the_oracle():
  rng = np.random.default_rng(0)
  kinds = [(375, 500), (32, 32), (1, 1), (1, 900), (900, 1), (7, 3), (200, 2000)]
  for height, width in kinds:
    for scale in ((0.08, 1.0), (0.2, 1.0), (0.6, 1.0), (1.0, 1.0)):
      for _ in range(100):
        units = rng.random(22)
        found = crop_box(Draws(units), height, width, scale, (3 / 4, 4 / 3))
        assert found == oracle_box(units, height, width, scale, (3 / 4, 4 / 3))


def test_fallback_is_central_and_of_an_allowed_ratio():
  never = [0.999] * 40  # the whole area at ratio 4/3 never fits
  assert crop_box(Draws(never), 100, 1000, (1, 1), (3 / 4, 4 / 3)) == (0, (1000 - 133) // 2, 100, 133)
  assert crop_box(Draws(never), 1000, 100, (1, 1), (3 / 4, 4 / 3)) == ((1000 - 133) // 2, 0, 133, 100)
  assert crop_box(Draws(never), 100, 100, (1, 1), (3 / 4, 4 / 3)) == (0, 0, 100, 100)


def test_boxes_are_distributed_as_the_rule_says():
  # So small that every box fits at once: area uniform, log ratio uniform, place uniform.
  rng = np.random.default_rng(0)
  boxes = np.array([crop_box(rng, 1000, 1000, (0.05, 0.25), (3 / 4, 4 / 3)) for _ in range(4000)])
  top, left, height, width = boxes.T.astype(float)
  for value, low, high in (
    (height * width / 1e6, 0.05, 0.25),
    (np.log(width / height), math.log(3 / 4), math.log(4 / 3)),
    (top / (1000 - height), 0, 1),
    (left / (1000 - width), 0, 1),
  ):
    quantiles = np.quantile((value - low) / (high - low), [0.1, 0.25, 0.5, 0.75, 0.9])
    np.testing.assert_allclose(quantiles, [0.1, 0.25, 0.5, 0.75, 0.9], atol=0.03)  # 4 sigma of 4,000 draws


def photograph_like(height, width):
  rng = np.random.default_rng(1)
  octaves = [
    cv2.resize(rng.normal(0, 2**k, (max(2, height >> k), max(2, width >> k), 3)), (width, height))
    for k in range(7)
  ]
  return np.clip(128 + 0.8 * sum(octaves), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
  "height, width, limit", [(260, 300, 1.5), (400, 380, 1.5), (700, 900, 1.5), (100, 120, 0.7)]
)
def test_resize_is_close_to_pillows_antialiased_bilinear(height, width, limit):
  image = photograph_like(height, width)
  expected = np.asarray(Image.fromarray(image).resize((224, 224), Image.BILINEAR)).astype(float)
  error = np.abs(crops._resize(image, 224, 224) - expected).mean()
  plain = np.abs(cv2.resize(image, (224, 224), interpolation=cv2.INTER_LINEAR) - expected).mean()
  assert error < limit
  if height > 300:
    assert error < 0.7 * plain


def test_random_resized_crops_are_the_boxes_resized():
  image = photograph_like(300, 400)
  asked = {"small": (64, (0.2, 1.0)), "large": (100, (0.6, 1.0))}
  cut = random_resized_crops(np.random.default_rng(5), open_image(image), asked)
  rng = np.random.default_rng(5)
  for name, (size, scale) in asked.items():
    top, left, height, width = crop_box(rng, 300, 400, scale, (3 / 4, 4 / 3))
    expected = Image.fromarray(image[top : top + height, left : left + width]).resize((size, size), Image.BILINEAR)
    assert cut[name].shape == (size, size, 3) and cut[name].dtype == np.uint8
    assert np.abs(cut[name] - np.asarray(expected).astype(float)).mean() < 2


@pytest.mark.parametrize(
  "shrunk, reduction", [(0.5, 1), (1.99, 1), (2, 2), (3.9, 2), (4, 4), (7.9, 4), (8, 8), (50, 8)])
def test_a_jpeg_is_reduced_by_no_more_than_its_crops_allow(shrunk, reduction):
  assert open_image(FILES["jpeg"], Decoding(reduced=True)).reduction(shrunk) == reduction
  assert open_image(FILES["jpeg"]).reduction(shrunk) == 1
  for kind in ("png", "webp", "jpeg cmyk"):
    assert open_image(FILES[kind], Decoding(reduced=True)).reduction(shrunk) == 1


@pytest.mark.parametrize("kind", ["jpeg", "jpeg progressive", "jpeg grey", "jpeg turned by exif"])
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_reduced_jpeg_is_the_whole_one_averaged(kind, reduction):
  whole, reduced = open_image(FILES[kind]).pixels(), open_image(FILES[kind]).pixels(reduction)
  assert reduced.shape == (48 // reduction, 64 // reduction, 3)
  averaged = whole.reshape(48 // reduction, reduction, 64 // reduction, reduction, 3).mean((1, 3))
  assert np.abs(averaged - reduced).mean() < 6
  assert kind == "jpeg grey" or np.abs(averaged - reduced[..., ::-1]).mean() > 10  # red, green, blue


@pytest.mark.parametrize("height, width, size", [(1500, 2000, 224), (2003, 1001, 96), (401, 503, 40)])
def test_crops_of_a_reduced_jpeg_show_the_same(height, width, size):
  data = encoded(Image.fromarray(photograph_like(height, width)), "JPEG", quality=95)
  asked = {"image_crop": (size, (0.3, 1.0)), "pretext_crop": (size + 31, (0.6, 1.0))}
  for seed in range(4):
    whole, reduced = (
      random_resized_crops(np.random.default_rng(seed), open_image(data, Decoding(reduced=reduced)), asked)
      for reduced in (False, True))
    for name in asked:
      moved = np.roll(whole[name], 3, axis=0).astype(float)
      error = np.abs(whole[name] - reduced[name].astype(float)).mean()
      assert 0 < error < 3.5 and error < 0.5 * np.abs(whole[name] - moved).mean(), (name, seed)


def turned(file_format, orientation, **options):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return encoded(options.pop("image", RGB), file_format, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format, options", [
  ("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"image": RGB.convert("CMYK")}),
  ("JPEG", {"image": RGB.convert("L")}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_an_upright_image_is_turned_as_pillow_turns_it(file_format, options, orientation):
  data = turned(file_format, orientation, **options)
  with Image.open(io.BytesIO(data)) as image:
    expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
  opened = open_image(data, Decoding(reduced=True, upright=True))
  assert (opened.height, opened.width) == expected.shape[:2] == ((64, 48) if orientation >= 5 else (48, 64))
  assert np.abs(opened.pixels().astype(int) - expected).max() <= 2
  if opened.reducible:
    averaged = expected.reshape(expected.shape[0] // 4, 4, expected.shape[1] // 4, 4, 3).mean((1, 3))
    assert np.abs(averaged - opened.pixels(4)).mean() < 6
  assert decode(data).shape == (48, 64, 3)  # as it is stored


@pytest.mark.parametrize("damage", [
  lambda exif: exif[:8], lambda exif: exif[:6] + b"XX" + exif[8:], lambda exif: exif[:6] + bytes(len(exif) - 6)])
def test_exif_data_that_cannot_be_read_leave_an_image_as_it_is(damage):
  good = Image.Exif()
  good[0x0112] = 6
  for data in (encoded(RGB, "JPEG", exif=damage(good.tobytes())), turned("JPEG", 0), turned("JPEG", 9)):
    np.testing.assert_array_equal(open_image(data, Decoding(upright=True)).pixels(), decode(data))


def test_a_crop_of_an_upright_image_is_that_of_the_turned_pixels():
  data, asked = turned("JPEG", 8), {"image_crop": (20, (0.3, 0.6))}
  cut, expected = (random_resized_crops(np.random.default_rng(3), opened, asked)["image_crop"] for opened in (
    open_image(data, Decoding(upright=True)), open_image(open_image(data, Decoding(upright=True)).pixels())))
  np.testing.assert_array_equal(cut, expected)


@pytest.mark.parametrize("file_format, options", [
  ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("GIF", {}), ("AVIF", {"quality": 100})])
def test_more_formats_equal_pillow(file_format, options):
  data = encoded(RGB, file_format, **options)
  with Image.open(io.BytesIO(data)) as image:
    expected = np.asarray(image.convert("RGB"))
  np.testing.assert_array_equal(decode(data), expected)
  assert np.abs(expected.astype(int) - np.asarray(RGB)).mean() < 12


@pytest.mark.skipif("HEIF" not in FORMATS, reason="pillow-heif is not installed")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_of_a_phone_is_turned_once(orientation):
  """HEIF has a turn of its own, which its decoder applies; phones write the same turn into the EXIF data once more."""
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encoded(RGB, "HEIF", exif=exif.tobytes(), quality=-1)
  assert orientation == 1 or b"irot" in data or b"imir" in data
  with Image.open(io.BytesIO(turned("PNG", orientation))) as image:
    expected = np.asarray(ImageOps.exif_transpose(image))
  for upright in (False, True):
    found = open_image(data, Decoding(upright=upright)).pixels()
    assert found.shape == expected.shape and np.abs(found.astype(int) - expected).mean() < 12


def test_the_first_image_of_several_is_taken():
  others = [Image.fromarray(smooth(seed=seed)) for seed in (1, 2)]
  for file_format in ("GIF", "TIFF"):
    data = encoded(RGB, file_format, save_all=True, append_images=others)
    assert np.abs(decode(data).astype(int) - np.asarray(RGB)).mean() < 12


def deep_files(levels):
  """Yields (name, file) of an image of 16 bits, u16[H, W] or u16[H, W, 3], RGB, in each format that has them."""
  stored = levels[..., ::-1] if levels.ndim == 3 else levels  # OpenCV takes BGR
  for ending in (".png", ".tiff"):
    yield ending, cv2.imencode(ending, stored)[1].tobytes()


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3)])
@pytest.mark.parametrize("bits", [10, 12, 16])
def test_the_full_range_of_an_image_of_16_bits(shape, bits):
  levels = np.random.default_rng(0).integers(0, 2**bits, shape, dtype=np.uint16)
  levels[0, 0] = 2**bits - 1
  colours = levels if levels.ndim == 3 else np.repeat(levels[..., np.newaxis], 3, axis=2)
  for ending, data in deep_files(levels):
    found = open_image(data, Decoding(full_range=True)).pixels()
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found, np.round(255 * (colours / (2**bits - 1))), atol=1, err_msg=ending)
    np.testing.assert_array_equal(decode(data), colours >> 8, err_msg=ending)


def test_floating_point_is_scaled_and_what_is_not_finite_is_broken():
  values = np.linspace(-1, 3, 20 * 30, dtype=np.float32).reshape(20, 30)
  found = decode(encoded(Image.fromarray(values), "TIFF"))
  np.testing.assert_allclose(found[..., 1], 255 * (values + 1) / 4, atol=0.51)
  values[3, 4] = np.nan
  with pytest.raises(BrokenImage, match="not finite"):
    decode(encoded(Image.fromarray(values), "TIFF"))


def test_an_image_of_8_bits_has_its_levels_whatever_is_asked_for():
  dark = Image.fromarray(smooth() // 8)
  for file_format in ("PNG", "TIFF", "WEBP", "BMP"):
    data = encoded(dark, file_format, **({"lossless": True} if file_format == "WEBP" else {}))
    np.testing.assert_array_equal(open_image(data, Decoding(full_range=True)).pixels(), np.asarray(dark))


def test_a_damaged_jpeg_is_broken_however_it_is_decoded():
  data = bytearray(encoded(Image.fromarray(photograph_like(400, 400)), "JPEG"))
  opened = open_image(bytes(data))
  assert (opened.height, opened.width) == (400, 400)
  with pytest.raises(BrokenImage):
    open_image(bytes(data[: len(data) // 2]))


@pytest.mark.parametrize("height, width", [(300, 400), (400, 300), (256, 256), (50, 1000), (1, 1)])
def test_centre_crop(height, width):
  image = photograph_like(height, width)
  shorter = min(height, width)
  resized = Image.fromarray(image).resize(
    (max(256, 256 * width // shorter), max(256, 256 * height // shorter)), Image.BILINEAR
  )
  left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
  expected = np.asarray(resized.crop((left, top, left + 224, top + 224))).astype(float)
  crop = centre_crop(image, size=224, fraction=224 / 256)
  assert crop.shape == (224, 224, 3) and crop.dtype == np.uint8
  assert np.abs(crop - expected).mean() < 2


def test_centre_crop_leaves_a_small_image_as_it_is():
  image = photograph_like(32, 32)
  np.testing.assert_array_equal(centre_crop(image, size=32, fraction=1.0), image)


def test_opencv_works_in_one_thread():
  assert cv2.getNumThreads() == 1


@pytest.mark.parametrize("height, width", [(300, 400), (400, 300), (256, 256), (50, 1000), (1, 1)])
def test_squash_resize_takes_the_whole_image_in_two_steps(height, width):
  image = photograph_like(height, width)
  shorter = min(height, width)
  resized = Image.fromarray(image).resize((256 * width // shorter, 256 * height // shorter), Image.BILINEAR)
  expected = np.asarray(resized.resize((224, 224), Image.BILINEAR)).astype(float)
  squashed = squash_resize(image, size=224, fraction=224 / 256)
  assert squashed.shape == (224, 224, 3) and squashed.dtype == np.uint8
  assert np.abs(squashed - expected).mean() < 2


@pytest.mark.parametrize("height, width", [(300, 400), (90, 60)])
def test_squash_resize_goes_straight_to_the_square_where_nothing_is_cut(height, width):
  image = photograph_like(height, width)
  expected = np.asarray(Image.fromarray(image).resize((64, 64), Image.BILINEAR)).astype(float)
  straight, stepwise = (squash_resize(image, size=64, fraction=fraction).astype(float) for fraction in (1.0, 0.5))
  assert np.abs(straight - expected).mean() < 2
  assert np.abs(straight - stepwise).mean() > 0.1
  small = photograph_like(32, 32)
  np.testing.assert_array_equal(squash_resize(small, size=32, fraction=1.0), small)


@pytest.mark.parametrize("height, width", [(1, 200_000), (200_000, 1), (1, 10_000), (3, 100_000)])
def test_the_memory_of_a_crop_is_bounded_by_the_view_whatever_the_image_is_like(height, width):
  """The image is a ramp along its longer side."""
  ramp = np.linspace(0, 255, max(height, width)).astype(np.uint8)
  ramp = np.ascontiguousarray(np.broadcast_to(ramp[:, None, None] if height > width else ramp[None, :, None],
                                              (height, width, 3)))
  file = encoded(Image.fromarray(ramp), "PNG")
  image = open_image(file)
  tracemalloc.start()
  centre = centre_crop(ramp, size=224, fraction=224 / 256)
  whole = squash_resize(ramp, size=224, fraction=224 / 256)
  cut = random_resized_crops(np.random.default_rng(0), image, {"a": (224, (0.08, 1.0)), "b": (255, (0.6, 1.0))})
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 12 * ramp.size + 40 * 3 * 256**2
  assert centre.shape == whole.shape == cut["a"].shape == (224, 224, 3) and cut["b"].shape == (255, 255, 3)
  assert centre.min() >= 125 and centre.max() <= 130  # the very middle
  assert whole.min() < 5 and whole.max() > 250  # both ends


def test_an_image_of_an_ordinary_shape_is_cut_as_ever():
  image = smooth(30, 450)
  expected = crops._resize(image, 64, 960)[4:60, 452:508]
  np.testing.assert_array_equal(centre_crop(image, size=56, fraction=0.875), expected)
  longer = np.concatenate([image, image[:, :50]], axis=1)
  np.testing.assert_array_equal(centre_crop(longer, size=56, fraction=0.875),
                                centre_crop(longer[:, 10:490], size=56, fraction=0.875))


def test_a_large_header_on_a_small_file_is_broken_and_a_photograph_is_not():
  blank = encoded(Image.new("1", (16_000, 16_000)), "PNG")
  assert len(blank) < 40_000
  for file in (blank, encoded(Image.new("L", (8_000, 8_000)), "WEBP"), encoded(Image.new("L", (8_000, 8_000)), "TIFF",
                                                                               compression="tiff_deflate")):
    with pytest.raises(BrokenImage, match="pixels are too many for"):
      open_image(file)
  assert decode(encoded(Image.new("L", (4_000, 4_000)), "PNG")).shape == (4_000, 4_000, 3)
  crops._check_size(9_000, 12_000, 3_000_000)  # 108 megapixels in 3 MB


@pytest.mark.parametrize("kind", ["webp", "jpeg cmyk"])
def test_a_lack_of_memory_is_no_fault_of_the_image(kind, monkeypatch):
  for error in (MemoryError(), OSError("out of memory error when reading image file")):
    def fail(*_, error=error):
      raise error
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(MemoryError):
      decode(FILES[kind])


@pytest.mark.parametrize("kind", ["png", "jpeg", "jpeg progressive"])
def test_a_lack_of_memory_in_opencv_is_no_fault_of_the_image(kind, monkeypatch):
  plain = Decoding(strict=False)  # OpenCV alone
  real, results = cv2.imdecode, [None]
  with monkeypatch.context() as patch:  # libjpeg's lack of memory looks like damage
    patch.setattr(cv2, "imdecode", lambda *given: results.pop() if results else real(*given))
    found = open_image(FILES[kind], plain).pixels()
    np.testing.assert_array_equal(found, real(np.frombuffer(FILES[kind], np.uint8), crops._FLAGS))
    results = [None, None]
    with pytest.raises(BrokenImage):
      open_image(FILES[kind], plain).pixels()
  with pytest.raises(cv2.error) as raised:
    np.zeros(1), cv2.resize(np.zeros((1, 1), np.uint8), (2**30, 2**30))
  assert raised.value.code == cv2.Error.StsNoMem
  def fail(*_):
    raise raised.value
  monkeypatch.setattr(cv2, "imdecode", fail)
  with pytest.raises(MemoryError):
    open_image(FILES[kind], plain).pixels()


def damaged_jpegs():
  """Returns {name: JPEG whose data are damaged, though it has a header and an end marker}."""
  one, other = (encoded(Image.fromarray(photograph_like(300, 400) // (1 + i)), "JPEG", quality=90) for i in range(2))
  middle = len(one) // 2
  return {"cut, with an end marker": one[:middle] + b"\xff\xd9",
          "zeroed middle": one[:middle] + bytes(4096) + one[middle + 4096:],
          "joined": one[:middle] + other,
          "half of another": one[:middle] + other[middle:],
          "a missing piece": one[:middle] + one[middle + 1000:],
          "progressive, cut": encoded(Image.fromarray(photograph_like(300, 400)), "JPEG", progressive=True)[:-900]
          + b"\xff\xd9"}


@pytest.mark.parametrize("reduction", [1, 2, 8])
@pytest.mark.parametrize("name", damaged_jpegs())
def test_a_jpeg_with_corrupt_data_is_broken(name, reduction):
  data = damaged_jpegs()[name]
  with pytest.raises(BrokenImage, match="JPEG"):
    open_image(data, Decoding(strict=True, reduced=True)).pixels(reduction)
  lenient = open_image(data, Decoding(strict=False, reduced=True))
  assert "joined" in name or lenient.pixels(reduction).ndim == 3  # grey, as ever


def odd_jpegs():
  """Returns {name: JPEG that is sound in spite of an oddity that cameras and programs write}."""
  whole = encoded(Image.fromarray(photograph_like(300, 400)), "JPEG", quality=90)
  end, scan = whole.rindex(b"\xff\xd9"), whole.index(b"\xff\xda")
  wrong_scan = bytearray(whole)
  wrong_scan[scan + 11:scan + 14] = b"\0\0\0"  # the range of coefficients, which a sequential JPEG does not need
  return {"as it is": whole, "trailing bytes": whole + b"trailer" * 99, "a second image behind it": whole + whole,
          "padding": whole[:end] + bytes(9) + whole[end:], "fill bytes": whole[:end] + b"\xff" * 5 + whole[end:],
          "odd range of coefficients": bytes(wrong_scan)}


@pytest.mark.parametrize("name", odd_jpegs())
def test_an_odd_jpeg_is_an_image(name):
  data = odd_jpegs()[name]
  np.testing.assert_array_equal(open_image(data, Decoding(strict=True)).pixels(), decode(data))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode, progressive", [("RGB", False), ("RGB", True), ("L", False)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_strict_decoding_changes_no_bit_of_a_sound_image(mode, progressive, subsampling, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  image = Image.fromarray(photograph_like(301, 403)).convert(mode)
  data = encoded(image, "JPEG", subsampling=subsampling, progressive=progressive, exif=exif)
  strict, plain = (open_image(data, Decoding(reduced=True, upright=True, strict=strict)) for strict in (True, False))
  for reduction in (1, 2, 4, 8):
    np.testing.assert_array_equal(strict.pixels(reduction), plain.pixels(reduction))
