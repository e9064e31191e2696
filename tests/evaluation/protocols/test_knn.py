"""kNN against the formula in float64 and against scikit-learn, on one device and on eight."""

import dataclasses
import json
import math
import tracemalloc
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from pirl_jax.data.crops import BrokenImage
from pirl_jax.data.embedded import TextureSource
from pirl_jax.errors import UserError
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.protocols import knn
from pirl_jax.models.heads import ImageHead, PatchesHead
from pirl_jax.models.network import Model, Network, create_variables
from pirl_jax.models.resnet import create_resnet
from pirl_jax.runtime.mesh import create_mesh, split


def oracle(references, labels, queries, *, k, temperature):
  """NPID 3.4 in float64 with plain loops; equals: the lower row, the lower class."""
  predictions = []
  for query in np.asarray(queries, np.float64):
    neighbours = []
    for row, (reference, label) in enumerate(zip(np.asarray(references, np.float64), labels, strict=True)):
      if label >= 0:
        neighbours.append((-sum(a * b for a, b in zip(query, reference, strict=True)), row, label))
    votes = {}
    for negative, _, label in sorted(neighbours)[:k]:
      votes[label] = votes.get(label, 0.0) + math.exp(-negative / temperature)
    predictions.append([int(c) for c, _ in sorted(votes.items(), key=lambda item: (-item[1], item[0]))][:5])
  return predictions


def unit_rows(rng, num, dim):
  rows = rng.normal(size=(num, dim))
  return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def as_lists(prediction):
  """The classes of each query without the -1 at the end."""
  return [[int(c) for c in row if c >= 0] for row in prediction.classes]


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize(("num_references", "num_queries", "k", "temperature", "num_classes"), [
  (203, 37, 20, 0.07, 7),  # no size divides another
  (64, 5, 1, 0.1, 3),
  (11, 6, 200, 0.07, 4),  # k > M, fewer rows than 8 devices take evenly
  (5, 3, 3, 0.01, 2),  # fewer rows than devices; exp(s / tau) alone spans 40 orders of magnitude
  (90, 9, 10, 0.5, 1),  # a single class
])
def test_equals_the_formula(monkeypatch, num_devices, num_references, num_queries, k, temperature,
                            num_classes):
  monkeypatch.setattr(knn, "ROWS", 8)  # several chunks, the last one overlapping
  monkeypatch.setattr(knn, "QUERIES", 16)  # several batches, the last one padded
  rng = np.random.default_rng(num_references)
  references, queries = unit_rows(rng, num_references, 6), unit_rows(rng, num_queries, 6)
  labels = rng.integers(-1, num_classes, num_references)  # some do not vote
  labels[:num_classes] = range(num_classes)
  prediction = knn.predict(references, labels, queries, mesh=create_mesh(num_devices), k=k,
                           temperature=temperature)
  assert prediction.classes.shape == (num_queries, min(5, num_classes))
  assert prediction.num_references == (labels >= 0).sum()
  assert prediction.k == min(k, (labels >= 0).sum())
  assert as_lists(prediction) == oracle(references, labels, queries, k=k, temperature=temperature)


def test_equals_scikit_learn():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 10, 1000)
  centres = rng.normal(size=(10, 16))
  references = centres[labels] + 1.5 * rng.normal(size=(1000, 16))
  queries = centres[rng.integers(0, 10, 300)] + 1.5 * rng.normal(size=(300, 16))
  model = KNeighborsClassifier(50, metric="cosine", algorithm="brute",
                               weights=lambda distance: np.exp((1 - distance) / 0.07)).fit(references, labels)
  references, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (references, queries))
  prediction = knn.predict(references.astype(np.float32), labels, queries.astype(np.float32),
                           mesh=create_mesh(), k=50, temperature=0.07)
  np.testing.assert_array_equal(prediction.classes[:, 0], model.predict(queries))


