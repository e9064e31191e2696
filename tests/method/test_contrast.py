"""What embeddings are compared with, against plain loops in float64: losses, gradients, Z, and what moves the bank."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import PartitionSpec as P

from pirl_jax.method import losses, memory_bank
from pirl_jax.method.contrast import Contrast
from pirl_jax.method.micro_batches import split_batch
from pirl_jax.method.negatives import Scores
from pirl_jax.method.optimizer import Optimizer
from pirl_jax.method.randomness import step_keys
from pirl_jax.method.state import create_state
from pirl_jax.method.step import Momenta, Weights, make_contrastive_step
from pirl_jax.models.heads import ImageHead
from pirl_jax.models.network import Network
from pirl_jax.models.resnet import ResNet
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.runtime.mesh import AXIS

N, B, K, D, TAU, SEED, STEP, MU = 103, 16, 32, 8, 0.2, 3, 5, 0.3
LAYOUT = memory_bank.create_layout(N, num_devices=8, num_negatives=K)
VIEWS = "pretext", "image"


@pytest.fixture(scope="module")
def case():
  """Returns the bank, what of it is usable, a batch with a broken image, and embeddings of each view."""
  rng = np.random.default_rng(0)
  bank, usable = jax.device_get(memory_bank.create(jax.random.key(1), LAYOUT, dim=D))
  drawn = np.intersect1d(*(drawn_by_hand(view, None) for view in VIEWS))
  broken = np.flatnonzero(np.isin(LAYOUT.row_of(np.arange(N)), drawn))[0]  # among the negatives of both views
  index = np.insert(rng.permutation(np.delete(np.arange(N), broken))[:B - 1], 4, broken).astype(np.int32)
  embs = {}
  for view in VIEWS:
    emb = bank[LAYOUT.row_of(index)] + 0.4 * rng.normal(size=(B, D))
    embs[view] = (emb / np.linalg.norm(emb, axis=1, keepdims=True)).astype(np.float32)
  return bank, usable, {"index": index, "valid": index != broken}, embs


def contrast_of(loss, num_negatives, negative_sampling, cls=Contrast, **options):
  loss_fn = losses.make_loss(loss, temperature=TAU, num_images=N, num_negatives=num_negatives or N)
  return cls(loss_fn, LAYOUT, num_negatives=num_negatives, negative_sampling=negative_sampling, temperature=TAU,
             **options)


def compared(contrast, case, *, num_devices, num_parts, known=None):
  """Returns (losses, similarities, Z), the gradient of the losses' means by the embeddings, usable and the next bank.

  What belongs to images is split into parts, [M, B / M, ...].
  """
  def device_fn(bank, usable, batch, embs):
    memory = contrast.look_up(bank, usable, split_batch(batch, num_parts), step_keys(SEED, STEP), views=VIEWS)
    parts = {"images": memory.images, "embs": embs}
    normaliser = jnp.float32(known or 0)
    if known is None and contrast.loss_fn.has_normaliser:
      normaliser = contrast.normaliser(memory, lambda part: part["embs"], parts)

    def objective(embs):
      each = [contrast(memory, *(jax.tree.map(lambda x, j=j: x[j], tree) for tree in (memory.images, embs)), normaliser)
              for j in range(num_parts)]
      each, seen = jax.tree.map(lambda *parts: jnp.stack(parts), *each)
      return sum(jnp.sum(loss * memory.images.share) for loss in each.values()), (each, seen, normaliser)

    grads, found = jax.grad(objective, has_aux=True)(embs)
    moved = memory_bank.update(bank, *memory.to_write(embs["image"]), momentum=MU, axis=AXIS)
    return found, grads, memory.usable, moved

  bank, usable, batch, embs = case
  mapped = jax.shard_map(device_fn, mesh=mesh_lib.create_mesh(num_devices), in_specs=(P(AXIS), P(AXIS), P(AXIS), P()),
                         out_specs=(P(), P(), P(AXIS), P(AXIS)))
  return jax.device_get(jax.jit(mapped)(bank, usable, batch, in_parts(embs, num_parts)))


def in_parts(tree, num_parts):
  """Returns [B, ...] as [M, B / M, ...]: part j is every Mth image from the jth on."""
  return jax.tree.map(lambda x: np.stack([x[j::num_parts] for j in range(num_parts)]), tree)


def drawn_by_hand(view, num_draws):
  """Returns the rows of the negatives, i32[B, K], those of a device beside those of the next."""
  draw = jax.jit(jax.shard_map(
    lambda key: memory_bank.draw(key, LAYOUT, num_negatives=K, axis=AXIS, num_draws=num_draws),
    mesh=mesh_lib.create_mesh(1), in_specs=P(), out_specs=P(AXIS) if num_draws is None else P(None, AXIS)))
  number = ("views", "pretext", "image").index(view)
  return np.broadcast_to(draw(jax.random.split(jax.random.fold_in(jax.random.key(SEED), STEP), 3)[number]), (B, K))


def by_hand(case, view, emb, negatives, loss, normaliser, *, with_own=False, nearest=0.0, ranks=(0, 1)):
  """Returns (losses, similarities) of one view, f64[B] each, and Z as this view would set it."""
  bank, usable, batch, _ = case
  rows = LAYOUT.row_of(batch["index"])
  drawn = {"shared": lambda: drawn_by_hand(view, None), "per_image": lambda: drawn_by_hand(view, B),
           "every": lambda: np.broadcast_to(np.arange(len(bank)), (B, len(bank)))}[negatives]()
  left_out = rows[~batch["valid"]]
  assert np.isin(left_out, drawn).all()
  is_own = drawn == rows[:, None]
  assert is_own.any()
  weight = usable[drawn] & (~is_own | with_own) & ~np.isin(drawn, left_out)
  near = [max((row for row in np.flatnonzero(usable) if row != own and row not in left_out),
              key=lambda row: bank[row].astype(float) @ bank[own]) for own in rows]  # noqa: B023, used at once
  if nearest:
    assert np.isin(near, drawn).any()
    weight &= drawn != np.array(near)[:, None]
  positive = np.array([bank[rows[i]].astype(float) @ emb[i] / TAU for i in range(B)])
  score = np.einsum("bkd,bd->bk", bank[drawn].astype(float), emb) / TAU
  for i in range(B):
    order = np.sort(score[i][weight[i]])[::-1]
    skipped, taken = int(np.floor(ranks[0] * len(order))), int(np.ceil(ranks[1] * len(order)))
    weight[i] &= score[i] >= order[taken - 1]
    if skipped:
      weight[i] &= score[i] < order[skipped - 1]
  z = oracles.nce_normaliser(positive, score, weight, batch["valid"], num_images=N)
  loss_of = getattr(oracles, loss)
  if loss == "nce":
    loss_of = partial(oracles.nce, normaliser=normaliser or z, num_images=N,
                      num_negatives=N if negatives == "every" else K)
  each = loss_of(positive, score, weight)
  if nearest:
    second = np.array([bank[near[i]].astype(float) @ emb[i] / TAU for i in range(B)])
    each = (1 - nearest) * each + nearest * loss_of(second, score, weight)
  beaten = np.sum((score < positive[:, None]) * weight, axis=1)
  return each, (positive, beaten, np.sum(score * weight, axis=1), np.sum(weight, axis=1)), z


PLAIN = [
  ("shared", "nce", 1, False), ("shared", "eq4", 2, False), ("per_image", "infonce", 2, False),
  ("per_image", "nce", 1, True), ("every", "infonce", 1, False), ("every", "nce", 2, False)]
CHOSEN = [  # with the nearest row as a positive, negatives of some ranks, or both
  ("shared", "nce", 1, False, 0.5, (0, 1)), ("every", "infonce", 2, False, 0.3, (0.1, 0.5)),
  ("per_image", "infonce", 1, False, 0, (0, 0.08)), ("shared", "eq4", 1, False, 0.2, (0.05, 0.4))]


@pytest.mark.parametrize("num_devices, negatives, loss, num_parts, with_own, nearest, ranks", [
  *((number, *row, 0, (0, 1)) for number in (1, 8) for row in PLAIN),
  *((8, *row) for row in CHOSEN), *(pytest.param(1, *row, marks=pytest.mark.slow) for row in CHOSEN)])
def test_losses_similarities_and_gradients(case, num_devices, negatives, loss, num_parts, with_own, nearest, ranks):
  contrast = contrast_of(loss, 0 if negatives == "every" else K, "per_image" if negatives == "per_image" else "shared",
                         own_row_is_negative=with_own, nearest_positive=nearest, negative_ranks=ranks)
  expect = partial(by_hand, case, negatives=negatives, loss=loss, with_own=with_own, nearest=nearest, ranks=ranks)
  (each, seen, normaliser), grads, usable, _ = compared(contrast, case, num_devices=num_devices, num_parts=num_parts)
  _, before, batch, embs = case
  assert set(each) == set(seen) == set(VIEWS)
  z = expect("pretext", embs["pretext"].astype(float), normaliser=None)[2]  # the pretext view sets it
  np.testing.assert_allclose(normaliser, z if loss == "nce" else 0, rtol=1e-5)
  for view in VIEWS:
    emb = embs[view].astype(float)
    expected, similarities, _ = expect(view, emb, normaliser=z)
    np.testing.assert_allclose(each[view], in_parts(expected, num_parts), rtol=2e-5)
    for name, wanted in zip(seen[view]._fields, in_parts(similarities, num_parts), strict=True):
      # A negative that is the own row has the own row's score but for rounding, so it is beaten or not.
      near = 1 if with_own and name == "beaten" else 1e-4
      np.testing.assert_allclose(getattr(seen[view], name), wanted, rtol=1e-4, atol=near)
    share, h, slopes = batch["valid"] / np.sum(batch["valid"]), 1e-6, np.zeros((B, D))
    for d in range(D):  # a loss depends on the embedding of its own image alone, so all images move at once
      up, down = (expect(view, emb + sign * h * np.eye(D)[d], normaliser=z)[0] for sign in (1, -1))
      slopes[:, d] = (up - down) / (2 * h) * share
    np.testing.assert_allclose(grads[view], in_parts(slopes, num_parts), rtol=1e-4, atol=1e-4 * np.abs(slopes).max())
  broken = LAYOUT.row_of(batch["index"][~batch["valid"]])
  np.testing.assert_array_equal(usable, before & ~np.isin(np.arange(len(before)), broken))


@pytest.mark.parametrize("num_devices, num_parts", [(1, 4), (8, 2)])
def test_the_rows_of_the_batch_move_towards_their_own_embeddings(case, num_devices, num_parts):
  *_, found = compared(contrast_of("infonce", K, "shared"), case, num_devices=num_devices, num_parts=num_parts)
  bank, _, batch, embs = case
  expected = oracles.bank_update(bank, LAYOUT.row_of(batch["index"]), embs["image"], batch["valid"], momentum=MU)
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("num_devices, num_parts", [(1, 2), (8, 1)])
def test_images_that_fill_a_batch_up_have_no_weight_in_it_and_stay_usable(case, num_devices, num_parts):
  bank, usable, batch, embs = case
  fills = np.arange(B) >= B - 3
  counts = batch["valid"] & ~fills
  (each, *_), grads, still, moved = compared(
    contrast_of("infonce", K, "shared"), (bank, usable, batch | {"fills": fills}, embs), num_devices=num_devices,
    num_parts=num_parts)
  (plain, *_), whole, usable, _ = compared(contrast_of("infonce", K, "shared"), case, num_devices=num_devices,
                                           num_parts=num_parts)
  np.testing.assert_array_equal(still, usable)
  for view in VIEWS:  # each loss as before, and the mean over the images that count
    np.testing.assert_allclose(each[view], plain[view], rtol=1e-6)
    shares = in_parts(counts / np.sum(counts) * np.sum(batch["valid"]), num_parts)[..., None]
    np.testing.assert_allclose(grads[view], whole[view] * shares, rtol=1e-4, atol=1e-6)
  expected = oracles.bank_update(bank, LAYOUT.row_of(batch["index"]), embs["image"], counts, momentum=MU)
  np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_the_loss_is_that_of_the_normaliser_given(case):
  (each, _, normaliser), *_ = compared(contrast_of("nce", K, "shared"), case, num_devices=1, num_parts=1, known=700.0)
  assert normaliser == 700
  expected, *_ = by_hand(case, "image", case[3]["image"].astype(float), "shared", "nce", 700.0)
  np.testing.assert_allclose(each["image"][0], expected, rtol=2e-5)


class BatchMates(Contrast):
  """Another kind of loss: the negatives of an image are the rows of the other images of its part of the batch."""

  def scores(self, memory, images, view, emb):
    weight = (~jnp.eye(len(emb), dtype=bool) & images.valid[None]).astype(jnp.float32)
    return (memory_bank.positive_scores(images.own, emb, temperature=self.temperature),
            Scores(memory_bank.negative_scores(images.own, emb, temperature=self.temperature), weight))


@pytest.mark.parametrize("num_devices", [1, 8])
def test_another_kind_of_loss_is_a_subclass(case, num_devices):
  contrast = contrast_of("infonce", K, "shared", BatchMates)
  (each, *_), *_ = compared(contrast, case, num_devices=num_devices, num_parts=1)
  bank, _, batch, embs = case
  own, emb = bank[LAYOUT.row_of(batch["index"])].astype(float), embs["image"].astype(float)
  for i in range(B):
    mates = [j for j in range(B) if j != i and batch["valid"][j]]
    expected = np.log(1 + sum(np.exp((own[j] - own[i]) @ emb[i] / TAU) for j in mates))
    np.testing.assert_allclose(each["image"][0, i], expected, rtol=2e-5)


def test_a_step_with_another_kind_of_loss_is_the_same_on_any_number_of_devices(case):
  network = Network(ResNet(blocks=(1,), bottleneck=False, channels=8, stem="3x3s2"), ImageHead(D))
  optimizer = Optimizer(optax.sgd(0.1), optax.constant_schedule(0.1))
  rng, states = np.random.default_rng(2), []
  batch = case[2] | {"image_crop": rng.integers(0, 256, (B, 12, 12, 3), dtype=np.uint8)}
  for num_devices in (1, 8):
    mesh = mesh_lib.create_mesh(num_devices)
    state = create_state(SEED, network, optimizer, LAYOUT, mesh=mesh, create_bank=partial(memory_bank.create, dim=D),
                         inputs=(jnp.zeros((1, 12, 12, 3)), None))
    step = make_contrastive_step(
      network.with_batch_norm(axis=AXIS), optimizer, lambda keys, image, pretext: (image / 127.5 - 1, None, None),
      contrast_of("infonce", K, "shared", BatchMates), mesh, weights=Weights(0), momenta=Momenta(MU))
    states.append(jax.device_get(step(state, jax.device_put(batch, mesh_lib.split(mesh)))))
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), *states)
  assert np.isfinite(states[0][1]["loss"])
