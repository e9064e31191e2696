"""Sources: what an index means, what is left out, and every mistake a user can make with a folder."""

import errno
import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from pirl_jax.data import reading
from pirl_jax.data.crops import decode
from pirl_jax.data.sources import DataSettings, open_source
from pirl_jax.errors import UserError


def opened(source, *, class_names=None, **changes):
  given = dict(split="", image_size=32, num_images=20 if source == "embedded" else 0) | changes
  return open_source(DataSettings(source, **given), class_names=class_names)


def file_of(colour, file_format="PNG"):
  file = io.BytesIO()
  Image.new("RGB", (4, 4), (colour, colour, colour)).save(file, file_format)
  return file.getvalue()


def fill(root, files):
  for path, data in files.items():
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
  return str(root)


def test_embedded():
  source = opened("embedded", split="train")
  assert len(source) == 20 and len(source.class_names) == 10
  assert source[3].image.shape == (32, 32, 3) and source[3].label == source.labels()[3]
  np.testing.assert_array_equal(source.targets(), np.eye(10)[source.labels()])
  assert source.class_names[3] in source.image_name(3) and "3" in source.image_name(3)
  fingerprints = {
    opened("embedded", **changes).fingerprint
    for changes in (
      {"split": "train"},
      {"split": "test"},
      {"image_size": 64},
      {"num_images": 21},
    )
  }
  assert len(fingerprints) == 4
  again = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(again[7].image, source[7].image)


@pytest.mark.parametrize("changes, words", [
  ({"num_images": 0}, "num_images"), ({"image_size": 4}, "4 px"),
  ({"num_images": 10**12}, "2,861,023 GiB.* take fewer"), ({"image_size": 10**6}, "held in memory")])
def test_impossible_embedded_sets(changes, words):
  with pytest.raises(UserError, match=words):
    opened("embedded", **changes)


def test_unknown_choices_list_the_choices():
  with pytest.raises(UserError, match="embedded, folder, tfds"):
    opened("web")
  with pytest.raises(UserError, match="none, folder"):
    opened("folder", labels="yes")


def test_folder_is_sorted_by_path_and_read_by_index(tmp_path):
  files = {
    "b/2.PNG": file_of(1),
    "a.webp": file_of(2, "WEBP"),
    "b/10.bmp": file_of(3, "BMP"),
    "B/x.JPeG": file_of(4, "JPEG"),
  }
  source = opened("folder", root=fill(tmp_path, files))
  names = [source.image_name(i) for i in range(len(source))]
  assert names == ["B/x.JPeG", "a.webp", "b/10.bmp", "b/2.PNG"]  # byte by byte, in any locale
  assert [int(decode(source[i].image)[0, 0, 0]) for i in range(4)] == [4, 2, 3, 1]
  assert all(isinstance(source[i].image, bytes) and source[i].label == -1 for i in range(4))
  assert source.labels() is None and source.targets() is None and source.class_names == ()
  again = pickle.loads(pickle.dumps(source))
  assert again[2].image == source[2].image


def test_folder_says_what_it_left_out(tmp_path):
  root = fill(
    tmp_path,
    {
      "ok.png": file_of(1),
      "empty.png": b"",
      ".hidden.png": file_of(1),
      ".cache/x.png": file_of(1),
      "notes.txt": b"x",
      **{f"more/{i}.gif": b"x" for i in range(5)},
    },
  )
  os.symlink("nowhere.png", tmp_path / "dangling.png")
  os.symlink("..", tmp_path / "more" / "loop")
  os.mkfifo(tmp_path / "pipe.png")
  source = opened("folder", root=root)
  assert [source.image_name(i) for i in range(len(source))] == ["ok.png"]
  for words in (
    "1 images",
    "empty file: 1 (empty.png)",
    "hidden: 2 (.cache, .hidden.png)",
    "by its ending: 6 (.gif 5, .txt 1)",
    "warning: 91% of the files were left out",
    "broken link: 1 (dangling.png)",
    "link to a folder above it: 1 (more/loop)",
    "not a regular file: 1 (pipe.png)",
  ):
    assert words in source.description, (words, source.description)


