"""Retrieval: the ranking against scikit-learn and by hand, the same queries and neighbours whatever the machine."""

import copy
import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score
from test_knn import EXACT, Arrays

from pirl_jax.data.embedded import TextureSource
from pirl_jax.data.sources import DataSettings, open_source
from pirl_jax.errors import UserError
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.protocols import knn, retrieval
from pirl_jax.models.heads import ImageHead, PatchesHead
from pirl_jax.models.network import Model, Network, create_variables
from pirl_jax.models.resnet import create_resnet
from pirl_jax.runtime.mesh import create_mesh

GALLERY = Arrays(203, seed=0, damaged=(3, 77, 202), unlabelled=(0, 100))
QUERIES = Arrays(45, seed=1, damaged=(44, 5), unlabelled=(7, 9))


def measure(path, gallery=GALLERY, queries=QUERIES, *, num_devices=8, batch_size=32, num_threads=0, model=EXACT,
            **changes):
  arguments = dict(bank=None, seed=0, same_split=False, plot_path=path / "neighbours.png")
  given = dict(layer="pooled", num_queries=20, num_shown=3, num_neighbours=4)
  settings = retrieval.RetrievalSettings(gallery="features" if changes.get("bank") is None else "bank", queries=None,
                                         **{name: changes.pop(name, value) for name, value in given.items()})
  of = [Images(source, 16, 1.0, batch_size, num_threads) for source in (gallery, queries)]
  return retrieval.measure_retrieval(model, *of, settings, mesh=create_mesh(num_devices), **{**arguments, **changes})


def chosen(source, num, *, seed=0):
  """The queries by the rule: the readable ones with the lowest sha256 of "seed:index"."""
  order = sorted(range(len(source)), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).hexdigest())
  return [i for i in order if i not in source._damaged][:num]


def oracle(gallery, queries, asked, *, same=False):
  """For each query the gallery ranked, in float64: (index, similarity) pairs, equals by lower index."""
  rankings = []
  for query in asked:
    row = queries.rows()[query].astype(np.float64)
    found = [(-sum(row * other), index) for index, other in enumerate(gallery.rows().astype(np.float64))
             if index not in gallery._damaged and not (same and index == query)]
    rankings.append([(index, -negative) for negative, index in sorted(found)])
  return rankings


def oracle_figures(rankings, gallery, queries, asked):
  """Mean average precision, precision at n, number of queries judged."""
  precisions, hits_of = [], []
  for query, ranking in zip(asked, rankings, strict=True):
    hits = [gallery.labels()[index] == queries.labels()[query] for index, _ in ranking]
    if queries.labels()[query] >= 0 and any(hits):
      precisions.append(np.mean([sum(hits[:rank + 1]) / (rank + 1) for rank in range(len(hits)) if hits[rank]]))
      hits_of.append(hits)
  return np.mean(precisions), lambda n: np.mean([sum(hits[:n]) / n for hits in hits_of]), len(precisions)


def test_average_precision_by_hand():
  # Relevant at ranks 1, 3 and 4: (1 / 1 + 2 / 3 + 3 / 4) / 3.
  similarity, relevant = np.float32([0.1, 0.9, 0.5, 0.7, 0.6]), np.array([False, True, True, False, True])
  assert retrieval.ranking_precision(similarity, relevant) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
  # All equal: in their order, ranks 2, 3 and 5.
  assert retrieval.ranking_precision(np.zeros(5, np.float32), relevant) == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3)


def test_average_precision_equals_scikit_learn():
  rng = np.random.default_rng(0)
  for num_relevant in (1, 7, 60, 100):
    similarity = rng.permutation(100).astype(np.float32) / 100  # without ties
    relevant = np.zeros(100, bool)
    relevant[rng.choice(100, num_relevant, replace=False)] = True
    assert retrieval.ranking_precision(similarity, relevant) == pytest.approx(
      average_precision_score(relevant, similarity), rel=1e-12)


