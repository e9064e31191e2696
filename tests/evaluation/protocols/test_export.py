"""Exported features: those of a plain forward pass, in files that others can read, whole or not at all."""

import json
import os
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launching import ROOT
from pyarrow import parquet

from pirl_jax.data.embedded import TextureSource
from pirl_jax.errors import UserError
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.protocols import export
from pirl_jax.models.heads import ImageHead, PatchesHead
from pirl_jax.models.network import Model, Network, create_variables
from pirl_jax.models.resnet import create_resnet
from pirl_jax.runtime.mesh import create_mesh

NUM = 37


class Odd(TextureSource):
  """Images 3, 20 and 36 are broken, every fifth has no label, and the names are a trial."""

  broken = (3, 20, 36)

  def __getitem__(self, index):
    record = super().__getitem__(index)
    record = record._replace(label=-1) if index % 5 == 0 else record
    return record._replace(image=b"broken") if index in self.broken else record

  def image_name(self, index):
    return f"Käfer/{'ü' * index} 猫 {index}.jpg"


SOURCE = Odd(NUM, size=16, split="train")
KEPT = np.setdiff1d(np.arange(NUM), Odd.broken)


@pytest.fixture(scope="module")
def model():
  network = Network(create_resnet("resnet8", stem="3x3s2"), ImageHead(12), PatchesHead(12))
  return Model(network, create_variables(
    network, jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 9, 5, 5, 3))))


def plain_features(model, layer):
  """One image after the other, by the network itself."""
  forward = jax.jit(lambda image: model.network.apply(model.variables, image, method="features"))
  mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
  rows = []
  for index in KEPT:
    image = (TextureSource.__getitem__(SOURCE, index).image / np.float32(255) - mean) / std
    pooled = forward(image[None])["pooled"]
    rows.append(np.asarray(pooled)[0])
    if layer == "embedding":
      dense = jax.tree.map(np.asarray, model.variables["params"]["image_head"]["embedding"])
      rows[-1] = rows[-1] @ dense["kernel"] + dense["bias"]
  return np.stack(rows)


def exported(model, path, *, source=SOURCE, num_devices=1, batch_size=8, num_threads=0, layer="pooled"):
  images = Images(source, 16, 1.0, batch_size, num_threads)
  settings = export.ExportSettings(layer=layer, splits=(), format=path.suffix[1:])
  return export.export_features(model, images, settings, mesh=create_mesh(num_devices), path=path)


def read(path):
  """Returns the features and everything else, alike for both formats."""
  if path.suffix == ".npz":
    with np.load(path) as found:
      arrays = dict(found)
    names = arrays["class_names"].tolist()
    classes = [names[i] if i >= 0 else None for i in arrays["label"]]
    return arrays["features"], {"index": arrays["index"].tolist(), "label": arrays["label"].tolist(),
                                "name": arrays["name"].tolist(), "class": classes, "class_names": names,
                                "layer": arrays["layer"].item()}
  table = parquet.read_table(path)
  about = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
  features = np.array(table["features"].to_pylist(), np.float32).reshape(len(table), -1)
  return features, {**{name: table[name].to_pylist() for name in ("index", "label", "name", "class")},
                    "class_names": json.loads(about["class_names"]), "layer": about["layer"]}