def test_every_format_that_can_be_decoded_is_read_if_all_are_asked_for(tmp_path):
  image = Image.fromarray(np.full((9, 8, 3), 200, np.uint8))
  for ending, file_format in ((".jfif", "JPEG"), (".JPE", "JPEG"), (".tif", "TIFF"), (".tiff", "TIFF"),
                              (".gif", "GIF"), (".avif", "AVIF"), (".bmp", "BMP")):
    image.save(tmp_path / f"image{ending}", file_format)
  assert len(opened("folder", root=str(tmp_path))) == 1
  source = open_source(DataSettings("folder", root=str(tmp_path), split="", formats="all"))
  assert len(source) == 7 and "left out" not in source.description
  assert all(np.abs(decode(source[i].image).astype(int) - 200).max() <= 2 for i in range(7))
  with pytest.raises(UserError, match="data.formats='most' is unknown; choose from common, all"):
    open_source(DataSettings("folder", root=str(tmp_path), split="", formats="most"))


def test_links_to_folders_are_followed(tmp_path):
  fill(tmp_path / "elsewhere", {"1.png": file_of(1)})
  (tmp_path / "root").mkdir()
  os.symlink("../elsewhere", tmp_path / "root" / "linked")
  assert opened("folder", root=str(tmp_path / "root")).image_name(0) == "linked/1.png"


def test_odd_names(tmp_path):
  names = [b"new\nline.png", b"latin1-\xe9.png", "utf8-é".encode() + b".png", b"-rf *.png", b"quo'te\".png"]
  for number, name in enumerate(names):
    with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
      file.write(file_of(number))
  source = opened("folder", root=str(tmp_path))
  assert len(source) == len(names)
  found = {int(decode(source[i].image)[0, 0, 0]): source.image_name(i) for i in range(len(source))}
  assert found[0] == r"new\nline.png" and found[2] == "utf8-é.png"
  "\n".join(found.values()).encode()  # printable: no lone surrogate
  assert pickle.loads(pickle.dumps(source)).fingerprint == source.fingerprint


def test_fingerprint_follows_names_and_sizes_only(tmp_path):
  def fingerprint(files, name):
    return opened("folder", root=fill(tmp_path / name, files)).fingerprint

  files = {"a.png": file_of(1), "b/c.png": file_of(2)}
  same = fingerprint(files, "one")
  assert fingerprint(files, "two") == same
  os.utime(tmp_path / "one" / "a.png", (0, 0))
  assert opened("folder", root=str(tmp_path / "one")).fingerprint == same
  others = [
    {"a.png": file_of(1)},
    {"a.png": file_of(1), "b/d.png": file_of(2)},
    {"a.png": file_of(1) + b"x", "b/c.png": file_of(2)},
  ]
  assert len({same, *(fingerprint(other, f"other{i}") for i, other in enumerate(others))}) == 4


def test_labels_from_folders_agree_between_splits(tmp_path):
  root = fill(
    tmp_path,
    {
      "train/cat/1.png": file_of(1),
      "train/ant/deep/2.png": file_of(2),
      "train/dog/3.png": file_of(3),
      "train/loose.png": file_of(4),
      "test/dog/5.png": file_of(5),
      "other/eel/6.png": file_of(6),
    },
  )
  train = opened("folder", root=root, split="train", labels="folder")
  assert train.class_names == ("ant", "cat", "dog")
  assert train.labels().tolist() == [0, 1, 2, -1] and train.labels().dtype == np.int32
  assert train[1].label == 1 and train[3].label == -1
  assert train.targets().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]  # the last one: labels() < 0
  assert train.targets().dtype == np.int8 and not train.multi_label
  test = opened("folder", root=root, split="test", labels="folder", class_names=train.class_names)
  assert test.labels().tolist() == [2]
  with pytest.raises(UserError, match="'eel'.*ant, cat, dog"):
    opened("folder", root=root, split="other", labels="folder", class_names=train.class_names)


@pytest.mark.parametrize(
  "files, changes, words",
  [
    ({}, {}, "no images"),
    ({"a.txt": b"x"}, {}, "not an image by its ending: 1 .a.txt."),
    ({"a.png": b"x"}, {"labels": "folder"}, "data.labels=none"),
    ({"train/a.png": b"x", ".git/x": b""}, {"split": "tset"}, "'tset'.*there are: train; "),
    ({"a.png": b"x"}, {"split": "train"}, "none at all"),
    ({"train/a.png": b"x", "test/a.txt": b"x"}, {"split": "test"}, "no images in .*test"),
  ],
)
def test_mistakes_with_folders(tmp_path, files, changes, words):
  with pytest.raises(UserError, match=words) as error:
    opened("folder", root=fill(tmp_path, files), **changes)
  assert "\n" not in str(error.value)


