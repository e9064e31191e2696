"""WebDataset shards: the same records as a folder of the same images, and every mistake that shards can have."""

import concurrent.futures
import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from pirl_jax.data import reading, webdataset
from pirl_jax.data.batches import train_batches
from pirl_jax.data.sources import DataSettings, open_source
from pirl_jax.errors import UserError

LONG = "a" * 150  # longer than a tar header has room for


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "pirl_jax" / "webdataset"


def image_file(seed, file_format="PNG"):
  file = io.BytesIO()
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 8, 3), np.uint8)).save(file, file_format)
  return file.getvalue()


def write(path, files, tar_format=tarfile.PAX_FORMAT):
  """Writes (name, content) one after the other, as WebDataset's own writer does: with a fraction of a second in PAX."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w", format=tar_format) as tar:
    for name, content in files:
      member = tarfile.TarInfo(name)
      member.size, member.mtime = len(content), 1.5 if tar_format == tarfile.PAX_FORMAT else 1
      tar.addfile(member, io.BytesIO(content))
  return path


def opened(root, *, split="", labels="folder", class_names=None, **changes):
  return open_source(DataSettings("webdataset", root=str(root), split=split, labels=labels, **changes),
                     class_names=class_names)


def names_of(source):
  return [source.image_name(i) for i in range(len(source))]


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_records_and_batches_are_those_of_a_folder_with_the_same_images(tmp_path, tar_format):
  classes = ["cat", "dog", "ant"]
  long = "b" * 90 + "/" + "a" * 90 if tar_format == tarfile.USTAR_FORMAT else LONG + "é"
  for number in range(30):
    shard, name = f"s{number // 10}.tar", long if number == 3 else f"{number:04}"
    path = tmp_path / "folder" / classes[number % 3] / shard / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_file(number))
  folder = open_source(DataSettings("folder", root=str(tmp_path / "folder"), split="", labels="folder"))
  for shard in range(3):  # in the folder's order, in which the classes come one after the other
    write(tmp_path / "shards" / f"{shard}.tar", [
      (f"{index:02}/{os.path.basename(folder.image_name(index))[:-4]}.{ending}", content)
      for index in range(10 * shard, 10 * shard + 10)
      for ending, content in (("cls", folder.class_names[folder[index].label].encode()), ("PNG", folder[index].image))
    ], tar_format)
  source = opened(tmp_path / "shards")
  assert len(source) == 30 and source.class_names == folder.class_names == ("ant", "cat", "dog")
  assert all(source[i] == folder[i] for i in range(30))
  np.testing.assert_array_equal(source.labels(), folder.labels())
  assert source.image_name(11).startswith("1.tar/11/") and source.image_name(11).endswith(".PNG")
  assert "3 of them, 30 images, 3 classes" in source.description and "left out" not in source.description
  again = pickle.loads(pickle.dumps(source))
  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    order = np.random.default_rng(0).integers(0, 30, 500).tolist()
    assert list(threads.map(again.__getitem__, order)) == [folder[i] for i in order]

  def batch(images):
    stream = train_batches(images, crops={"image": (8, (0.2, 1.0))}, batch_size=8, seed=3, start_step=5, num_threads=2)
    found = next(stream)
    stream.close()
    return found
  for name, value in batch(folder).items():
    np.testing.assert_array_equal(value, batch(source)[name])


def test_labels_are_numbers_or_names_beside_the_image_or_in_json(tmp_path):
  write(tmp_path / "train" / "0.tar", [
    ("0.jpg", image_file(0)), ("0.cls", b"10\n"), ("1.cls", b"9"), ("1.jpg", image_file(1)),
    ("2.jpg", image_file(2)), ("2.json", json.dumps({"label": 2}).encode()), ("3.jpg", image_file(3)),
    ("4.jpg", image_file(4)), ("4.json", b'{"caption": "x"}'), ("5.jpg", image_file(5)), ("5.cls", b"-1"),
    ("6.json", b'{"label": 9}'), ("6.cls", b"10"), ("6.jpg", image_file(6))])
  source = opened(tmp_path, split="train")
  assert source.class_names == ("2", "9", "10") and source.labels().tolist() == [2, 1, 0, -1, -1, -1, 2]
  assert source.labels().dtype == np.int32 and [source[i].label for i in range(7)] == source.labels().tolist()
  assert opened(tmp_path, split="train", labels="none").labels() is None
  write(tmp_path / "val" / "0.tar", [("0.jpg", image_file(9)), ("0.cls", b"10")])
  held_out = opened(tmp_path, split="val", class_names=source.class_names)
  assert held_out.labels().tolist() == [2] and held_out.class_names == source.class_names
  with pytest.raises(UserError, match="class '10' of .* is not among the 1 classes of the training images .owl.; "):
    opened(tmp_path, split="train", class_names=("owl",))
  write(tmp_path / "bare" / "0.tar", [("0.jpg", image_file(9))])
  bare = opened(tmp_path, split="bare")
  assert bare.labels() is None and bare.class_names == () and "no labels" in bare.description
  write(tmp_path / "bad" / "0.tar", [("0.jpg", image_file(9)), ("0.json", b"{")])
  with pytest.raises(UserError, match=r"the label in .*0.tar/0.json cannot be read .*data.labels=none"):
    opened(tmp_path, split="bad")
  assert len(opened(tmp_path, split="bad", labels="none")) == 1


def test_a_pattern_names_shards_and_all_of_its_numbers_must_be_there(tmp_path):
  for name in ("a-train-08", "a-train-09", "a-train-10", "a-val-00"):
    write(tmp_path / f"{name}.tar", [(f"{name}.png", image_file(0))])
  assert len(opened(tmp_path)) == 4
  expected = [f"a-train-{n}.tar/a-train-{n}.png" for n in ("08", "09", "10")]
  for root, split in ((tmp_path, "*train*.tar"), (tmp_path / "a-train-{08..10}.tar", ""),
                      (f"{tmp_path}/a-{{train-08,train-09,train-1?}}.tar", "")):
    assert names_of(opened(root, split=split)) == expected
  assert names_of(opened(tmp_path / "a-val-00.tar")) == ["a-val-00.tar/a-val-00.png"]
  for root, split, words in (
      (tmp_path / "a-train-{08..12}.tar", "", r"2 of 5 shards are missing: .*/a-train-11.tar, .*/a-train-12.tar; "),
      (tmp_path, "b*.tar", "no shards in .*there are: a-train-08.tar, "),
      (tmp_path, "train", "split 'train' is neither a folder nor a pattern .*there are: a-train-08"),
      (tmp_path / "nowhere", "", "data.root=.*nowhere is neither"), ("", "", "data.root is empty")):
    with pytest.raises(UserError, match=words) as error:
      opened(root, split=split)
    assert "\n" not in str(error.value)


def test_what_is_left_out_is_counted_and_the_plain_name_is_the_image(tmp_path):
  write(tmp_path / "0.tar", [
    ("./", b""), ("./0.depth.png", b"x"), ("./0.jpg", image_file(0)), ("./0.seg.png", b"x"), ("._0.jpg", b"x"),
    ("1.heic", b"x"), ("1.cls", b"3"), ("2.jpg", b""), ("3.view.jpg", image_file(3))])
  source = opened(tmp_path)
  assert names_of(source) == ["0.tar/./0.jpg", "0.tar/3.view.jpg"] and source[0].image == image_file(0)
  for words in ("an empty file or no regular file: 1 (0.tar/2.jpg)", "samples without an image: 1 (0.tar/1.heic)",
                "warning: 50% of the samples"):
    assert words in source.description
  write(tmp_path / "0.tar", [("0.tif", image_file(0, "TIFF"))])
  with pytest.raises(UserError, match=r"no images in the 1 shards .*without an image: 1 \(0.tar/0.tif\): files"):
    opened(tmp_path)
  assert len(opened(tmp_path, formats="all")) == 1


def cut(path):
  path.write_bytes(path.read_bytes()[:1600])  # in the second image


def flip(path):
  content = bytearray(path.read_bytes())
  content[1024 + 5] ^= 1  # in the second header
  path.write_bytes(content)


def without_end(path):
  path.write_bytes(path.read_bytes()[:2048])


@pytest.mark.parametrize("harm, words", [
  (cut, "0.tar is damaged or cut short"), (flip, "0.tar is damaged or cut short .no header and no end at byte 1024"),
  (without_end, "no header and no end at byte 2048"), (lambda path: path.write_bytes(b""), "damaged or cut short"),
  (lambda path: path.write_bytes(b"\x1f\x8b" + path.read_bytes()), "0.tar is compressed.* gunzip"),
  (lambda path: path.rename(path.with_name("0.tar.zst")), "0.tar.zst is compressed"),
  (lambda path: write(path, [("0.png", b"x"), ("0.png", b"y")]), "holds 0.png twice"),
  (lambda path: write(path, [("IMG.1.jpg", b"x"), ("IMG.2.jpg", b"y")]),
   "has 2 images of one sample, IMG.1.jpg and IMG.2.jpg"),
  (lambda path: path.unlink(), "no shards in")])
def test_damaged_shards_are_named(tmp_path, harm, words):
  path = write(tmp_path / "set" / "0.tar", [("0.png", b"x" * 500), ("1.png", b"y" * 500)], tarfile.GNU_FORMAT)
  harm(path)
  with pytest.raises(UserError, match=words) as error:
    opened(tmp_path / "set")
  assert "\n" not in str(error.value)


def test_the_fingerprint_follows_shards_names_sizes_and_order(tmp_path):
  def fingerprint(name, **shards):
    for shard, files in shards.items():
      write(tmp_path / name / f"{shard}.tar", files)
    return opened(tmp_path / name).fingerprint

  files = [("0.png", b"xx"), ("1.png", b"yy")]
  same = fingerprint("one", a=files)
  assert fingerprint("two", a=files) == same == fingerprint("three", a=[*files, ("1.cls", b"4")])
  others = [fingerprint("b", b=files), fingerprint("c", a=files[::-1]), fingerprint("d", a=files, e=files),
            fingerprint("f", a=[files[0], ("1.png", b"y")]), fingerprint("g", a=[files[0], ("2.png", b"yy")]),
            fingerprint("h", a=files[:1], b=files[1:])]
  assert len({same, *others}) == 7


def test_the_index_is_read_once_and_again_if_a_shard_changes(tmp_path, monkeypatch, cache):
  path = write(tmp_path / "set" / "0.tar", [("0.png", image_file(0)), ("0.cls", b"4"), ("x.txt", b"")])
  scans, scan = [], webdataset._scan
  monkeypatch.setattr(webdataset, "_scan", lambda *given: scans.append(given) or scan(*given))
  first, again = opened(tmp_path / "set"), opened(tmp_path / "set")
  assert len(scans) == 1 and again[0] == first[0] == (image_file(0), 0)
  assert (again.fingerprint, again.description, again.class_names) == (
    first.fingerprint, first.description, first.class_names)
  stored, = cache.iterdir()
  stored.write_bytes(stored.read_bytes()[:-100])
  assert opened(tmp_path / "set").fingerprint == first.fingerprint and len(scans) == 2
  write(path, [("0.png", image_file(1)), ("1.png", image_file(2))])
  assert len(opened(tmp_path / "set")) == 2 and len(scans) == 3 and len(list(cache.iterdir())) == 1
  monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")  # nothing can be stored
  assert len(opened(tmp_path / "set")) == 2 and len(scans) == 4


def test_a_shard_that_changes_or_vanishes_ends_the_run_and_costs_no_image(tmp_path, monkeypatch):
  monkeypatch.setattr(reading, "PAUSES", (0.001,))
  path = write(tmp_path / "0.tar", [("0.png", image_file(0))])
  source = opened(tmp_path)
  path.write_bytes(path.read_bytes() + bytes(512))
  with pytest.raises(UserError, match="0.png .*0.tar has changed during the run: it had 10240 bytes and has 10752 now"):
    reading.read_record(source, 0)
  path.unlink()
  with pytest.raises(UserError, match="0.tar has vanished"):
    next(train_batches(source, crops={"image": (8, (1.0, 1.0))}, batch_size=1, seed=0, start_step=0, num_threads=0))
