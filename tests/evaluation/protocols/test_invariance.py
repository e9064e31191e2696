
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pirl_jax.data.crops import centre_crop
from pirl_jax.data.embedded import TextureSource
from pirl_jax.data.records import Record
from pirl_jax.data.subsets import shuffled
from pirl_jax.errors import UserError
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.protocols.invariance import NO_AUGMENTATION, InvarianceSettings, measure_invariance
from pirl_jax.method.randomness import view_keys
from pirl_jax.models.heads import ImageHead, PatchesHead
from pirl_jax.models.network import Model, Network, create_variables
from pirl_jax.models.resnet import create_resnet
from pirl_jax.runtime.mesh import create_mesh
from pirl_jax.views.jigsaw import Jigsaw
from pirl_jax.views.normalisation import normalise_image
from pirl_jax.views.two_views import make_views

NETWORK = Network(create_resnet("resnet8", stem="3x3s2"), ImageHead(8), PatchesHead(8))
VIEWS = make_views(Jigsaw(crop_size=18, crop_scale=(0.6, 1.0), grid=3, patch_size=5), recipe=NO_AUGMENTATION,
                   pretext_recipe=NO_AUGMENTATION)


class Textures(TextureSource):
  """Textures of 20 pixels, some of them damaged."""

  def __init__(self, num, damaged=()):
    super().__init__(num, size=20, split="test")
    self._damaged = damaged

  def __getitem__(self, index):
    return Record(b"damaged", 0) if index in self._damaged else super().__getitem__(index)


@pytest.fixture(scope="module")
def model():
  variables = create_variables(NETWORK, jax.random.key(1), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 9, 5, 5, 3)))
  # Biases tell nothing of the image; without them embeddings of a new network differ enough to compare.
  params = jax.tree.map(lambda x: x if x.ndim > 1 else jnp.zeros_like(x), variables["params"]["image_head"])
  return Model(NETWORK, {**variables, "params": {**variables["params"], "image_head": params}})


def measure(model, *, num_devices=1, source=None, batch_size=8, **changes):
  images = Images(source or Textures(21), 16, 0.8, batch_size, 0)
  arguments = {"views_fn": VIEWS, "pretext_size": 18, "seed": 5}
  given = {"split": None, "representation": "heads", "num_pictures": 13, "num_transforms": 3, "num_bins": 40,
           "centred": False, "augmented": False}
  settings = InvarianceSettings(**{name: changes.pop(name, value) for name, value in given.items()})
  return measure_invariance(model, images, settings, mesh=create_mesh(num_devices), **(arguments | changes))


def unit(x):
  return np.float64(x) / np.linalg.norm(np.float64(x))


def embed_heads(model):
  """Returns embed(image, patches) -> f and g of one image."""
  forward = jax.jit(lambda *views: NETWORK.apply(model.variables, *views, train=False))
  return lambda image, patches: [emb[0] for emb in forward(image, patches)]


def embed_trunk(model):
  """Returns embed(image, patches) -> features, pooled by hand from the last map, a patch at a time, in float64."""
  forward = jax.jit(lambda x: NETWORK.apply(model.variables, x, method="features")["res4"])

  def pooled(x):
    return np.float64(forward(x))[0].mean(axis=(0, 1))

  return lambda image, patches: (pooled(image), sum(pooled(patches[:, i]) for i in range(9)) / 9)


