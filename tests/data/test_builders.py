"""TFDS sets without TensorFlow: own builders on fabricated official archives, and what can go wrong."""

import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tarfile
import textwrap

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from archives import cifar_archive, write_archive
from array_record.python import array_record_module
from PIL import Image

from pirl_jax.data import reading, tfds_source
from pirl_jax.data.batches import eval_batches
from pirl_jax.data.crops import decode
from pirl_jax.data.records import same_images
from pirl_jax.data.sources import DataSettings, open_source
from pirl_jax.errors import UserError


def opened(root, name, split="train"):
  return open_source(DataSettings("tfds", name=name, root=str(root), split=split))


def stl_archive(root, counts=(("train", 12), ("test", 7), ("unlabeled", 9))):
  rng = np.random.default_rng(1)
  members, examples = {}, {}
  for split, count in counts:
    images = rng.integers(0, 256, (count, 96, 96, 3), dtype=np.uint8)
    labels = rng.integers(1, 11, count)
    # The format: three planes, each column by column.
    members[f"stl10_binary/{split}_X.bin"] = b"".join(
      image[:, x, c].tobytes() for image in images for c in range(3) for x in range(96)
    )
    if split != "unlabeled":
      members[f"stl10_binary/{split}_y.bin"] = bytes(labels.tolist())
    examples[split] = list(
      zip(images, (labels - 1).tolist() if split != "unlabeled" else [-1] * count, strict=True)
    )
  write_archive(root / "downloads" / "manual" / "stl10_binary.tar.gz", members)
  return examples


VOC = {  # split: {image: [(class, difficult), ...]}
  "train": {"000012": [("car", 0)], "000017": [("person", 0), ("Horse", 0), ("person", 1)], "000023": []},
  "val": {"000005": [("chair", 0), ("chair", 1)], "000007": [("car", 1), ("tvmonitor", 0)], "000009": [("bus", 1)]},
  "test": {f"{i:06d}": [("aeroplane", 0), ("dog", i % 2)] for i in range(1, 8)},
}


