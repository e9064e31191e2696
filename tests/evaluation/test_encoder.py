"""The encoder: features of anyone's images, bit for bit those that an evaluation writes."""

import os
import shutil

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import pirl_jax
from pirl_jax.configs import evaluate as evaluate_configs
from pirl_jax.configs import npid, pirl, rotnet
from pirl_jax.evaluation.features import unit_norm

NUM = 21
LAYERS = ("conv1", "res2", "res3", "res4", "pooled")


def tiny(system):
  config = system.get_config()
  config.update(num_epochs=0, batch_size=32, num_negatives=32)
  config.data.update(num_images=64, image_size=16)
  config.jigsaw.update(crop_size=18, patch_size=5)
  config.model.dim = 8
  # The sides are resized to 20 and cut to 16, and a batch is neither a divisor nor a multiple of the images.
  config.evaluate.update(num_images=16, crop_fraction=0.8, batch_size=8, every_epochs=0, learning=False)
  config.report = config.export = False
  return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return pirl_jax.pretrain(tiny(pirl), tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def encoder(run):
  return pirl_jax.load(run)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
  """PNGs and JPEGs, RGB and grey, of sizes that all differ."""
  folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
  for number in range(NUM):
    shape = (17 + number, 40 - number, 3) if number % 4 else (30, 21 + number)
    smooth = cv2.resize(rng.integers(0, 256, (5, 4, *shape[2:]), np.uint8), shape[1::-1])
    cv2.imwrite(str(folder / f"{number:02}.{'jpg' if number % 3 else 'png'}"), smooth)
  return folder


def exported(run, photographs, tmp_path, layer):
  """Returns the features as configs/evaluate.py:features writes them."""
  config = evaluate_configs.get_config("features")
  config.update_from_flattened_dict({
    "checkpoint": str(run), "features.layer": layer, "data.source": "folder", "data.root": str(photographs),
    "data.split": "", "data.test_split": "", "data.labels": "none"})
  figures, = pirl_jax.evaluate(config, tmp_path).values()
  assert figures["splits"][""]["num_images"] == NUM
  with np.load(figures["written"][0]) as found:
    return found["features"]


@pytest.mark.parametrize("layer", ["pooled", "res3", "embedding"])
def test_features_are_those_that_the_evaluation_writes_bit_for_bit(run, encoder, photographs, tmp_path, layer):
  expected = exported(run, photographs, tmp_path, layer)
  paths = sorted(photographs.iterdir())
  features = encoder(paths, layer=layer)
  assert features.dtype == np.float32 and len(np.unique(features, axis=0)) == NUM
  if layer == "embedding":
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-6)
    expected = unit_norm(expected)
  np.testing.assert_array_equal(features, expected)
  # However the images come, how many, and in which order.
  np.testing.assert_array_equal(encoder((str(path) for path in paths), layer), expected)
  np.testing.assert_array_equal(encoder(np.array(list(map(str, paths))), layer), expected)
  np.testing.assert_array_equal(encoder(paths[::-1][:10], layer), expected[::-1][:10])
  np.testing.assert_array_equal(encoder(paths[7], layer), expected[7:8])


def test_features_of_a_run_that_decodes_at_a_part_of_the_size_are_those_of_its_evaluation(photographs, tmp_path):
  config = tiny(pirl)
  config.data.update(reduced_decoding=True, upright=True)
  run = pirl_jax.pretrain(config, tmp_path / "reduced")
  images = shutil.copytree(photographs, tmp_path / "images")
  rng = np.random.default_rng(1)
  for number in range(1, NUM, 3):
    smooth = cv2.resize(rng.integers(0, 256, (9, 9, 3), np.uint8), (90 + number, 101))
    cv2.imwrite(str(images / f"{number:02}.jpg"), smooth)
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.open(photographs / "02.jpg").save(images / "02.jpg", exif=exif, quality=95)
  paths = sorted(images.iterdir())
  features = pirl_jax.load(run)(paths)
  np.testing.assert_array_equal(features, exported(run, images, tmp_path / "results", "pooled"))
  np.testing.assert_array_equal(pirl_jax.load(run)(Image.open(images / "02.jpg")), features[2:3])
  whole = pirl_jax.load(run)([cv2.imread(str(path))[..., ::-1] for path in paths])  # OpenCV turns it, too
  assert [(a != b).any() for a, b in zip(features, whole, strict=True)] == [
    path.suffix == ".jpg" and cv2.imread(str(path)).shape[0] == 101 for path in paths]


