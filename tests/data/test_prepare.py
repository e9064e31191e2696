"""Smaller copies of images: their sizes, order, labels and bytes, and what cannot be copied."""

import io

import numpy as np
import pytest
from PIL import Image

from pirl_jax.configs import prepare as prepare_config
from pirl_jax.data import prepare
from pirl_jax.data.crops import decode
from pirl_jax.data.sources import DataSettings, open_source
from pirl_jax.errors import UserError

SIZES = {"a/0.jpg": (300, 200), "a/1.png": (90, 400), "a/2.jpg": (50, 40), "b/0.webp": (120, 120), "b/1.jpg": (64, 99)}
"""(width, height) of each image of a split."""


def photograph(width, height, seed):
  grid = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
  return Image.fromarray(grid).resize((width, height), Image.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("photographs")
  for split in ("train", "test"):
    for number, (name, size) in enumerate(SIZES.items()):
      path = root / split / name
      path.parent.mkdir(parents=True, exist_ok=True)
      photograph(*size, seed=number + 10 * (split == "test")).save(path, quality=90)
  return root


def config_of(folder, root, **changes):
  config = prepare_config.get_config()
  config.update(name="small", root=str(root), splits=("train", "test"), shorter_side=60)
  config.data.update(root=str(folder), labels="folder", num_threads=2)
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
  root = tmp_path_factory.mktemp("sets")
  prepare.run(config_of(folder, root), "")
  return root


def opened(root, split):
  return open_source(DataSettings("tfds", name="small", root=str(root), split=split))


@pytest.mark.parametrize("split", ["train", "test"])
def test_copies_have_the_order_the_labels_and_the_look_of_the_images(folder, prepared, split):
  originals = open_source(DataSettings("folder", root=str(folder), split=split, labels="folder"))
  copies = opened(prepared, split)
  assert len(copies) == len(originals) == 5 and copies.class_names == originals.class_names == ("a", "b")
  np.testing.assert_array_equal(copies.labels(), originals.labels())
  for index, (width, height) in enumerate(SIZES.values()):
    image, copy = decode(originals[index].image), decode(copies[index].image)
    shorter = min(width, height, 60)
    assert min(copy.shape[:2]) == shorter
    assert copy.shape[0] / copy.shape[1] == pytest.approx(height / width, abs=0.02)
    expected = Image.fromarray(image).resize((copy.shape[1], copy.shape[0]), Image.BILINEAR)
    assert np.abs(copy - np.asarray(expected).astype(float)).mean() < 4, index


def test_a_small_jpeg_is_copied_byte_by_byte_and_nothing_else_is(folder, prepared):
  originals = open_source(DataSettings("folder", root=str(folder), split="train", labels="folder"))
  copies = opened(prepared, "train")
  assert [originals[i].image == copies[i].image for i in range(5)] == [False, False, True, False, False]
  assert all(copies[i].image[:2] == b"\xff\xd8" for i in range(5))


def test_a_photograph_is_turned_upright(tmp_path):
  (tmp_path / "images").mkdir()
  exif = Image.Exif()
  exif[0x0112] = 6
  photograph(40, 30, seed=0).save(tmp_path / "images" / "0.jpg", exif=exif, quality=95)
  prepare.run(config_of(tmp_path / "images", tmp_path / "sets", **{"splits": ("",), "data.labels": "none"}), "")
  copy = decode(opened(tmp_path / "sets", "train")[0].image)
  expected = np.asarray(photograph(40, 30, seed=0).transpose(Image.Transpose.ROTATE_270)).astype(float)
  assert copy.shape == (40, 30, 3) and np.abs(copy - expected).mean() < 8


def test_a_flat_folder_is_the_split_train(folder, tmp_path):
  prepare.run(config_of(folder / "train" / "a", tmp_path, **{"splits": ("",), "data.labels": "none"}), "")
  copies = opened(tmp_path, "train")
  assert len(copies) == 3 and copies.labels() is None


@pytest.mark.parametrize("changes, said", [
  ({"name": "Small"}, "name='Small' is not possible"), ({"name": ""}, "name='' is not possible"),
  ({"shorter_side": 0}, "shorter_side=0"), ({"quality": 101}, "quality=101"),
  ({"data.num_threads": 0}, "data.num_threads=0"), ({"data.max_bad_fraction": 2.0}, "data.max_bad_fraction=2.0"),
  ({"splits": ()}, "one split or more"), ({"splits": ("train", "train")}, "each once"),
  ({"splits": ("train[:10%]",)}, "cannot be the name of a split"), ({"splits": ("no",)}, "no")])
def test_what_is_wrong_is_said_before_anything_is_written(folder, tmp_path, changes, said):
  with pytest.raises(UserError, match=said.replace("[", r"\[")):
    prepare.run(config_of(folder, tmp_path / "sets", **changes), "")
  assert not (tmp_path / "sets").exists()


def test_a_set_that_is_there_is_not_written_again(folder, prepared):
  before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()}
  with pytest.raises(UserError, match="is there already"):
    prepare.run(config_of(folder, prepared), "")
  assert before == {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()}


def test_images_that_cannot_be_read_are_left_out_and_named(tmp_path, capsys):
  images = tmp_path / "images"
  images.mkdir()
  for number in range(8):
    photograph(30, 20, seed=number).save(images / f"{number}.jpg")
  file = io.BytesIO((images / "3.jpg").read_bytes())
  (images / "3.jpg").write_bytes(file.getvalue()[:-50])
  changes = {"splits": ("",), "data.labels": "none"}
  with pytest.raises(UserError, match=r"train: 1 of 8 images cannot be read: 3.jpg \(JPEG is cut short\); repair"):
    prepare.run(config_of(images, tmp_path / "refused", **changes), "")
  prepare.run(config_of(images, tmp_path / "sets", **changes, **{"data.max_bad_fraction": 0.2}), "")
  assert "1 of 8 images cannot be read: 3.jpg" in capsys.readouterr().out
  copies = opened(tmp_path / "sets", "train")
  assert [copies[i].image for i in range(7)] == [
    (images / f"{number}.jpg").read_bytes() for number in range(8) if number != 3]