def annotation(objects):
  text = "".join(f"""<object><name>{name}</name><pose>Left</pose><truncated>1</truncated>
    <difficult>{difficult}</difficult><bndbox><xmin>5</xmin><ymin>4</ymin><xmax>15</xmax><ymax>8</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""
    for name, difficult in objects)
  return f"<annotation><size><width>20</width><height>16</height><depth>3</depth></size>{text}</annotation>".encode()


def voc_archives(root):
  """Writes both small archives; returns {split: {image: JPEG file}}."""
  rng = np.random.default_rng(2)
  files = {}
  for archive, splits in (("VOCtrainval_06-Nov-2007.tar", ("train", "val")), ("VOCtest_06-Nov-2007.tar", ("test",))):
    members = {}
    for split in splits:
      files[split] = {}
      for name, objects in VOC[split].items():
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(file, "JPEG")
        files[split][name] = file.getvalue()
        members[f"VOCdevkit/VOC2007/JPEGImages/{name}.jpg"] = file.getvalue()
        members[f"VOCdevkit/VOC2007/Annotations/{name}.xml"] = annotation(objects)
      members[f"VOCdevkit/VOC2007/ImageSets/Main/{split}.txt"] = "".join(f"{name}\n" for name in VOC[split]).encode()
      # Per class lists lie there too.
      members[f"VOCdevkit/VOC2007/ImageSets/Main/car_{split}.txt"] = b"000012  1\n"
    write_archive(root / "downloads" / "manual" / archive, members, "w")
  return files


def as_set(images):
  return {(image.tobytes(), label) for image, label in images}


def read_all(source):
  return [(decode(source[i].image), source[i].label) for i in range(len(source))]


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
  root = tmp_path_factory.mktemp("cifar")
  return root, cifar_archive(root), opened(root, "cifar10")


def test_cifar10_from_the_archive(cifar):
  root, images, train = cifar
  for split, source in (("train", train), ("test", opened(root, "cifar10", "test"))):
    assert len(source) == len(images[split])
    assert isinstance(source[0].image, bytes)
    assert as_set(read_all(source)) == as_set(images[split])
    assert source.labels().tolist() == [source[i].label for i in range(len(source))]
    assert source.labels().dtype == np.int32
  assert train.class_names[:2] == ("airplane", "automobile") and len(train.class_names) == 10
  assert not train.multi_label
  np.testing.assert_array_equal(train.targets(), np.eye(10, dtype=np.int8)[train.labels()])
  assert train.image_name(3) == "train[3]"
  assert "cifar10/3.0.2" in train.description and "100 images" in train.description
  again = pickle.loads(pickle.dumps(train))
  assert again[5] == train[5]


def test_stored_order_is_that_of_tfds_own_builder(cifar):
  _, images, train = cifar
  from tensorflow_datasets.core import hashing

  # TFDS stores records in the order of the hash of (split, key); its own CIFAR-10 has the running number as
  # key.
  hasher = hashing.Hasher("train")
  order = sorted(range(100), key=hasher.hash_key)
  np.testing.assert_array_equal(decode(train[0].image), images["train"][order[0]][0])
  assert train.labels().tolist() == [images["train"][i][1] for i in order]


def test_stl10_from_the_archive(tmp_path):
  images = stl_archive(tmp_path)
  for split, name in (("train", "train"), ("test", "test"), ("unlabelled", "unlabeled")):
    source = opened(tmp_path, "stl10", split)
    assert as_set(read_all(source)) == as_set(images[name])
    if split == "unlabelled":
      assert source.labels() is None and source.class_names == ()
    else:
      assert source.class_names[-1] == "truck"


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
  root = tmp_path_factory.mktemp("voc")
  return root, voc_archives(root)


@pytest.mark.parametrize("split, lists", [
  ("train", ["train"]), ("validation", ["val"]), ("train+validation", ["train", "val"]), ("test", ["test"])])
def test_voc2007_from_the_archives(voc, split, lists):
  root, files = voc
  source = opened(root, "voc/2007", split)
  files, objects = ({name: value for part in lists for name, value in of[part].items()} for of in (files, VOC))
  assert len(source) == len(files)
  # The files are kept as they are, not encoded again; the image says which annotation belongs to it.
  name_of = {file: name for name, file in files.items()}
  names = [name_of[source[i].image] for i in range(len(source))]
  assert sorted(names) == sorted(files)
  assert source.multi_label and source.labels() is None and source[0].label == -1
  assert len(source.class_names) == 20 and source.class_names[:2] == ("aeroplane", "bicycle")
  targets = source.targets()
  assert targets.dtype == np.int8 and targets.shape == (len(files), 20)
  for name, row in zip(names, targets, strict=True):
    # As the devkit's lists of a class: 1 where one object at least is not difficult, 0 (here -1) where all are.
    expected = {}
    for label, difficult in objects[name]:
      expected[label.lower()] = max(expected.get(label.lower(), -1), -1 if difficult else 1)
    assert {source.class_names[i]: int(row[i]) for i in np.flatnonzero(row)} == expected
  assert source.targets() is targets  # read once
  assert "20 classes, any number of them in an image" in source.description
  again = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(again.targets(), targets)


def test_voc2007_is_stored_as_tfds_stores_it(voc):
  root, _ = voc
  ours = opened(root, "voc/2007", "train+validation")
  # TFDS's own builder reads what ours has prepared, the objects too: a set prepared by either serves the other.
  theirs = tfds.builder("voc/2007", data_dir=root)
  assert theirs.data_dir == tfds_source.OWN_BUILDERS["voc/2007"](data_dir=root).data_dir
  records = theirs.as_data_source("train+validation", decoders={"image": tfds.decode.SkipDecoding()})
  assert len(records) == len(ours) == 6
  for i, record in enumerate(records):
    assert record["image"] == ours[i].image
    name = record["image/filename"].decode().removesuffix(".jpg")
    objects = (VOC["train"] | VOC["val"])[name]
    found = record["objects"]
    names = [ours.class_names[label] for label in found["label"]]
    assert names == [label.lower() for label, _ in objects]
    assert found["is_difficult"] == [bool(difficult) for _, difficult in objects]
    assert all(found["is_truncated"]) and all(pose == 2 for pose in found["pose"])
    np.testing.assert_allclose(found["bbox"], [[4 / 16, 5 / 20, 8 / 16, 15 / 20]] * len(objects))


@pytest.mark.parametrize("damage", ["cut", "image missing", "no archive"])
def test_damaged_voc_archives(tmp_path, damage):
  voc_archives(tmp_path)
  path = tmp_path / "downloads" / "manual" / "VOCtest_06-Nov-2007.tar"
  if damage == "cut":
    path.write_bytes(path.read_bytes()[:7000])
  elif damage == "image missing":
    write_archive(path, {"VOCdevkit/VOC2007/ImageSets/Main/test.txt": b"000001\n"}, "w")
  else:
    path.write_bytes(b"<html>not found</html>")
  message = one_line(opened, tmp_path, "voc/2007", "test")
  assert str(path) in message and "fetch it again" in message
  assert not list((tmp_path / "voc" / "2007").iterdir())


def test_fingerprints(cifar, tmp_path):
  root, _, train = cifar
  assert opened(root, "cifar10").fingerprint == train.fingerprint
  cifar_archive(tmp_path / "again")
  assert opened(tmp_path / "again", "cifar10").fingerprint == train.fingerprint
  cifar_archive(tmp_path / "smaller", per_file=19)
  others = [
    opened(root, "cifar10", "test"),
    opened(root, "cifar10", "train[:50%]"),
    opened(tmp_path / "smaller", "cifar10"),
  ]
  assert len({train.fingerprint, *(other.fingerprint for other in others)}) == 4
  assert len(others[1]) == 50


def one_line(call, *arguments):
  with pytest.raises(UserError) as error:
    call(*arguments)
  assert "\n" not in str(error.value)
  return str(error.value)


def test_unknown_names_and_splits(cifar, tmp_path):
  root = cifar[0]
  assert "there are: train, test" in one_line(opened, root, "cifar10", "tain")
  assert "is empty" in one_line(opened, root, "cifar10", "train[:0]")
  assert "cifar10, cifar100" in one_line(opened, tmp_path, "cifr10")
  assert "catalog" in one_line(opened, tmp_path, "qqqqqqqqqqqq")
  assert "only: 3.0.2" in one_line(opened, tmp_path, "cifar10:1.0.0")
  assert "data.name is empty" in one_line(opened, tmp_path, "")
  one_line(opened, tmp_path, "a b/c:d")
  assert not list(tmp_path.iterdir())


def test_no_network_and_no_archive(tmp_path, monkeypatch):
  def refuse(*_, **__):
    raise requests.ConnectionError("no route")

  monkeypatch.setattr(requests, "get", refuse)
  message = one_line(opened, tmp_path, "stl10")
  assert "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz" in message
  assert str(tmp_path / "downloads" / "manual" / "stl10_binary.tar.gz") in message


def test_an_archive_cannot_write_outside(tmp_path):
  """Only members of the known names are read, and none is unpacked."""
  root = tmp_path / "root" / "data"
  cifar_archive(root)
  path = root / "downloads" / "manual" / "cifar-10-binary.tar.gz"
  with tarfile.open(path) as archive:
    members = {entry.name: archive.extractfile(entry).read() for entry in archive}
  evil = "../../../evil.txt", str(tmp_path / "absolute.txt"), "cifar-10-batches-bin/../../evil.bin"
  write_archive(path, {**dict.fromkeys(evil, b"x"), **members})
  assert len(opened(root, "cifar10")) == 100
  outside = [path for path in tmp_path.rglob("*") if path.is_file() and root not in path.parents]
  assert not outside and not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("damage", ["cut inside a record", "member missing", "archive cut", "no archive"])
def test_damaged_archives_leave_no_half_prepared_set(tmp_path, damage):
  path = tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz"
  cifar_archive(tmp_path, cut=100 if damage == "cut inside a record" else 0)
  if damage == "member missing":
    write_archive(path, {"cifar-10-batches-bin/data_batch_1.bin": bytes(3073)})
  elif damage == "archive cut":
    path.write_bytes(path.read_bytes()[:-5000])
  elif damage == "no archive":
    path.write_bytes(b"<html>not found</html>")
  message = one_line(opened, tmp_path, "cifar10")
  assert str(path) in message and "fetch it again" in message
  assert not list((tmp_path / "cifar10").iterdir())
  cifar_archive(tmp_path)
  assert len(opened(tmp_path, "cifar10")) == 100


def test_another_file_format_names_the_command(tmp_path):
  cifar_archive(tmp_path)
  folder = tmp_path / "cifar10" / "3.0.2"
  opened(tmp_path, "cifar10")
  info = json.loads((folder / "dataset_info.json").read_text())
  info["fileFormat"] = "tfrecord"
  (folder / "dataset_info.json").write_text(json.dumps(info))
  for path in folder.glob("*array_record*"):
    path.rename(folder / path.name.replace("array_record", "tfrecord"))
  message = one_line(opened, tmp_path, "cifar10")
  assert f"tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record" in message


def test_damaged_files_of_a_prepared_set(tmp_path):
  cifar_archive(tmp_path)
  opened(tmp_path, "cifar10")
  for path in (tmp_path / "cifar10" / "3.0.2").glob("*train*array_record*"):
    path.unlink()
  assert "move that folder away" in one_line(opened, tmp_path, "cifar10")


class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A set of the usual kind; arrays as images need TensorFlow to become PNG."""

  VERSION = tfds.core.Version("1.0.0")
  as_array = False
  url_infos = None

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "photo": tfds.features.Image(shape=(None, None, 3)),
          "fine": tfds.features.ClassLabel(names=["a", "b"]),
          "coarse": tfds.features.ClassLabel(names=["c"]),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i in range(4):
      image = np.full((5, 6, 3), i, np.uint8)
      yield i, {"photo": image if self.as_array else Image.fromarray(image), "fine": i % 2, "coarse": 0}


def test_the_image_is_found_by_its_type_and_two_labels_are_none(tmp_path, monkeypatch):
  monkeypatch.setattr(tfds, "builder", lambda name, data_dir: Toy(data_dir=data_dir))
  source = opened(tmp_path, "toy")
  assert {int(decode(source[i].image)[0, 0, 0]) for i in range(4)} == {0, 1, 2, 3}
  assert source.labels() is None and source.class_names == () and source[0].label == -1
  assert "no labels" in source.description


def test_a_single_sequence_of_labels_is_multi_label(tmp_path, monkeypatch):
  class Tags(Toy, skip_registration=True):
    def _info(self):
      label = tfds.features.ClassLabel(names=["a", "b", "c"])
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
        {"photo": tfds.features.Image(shape=(None, None, 3)), "tags": tfds.features.Sequence(label)}))

    def _generate_examples(self):
      for i in range(4):
        yield i, {"photo": Image.new("RGB", (4, 4), (i, i, i)), "tags": list(range(i))}

  monkeypatch.setattr(tfds, "builder", lambda name, data_dir: Tags(data_dir=data_dir))
  source = opened(tmp_path, "tags")
  assert source.multi_label and source.labels() is None and source.class_names == ("a", "b", "c")
  images = [int(decode(source[i].image)[0, 0, 0]) for i in range(4)]
  np.testing.assert_array_equal(source.targets(), np.tri(5, 3, -1, dtype=np.int8)[images])