@pytest.mark.parametrize("ending", ["npz", "parquet"])
@pytest.mark.parametrize(("num_devices", "batch_size", "num_threads", "layer"), [
  (1, 8, 0, "pooled"),
  (1, 37, 2, "pooled"),
  (2, 24, 1, "embedding"),
  (8, 32, 3, "pooled"),
  (8, 64, 0, "embedding"),
])
def test_features_are_those_of_a_plain_forward_pass(model, tmp_path, ending, num_devices, batch_size, num_threads,
                                                    layer):
  path = tmp_path / "deep" / "er" / f"features.{ending}"
  outcome = exported(model, path, num_devices=num_devices, batch_size=batch_size, num_threads=num_threads, layer=layer)
  features, others = read(path)
  expected = plain_features(model, layer)
  assert features.dtype == np.float32 and features.shape == expected.shape
  np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
  assert others == {
    "index": KEPT.tolist(),
    "label": [-1 if i % 5 == 0 else i % 10 for i in KEPT],
    "name": [f"Käfer/{'ü' * i} 猫 {i}.jpg" for i in KEPT],
    "class": [None if i % 5 == 0 else SOURCE.class_names[i % 10] for i in KEPT],
    "class_names": list(SOURCE.class_names),
    "layer": layer,
  }
  figures = outcome.figures
  assert figures.pop("features_per_second") > 0
  assert figures == {
    "path": str(path), "format": ending, "layer": layer, "dtype": "float32", "dim": expected.shape[1],
    "num_images": 34, "num_broken": 3, "broken": [SOURCE.image_name(i) for i in Odd.broken]}
  assert outcome.table == {"images": 34, "numbers an image": expected.shape[1]} and outcome.curve is None
  json.dumps(outcome.to_json())
  assert os.listdir(path.parent) == [path.name]


def test_both_formats_hold_the_same_bits(model, tmp_path):
  for ending in ("npz", "parquet"):
    exported(model, tmp_path / f"f.{ending}")
  (one, others), (two, same) = (read(tmp_path / f"f.{ending}") for ending in ("npz", "parquet"))
  np.testing.assert_array_equal(one, two)
  assert others == same


def test_the_archive_is_one_of_numpy_and_is_not_compressed(model, tmp_path):
  path = tmp_path / "f.npz"
  exported(model, path)
  with np.load(path, allow_pickle=False) as found:
    assert {name: found[name].dtype.kind for name in found} == {
      "features": "f", "index": "i", "label": "i", "name": "U", "class_names": "U", "layer": "U"}
    np.savez(tmp_path / "numpy.npz", **found)
  assert abs(path.stat().st_size - (tmp_path / "numpy.npz").stat().st_size) < 100


def test_row_groups_are_written_as_they_fill(model, tmp_path, monkeypatch):
  exported(model, tmp_path / "one.parquet")
  monkeypatch.setattr(export, "BLOCK_NUMBERS", 64 * 13)  # batches of 8 images, some broken, 64 numbers each
  exported(model, tmp_path / "many.parquet")
  groups = parquet.ParquetFile(tmp_path / "many.parquet").metadata
  assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [15, 15, 4]
  for one, many in zip(read(tmp_path / "one.parquet"), read(tmp_path / "many.parquet"), strict=True):
    np.testing.assert_equal(one, many)


def test_images_without_classes(model, tmp_path):
  class Bare(TextureSource):
    def __getitem__(self, index):
      return super().__getitem__(index)._replace(label=-1)

    def image_name(self, index):
      return str(index)

  source = Bare(5, size=16, split="train")
  source.class_names = ()
  for ending in ("npz", "parquet"):
    exported(model, tmp_path / f"f.{ending}", source=source)
    _, others = read(tmp_path / f"f.{ending}")
    assert others["label"] == [-1] * 5 and others["class"] == [None] * 5 and others["class_names"] == []


