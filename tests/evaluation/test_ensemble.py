"""Several networks as one: their features side by side, and a linear classifier on all of them against scikit-learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from pirl_jax.data.embedded import TextureSource
from pirl_jax.errors import UserError
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.layers import check_layers, check_maps, layer_features, layer_names
from pirl_jax.evaluation.protocols import linear
from pirl_jax.evaluation.protocols.knn import KnnSettings, measure_knn
from pirl_jax.models.heads import ImageHead, PatchesHead
from pirl_jax.models.network import Ensemble, Model, Network
from pirl_jax.models.resnet import create_resnet
from pirl_jax.runtime.mesh import create_mesh
from pirl_jax.views.normalisation import normalise_image

SIZE = 16
LAYERS = ("conv1", "res2", "res3", "res4", "pooled")


def create(arch="resnet8", *, width=1, stem="3x3s2"):
  return Network(create_resnet(arch, width=width, stem=stem), ImageHead(8), PatchesHead(8))


NETWORK, WIDE = create(), create(width=3)


@functools.partial(jax.jit, static_argnums=0)
def create_variables(network, key):
  """Running statistics are those of noise: with those of its start the deep layers are dead."""
  image = jax.random.normal(key, (8, SIZE, SIZE, 3))
  variables = network.init(key, image[:1], jnp.zeros((1, 4, 8, 8, 3)), train=False)
  zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
  _, updated = network.apply({"params": variables["params"], "batch_stats": zeros}, image, train=True,
                             mutable=["batch_stats"], method="features")
  return {**variables, "batch_stats": jax.tree.map(lambda x: 10 * x, updated["batch_stats"])}  # a tenth was taken on


@functools.cache
def model_of(network, seed):
  return Model(network, jax.device_get(create_variables(network, jax.random.key(seed))))


def together(*models):
  return Model(Ensemble(tuple(model.network for model in models)), tuple(model.variables for model in models))


@functools.cache
def two():
  return together(model_of(NETWORK, 0), model_of(NETWORK, 1))


def images(source):
  return normalise_image(jnp.asarray(np.stack([source[i].image for i in range(len(source))])))


def pool_by_hand(x, side):
  """PyTorch's adaptive cells in float64, for sides that divide."""
  cell = x.shape[1] // side
  return np.array([[[row[i * cell:(i + 1) * cell, j * cell:(j + 1) * cell].mean(axis=(0, 1)) for j in range(side)]
                    for i in range(side)] for row in np.float64(x)])


def test_features_are_those_of_the_networks_one_after_the_other():
  members = model_of(NETWORK, 0), model_of(create(stem="3x3"), 1)
  # At 48 pixels conv1 and res2 of the one have 24 points a side, as many as 16 channels may; the other's are pooled.
  image = np.random.default_rng(0).normal(size=(2, 48, 48, 3)).astype(np.float32)
  layers = ("conv1", "res2", "pooled")
  ensemble = together(*members)

  @jax.jit
  def compute(variables):
    return (*(layer_features(ensemble.network, layers, flat=flat)(variables, image) for flat in (False, True)),
            [model.network.apply(own, image, method="features") for model, own in zip(members, variables, strict=True)])

  square, flat, maps = compute(ensemble.variables)
  assert [found["conv1"].shape[1] for found in maps] == [24, 48]
  for layer in ("conv1", "res2"):
    expected = np.concatenate([pool_by_hand(found[layer], 24) for found in maps], axis=-1)
    assert square[layer].shape == (2, 24, 24, 32)
    np.testing.assert_allclose(square[layer], expected, atol=1e-5)
    np.testing.assert_allclose(flat[layer], expected.reshape(2, -1), atol=1e-5)
  # The last map's mean, by hand.
  expected = np.concatenate([np.float64(found["res4"]).mean(axis=(1, 2)) for found in maps], axis=-1)
  assert np.abs(expected[:, :64] - expected[:, 64:]).max() > 0.1
  np.testing.assert_allclose(square["pooled"], expected, atol=1e-5)
  np.testing.assert_array_equal(square["pooled"], flat["pooled"])


def test_the_same_function_for_equal_ensembles():
  again = Ensemble((create(), create()))
  assert layer_features(two().network, ("res2",)) is layer_features(again, ("res2",))
  assert layer_features(two().network, ("res2",)) is not layer_features(NETWORK, ("res2",))


def test_a_network_with_itself_has_the_same_neighbours():
  alone = model_of(NETWORK, 0)
  train, test = (Images(TextureSource(num, size=SIZE, split=split), SIZE, 1.0, 16, 1)
                 for num, split in ((96, "train"), (40, "test")))
  one, both, other = (
    measure_knn(model, train, test, KnnSettings("pooled", 7, 0.07), mesh=create_mesh(8)).figures
    for model in (alone, together(alone, alone), two()))
  assert (one["dim"], both["dim"], other["dim"]) == (64, 128, 128)
  assert one["top1_by_k"] == both["top1_by_k"] and one["top5"] == both["top5"]
  assert other["top1_by_k"] != one["top1_by_k"]