@pytest.mark.parametrize("num_devices", [1, 8])
def test_equal_similarities_go_to_the_lower_row_and_equal_votes_to_the_lower_class(monkeypatch, num_devices):
  monkeypatch.setattr(knn, "ROWS", 5)
  rng = np.random.default_rng(1)
  # Entries of 0 and +-1/2 in 4 places have unit norm and exact sums: ties are exact, and there are many.
  def rows(num):
    x = np.zeros((num, 8), np.float32)
    for row in x:
      row[rng.choice(8, 4, replace=False)] = rng.choice([-0.5, 0.5], 4)
    return x
  references, queries = rows(60), rows(40)
  references = np.concatenate([references, references[::-1], references[:23]])  # each row two or three times
  labels = rng.integers(0, 6, len(references))
  for k in (1, 4, 30):
    prediction = knn.predict(references, labels, queries, mesh=create_mesh(num_devices), k=k,
                             temperature=0.25)
    assert [row[0] for row in as_lists(prediction)] == [
      row[0] for row in oracle(references, labels, queries, k=k, temperature=0.25)]


def test_padding_rows_are_never_neighbours():
  # The nearest row by far does not vote.
  references = np.float32([[1, 0], [0.6, 0.8], [0, 1]])
  prediction = knn.predict(references, np.array([-1, 3, 1]), references[:1], mesh=create_mesh(1), k=2,
                           temperature=0.1)
  assert prediction.classes.tolist() == [[3, 1, -1, -1]]
  assert prediction.k == 2


def test_weights_do_not_underflow():
  # exp(s / tau) is 0 in float32 for all three, and a tie of zeros would go to class 0.
  angles = np.float32([np.pi, np.pi - 0.02, np.pi - 0.04])
  references = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  prediction = knn.predict(references, np.array([0, 1, 1]), np.float32([[1, 0]]), mesh=create_mesh(1), k=3,
                           temperature=0.001)
  assert prediction.classes.tolist() == [[1, 0]]


def test_a_bank_split_over_the_devices_is_searched_where_it_lies(full_compile):
  mesh = create_mesh(8)
  rng = np.random.default_rng(2)
  references, labels, queries = unit_rows(rng, 320, 16), rng.integers(0, 5, 320), unit_rows(rng, 20, 16)
  bank = jax.device_put(references, split(mesh))
  found = knn.predict(bank, labels, queries, mesh=mesh, k=9, temperature=0.07)
  on_one = knn.predict(references, labels, queries, mesh=create_mesh(1), k=9, temperature=0.07)
  np.testing.assert_array_equal(found.classes, on_one.classes)
  search = knn._make_search(mesh, 9, knn.ROWS)
  best = (np.zeros((64, 9), np.float32), np.zeros((64, 9), np.int32))
  text = search.lower(best, bank, jax.device_put(labels.astype(np.int32), split(mesh)),
                      np.zeros((64, 16), np.float32)).compile().as_text()
  gathered = [line for line in text.splitlines() if " all-gather(" in line]
  assert gathered and all("[64,72]" in line for line in gathered)  # the candidates travel, 8 x k, and no row


def test_memory_does_not_grow_with_the_references(full_compile):
  mesh = create_mesh(1)
  search = knn._make_search(mesh, 10, 256)

  def temporary(num_rows):
    best, *arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in [
      ((128, 10), np.float32), ((num_rows, 8), np.float32), ((num_rows,), np.int32), ((128, 8), np.float32)]]
    best = (best, jax.ShapeDtypeStruct(best.shape, np.int32))
    return search.lower(best, *arguments).compile().memory_analysis().temp_size_in_bytes

  assert temporary(64_000) < 1.1 * temporary(1_024)


def test_one_program_serves_all_batches(monkeypatch):
  monkeypatch.setattr(knn, "QUERIES", 8)
  mesh = create_mesh(2)
  rng = np.random.default_rng(3)
  references, labels = unit_rows(rng, 24, 4), rng.integers(0, 3, 24)
  for num_queries in (3, 8, 21):
    knn.predict(references, labels, unit_rows(rng, num_queries, 4), mesh=mesh, k=5, temperature=0.07)
  assert knn._make_search(mesh, 5, knn.ROWS)._cache_size() == 1