def loop(embed, source, index, *, num_transforms=3, seed=5, centred=False):
  """Returns matched and mismatched distances, one image and one transform at a time."""
  views_fn = jax.jit(VIEWS)
  f, g = [], []
  for i in index:
    original = source[i].image
    image = centre_crop(original, size=16, fraction=0.8)
    crop = centre_crop(original, size=18, fraction=0.8)
    views = [views_fn(view_keys(seed, draw, jnp.int32([i])), image[None], crop[None])[1]
             for draw in range(num_transforms)]
    pairs = [embed(normalise_image(jnp.asarray(image[None])), view) for view in views]
    f.append(np.float64(pairs[0][0]))
    g.append([np.float64(pair[1]) for pair in pairs])
  of_images, of_transformed = 0, 0
  if centred:
    of_images, of_transformed = sum(f) / len(f), sum(sum(g, [])) / len(f) / num_transforms
  f = [unit(vector - of_images) for vector in f]
  g = [[unit(vector - of_transformed) for vector in vectors] for vectors in g]
  matched = [np.linalg.norm(f[i] - g[i][t]) for i in range(len(f)) for t in range(num_transforms)]
  other = [np.linalg.norm(f[i] - g[(i + 1) % len(f)][t]) for i in range(len(f)) for t in range(num_transforms)]
  return matched, other