def test_images_of_several_classes(model, tmp_path):
  class Several(Odd):
    multi_label = True

    def __getitem__(self, index):
      return super().__getitem__(index)._replace(label=-1)

    def labels(self):
      return None

    def targets(self):
      return np.random.default_rng(0).integers(-1, 2, (NUM, 10)).astype(np.int8)

  source = Several(NUM, size=16, split="train")
  for ending in ("npz", "parquet"):
    exported(model, tmp_path / f"f.{ending}", source=source)
    assert read(tmp_path / f"f.{ending}")[1]["class"] == [None] * len(KEPT)
  with np.load(tmp_path / "f.npz") as archive:
    assert archive["targets"].dtype == np.int8
    np.testing.assert_array_equal(archive["targets"], source.targets()[KEPT])
  column = parquet.read_table(tmp_path / "f.parquet")["targets"]
  assert str(column.type) == "fixed_size_list<element: int8>[10]"
  assert column.to_pylist() == source.targets()[KEPT].tolist()


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_what_fails_on_the_way_leaves_the_old_file_and_nothing_else(model, tmp_path, ending):
  class Failing(Odd):
    def __getitem__(self, index):
      if index == 33:
        raise OSError(5, "Input/output error")
      return super().__getitem__(index)

  path = tmp_path / f"f.{ending}"
  exported(model, path)
  before = path.read_bytes()
  with pytest.raises(UserError, match=r"33.jpg cannot be read because the disk .*\(Input/output error\)"):
    exported(model, path, source=Failing(NUM, size=16, split="train"))
  with pytest.raises(UserError, match="none of the 3 images"):
    source = Odd(3, size=16, split="train")
    source.broken = (0, 1, 2)
    exported(model, path, source=source)
  assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_the_same_call_writes_the_same_bytes_over_the_old_file_and_what_a_killed_one_left(model, tmp_path):
  path = tmp_path / "f.npz"
  exported(model, path)
  before = path.read_bytes()
  (tmp_path / ".f.npz.unfinished").write_bytes(b"x" * 10**6)
  os.utime(tmp_path / ".f.npz.unfinished", (0, 0))
  exported(model, path)
  assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(("name", "layer", "message"), [
  ("f.npz", "res9", "features.layer names the layer 'res9'; this network has conv1, res2"),
  ("f.csv", "pooled", "features.format='csv' is unknown; choose one of: npz, parquet"),
])
def test_what_cannot_be_written_is_refused_at_once(model, tmp_path, monkeypatch, name, layer, message):
  monkeypatch.setattr(export, "stream_features", lambda *_: pytest.fail("read images first"))
  with pytest.raises(UserError, match=message):
    exported(model, tmp_path / "new" / name, layer=layer)
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("ending", "needed", "way_out"), [("npz", 1_024, "features.format=parquet"),
                                                           ("parquet", 512, "--workdir=DIR")])
def test_too_small_a_disk_is_seen_before(model, tmp_path, monkeypatch, ending, needed, way_out):
  source = TextureSource(2, size=16, split="train")  # 2 x 64 numbers of 4 bytes, twice for npz
  usage = export.shutil.disk_usage(tmp_path)
  monkeypatch.setattr(export.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
  with pytest.raises(UserError, match=f"2 images x 64 numbers.*{way_out}"):
    exported(model, tmp_path / f"f.{ending}", source=source)
  monkeypatch.setattr(export.shutil, "disk_usage", lambda _: usage._replace(free=needed))
  exported(model, tmp_path / f"f.{ending}", source=source)


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_memory_does_not_grow_with_the_images(tmp_path, monkeypatch, ending):
  monkeypatch.setattr(export, "BLOCK_NUMBERS", 2**18)
  monkeypatch.setattr(export, "layer_features", lambda network, layers: wide)
  monkeypatch.setattr(export, "check_features", lambda *_, **__: None)

  def wide(variables, image):
    return {"pooled": jnp.tile(jnp.reshape(image, (image.shape[0], -1)), (1, 16))}  # 49 kB an image

  def peak(num):
    source = TextureSource(num, size=16, split="train")
    exported(Model(None, {}), tmp_path / f"f.{ending}", source=source)
    tracemalloc.start()
    try:
      exported(Model(None, {}), tmp_path / f"f.{ending}", source=source)
      return tracemalloc.get_traced_memory()[1]
    finally:
      tracemalloc.stop()

  small, large = peak(64), peak(512)
  assert large < small + 3e6  # where 448 images more are 22 MB


def test_progress_is_told(model, tmp_path, capsys):
  exported(model, tmp_path / "f.npz")
  assert "features of pooled: 37 of 37 images" in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_prints_both_rates_and_their_ratio():
  command = [sys.executable, "-m", "benchmarks.features", "--embedded=256", "--num=4", "--size=32", "--rounds=2",
             "--seconds=0.1"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  medians = [line.split() for line in done.stdout.splitlines() if line.startswith("median")]
  assert len(medians) == 2
  for _, forward, exporting, ratio in medians:
    assert float(forward.replace(",", "")) > 0 and float(exporting.replace(",", "")) > 0
    assert float(ratio.rstrip("%")) > 0