def test_accuracy_counts_labelled_queries_only():
  references = np.eye(4, dtype=np.float32)
  figures = knn.accuracy(references, np.array([0, 1, 2, 2]), references, np.array([0, 2, -1, 2]),
                         mesh=create_mesh(1), k=1, temperature=0.07)
  assert figures == {"top1": 2 / 3, "top5": 2 / 3, "k": 1, "num_references": 4, "num_queries": 3}
  # With more neighbours the true class of the second query votes too, and comes among the first five.
  figures = knn.accuracy(references, np.array([0, 1, 2, 2]), references, np.array([0, 2, -1, 2]),
                         mesh=create_mesh(1), k=4, temperature=0.07)
  assert (figures["top1"], figures["top5"]) == (2 / 3, 1.0)


@pytest.mark.parametrize(("labels", "k", "temperature", "message"), [
  ([-1, -1], 1, 0.1, "none of the 2 references"),
  ([0, 1], 0, 0.1, "k=0"),
  ([0, 1], 1, 0.0, "temperature=0.0"),
])
def test_what_cannot_be_is_refused(labels, k, temperature, message):
  with pytest.raises(UserError, match=message):
    knn.predict(np.eye(2, dtype=np.float32), np.array(labels), np.eye(2, dtype=np.float32),
                mesh=create_mesh(1), k=k, temperature=temperature)


def exact_rows(rng, num, dim=16):
  """Unit rows of +-1/4 in 16 places: sums are exact in any order, and ties many."""
  return rng.choice(np.float32([-0.25, 0.25]), (num, dim))


