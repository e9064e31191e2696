"""kNN against the formula in float64 and against scikit-learn, on one device and on eight."""

import math

import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from pirl_jax.errors import UserError
from pirl_jax.evaluation import knn
from pirl_jax.mesh import create_mesh, split


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


def test_a_bank_split_over_the_devices_is_searched_where_it_lies():
  mesh = create_mesh(8)
  rng = np.random.default_rng(2)
  references, labels, queries = unit_rows(rng, 320, 16), rng.integers(0, 5, 320), unit_rows(rng, 20, 16)
  bank = jax.device_put(references, split(mesh))
  found = knn.predict(bank, labels, queries, mesh=mesh, k=9, temperature=0.07)
  on_one = knn.predict(references, labels, queries, mesh=create_mesh(1), k=9, temperature=0.07)
  np.testing.assert_array_equal(found.classes, on_one.classes)
  search = knn._make_search(mesh, 9, knn.ROWS)
  text = search.lower(bank, jax.device_put(labels.astype(np.int32), split(mesh)),
                      np.zeros((64, 16), np.float32)).compile().as_text()
  gathered = [line for line in text.splitlines() if " all-gather(" in line]
  assert gathered and all("[64,72]" in line for line in gathered)  # the candidates travel, 8 x k, and no row


def test_memory_does_not_grow_with_the_references():
  mesh = create_mesh(1)
  search = knn._make_search(mesh, 10, 256)

  def temporary(num_rows):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in
                 [((num_rows, 8), np.float32), ((num_rows,), np.int32), ((128, 8), np.float32)]]
    return search.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

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