def test_no_root_and_no_folder(tmp_path):
  with pytest.raises(UserError, match="data.root is empty"):
    opened("folder")
  with pytest.raises(UserError, match="is not a folder"):
    opened("folder", root=str(tmp_path / "nowhere"))


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
  root = fill(tmp_path, {"a.png": file_of(1), "secret/b.png": file_of(1)})
  listdir = os.listdir

  # The tests may run as root, whom no permission stops.
  def refuse(folder):
    if str(folder).endswith("secret"):
      raise PermissionError(13, "Permission denied", folder)
    return listdir(folder)

  monkeypatch.setattr(os, "listdir", refuse)
  with pytest.raises(UserError, match="secret cannot be listed .Permission denied."):
    opened("folder", root=root)


def test_an_image_alone_is_broken_and_its_folder_is_not(tmp_path, monkeypatch):
  monkeypatch.setattr(reading, "PAUSES", (0.001,))
  names = ("cat/gone", "cat/folder", "cat/pipe", "cat/huge", "cat/loop", "cat/whole", "dog/a", "eel/a", "fox/a")
  root = tmp_path / "root"
  source = opened("folder", root=fill(root, {f"{name}.png": file_of(1) for name in names}))
  index = {source.image_name(i).removesuffix(".png"): i for i in range(len(source))}
  for name in names[:5]:
    (root / f"{name}.png").unlink()
  (root / "cat" / "folder.png").mkdir()
  os.mkfifo(root / "cat" / "pipe.png")
  with open(root / "cat" / "huge.png", "wb") as file:
    file.truncate(300 * 2**30)
  os.symlink("loop.png", root / "cat" / "loop.png")
  for name, reason in (("gone", "No such file"), ("folder", "Is a directory"), ("pipe", "not a regular file"),
                       ("huge", "322,122,547,200 bytes are too many"), ("loop", "Too many levels of")):
    assert reading.read_image(source, index[f"cat/{name}"], lambda image: image.pixels()) == (None, -1)
    assert reason in reading.why_broken(source, index[f"cat/{name}"])
  (root / "dog").rename(tmp_path / "dog")  # taken away; another folder in its place, as after an unmount
  (root / "eel").rename(tmp_path / "eel")
  (root / "eel").mkdir()
  for name in ("dog", "eel"):
    with pytest.raises(UserError, match=f"{name}/a.png cannot be read .*(vanished during the run|another folder)"):
      reading.read_image(source, index[f"{name}/a"], lambda image: image.pixels())
  root.rename(tmp_path / "moved")
  with pytest.raises(UserError, match="fox has vanished during the run"):
    reading.read_image(source, index["fox/a"], lambda image: image.pixels())
  for path in (tmp_path / "dog", tmp_path / "eel"):
    (tmp_path / "moved" / "eel").rmdir() if path.name == "eel" else None
    path.rename(tmp_path / "moved" / path.name)
  (tmp_path / "moved").rename(root)
  assert all(reading.why_broken(source, index[f"{name}/a"]) == "" for name in ("dog", "eel", "fox"))


@pytest.mark.parametrize("refused, broken", [
  (("a.png",), True), (("a.png", "b.png"), False), ((".png", "root"), False)])
def test_a_file_that_may_not_be_read_is_broken_if_another_of_its_folder_may(refused, broken, tmp_path, monkeypatch):
  monkeypatch.setattr(reading, "PAUSES", (0.001,))
  source = opened("folder", root=fill(tmp_path / "root", {"a.png": file_of(1), "b.png": file_of(1)}))
  for name in ("open", "listdir"):
    real = getattr(os, name)
    def refuse(path, *given, real=real):
      if str(path).endswith(refused):
        raise PermissionError(13, "Permission denied", path)
      return real(path, *given)
    monkeypatch.setattr(os, name, refuse)
  if broken:
    assert reading.why_broken(source, 0) == "Permission denied"
  else:
    with pytest.raises(UserError, match="a.png cannot be read because the disk or the network fails .*Permission"):
      reading.why_broken(source, 0)