def nearest_oracle(references, ids, queries, k):
  similarity = np.asarray(queries, np.float64) @ np.asarray(references, np.float64).T
  similarity[:, ids < 0] = -np.inf
  order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
  similarity = np.take_along_axis(similarity, order, axis=1)
  return similarity, np.where(np.isfinite(similarity), ids[order], -1)


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("block", [7, 64, 333])
def test_nearest_is_the_same_bit_for_bit_however_the_references_come(monkeypatch, num_devices, block):
  monkeypatch.setattr(knn, "ROWS", 5)
  monkeypatch.setattr(knn, "QUERIES", 16)
  monkeypatch.setattr(knn, "BLOCK_ROWS", block)
  rng = np.random.default_rng(4)
  references, queries = exact_rows(rng, 333), exact_rows(rng, 37)
  references[200:250] = references[50:100]  # the same image twice, far apart
  ids = np.where(rng.random(333) < 0.1, -1, 3 * np.arange(333))
  similarity, expected = nearest_oracle(references, ids, queries, 20)
  mesh = create_mesh(num_devices)
  nearest = knn.Nearest(queries, k=20, mesh=mesh)
  cuts = np.sort(rng.integers(0, 333, 9))  # parts of any size, some of them empty
  parts, seen = zip(np.split(references, cuts), np.split(ids, cuts), strict=True), np.zeros(0, np.int32)
  for rows, row_ids in knn.gather_blocks(parts, num_references=333, dim=16, mesh=mesh):
    assert rows.shape == (-(-block // num_devices) * num_devices, 16)
    seen = np.append(seen, row_ids)
    nearest.visit(rows, row_ids)
  np.testing.assert_array_equal(seen[:333], ids)
  assert (seen[333:] == -1).all()  # the padding of the last block is never a neighbour
  found = nearest.result()
  np.testing.assert_array_equal(found.ids, expected)
  np.testing.assert_array_equal(found.similarity, similarity.astype(np.float32))


def test_nearest_equals_scikit_learn():
  rng = np.random.default_rng(5)
  references, queries = unit_rows(rng, 500, 24), unit_rows(rng, 40, 24)
  distance, index = NearestNeighbors(n_neighbors=30, metric="cosine", algorithm="brute").fit(
    references.astype(np.float64)).kneighbors(queries.astype(np.float64))
  nearest = knn.Nearest(queries, k=30, mesh=create_mesh())
  for start in range(0, 500, 100):
    nearest.visit(references[start:start + 100], np.arange(start, start + 100))
  found = nearest.result()
  np.testing.assert_array_equal(found.ids, index)
  np.testing.assert_allclose(found.similarity, 1 - distance, atol=1e-6)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_nearest_of_fewer_references_than_k(num_devices):
  rng = np.random.default_rng(6)
  references, queries = exact_rows(rng, 5), exact_rows(rng, 3)
  nearest = knn.Nearest(queries, k=9, mesh=create_mesh(num_devices))
  nearest.visit(references[:3], np.array([10, -1, 12]))
  nearest.visit(references[3:], np.array([13, 14]))
  similarity, ids = nearest_oracle(references, np.array([10, -1, 12, 13, 14]), queries, 9)
  found = nearest.result()
  np.testing.assert_array_equal(found.ids[:, :5], ids)
  np.testing.assert_array_equal(found.similarity[:, :5], similarity)
  assert (found.ids[:, 4:] == -1).all() and (found.similarity[:, 4:] == -np.inf).all()


class Signs:
  """A network whose features are exact: 16 signs of an image's pixels."""

  trunk, has_embedding = types.SimpleNamespace(blocks=()), True

  def apply(self, variables, image, method):
    del variables, method
    return {"pooled": jnp.where(image[:, ::4, ::4, 0] > 0, 1.0, -1.0).reshape(-1, 16)}


class Arrays(TextureSource):
  """Images of 16 black and white squares; those in `damaged` cannot be read, those in `unlabelled` have no label."""

  def __init__(self, num, *, seed, num_classes=6, damaged=(), unlabelled=(), spread=0.25):
    rng = np.random.default_rng(seed)
    prototypes = np.random.default_rng(99).random((num_classes, 4, 4)) < 0.5
    self._labels = rng.integers(0, num_classes, num).astype(np.int32)
    self.signs = prototypes[self._labels] ^ (rng.random((num, 4, 4)) < spread)
    self._images = np.repeat((255 * self.signs).astype(np.uint8).repeat(4, 1).repeat(4, 2)[..., None], 3, axis=-1)
    self._labels[list(unlabelled)] = -1
    self._damaged = damaged
    self.class_names = tuple("abcdefgh"[:num_classes])
    self.description = self.fingerprint = "arrays"

  def __getitem__(self, index):
    record = super().__getitem__(index)
    if index in self._damaged[:1]:
      raise BrokenImage(index)
    return record._replace(image=b"broken") if index in self._damaged else record

  def image_name(self, index):
    return f"image {index}"

  def rows(self):
    """Returns what `Signs` makes of them, of unit length."""
    return np.where(self.signs.reshape(-1, 16), 0.25, -0.25).astype(np.float32)


TRAIN = Arrays(331, seed=0, damaged=(3, 77, 330), unlabelled=range(0, 331, 4))
TEST = Arrays(45, seed=1, damaged=(44, 5), unlabelled=(7,))
EXACT = Model(Signs(), {})


def exact_images(source, batch_size=32, num_threads=0):
  return Images(source, 16, 1.0, batch_size, num_threads)


def exact_knn(train=TRAIN, test=TEST, *, num_devices=8, batch_size=32, num_threads=0, **changes):
  settings = knn.KnnSettings(**{"layer": "pooled", "k": 60, "temperature": 0.07, **changes})
  return knn.measure_knn(EXACT, exact_images(train, batch_size, num_threads),
                         exact_images(test, batch_size, num_threads), settings, mesh=create_mesh(num_devices))


def test_measured_accuracy_is_that_of_the_formula(capsys):
  outcome = exact_knn()
  voting = np.setdiff1d(np.arange(331), [3, 77, 330, *range(0, 331, 4)])
  judged = np.setdiff1d(np.arange(45), [5, 7, 44])
  references, queries = TRAIN.rows()[voting], TEST.rows()[judged]
  labels, answers = TRAIN.labels()[voting], TEST.labels()[judged].tolist()
  figures = outcome.figures
  found = {}
  for k in (1, 5, 10, 20, 50, 60):
    predicted = oracle(references, labels, queries, k=k, temperature=0.07)
    found[str(k)] = np.mean([row[0] == answer for row, answer in zip(predicted, answers, strict=True)])
  top5 = np.mean([answer in row for row, answer in zip(predicted, answers, strict=True)])
  assert figures["top1_by_k"] == pytest.approx(found)
  assert figures["top1"] == pytest.approx(found["60"]) and figures["top5"] == pytest.approx(top5)
  assert 0.4 < figures["top1"] < figures["top5"]
  assert {name: figures[name] for name in ("layer", "k", "k_used", "temperature", "num_train", "num_test",
                                           "num_broken_train", "num_broken_test", "dim", "similarity")} == {
    "layer": "pooled", "k": 60, "k_used": 60, "temperature": 0.07, "num_train": 245, "num_test": 42,
    "num_broken_train": 3, "num_broken_test": 2, "dim": 16, "similarity": "cosine"}
  assert outcome.table == {"top-1": figures["top1"], "top-5": figures["top5"], "top-1, k=1": found["1"]}
  assert outcome.curve.x == [1, 5, 10, 20, 50, 60] and outcome.curve.log_x
  assert outcome.curve.y == list(figures["top1_by_k"].values())
  json.dumps(dataclasses.asdict(outcome))
  assert "331 of 331 images" in capsys.readouterr().out


@pytest.mark.parametrize(("num_devices", "batch_size", "block", "num_threads"), [
  (1, 1, 16_384, 0),
  (1, 24, 50, 2),
  (8, 8, 64, 2),
  (8, 512, 1, 0),  # all images in one batch, and blocks of a single row for each device
])
def test_neither_devices_nor_batches_nor_blocks_change_the_figures(monkeypatch, num_devices, batch_size, block,
                                                                   num_threads):
  expected = exact_knn()
  monkeypatch.setattr(knn, "BLOCK_ROWS", block)
  assert exact_knn(num_devices=num_devices, batch_size=batch_size, num_threads=num_threads) == expected


def test_long_vectors_come_in_smaller_blocks(monkeypatch):
  expected = exact_knn()
  monkeypatch.setattr(knn, "BLOCK_NUMBERS", 16 * 40)
  visited = []
  visit = knn.Nearest.visit
  monkeypatch.setattr(knn.Nearest, "visit", lambda self, rows, ids: (visited.append(len(rows)), visit(self, rows, ids)))
  assert exact_knn() == expected
  assert visited == [40] * 7  # 245 that vote, the last block filled up


def test_all_blocks_of_a_measurement_share_one_program(monkeypatch):
  monkeypatch.setattr(knn, "BLOCK_ROWS", 48)
  monkeypatch.setattr(knn, "QUERIES", 16)
  knn._make_search.cache_clear()
  exact_knn(k=13)
  assert knn._make_search(create_mesh(8), 13, knn.ROWS)._cache_size() == 1


def test_more_neighbours_than_training_images():
  few = Arrays(9, seed=2, damaged=(1,), unlabelled=(4,))
  figures = exact_knn(few, k=200).figures
  assert (figures["k"], figures["k_used"], figures["num_train"]) == (200, 7, 7)
  assert list(figures["top1_by_k"]) == ["1", "5", "7"]
  kept = [0, 2, 3, 5, 6, 7, 8]
  judged = np.setdiff1d(np.arange(45), [5, 7, 44])
  predicted = oracle(few.rows()[kept], few.labels()[kept], TEST.rows()[judged], k=7, temperature=0.07)
  assert figures["top1"] == pytest.approx(np.mean(
    [row[0] == answer for row, answer in zip(predicted, TEST.labels()[judged], strict=True)]))


@pytest.fixture(scope="module")
def resnet():
  network = Network(create_resnet("resnet8", stem="3x3s2"), ImageHead(16), PatchesHead(16))
  return Model(network, create_variables(
    network, jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 9, 5, 5, 3))))