@pytest.mark.parametrize("same", [False, True])
def test_figures_are_those_of_the_formula(tmp_path, same, capsys):
  queries = GALLERY if same else QUERIES
  outcome = measure(tmp_path, queries=queries, same_split=same)
  asked = chosen(queries, 20)
  rankings = oracle(GALLERY, queries, asked, same=same)
  mean, precision_at, num_judged = oracle_figures(rankings, GALLERY, queries, asked)
  figures = outcome.figures
  assert figures["mean_average_precision"] == pytest.approx(mean)
  assert figures["precision_at"] == pytest.approx({str(n): precision_at(n) for n in (1, 5, 10, 20, 50)})
  assert 0.2 < mean < 0.95 and figures["precision_at"]["1"] > figures["precision_at"]["50"]
  assert figures["mean_similarity_of_nearest"] == pytest.approx(np.mean([ranking[0][1] for ranking in rankings]))
  assert {name: figures[name] for name in ("num_queries", "num_judged", "num_gallery", "num_broken_gallery", "labels",
                                           "gallery", "layer", "dim", "seed")} == {
    "num_queries": 20, "num_judged": num_judged, "num_gallery": 200, "num_broken_gallery": 3, "labels": "classes",
    "gallery": "features", "layer": "pooled", "dim": 16, "seed": 0}
  assert num_judged < 20 or same  # an unlabelled query is among them
  assert outcome.table == {"mean average precision": figures["mean_average_precision"],
                           "precision at 1": figures["precision_at"]["1"],
                           "precision at 10": figures["precision_at"]["10"]}
  assert outcome.curve.x == list(range(1, 51)) and outcome.curve.log_x
  assert outcome.curve.y == pytest.approx([precision_at(n) for n in range(1, 51)])
  assert [query["index"] for query in figures["queries"]] == asked[:3]
  for query, index, ranking in zip(figures["queries"], asked, rankings, strict=False):
    assert query["name"] == f"image {index}"
    assert query["class"] == (queries.class_names[queries.labels()[index]] if queries.labels()[index] >= 0 else None)
    assert [(other["index"], other["similarity"]) for other in query["neighbours"]] == ranking[:4]
    assert [other["class"] for other in query["neighbours"]] == [
      GALLERY.class_names[GALLERY.labels()[i]] if GALLERY.labels()[i] >= 0 else None for i, _ in ranking[:4]]
  json.dumps(dataclasses.asdict(outcome))
  assert "203 of 203 images" in capsys.readouterr().out


@pytest.mark.parametrize(("num_devices", "batch_size", "num_threads", "block", "scores"), [
  (1, 1, 0, 16_384, 2**28),
  (1, 64, 2, 50, 203 * 3),  # three queries ranked at a time
  (8, 256, 2, 64, 1),  # one at a time
])
@pytest.mark.parametrize("same", [False, True])
def test_neither_devices_nor_batches_nor_blocks_change_anything(tmp_path, monkeypatch, same, num_devices, batch_size,
                                                                num_threads, block, scores):
  queries = GALLERY if same else QUERIES
  arguments = dict(queries=queries, same_split=same, num_queries=42)
  expected = measure(tmp_path, **arguments)
  monkeypatch.setattr(knn, "BLOCK_ROWS", block)
  monkeypatch.setattr(retrieval, "SCORES", scores)
  found = measure(tmp_path / "other", num_devices=num_devices, batch_size=batch_size, num_threads=num_threads,
                  **arguments)
  for outcome, path in ((expected, tmp_path), (found, tmp_path / "other")):
    assert outcome.figures.pop("written") == [str(path / "neighbours.png")]
  assert found == expected
  for path in (tmp_path, tmp_path / "other"):
    assert Image.open(path / "neighbours.png").width > 5 * 128
  np.testing.assert_array_equal(*(np.asarray(Image.open(path / "neighbours.png"))
                                  for path in (tmp_path, tmp_path / "other")))


def test_queries_are_known_by_their_seed_alone(tmp_path):
  def asked(**changes):
    figures = measure(tmp_path, num_shown=99, **changes).figures
    return [query["index"] for query in figures["queries"]], figures["num_broken_queries"]

  first, _ = asked(num_queries=10)
  # The lowest of `printf 0:INDEX | sha256sum`; 44 cannot be read.
  assert first[:7] == [15, 36, 20, 25, 18, 7, 33] and first == chosen(QUERIES, 10)
  assert asked(num_queries=30)[0][:10] == first
  assert asked(num_queries=10, seed=1)[0] == chosen(QUERIES, 10, seed=1) != first
  every, num_broken = asked(num_queries=1000, batch_size=8)
  assert sorted(every) == sorted(set(range(45)) - {5, 44}) and num_broken == 2
  assert asked(num_queries=43, batch_size=8)[1] <= 2