def test_a_set_that_needs_tensorflow_names_the_one_command(tmp_path, monkeypatch):
  monkeypatch.setattr(Toy, "as_array", True)
  monkeypatch.setattr(tfds, "builder", lambda name, data_dir: Toy(data_dir=data_dir))
  message = one_line(opened, tmp_path, "toy")
  assert "TFDS needs tensorflow once" in message
  assert f"tfds build toy --file_format=array_record --data_dir={tmp_path}" in message


def test_tensorflow_is_never_imported(cifar):
  # TensorFlow appears installed (etils looks for it), but nobody may load it.
  code = textwrap.dedent("""
    import importlib.machinery, sys

    class Trap:
      tried = []
      def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorflow":
          return importlib.machinery.ModuleSpec(name, self)
      def create_module(self, spec):
        self.tried.append(spec.name)
        raise ImportError("TensorFlow was imported")

    sys.meta_path.insert(0, Trap())
    from pirl_jax.data.batches import eval_batches, train_batches
    from pirl_jax.data.sources import DataSettings, open_source

    source = open_source(DataSettings("tfds", name="cifar10", root=sys.argv[1]))
    stream = train_batches(source, crops={"image_crop": (32, (0.2, 1.0)), "pretext_crop": (36, (0.6, 1.0))},
                           batch_size=32, seed=0, start_step=0, num_threads=2)
    assert all(next(stream)["valid"].all() for _ in range(4))
    stream.close()
    assert sum(batch["valid"].sum() for batch in eval_batches(
      source, batch_size=32, image_size=32, crop_fraction=1.0, num_threads=2)) == 100
    assert len(source.labels()) == 100
    assert not Trap.tried and "tensorflow" not in sys.modules, Trap.tried
    print("read without TensorFlow")
  """)
  done = subprocess.run(
    [sys.executable, "-c", code, str(cifar[0])], capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0 and "read without TensorFlow" in done.stdout, done.stderr


def test_own_builders_are_those_of_tfds_in_name_version_and_features(tmp_path):
  for name, builder in tfds_source.OWN_BUILDERS.items():
    ours, theirs = builder(data_dir=tmp_path), tfds.builder(name, data_dir=tmp_path)
    assert ours.info.full_name == theirs.info.full_name
    assert ours.info.features.get_serialized_info() == theirs.info.features.get_serialized_info()


@pytest.fixture
def records(tmp_path):
  """Returns (a copy of a prepared set of 200 records, its source, the file, the offset of each record's image)."""
  cifar_archive(tmp_path, per_file=40)
  source = opened(tmp_path, "cifar10")
  path, = (tmp_path / "cifar10" / "3.0.2").glob("*train*array_record*")
  content = path.read_bytes()
  return tmp_path, source, path, [content.index(source[i].image[100:200]) for i in range(len(source))]


def flip(path, offset):
  content = bytearray(path.read_bytes())
  content[offset] ^= 4
  path.write_bytes(bytes(content))


def test_a_damaged_record_is_a_broken_image_like_any_other(records):
  root, source, path, offsets = records
  whole, labels = [source[i] for i in range(200)], source.labels()
  flip(path, offsets[20])
  damaged = opened(root, "cifar10")
  assert damaged.fingerprint == source.fingerprint and "damaged record" in reading.why_broken(damaged, 20)
  assert reading.read_image(damaged, 20, lambda image: image) == (None, -1)
  assert [damaged[i] for i in range(200) if i != 20] == [whole[i] for i in range(200) if i != 20]
  assert damaged.labels()[20] == -1 and (np.delete(damaged.labels(), 20) == np.delete(labels, 20)).all()
  batch, *_ = eval_batches(damaged, batch_size=200, image_size=8, crop_fraction=1.0, num_threads=2)
  assert np.flatnonzero(~batch["valid"]).tolist() == [20]
  flip(path, offsets[0])  # its pixels are a part of the fingerprint
  other = opened(root, "cifar10")
  assert other.fingerprint != source.fingerprint and same_images(source.fingerprint, other.fingerprint)
  assert not same_images(source.fingerprint, other.fingerprint.replace("200", "201"))
  assert "damaged record" in reading.why_broken(other, 0) and len(other) == 200


def test_a_shard_that_is_gone_or_cut_or_cannot_be_opened_costs_no_image_its_weight(records, monkeypatch):
  root, source, path, offsets = records
  monkeypatch.setattr(reading, "PAUSES", (0.001,))
  whole, content = [source[i] for i in range(200)], path.read_bytes()
  fresh = pickle.loads(pickle.dumps(source))
  for change, said, readers in (
      (lambda: path.rename(root / "away"), "No such file or directory", [fresh]),  # the other has opened the file
      (lambda: path.write_bytes(b""), "has changed during the run: it had", [fresh]),
      (lambda: path.write_bytes(content), "", []),
      (lambda: os.truncate(path, 80_000), "has changed during the run: it had", [fresh])):
    change()
    for one in readers:
      with pytest.raises(UserError, match=rf"train\[150\] cannot be read .*{said}"):
        reading.read_image(one, 150, lambda image: image)
  with open(path, "r+b") as file:
    file.write(content)
  for one in (source, fresh):  # both go on, and then see the same file being cut
    assert [one[i] for i in range(200)] == whole
  os.truncate(path, 80_000)
  with pytest.raises(UserError, match=r"train\[199\] cannot be read .*has changed during the run"):
    reading.read_image(fresh, 199, lambda image: image)
  path.write_bytes(content)
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  fresh = pickle.loads(pickle.dumps(source))
  first_free = os.dup(0)
  os.close(first_free)
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, limits[1]))
    with pytest.raises(UserError, match="Too many open files"):
      reading.read_record(fresh, 3)
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
  assert fresh[3] == whole[3]