@pytest.mark.parametrize("damaged", [(), (3, 7)])
def test_distances_are_those_of_a_plain_loop(model, damaged):
  source = Textures(21, damaged)
  index = shuffled(range(21), seed=5)[:13]
  figures = measure(model, source=source).figures
  matched, mismatched = loop(embed_heads(model), source, [i for i in index if i not in damaged])
  for name, distances in (("matched", matched), ("mismatched", mismatched)):
    found = figures[name]
    assert found["mean"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert found["std"] == pytest.approx(np.std(distances), rel=1e-3)
    assert (found["min"], found["max"]) == pytest.approx((min(distances), max(distances)), rel=1e-4)
    assert found["median"] == pytest.approx(np.median(distances), rel=1e-4)
    assert sum(found["counts"]) == len(distances) and len(found["edges"]) == 41
  expected = roc_auc_score([0] * len(matched) + [1] * len(mismatched), matched + mismatched)
  assert figures["separation"] == pytest.approx(expected, abs=1e-3)
  assert figures["num_broken"] == len(set(damaged) & set(index))
  assert figures["num_images"] + figures["num_broken"] == 13


def test_trunks_of_networks_without_heads_are_those_of_a_plain_loop(model):
  matched, mismatched = loop(embed_trunk(model), Textures(21), shuffled(range(21), seed=5)[:13])
  separation = roc_auc_score([0] * len(matched) + [1] * len(mismatched), matched + mismatched)
  bare = Model(NETWORK.clone(image_head=None, pretext_head=None), {
    name: {"trunk": model.variables[name]["trunk"]} for name in ("params", "batch_stats")})
  for num_devices in (1, 8):
    outcome = measure(bare, num_devices=num_devices, representation="trunk")
    for name, distances in (("matched", matched), ("mismatched", mismatched)):
      found = outcome.figures[name]
      assert found["mean"] == pytest.approx(np.mean(distances), rel=1e-4)
      assert found["std"] == pytest.approx(np.std(distances), rel=1e-3)
      assert (found["min"], found["max"]) == pytest.approx((min(distances), max(distances)), rel=1e-4)
      assert found["max"] < 2**0.5
    assert outcome.figures["separation"] == pytest.approx(separation, abs=1e-3)
    assert outcome.figures["representation"] == "trunk" and "trunk" in outcome.curve.x_label


def test_centred_distances_are_those_of_a_plain_loop_whatever_is_added_to_all_images(model):
  matched, mismatched = loop(embed_trunk(model), Textures(21), shuffled(range(21), seed=5)[:13], centred=True)
  outcome = measure(model, representation="trunk", centred=True)
  assert outcome.figures["matched"]["mean"] == pytest.approx(np.mean(matched), rel=1e-4)
  assert outcome.figures["mismatched"]["max"] == pytest.approx(max(mismatched), rel=1e-4)
  assert outcome.table["the first over the third"] == pytest.approx(np.mean(matched) / np.mean(mismatched), rel=1e-4)
  # A bias of the last layer of g moves all transformed images alike.
  head = model.variables["params"]["pretext_head"]
  biased = jax.tree.map(lambda x: x + 3.0 if x.ndim == 1 else x, head)
  shifted = Model(NETWORK, {**model.variables, "params": {**model.variables["params"], "pretext_head": biased}})
  assert measure(shifted).figures["separation"] != measure(model).figures["separation"]
  found, expected = (measure(one, centred=True).figures["matched"]["mean"] for one in (shifted, model))
  assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_devices_batches_and_the_number_of_images_asked_change_nothing(model):
  one = measure(model).figures
  for changes in ({"num_devices": 8}, {"num_devices": 2, "batch_size": 4}, {"batch_size": 13}):
    other = measure(model, **changes).figures
    assert other["matched"]["mean"] == pytest.approx(one["matched"]["mean"], rel=1e-5)
    assert other["mismatched"]["max"] == pytest.approx(one["mismatched"]["max"], rel=1e-5)
  everything = measure(model, num_pictures=1_000).figures
  assert everything["num_images"] == 21
  assert measure(model, seed=6).figures["matched"]["mean"] != one["matched"]["mean"]


def test_views_differ_by_the_transform_alone():
  crop = jnp.full((1, 18, 18, 3), 77, jnp.uint8)
  image, patches, _ = jax.jit(VIEWS)(view_keys(0, 0, jnp.int32([0])), jnp.full((1, 16, 16, 3), 200, jnp.uint8), crop)
  np.testing.assert_allclose(image, normalise_image(jnp.full((1, 16, 16, 3), 200)), rtol=1e-6)
  np.testing.assert_allclose(patches[:, 0], normalise_image(jnp.full((1, 5, 5, 3), 77)), rtol=1e-6)


class OneVector:
  """Embeds everything alike."""

  image_head = pretext_head = "any"

  def apply(self, variables, x, method):
    return jnp.ones((x.shape[0], 4)) + 0 * x.mean()


class Knows:
  """Embeds image and patches by their mean colour: as invariant as can be."""

  image_head = pretext_head = "any"

  def apply(self, variables, x, method):
    mean = x.mean(axis=tuple(range(1, x.ndim - 1)))
    return jnp.concatenate([jnp.sin(5 * mean), jnp.cos(5 * mean)], axis=-1)


class Colours(Textures):
  """Images of a single colour each."""

  def __getitem__(self, index):
    return Record(np.broadcast_to(np.uint8([40 + 9 * index, 240 - 10 * index, 100]), (20, 20, 3)).copy(), 0)


def test_a_collapsed_network_is_told_by_the_separation_and_an_invariant_one_too():
  collapsed = measure(Model(OneVector(), {})).figures
  assert collapsed["matched"]["max"] == pytest.approx(0, abs=1e-6) and collapsed["separation"] == 0.5
  known = measure(Model(Knows(), {}), source=Colours(21))
  assert known.figures["matched"]["max"] < 1e-3 and known.figures["separation"] == 1
  assert sum(known.curve.y) * 2 / 40 == pytest.approx(1)  # a density
  np.testing.assert_allclose(known.curve.x, 0.025 + 0.05 * np.arange(40))  # at the centres of the bins
  assert known.table["mean distance"] == known.figures["matched"]["mean"]


@pytest.mark.parametrize("changes, said", [
  ({"num_pictures": 0}, "invariance.num_pictures=0"), ({"num_transforms": 0}, "num_transforms"),
  ({"num_bins": 0}, "num_bins"), ({"num_pictures": 1}, "1 of 1 images"),
  ({"source": Textures(4, damaged=range(4))}, "0 of 4 images"),
  ({"representation": "f"}, "representation='f' is not possible: choose from heads, trunk"),
])
def test_what_cannot_be_measured(model, changes, said):
  with pytest.raises(UserError, match=said):
    measure(model, **changes)


@pytest.mark.parametrize("missing", ["image_head", "pretext_head"])
def test_without_a_head_the_trunk_is_the_way_out(model, missing):
  bare = Model(NETWORK.clone(**{missing: None}), model.variables)
  with pytest.raises(UserError, match="no heads f and g.*--config.invariance.representation=trunk"):
    measure(bare)