def test_an_image_never_finds_itself_but_its_double(tmp_path):
  source = Arrays(60, seed=3)
  for pixels in (source._images, source.signs):
    pixels[30:] = pixels[:30]  # every image twice
  source._labels[30:] = source._labels[:30]
  arguments = dict(gallery=source, queries=source, num_queries=60, num_shown=60)
  figures = measure(tmp_path, same_split=True, **arguments).figures
  assert figures["mean_similarity_of_nearest"] == 1
  for query in figures["queries"]:
    found = [other["index"] for other in query["neighbours"]]
    twins = [i for i in range(60) if i != query["index"]
             and np.array_equal(source.signs[i], source.signs[query["index"]])]
    assert query["index"] not in found and found[:len(twins)] == twins[:4]
  # As two splits, each finds itself.
  figures = measure(tmp_path, **arguments).figures
  assert all(query["index"] in [other["index"] for other in query["neighbours"]] for query in figures["queries"])


def test_a_gallery_smaller_than_what_is_asked_for(tmp_path):
  few = Arrays(4, seed=0, num_classes=2)
  outcome = measure(tmp_path, few, few, same_split=True, num_neighbours=9)
  assert all(len(query["neighbours"]) == 3 for query in outcome.figures["queries"])
  assert list(outcome.figures["precision_at"]) == ["1", "3"] and "precision at 10" not in outcome.table
  with pytest.raises(UserError, match="1 of 2 gallery images can be read"):
    measure(tmp_path, *[Arrays(2, seed=0, damaged=(0,))] * 2, same_split=True)


@pytest.mark.parametrize("unlabelled", ["gallery", "queries"])
def test_without_labels_there_are_neighbours_and_a_plot(tmp_path, unlabelled):
  sources = {"gallery": GALLERY, "queries": QUERIES}
  bare = copy.copy(sources[unlabelled])
  bare.class_names, bare._labels = (), np.full(len(bare), -1, np.int32)
  outcome = measure(tmp_path, **{**sources, unlabelled: bare})
  labelled = measure(tmp_path / "labelled")
  name = {"gallery": "gallery", "queries": "query"}[unlabelled]
  assert outcome.figures["labels"] == f"none: the {name} images have no labels"
  assert "mean_average_precision" not in outcome.figures and "precision_at" not in outcome.figures
  assert outcome.curve is None
  assert outcome.table == {"similarity of the nearest": labelled.figures["mean_similarity_of_nearest"]}
  for query, other in zip(outcome.figures["queries"], labelled.figures["queries"], strict=True):
    assert [(n["index"], n["similarity"]) for n in query["neighbours"]] == [
      (n["index"], n["similarity"]) for n in other["neighbours"]]
  plot = np.asarray(Image.open(tmp_path / "neighbours.png"))
  assert not (plot == (0, 140, 60)).all(-1).any() and not (plot == (205, 40, 40)).all(-1).any()
  assert (np.asarray(Image.open(tmp_path / "labelled" / "neighbours.png")) == (0, 140, 60)).all(-1).any()


def test_the_plot_shows_whole_images_and_black_for_one_that_cannot_be_read(tmp_path):
  photograph = np.repeat(np.arange(0, 240, dtype=np.uint8)[None], 80, axis=0)  # 3 to 1: a centre crop would lose most
  Image.fromarray(photograph).save(tmp_path / "0.png")
  (tmp_path / "1.png").write_bytes(b"no image")
  source = open_source(DataSettings("folder", root=str(tmp_path), split=""))
  whole, broken = retrieval._originals([(source, 0), (source, 1)], 2)
  np.testing.assert_array_equal(whole, np.repeat(photograph[..., None], 3, axis=2))
  assert broken.shape[0] == broken.shape[1] and not broken.any()


def test_classes_that_never_meet_are_said(tmp_path):
  queries = Arrays(9, seed=0)
  queries._labels[:] = 5
  gallery = Arrays(30, seed=0)
  gallery._labels[:] = 4
  assert measure(tmp_path, gallery, queries).figures["labels"].startswith("none: no query has an image of its class")
  queries.class_names = ("other", "classes")
  queries._labels[:] = 1
  assert measure(tmp_path, gallery, queries).figures["labels"] == "none: the classes of gallery and queries differ"