def _head(network, pooled):
  return network.image_head(pooled)


@pytest.mark.parametrize("layer", ["res2", "embedding"])
def test_layers_of_a_network_against_scikit_learn(resnet, layer):
  sources = [TextureSource(num, size=16, split=split) for num, split in ((150, "train"), (40, "test"))]
  by_devices = []
  for num_devices in (1, 8):
    train, test = (Images(source, 16, 1.0, 16 * num_devices, 0) for source in sources)
    by_devices.append(knn.measure_knn(resnet, train, test, knn.KnnSettings(layer, 20, 0.07),
                                      mesh=create_mesh(num_devices)).figures)
  assert by_devices[0]["top1_by_k"] == pytest.approx(by_devices[1]["top1_by_k"], abs=1.5 / 40)  # a tie may turn

  def features(source):
    image = (np.stack([source[i].image for i in range(len(source))]) / 255 - [0.485, 0.456, 0.406]) / [
      0.229, 0.224, 0.225]
    found = resnet.network.apply(resnet.variables, image.astype(np.float32), method="features")
    found["embedding"] = resnet.network.apply(resnet.variables, found["pooled"], method=_head)
    return np.asarray(found[layer], np.float64).reshape(len(image), -1)

  model = KNeighborsClassifier(20, metric="cosine", algorithm="brute",
                               weights=lambda distance: np.exp((1 - distance) / 0.07))
  model.fit(features(sources[0]), sources[0].labels())
  expected = model.score(features(sources[1]), sources[1].labels())
  assert by_devices[0]["top1"] == pytest.approx(expected, abs=1.5 / 40)
  assert by_devices[0]["dim"] == features(sources[1]).shape[1]