def test_there_is_no_embedding():
  network = two().network
  assert layer_names(network) == LAYERS
  check_layers(network, LAYERS, field="knn.layer")
  with pytest.raises(UserError, match="knn.layer names the layer 'embedding'; this ensemble has conv1, .*, pooled$"):
    check_layers(network, ("embedding",), field="knn.layer")


def test_maps_on_different_grids_are_refused():
  # 16 channels keep 24 points a side, 48 keep 13; the deeper maps of both are small enough to stay.
  variables = [jax.eval_shape(functools.partial(create_variables, network), jax.random.key(0))
               for network in (NETWORK, WIDE)]
  check = functools.partial(check_maps, Ensemble((NETWORK, WIDE)), variables, field="svm.layers")
  check(LAYERS, image_size=16)
  check(("res3", "pooled"), image_size=32)
  with pytest.raises(UserError, match="svm.layers: .* 16 x 16 and 13 x 13 points in the pooled map of res2 at 32 "
                                      "pixels, .* choose from res3, res4, pooled$"):
    check(("res3", "res2"), image_size=32)
  check_maps(WIDE, variables[1], LAYERS, image_size=32, field="svm.layers")


# Linear classifiers.

def coloured(num, split):
  """Textures' labels, with noise about one colour for each class as images: random networks tell most of them."""
  source = TextureSource(num, size=SIZE, split=split)
  rng = np.random.default_rng(num)
  colours = np.random.default_rng(0).uniform(60, 190, (10, 3))
  own = colours[source.labels()] + rng.normal(0, 20, (num, 3))
  noise = rng.normal(0, 30, (num, SIZE, SIZE, 3))
  source._images = np.clip(own[:, None, None] + noise, 0, 255).astype(np.uint8)
  return source


TRAIN, TEST = coloured(112, "train"), coloured(60, "test")


def classify(folder, model, *, num_devices=8, **changes):
  settings = linear.LinearSettings(**(dict(
    layers="res4,pooled", num_epochs=3, batch_size=32, learning_rate=0.4, schedule="steps", milestones=(1 / 3,),
    decay_factor=0.1, momentum=0.9, nesterov=False, weight_decay=1e-3, head="bn", image_scale=(0.3, 1.0),
    cached=False) | changes))
  train, test = (Images(source, SIZE, 1.0, 16, 1) for source in (TRAIN, TEST))
  return linear.measure_linear(model, train, test, settings, mesh=create_mesh(num_devices), seed=5,
                               snapshot_folder=folder).figures


@pytest.mark.slow
def test_one_device_finds_what_eight_find(tmp_path):
  one, eight = (classify(tmp_path, two(), num_devices=num) for num in (1, 8))
  for layer, dim in (("res4", 2 * 256), ("pooled", 2 * 64)):
    assert one["layers"][layer]["dim"] == eight["layers"][layer]["dim"] == dim
    assert one["layers"][layer]["loss"] == pytest.approx(eight["layers"][layer]["loss"], rel=1e-3)
    assert abs(one["layers"][layer]["top1"] - eight["layers"][layer]["top1"]) <= 1.5 / 60


def test_trained_to_the_end_it_is_scikit_learns_logistic_regression(tmp_path):
  # The whole set is one batch, so every step has the same objective, and that has a single minimum.
  decay = 0.02
  found = classify(tmp_path, two(), num_devices=1, batch_size=112, num_epochs=800, schedule="cosine", milestones=(),
                   learning_rate=0.15 * 256 / 112, nesterov=True, weight_decay=decay, cached=True)["layers"]["pooled"]
  x, y = (np.concatenate([np.float64(jax.jit(layer_features(NETWORK, ("pooled",)))(
    model_of(NETWORK, seed).variables, images(source))["pooled"]) for seed in (0, 1)], axis=1)
    for source in (TRAIN, TEST))
  mean, var = x.mean(axis=0), x.var(axis=0)
  x = (x - mean) / np.sqrt(var + 1e-5)
  y = (y - mean) / np.sqrt(var * 112 / 111 + 1e-5)  # running statistics are unbiased
  x, y = (np.concatenate([z, np.ones((len(z), 1))], axis=1) for z in (x, y))  # the bias, which decays here too
  regression = LogisticRegression(C=1 / (decay * 112), fit_intercept=False, tol=1e-8, max_iter=10_000)
  regression.fit(x, TRAIN.labels())
  loss = -np.log(regression.predict_proba(x)[np.arange(112), TRAIN.labels()]).mean()
  assert found["loss"] == pytest.approx(loss, rel=1e-3)
  assert found["top1"] == pytest.approx(regression.score(y, TEST.labels()), abs=1.5 / 60)