@pytest.fixture(scope="module")
def resnet():
  network = Network(create_resnet("resnet8", stem="3x3s2"), ImageHead(16), PatchesHead(16))
  return Model(network, create_variables(
    network, jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 9, 5, 5, 3))))


@pytest.mark.parametrize(("num_devices", "same"), [(1, False), (8, False), (8, True)])
def test_a_memory_bank_as_gallery(tmp_path, resnet, num_devices, same):
  gallery = TextureSource(90, size=16, split="train")
  queries = gallery if same else TextureSource(30, size=16, split="test")
  rng = np.random.default_rng(0)
  bank = rng.normal(size=(90, 16)).astype(np.float32)  # of any length
  bank[[4, 50]] = 0  # images that could not be read
  figures = measure(tmp_path, gallery, queries, model=resnet, bank=bank, num_devices=num_devices, layer="pooled",
                    num_queries=30, num_shown=30, same_split=same).figures
  assert (figures["gallery"], figures["layer"], figures["num_gallery"], figures["num_broken_gallery"]) == (
    "bank", "embedding", 88, 2)
  image = (np.stack([record.image for record in map(queries.__getitem__, range(len(queries)))]) / 255
           - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  embedding = np.asarray(resnet.network.apply(resnet.variables, image.astype(np.float32), method="embed_image"),
                         np.float64)
  expected, precision = [], []
  for query in figures["queries"]:
    index = query["index"]
    # An image lies anywhere in the bank's ranking of itself, at the head or not.
    usable = np.setdiff1d(np.arange(90), [4, 50, index] if same else [4, 50])
    similarity = bank[usable] @ embedding[index] / np.linalg.norm(embedding[index])
    similarity /= np.linalg.norm(bank[usable], axis=1)
    relevant = gallery.labels()[usable] == queries.labels()[index]
    expected.append(average_precision_score(relevant, similarity))
    order = np.argsort(-similarity)
    precision.append(relevant[order[:50]].mean())
    assert [other["index"] for other in query["neighbours"]] == usable[order[:4]].tolist()
    np.testing.assert_allclose([other["similarity"] for other in query["neighbours"]], similarity[order[:4]], atol=1e-5)
  assert figures["mean_average_precision"] == pytest.approx(np.mean(expected), rel=1e-5)
  assert figures["precision_at"]["50"] == pytest.approx(np.mean(precision))


def test_features_of_a_network_are_ranked_as_by_scikit_learn(tmp_path, resnet):
  source = TextureSource(120, size=16, split="train")
  by_devices = [measure(tmp_path, source, source, model=resnet, num_devices=n, num_queries=40, same_split=True).figures
                for n in (1, 8)]
  image = (np.stack([source[i].image for i in range(120)]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  rows = np.asarray(resnet.network.apply(resnet.variables, image.astype(np.float32), method="features")["pooled"],
                    np.float64)
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  asked = sorted(range(120), key=lambda i: hashlib.sha256(f"0:{i}".encode()).hexdigest())[:40]
  expected = []
  for query in asked:
    others = np.setdiff1d(np.arange(120), query)
    relevant = source.labels()[others] == source.labels()[query]
    expected.append(average_precision_score(relevant, rows[others] @ rows[query]))
  for figures in by_devices:
    # Two images as similar but for rounding may change places.
    assert figures["mean_average_precision"] == pytest.approx(np.mean(expected), rel=1e-3)
    assert figures["num_judged"] == 40


@pytest.mark.parametrize(("changes", "message"), [
  ({"layer": "res9"}, "retrieval.layer names the layer 'res9'"),
  ({"num_queries": 0}, "retrieval.num_queries=0"),
  ({"num_shown": 0}, "retrieval.num_shown=0"),
  ({"num_neighbours": -1}, "retrieval.num_neighbours=-1"),
  ({"bank": np.ones((5, 16), np.float32)}, "a memory bank of 5 images, but the gallery has 203"),
  ({"queries": Arrays(2, seed=0, damaged=(0, 1))}, "none of the 2 query images"),
  ({"gallery": Arrays(2, seed=0, damaged=(0, 1))}, "0 of 2 gallery images can be read"),
])
def test_what_cannot_be_is_refused(tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    measure(tmp_path, **changes)
  assert not list(tmp_path.iterdir())
