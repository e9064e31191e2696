"""Folders as people have them: their arrangement, what is held out, what stays in memory, what lies there twice."""

import pickle
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from pirl_jax.data import arrangement, overlap
from pirl_jax.data.in_memory import InMemory, keep
from pirl_jax.data.reading import read_image, why_broken
from pirl_jax.data.sources import DataSettings, open_source
from pirl_jax.errors import UserError


def write(folder, *names, size=(20, 24)):
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    cv2.imwrite(str(folder / name), rng.integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize("names, expected", [
  (["a.png", "b.png"], ("", "", "none")),
  (["2023/05/a.png", "2023/06/b.png", "2024/01/c.png"], ("", "", "none")),
  (["cat/a.png", "dog/b.jpg"], ("", "", "folder")),
  (["cat/a.png", "dog/b.jpg", "c.png"], ("", "", "none")),
  (["cat/a.png", "cat/b.png"], ("", "", "none")),
  (["train/a.png", "test/b.png"], ("train", "test", "none")),
  (["train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png"], ("train", "val", "folder")),
  (["Training/cat/a.png", "Training/dog/b.png", "Validation/cat/c.png"], ("Training", "Validation", "folder")),
  (["train/cat/a.png", "train/dog/b.png"], ("train", "", "folder")),
  (["train/a.png", "train/b.png", "other/c.png"], ("", "", "folder")),
  (["train/a.png", "b.png"], ("", "", "none")),
  (["train/a.png", "val/b.png", "test/c.png"], ("train", "test", "none")),
])
def test_what_lies_in_a_folder_says_how_the_folder_is_arranged(names, expected, tmp_path):
  write(tmp_path, *names)
  (tmp_path / ".hidden").mkdir()
  (tmp_path / "empty").mkdir()
  (tmp_path / "notes.txt").write_text("no image")
  found = arrangement.arrangement_of(str(tmp_path))
  assert (found.split, found.test_split, found.labels) == expected
  assert arrangement.holds_images(str(tmp_path))


@pytest.mark.parametrize("names, expected", [
  (["0.tar", "1.tar"], ("", "")),
  (["train/0.tar", "val/0.tar"], ("train", "val")),
  (["imagenet-train-000.tar", "imagenet-train-001.tar", "imagenet-val-000.tar"], ("*train*.tar", "*val*.tar")),
])
def test_shards_are_arranged_in_folders_or_by_their_names(names, expected, tmp_path):
  for name in names:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
  found = arrangement.arrangement_of_shards(str(tmp_path))
  assert (found.split, found.test_split) == expected
  assert arrangement.arrangement_of_shards(f"{tmp_path}/*.tar").split == ""
  with pytest.raises(UserError, match="no images in .*, but tar files; .*--config.data.source=webdataset"):
    open_source(DataSettings("folder", root=str(tmp_path), split=""))


def test_a_split_that_is_named_is_taken(tmp_path):
  write(tmp_path, "mine/cat/a.png", "mine/dog/b.png", "test/cat/c.png", "train/x.png")
  found = arrangement.arrangement_of(str(tmp_path), split="mine")
  assert (found.split, found.test_split, found.labels) == ("mine", "test", "folder")
  with pytest.raises(UserError, match="cannot be listed"):
    arrangement.arrangement_of(str(tmp_path), split="yours")


def names_of(source):
  return {source.image_name(index) for index in range(len(source))}


def opened(folder, *, held_out=False, **settings):
  return open_source(DataSettings("folder", root=str(folder), split="", holdout=0.25, **settings), held_out=held_out)


def test_a_new_image_moves_no_other_to_the_other_side(tmp_path):
  write(tmp_path, *(f"{i}.png" for i in range(60)))
  train, test = opened(tmp_path), opened(tmp_path, held_out=True)
  assert not names_of(train) & names_of(test) and len(train) + len(test) == 60 and 5 <= len(test) <= 25
  write(tmp_path, *(f"new{i}.png" for i in range(20)))
  assert names_of(train) < names_of(opened(tmp_path)) and names_of(test) <= names_of(opened(tmp_path, held_out=True))
  assert opened(tmp_path).fingerprint != train.fingerprint != test.fingerprint


def test_each_part_of_a_small_set_has_an_image(tmp_path):
  write(tmp_path, "a.png", "b.png")
  for share in (1e-9, 0.999999):
    parts = [open_source(DataSettings("folder", root=str(tmp_path), split="", holdout=share), held_out=held_out)
             for held_out in (False, True)]
    assert sorted(name for part in parts for name in names_of(part)) == ["a.png", "b.png"]


@pytest.mark.parametrize("share, problem", [(1.0, "lies in"), (-0.1, "lies in"), (0.5, "of 1 image.* not possible")])
def test_a_share_that_is_impossible_is_refused(share, problem, tmp_path):
  write(tmp_path, "a.png")
  with pytest.raises(UserError, match=problem):
    open_source(DataSettings("folder", root=str(tmp_path), split="", holdout=share))


def test_a_kept_image_is_decoded_once_and_is_the_image_that_is_read(tmp_path, monkeypatch):
  write(tmp_path, "a.png", "b.jpg")
  write(tmp_path, "large.png", size=(80, 120))
  (tmp_path / "c.jpg").write_bytes(b"no image")
  source = open_source(DataSettings("folder", root=str(tmp_path), split="", upright=True))
  kept = keep(source, 32)
  assert keep(source, 0) is source and isinstance(kept, InMemory)
  for index in range(4):
    (plain, _), (found, label) = (read_image(one, index, lambda image: image.pixels()) for one in (source, kept))
    if source.image_name(index) == "large.png":
      assert found.shape == (32, 48, 3)
    else:
      np.testing.assert_array_equal(found, plain)
    assert why_broken(source, index) == why_broken(kept, index) and label == -1
  again = pickle.loads(pickle.dumps(kept))
  monkeypatch.setattr("pirl_jax.data.in_memory.open_image", lambda *_: pytest.fail("decoded again"))
  whole = [index for index in range(4) if source.image_name(index) != "c.jpg"]
  with ThreadPoolExecutor(4) as threads:
    list(threads.map(kept.__getitem__, whole * 10))
  monkeypatch.undo()
  np.testing.assert_array_equal(again[0].image, kept[0].image)


def test_copies_among_the_held_out_images_are_noticed_under_any_name(tmp_path):
  write(tmp_path, *(f"train/{i}.png" for i in range(9)), *(f"test/other{i}.png" for i in range(5)))
  train, test = (open_source(DataSettings("folder", root=str(tmp_path), split=split)) for split in ("train", "test"))
  assert overlap.warning(train, test) == ""
  for name, number in (("copy.png", 3), ("again.jpeg", 4)):
    (tmp_path / "test" / name).write_bytes((tmp_path / "train" / f"{number}.png").read_bytes())
  test = open_source(DataSettings("folder", root=str(tmp_path), split="test"))
  warned = overlap.warning(keep(train, 8), keep(test, 8))
  assert "of 7 held-out images that were compared, 2 are training images" in warned
  assert "copy.png = 3.png" in warned and "again.jpeg = 4.png" in warned
  whole = open_source(DataSettings("folder", root=str(tmp_path), split=""))  # data.split forgotten
  assert "of 7 held-out images that were compared, 7" in overlap.warning(whole, test)