def test_memory_does_not_grow_with_the_training_images(monkeypatch):
  monkeypatch.setattr(knn, "BLOCK_ROWS", 64)
  sources = [Arrays(num, seed=num) for num in (256, 2048)]

  class Wide(Signs):
    def apply(self, variables, image, method):
      return {"pooled": jnp.tile(super().apply(variables, image, method)["pooled"], (1, 256))}  # 16 kB an image

  model = Model(Wide(), {})

  def peak(source):
    arguments = (model, exact_images(source), exact_images(TEST), knn.KnnSettings("pooled", 5, 0.07))
    knn.measure_knn(*arguments, mesh=create_mesh(1))  # compiles
    tracemalloc.start()
    try:
      knn.measure_knn(*arguments, mesh=create_mesh(1))
      return tracemalloc.get_traced_memory()[1]
    finally:
      tracemalloc.stop()

  small, large = map(peak, sources)
  assert small > 64 * 16e3  # a block at the least is seen
  # The features of 1,792 more images are 29 MB. How many batches wait at once differs: 4 MB more were seen.
  assert large < small + 10e6


@pytest.mark.parametrize(("changes", "message"), [
  ({"layer": "res9"}, "knn.layer names the layer 'res9'; this network has conv1, pooled, embedding"),
  ({"k": 0}, "k=0"),
  ({"temperature": -1.0}, "temperature=-1.0"),
  ({"train": Arrays(9, seed=0, unlabelled=range(9))}, "none of the 9 training images"),
  ({"test": Arrays(9, seed=0, unlabelled=range(9))}, "none of the 9 held-out images"),
  ({"test": Arrays(3, seed=0, damaged=(0, 1, 2))}, "no image to take features of: 3 broken"),
])
def test_what_cannot_be_measured_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    exact_knn(**changes)


@pytest.mark.parametrize("name", ["train", "test"])
def test_images_without_labels_are_refused_at_once(name, monkeypatch):
  monkeypatch.setattr(knn, "extract_features", lambda *_, **__: pytest.fail("read images first"))
  source = Arrays(9, seed=0)
  source.class_names = ()
  with pytest.raises(UserError, match="--config.data.labels=folder"):
    exact_knn(**{name: source})


@pytest.mark.parametrize(("k", "steps"), [
  (1, [1]), (7, [1, 5, 7]), (10, [1, 5, 10]), (1_200, [1, 5, 10, 20, 50, 100, 200, 500, 1_000, 1_200])])
def test_numbers_of_neighbours_rise_to_k(k, steps):
  assert knn.ladder(k) == steps


def test_labels_of_other_references_are_refused():
  with pytest.raises(ValueError, match="5 references, but labels of shape"):
    knn.predict(np.eye(5, dtype=np.float32), np.zeros(4, np.int32), np.eye(5, dtype=np.float32), mesh=create_mesh(1),
                k=1, temperature=0.1)