def test_an_image_is_the_same_however_it_is_given(encoder, photographs):
  path = photographs / "03.png"
  levels = np.asarray(Image.open(path))
  expected = encoder(path)
  assert expected.shape == (1, 64)
  for same in (levels, Image.open(path), jnp.asarray(levels), levels[:, ::-1][:, ::-1], np.float32(levels) / 255,
               np.float16(levels / 255), levels / 255, levels[None], [levels]):
    np.testing.assert_array_equal(encoder(same), expected)
  grey = levels[:, :, 0]
  three = np.repeat(grey[:, :, None], 3, axis=2)
  for same in (grey, grey / 255, Image.fromarray(grey), Image.fromarray(three).convert("RGBA")):
    np.testing.assert_array_equal(encoder(same), encoder(three))
  np.testing.assert_array_equal(encoder([path, levels[:9], Image.fromarray(grey)]),
                                np.concatenate([expected, encoder(levels[:9]), encoder(grey)]))
  assert (encoder(levels[:, ::-1], "res3") != encoder(levels, "res3")).any()


def test_a_generator_is_read_a_batch_at_a_time(encoder):
  alive, most = set(), 0

  class Counted:
    def __init__(self, number):
      nonlocal most
      self.number = number
      alive.add(number)
      most = max(most, len(alive))

    def __array__(self, dtype=None, copy=None):
      return np.full((16, 16), self.number, np.uint8)

    def __del__(self):
      alive.discard(self.number)

  features = encoder(Counted(number) for number in range(240))
  assert len(np.unique(features, axis=0)) == 240
  assert most < 120  # batches of 8, some of them on the way, some not yet collected as garbage


def test_all_batches_have_one_shape_and_compile_once(encoder, monkeypatch):
  from pirl_jax.evaluation import encoder as module
  shapes, stream = set(), module.stream_features

  def watched(forward_fn, variables, batches, mesh):
    def note(batch):
      shapes.add(batch["image"].shape)
      return batch
    return stream(forward_fn, variables, map(note, batches), mesh)

  monkeypatch.setattr(module, "stream_features", watched)
  for num in (1, 7, 8, 9, 20):
    assert encoder([np.zeros((16 + num, 30), np.uint8)] * num).shape == (num, 64)
  assert shapes == {(8, 16, 16, 3)}


def test_another_batch_size(run, encoder, photographs):
  paths = sorted(photographs.iterdir())
  small, large = (pirl_jax.load(run, batch_size=size) for size in (1, 17))
  assert (small.batch_size, encoder.batch_size, large.batch_size) == (8, 8, 24)  # of 8 devices
  np.testing.assert_allclose(large(paths), encoder(paths), rtol=1e-4, atol=1e-6)
  with pytest.raises(pirl_jax.UserError, match="batch_size=0 is not possible"):
    pirl_jax.load(run, batch_size=0)


def test_what_an_encoder_says_of_itself(run, encoder):
  assert encoder.layers == (*LAYERS, "embedding") and encoder.image_size == 16
  assert encoder.config["data"]["num_images"] == 64 and encoder.folder == run and encoder.step == 0
  assert repr(encoder) == (f"Encoder('{run}', step=0, arch='resnet8', image_size=16, "
                           f"layers={(*LAYERS, 'embedding')})")
  assert {layer: encoder(np.zeros((16, 16), np.uint8), layer).shape for layer in encoder.layers} == {
    "conv1": (1, 1_024), "res2": (1, 1_024), "res3": (1, 512), "res4": (1, 256), "pooled": (1, 64), "embedding": (1, 8)}


@pytest.mark.parametrize(("system", "layers"), [(npid, (*LAYERS, "embedding")), (rotnet, LAYERS)])
def test_other_systems(tmp_path, system, layers):
  encoder = pirl_jax.load(pirl_jax.pretrain(tiny(system), tmp_path / "run"))
  assert encoder.layers == layers
  assert encoder(np.zeros((20, 20), np.uint8)).shape == (1, 64)