def test_folders_that_are_linked_to_each_other_are_read_once(tmp_path):
  fill(tmp_path, {f"root/{i}/{i}.png": file_of(i) for i in range(8)} | {"away/in/x.png": file_of(9)})
  for one in range(8):
    for other in range(8):
      os.symlink(f"../{other}", tmp_path / "root" / f"{one}" / f"to{other}")
  os.symlink("../away/in", tmp_path / "root" / "first")
  os.symlink("../away", tmp_path / "root" / "second")
  os.symlink("0/0.png", tmp_path / "root" / "same.png")
  os.symlink("../other.png", tmp_path / "root" / "u.png")
  os.symlink("../other.png", tmp_path / "root" / "v.png")
  fill(tmp_path, {"other.png": file_of(10)})
  os.link(tmp_path / "root" / "0" / "0.png", tmp_path / "root" / "hard.png")
  source = opened("folder", root=str(tmp_path / "root"))
  assert names_of(source) == [*(f"{i}/{i}.png" for i in range(8)), "first/x.png", "hard.png", "u.png"]
  for reason in ("link to a folder above it: 8", "link to a folder that is read already: 56", "by a link: 1",
                 "link to an image that is read already: 2 (same.png, v.png)"):
    assert reason in source.description


def test_a_failure_while_listing_is_tried_again_and_never_leaves_an_image_out(tmp_path, monkeypatch):
  root = fill(tmp_path, {"a/a.png": file_of(1), "b/b.png": file_of(1)})
  for name, ending in (("lstat", "b.png"), ("listdir", "/b")):
    for lasting in (False, True):
      failures = [OSError(errno.EIO, "Input/output error")] * (9 if lasting else 1)
      real = getattr(os, name)
      def fail(path, real=real, ending=ending, failures=failures):
        if str(path).endswith(ending) and failures:
          raise failures.pop()
        return real(path)
      with monkeypatch.context() as patch:
        patch.setattr(reading, "PAUSES", (0.001,) * 3)
        patch.setattr(os, name, fail)
        if lasting:
          with pytest.raises(UserError, match=f"{ending} cannot be read because the disk or the network fails"):
            opened("folder", root=root)
        else:
          assert len(opened("folder", root=root)) == 2 and not failures


def test_a_number_of_images_of_a_folder_is_a_random_subset_the_same_each_time(tmp_path):
  root = fill(tmp_path, {f"{name}/{i:02}.png": file_of(i) for name in ("ant", "bee") for i in range(30)})
  whole = opened("folder", root=root, labels="folder")
  source = opened("folder", root=root, labels="folder", num_images=12)
  names = [source.image_name(i) for i in range(12)]
  assert len(source) == 12 and len(set(names)) == 12
  assert names == sorted(names)  # in the folder's order
  assert names == [opened("folder", root=root, labels="folder", num_images=12).image_name(i) for i in range(12)]
  # Not the first ones, nor every so many: both folders, without a rule.
  index = [names_of(whole).index(name) for name in names]
  assert index[-1] >= 40 and len(set(np.diff(index))) > 2
  assert all(int(decode(source[i].image)[0, 0, 0]) == int(names[i][-6:-4]) for i in range(12))
  np.testing.assert_array_equal(source.labels(), whole.labels()[index])
  assert set(names) < set(names_of(opened("folder", root=root, num_images=20)))
  assert source.class_names == whole.class_names == ("ant", "bee")
  fingerprints = {opened("folder", root=root, labels="folder", num_images=number).fingerprint
                  for number in (0, 12, 13, 60)}
  assert len(fingerprints) == 4 and opened("folder", root=root, labels="folder").fingerprint in fingerprints
  assert "12 of: " in source.description
  assert pickle.loads(pickle.dumps(source)).fingerprint == source.fingerprint


def names_of(source):
  return [source.image_name(i) for i in range(len(source))]


def test_all_of_a_folder_and_more_than_it_has(tmp_path):
  root = fill(tmp_path, {f"{i}.png": file_of(i) for i in range(3)})
  assert names_of(opened("folder", root=root, num_images=0)) == ["0.png", "1.png", "2.png"]
  assert len(opened("folder", root=root, num_images=3)) == 3
  with pytest.raises(UserError, match="num_images=4, but there are only 3 images; 0 takes all"):
    opened("folder", root=root, num_images=4)