def test_a_record_that_does_not_parse_is_broken(tmp_path):
  cifar_archive(tmp_path)
  opened(tmp_path, "cifar10")
  path, = (tmp_path / "cifar10" / "3.0.2").glob("*train*array_record*")
  reader = array_record_module.ArrayRecordReader(str(path))
  stored = reader.read_all()
  reader.close()
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for number, record in enumerate(stored):
    writer.write({30: b"", 31: b"no record", 33: record[:-20]}.get(number, record))
  writer.close()
  source = opened(tmp_path, "cifar10")
  assert [i for i in range(100) if reading.why_broken(source, i)] == [30, 31, 33]


def test_no_module_is_imported_that_features_name(tmp_path):
  cifar_archive(tmp_path)
  opened(tmp_path, "cifar10")
  folder = tmp_path / "mine" / "1.0.0"
  (tmp_path / "cifar10" / "3.0.2").rename(tmp_path / "moved")
  folder.parent.mkdir()
  (tmp_path / "moved").rename(folder)
  for path in folder.iterdir():
    path.write_bytes(path.read_bytes().replace(b'"cifar10"', b'"mine"'))
    path.rename(folder / path.name.replace("cifar10", "mine"))
  assert len(opened(tmp_path, "mine")) == 100
  features = folder / "features.json"
  features.write_text(features.read_text().replace("tensorflow_datasets.core.features.image_feature.Image",
                                                   "wsgiref.simple_server.WSGIServer"))
  sys.modules.pop("wsgiref.simple_server", None)
  assert "wsgiref.simple_server.WSGIServer, which is no feature of TFDS" in one_line(opened, tmp_path, "mine")
  assert "wsgiref.simple_server" not in sys.modules