def test_what_cannot_be_loaded(run, tmp_path):
  for path, said in ((tmp_path / "none", "path=.*/none: there is no such folder; give the folder of a run"),
                     (tmp_path, "path=.* is not the folder of a run"),
                     (run / "checkpoints" / "0", "is a single checkpoint; give the folder of its run, .*, and step=0")):
    with pytest.raises(pirl_jax.UserError, match=said):
      pirl_jax.load(path)
  with pytest.raises(pirl_jax.UserError, match="has no checkpoint of step 3; there are 0"):
    pirl_jax.load(run, step=3)
  damaged = shutil.copytree(run, tmp_path / "damaged")
  for path in (damaged / "checkpoints" / "0" / "model" / "d").iterdir():
    os.truncate(path, 10)
  with pytest.raises(pirl_jax.UserError, match="checkpoint .*/damaged/checkpoints/0 cannot be read"):
    pirl_jax.load(damaged)


IMAGE = np.zeros((16, 16, 3), np.uint8)


@pytest.mark.parametrize(("images", "said"), [
  ([], "images is empty; give one image or more"),
  (iter(()), "images is empty"),
  (np.zeros((0, 16, 16, 3), np.uint8), "images is empty"),
  (None, "images is of type NoneType; give a path, a PIL image, or an array u8.H, W, 3"),
  ([IMAGE] * 9 + [5], r"images\[9\] is of type int; give a path"),
  ("none.jpg", "images, none.jpg, is not there; give the path of an image"),
  ([IMAGE, "."], r"images\[1\], \., is a folder; give its files one by one"),
  ("a\0b", "is no path"),
  (IMAGE.transpose(2, 0, 1), r"images is an array uint8\[3, 16, 16\]; an image is \[H, W, 3\]"),
  ([IMAGE[0, 0]], r"images\[0\] is an array uint8\[3\]; an image is"),
  (np.zeros((16, 16, 4), np.uint8), r"uint8\[16, 16, 4\]; an image is \[H, W, 3\]"),
  (np.zeros((0, 16), np.uint8), r"uint8\[0, 16\]; an image is"),
  (IMAGE.astype(int), "the levels are u8 in .0, 255. or floats in .0, 1."),
  (IMAGE == 0, "array bool.*; the levels are u8"),
  (IMAGE + 255.0, r"values from 255 to 255; floats lie in \[0, 1\], and levels from 0 to 255 are u8"),
  (IMAGE - 0.5, "values from -0.5 to -0.5; floats lie in"),
  (IMAGE + np.nan, "values from nan to nan; floats lie in"),
  (Image.new("I", (16, 16)), "a PIL image of mode I, which has no 8-bit levels; give it as an array of floats"),
])
def test_what_is_no_image_is_named(encoder, images, said):
  with pytest.raises(pirl_jax.UserError, match=said):
    encoder(images)


def test_broken_files_are_named(encoder, photographs, tmp_path):
  whole = (photographs / "04.jpg").read_bytes()
  other = "none of the formats JPEG, PNG"
  for name, content, reason in (("cut.jpg", whole[:-2], "JPEG is cut short"), ("empty.jpg", b"", other),
                                ("text.png", b"text", other)):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(pirl_jax.UserError, match=rf"images\[1\], .*{name}, cannot be decoded: {reason}"):
      encoder([photographs / "04.jpg", tmp_path / name])
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / "half.png")
  os.truncate(tmp_path / "half.png", 2_000)
  with pytest.raises(pirl_jax.UserError, match="images, a PIL image of mode RGB, cannot be made RGB"):
    encoder(Image.open(tmp_path / "half.png"))


@pytest.mark.parametrize("layer", ["res9", "", None, "embeddings"])
def test_an_unknown_layer_names_the_choices(encoder, layer):
  said = f"the layer {layer!r}; this network has conv1, res2, res3, res4, pooled, embedding"
  with pytest.raises(pirl_jax.UserError, match=said):
    encoder(IMAGE, layer=layer)
