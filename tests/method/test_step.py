import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import PartitionSpec as P

from pirl_jax.method import losses, memory_bank
from pirl_jax.method.contrast import Contrast
from pirl_jax.method.optimizer import Optimizer, create_optimizer
from pirl_jax.method.programs import VOID
from pirl_jax.method.randomness import view_keys
from pirl_jax.method.state import Keeps, create_state
from pirl_jax.method.step import Momenta, Weights, make_contrastive_step
from pirl_jax.models.heads import ClassHead, ImageHead, PatchesHead
from pirl_jax.models.network import Network
from pirl_jax.models.resnet import ResNet, create_resnet
from pirl_jax.planning.program import COLLECTIVES, Program
from pirl_jax.runtime import mesh as mesh_lib

N, B, K, D, TAU = 103, 16, 32, 16, 0.2
BIG = 65_536
INPUTS = jnp.zeros((1, 12, 12, 3)), jnp.zeros((1, 4, 6, 6, 3))
PLAIN_SGD = Optimizer(optax.sgd(1.0), optax.constant_schedule(1.0))  # the parameters move by the gradient itself


def views_fn(keys, image_crop, pretext_crop=None):
  """Normalised images and four patches of the pretext crop, with noise from each image's own key."""
  noise = jax.vmap(lambda key: jax.random.normal(key, image_crop.shape[1:]))(keys)
  image = image_crop / 127.5 - 1 + 0.1 * noise
  if pretext_crop is None:
    return image, None, None
  patches = [pretext_crop[:, y:y + 6, x:x + 6] for y in (0, 6) for x in (0, 6)]
  return image, jnp.stack(patches, axis=1) / 127.5 - 1, None


def make_batch(step, *, broken=(), with_pretext=True, with_second=False):
  rng = np.random.default_rng(step)
  index = rng.permutation(N)[:B].astype(np.int32)
  batch = {"image_crop": rng.integers(0, 256, (B, 12, 12, 3), dtype=np.uint8),
           "pretext_crop": rng.integers(0, 256, (B, 12, 12, 3), dtype=np.uint8),
           "index": index, "valid": ~np.isin(index, broken)}
  if with_second:
    batch["second_crop"] = rng.integers(0, 256, (B, 12, 12, 3), dtype=np.uint8)
  return batch if with_pretext else {name: x for name, x in batch.items() if name != "pretext_crop"}


def build(num_devices, *, loss="nce", batch_norm=mesh_lib.AXIS, group=None, optimizer=None, pretext_weight=0.4,
          angle_weight=0.0, bank_momentum=0.5, encoder_momentum=0.0, dtype=jnp.float32, num_negatives=K,
          negative_sampling="shared", micro_batches=1, trunk=None, **choice):
  mesh = mesh_lib.create_mesh(num_devices)
  layout = memory_bank.create_layout(N, num_devices=num_devices, num_negatives=num_negatives)
  trunk = trunk or ResNet(blocks=(1,), bottleneck=False, channels=16, stem="3x3s2", dtype=dtype)  # little to compile
  network = Network(trunk, ImageHead(D), PatchesHead(D) if pretext_weight else None,
                    ClassHead(4) if angle_weight else None)
  optimizer = optimizer or create_optimizer(optax.constant_schedule(0.05), momentum=0.9, weight_decay=1e-4)
  make_state = partial(create_state, 7, network, optimizer, layout, mesh=mesh,
                       create_bank=partial(memory_bank.create, dim=D),
                       inputs=INPUTS if pretext_weight else (INPUTS[0], None),
                       keeps=Keeps(ages=choice.get("max_age", 0) > 0, momentum_encoder=encoder_momentum > 0))
  loss_fn = losses.make_loss(loss, temperature=TAU, num_images=N, num_negatives=num_negatives or N)
  contrast = Contrast(loss_fn, layout, num_negatives=num_negatives, negative_sampling=negative_sampling,
                      temperature=TAU, **choice)
  step = make_contrastive_step(network.with_batch_norm(axis=batch_norm, group=group), optimizer, views_fn, contrast,
                               mesh, weights=Weights(pretext_weight, angle_weight),
                               momenta=Momenta(bank_momentum, encoder_momentum), micro_batches=micro_batches)
  return mesh, layout, network, make_state, step


@functools.cache  # compiling costs seconds, and several tests look at the same run
def run(num_devices, *, loss="nce", num_steps=3, broken=(), **options):
  """Returns the states after each step, the start included, and the metrics of each step, on the host."""
  mesh, _, network, make_state, step = build(num_devices, loss=loss, **options)
  state, states, metrics = make_state(), [], []
  states.append(jax.device_get(state))
  for i in range(num_steps):
    batch = make_batch(i, broken=broken, with_pretext=network.pretext_head is not None,
                       with_second=state.momentum_encoder is not None)
    state, figures = step(state, jax.device_put(batch, mesh_lib.split(mesh)))
    states.append(jax.device_get(state))
    metrics.append(jax.device_get(figures))
  assert state.bank.sharding.is_equivalent_to(mesh_lib.split(mesh), 2)
  return states, metrics


@pytest.mark.parametrize(("loss", "num_programs"), [("infonce", 1), ("nce", 2)])  # the second takes Z from a batch
def test_step_compiles_once(loss, num_programs):
  mesh, _, _, make_state, step = build(8, loss=loss)
  batches = [jax.device_put(make_batch(i), mesh_lib.split(mesh)) for i in range(3)]
  state, compiled = make_state(), []
  def note(event, duration, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(event)
  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    for batch in batches:
      state, _ = step(state, batch)
      assert len(compiled) == num_programs
  finally:
    jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize("num_negatives", [K, 0])
def test_no_step_moves_anything_between_host_and_device_unasked(num_negatives):
  mesh, _, _, make_state, step = build(8, loss="infonce", num_negatives=num_negatives)
  batches = [jax.device_put(make_batch(i), mesh_lib.split(mesh)) for i in range(2)]
  state = make_state()
  with jax.transfer_guard("disallow"):
    for batch in batches:
      state, metrics = step(state, batch)
    with pytest.raises(Exception, match="[Dd]isallowed"):
      step(state, make_batch(2))
  assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize("loss", ["nce", "infonce", "eq4"])
def test_step_is_the_same_on_one_device_and_on_eight(loss):
  broken = (make_batch(0)["index"][5],)
  one, eight = run(1, loss=loss, broken=broken), run(8, loss=loss, broken=broken)
  # Only the order of the sums differs; a wrong mean or a missed row shows up far above this.
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), one, eight)


def test_neighbours_are_chosen_from_the_bank_of_all_devices():
  options = dict(loss="infonce", nearest_positive=0.5, negative_ranks=(0.05, 0.5), broken=(3, 9))
  one, eight = run(1, **options), run(8, **options)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), one, eight)
  assert one[1][-1]["loss"] != run(1, loss="infonce", broken=(3, 9))[1][-1]["loss"]


def test_gradients_are_the_same_on_one_device_and_on_eight():
  one, eight = (run(n, num_steps=1, optimizer=PLAIN_SGD)[0] for n in (1, 8))
  grads = [jax.tree.map(lambda a, b: a - b, states[0].params, states[1].params) for states in (one, eight)]
  largest = max(np.abs(x).max() for x in jax.tree.leaves(grads[0]))
  jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5 * largest), *grads)


def test_statistics_of_each_device_are_an_option_that_leaves_one_device_as_it_is():
  one, single = run(1)[1], run(1, batch_norm=None)[1]
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), one, single)
  eight = run(8, batch_norm=None)[1]
  assert abs(eight[1]["loss"] - one[1]["loss"]) > 1e-4
  assert np.isfinite(eight[1]["loss"])


def test_statistics_of_groups_are_those_of_as_many_devices():
  """On any number of devices and in any number of parts, with a broken image and a draw for each image."""
  options = {"loss": "infonce", "negative_sampling": "per_image", "broken": (make_batch(0)["index"][5],),
             "batch_norm": None}
  devices = run(8, **options)  # each with statistics of its own 2 images
  for num_devices, micro_batches in ((1, 1), (2, 2)):
    groups = run(num_devices, group=2, micro_batches=micro_batches, **options)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), groups, devices)


def test_batch_norm_of_groups_sends_nothing():
  def senders(**options):
    mesh, _, _, make_state, step = build(8, loss="infonce", pretext_weight=0, **options)
    batch = jax.device_put(make_batch(0, with_pretext=False), mesh_lib.split(mesh))
    program = Program(step.lower(make_state(), batch).compile().as_text())
    return [program.scope(kernel) for kernel, _, _ in program.kernels()
            if kernel.opcode.removesuffix("-start") in COLLECTIVES]
  of_all, of_groups = senders(), senders(batch_norm=None, group=2)
  assert sum("/bn" in scope for scope in of_all) >= 3  # one for each layer at least
  assert of_groups and not any("/bn" in scope for scope in of_groups)


def embeddings_by_hand(state, network, batch):
  """Returns f(v_I) and g(v_It) of the first step, unit rows in float64; None for what the network does not have."""
  views = views_fn(view_keys(7, 0, jnp.asarray(batch["index"])), batch["image_crop"], batch.get("pretext_crop"))
  embs, _ = network.apply({"params": state.params, "batch_stats": state.batch_stats}, *views[:2], train=True,
                          mutable=["batch_stats"])
  return [None if emb is None else np.asarray(emb, np.float64) / np.linalg.norm(emb, axis=1, keepdims=True)
          for emb in embs]


def draw_by_hand(mesh, layout, term, *, num_draws=None, step=0):
  """Returns the rows of the negatives of a step, i32[B, K]: one draw for all, or one for each image."""
  key = jax.random.split(jax.random.fold_in(jax.random.key(7), step), 3)[("views", "pretext", "image").index(term)]
  draw = jax.jit(jax.shard_map(
    lambda key: memory_bank.draw(key, layout, num_negatives=K, axis=mesh_lib.AXIS, num_draws=num_draws), mesh=mesh,
    in_specs=mesh_lib.WHOLE, out_specs=mesh_lib.SPLIT if num_draws is None else P(None, mesh_lib.AXIS)))
  return np.broadcast_to(draw(key), (B, K))


def objective_by_hand(state, layout, embs, batch, negatives, *, loss, pretext_weight, own=None):
  """Returns the terms of the first step and Z, in float64, from the rows i32[B, K] of the negatives of each term.

  The positives are the vectors `own` f64[B, D], or the images' own rows.
  """
  bank = np.asarray(state.bank, np.float64)
  rows = layout.row_of(batch["index"])
  left_out = rows[~batch["valid"]]
  terms, normaliser = {}, None
  for name, drawn in negatives.items():
    emb = embs[("image", "pretext").index(name)]
    positive = np.sum((bank[rows] if own is None else own) * emb, axis=1) / TAU
    negative = np.einsum("bd,bkd->bk", emb, bank[drawn]) / TAU
    weight = (drawn != rows[:, None]) & ~np.isin(drawn, left_out)
    if normaliser is None:  # from the first term of the first batch, and for both terms
      normaliser = oracles.nce_normaliser(positive, negative, weight, batch["valid"], num_images=N)
    if loss == "nce":
      each = oracles.nce(positive, negative, weight, normaliser=normaliser, num_images=N, num_negatives=K)
    else:
      each = getattr(oracles, loss)(positive, negative, weight)
    terms[f"loss_{name}"] = np.mean(each[batch["valid"]])
  terms["loss"] = sum(terms[f"loss_{name}"] * {"pretext": pretext_weight, "image": 1 - pretext_weight}[name]
                      for name in negatives)
  return terms, normaliser


@pytest.mark.parametrize("loss", ["nce", "infonce", "eq4"])
def test_first_step_is_the_papers_objective_by_hand(loss):
  """The objective, the normaliser and the bank of one step, with negatives read off the draw, in float64."""
  broken = make_batch(0)["index"][2],
  mesh, layout, network, make_state, step = build(1, loss=loss)
  state, batch = make_state(), make_batch(0, broken=broken)
  embs = embeddings_by_hand(state, network, batch)
  terms, normaliser = objective_by_hand(
    state, layout, embs, batch, {term: draw_by_hand(mesh, layout, term) for term in ("pretext", "image")}, loss=loss,
    pretext_weight=0.4)
  bank = np.asarray(state.bank, np.float64)

  state, metrics = step(state, jax.device_put(batch, mesh_lib.split(mesh)))
  for name, expected in terms.items():
    np.testing.assert_allclose(metrics[name], expected, rtol=1e-4)
  np.testing.assert_allclose(state.normaliser, normaliser if loss == "nce" else 0, rtol=1e-4)
  rows = layout.row_of(batch["index"])
  np.testing.assert_allclose(
    state.bank, oracles.bank_update(bank, rows, embs[0], batch["valid"], momentum=0.5), atol=2e-5)
  _, later = step(state, jax.device_put(make_batch(1), mesh_lib.split(mesh)))
  assert np.isfinite(later["loss"])


@pytest.mark.parametrize("num_negatives", [0, K])
def test_old_rows_are_no_negatives(num_negatives):
  """In the third step only the rows of the second are new enough, and not all of them: one is the image's own."""
  options = {"loss": "infonce", "pretext_weight": 0, "num_negatives": num_negatives, "max_age": 1}
  mesh, layout, network, _, _ = build(1, **options)
  (_, _, state, end), metrics = run(1, **options)
  batch = make_batch(2, with_pretext=False)
  image, *_ = views_fn(view_keys(7, 2, jnp.asarray(batch["index"])), batch["image_crop"])
  emb, _ = network.apply({"params": state.params, "batch_stats": state.batch_stats}, image, None, train=True,
                         mutable=["batch_stats"])[0]
  emb = np.asarray(emb, np.float64) / np.linalg.norm(emb, axis=1, keepdims=True)
  rows, second = layout.row_of(batch["index"]), layout.row_of(make_batch(1)["index"])
  drawn = draw_by_hand(mesh, layout, "image", step=2) if num_negatives else np.broadcast_to(second, (B, B))
  scores = np.einsum("bd,bkd->bk", emb, np.asarray(state.bank, np.float64)[drawn]) / TAU
  weight = np.isin(drawn, second) & (drawn != rows[:, None])
  assert weight.sum(axis=1).min() > 0 and not weight.all()
  expected = oracles.infonce(np.sum(state.bank[rows] * emb, axis=1) / TAU, scores, weight)
  np.testing.assert_allclose(metrics[2]["loss"], expected.mean(), rtol=1e-4)
  assert (np.flatnonzero(end.written == 2) == np.sort(rows)).all() and end.written.max() == 2
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), ([state, end], metrics),
               (lambda found: (found[0][2:], found[1]))(run(8, **options)))


def angle_by_hand(state, network, batch, params):
  """Returns the cross-entropy of the angle in the first step over the valid images, twice, and the share of hits."""
  keys = view_keys(7, 0, jnp.asarray(batch["index"]))
  image, *_ = views_fn(keys, batch["image_crop"], batch["pretext_crop"])
  turns = np.array([jax.random.randint(jax.random.fold_in(key, 3), (), 0, 4) for key in keys])
  turned = np.stack([np.rot90(one, turn) for one, turn in zip(np.asarray(image), turns, strict=True)])
  variables = {"params": params, "batch_stats": state.batch_stats}
  logits, _ = network.apply(variables, turned, train=True, mutable=["batch_stats"], method="predict_angle")
  each = -jax.nn.log_softmax(logits)[np.arange(B), turns]
  loss = jnp.mean(each[batch["valid"]])
  return loss, (loss, jnp.mean((jnp.argmax(logits, axis=1) == turns)[batch["valid"]]))


def test_the_helper_of_e_ssl_by_hand():
  broken = make_batch(0)["index"][2],
  steps = {weight: run(1, loss="infonce", angle_weight=weight, optimizer=PLAIN_SGD, broken=broken, num_steps=1)
           for weight in (0.4, 0.8)}
  _, _, network, _, _ = build(1, angle_weight=0.4)
  (start, _), (metrics,) = steps[0.4]
  batch = make_batch(0, broken=broken)
  slopes, (loss, top1) = jax.grad(lambda params: angle_by_hand(start, network, batch, params), has_aux=True)(
    start.params)
  np.testing.assert_allclose(metrics["loss_angle"], loss, rtol=1e-5)
  np.testing.assert_allclose(metrics["top1_angle"], top1)
  np.testing.assert_allclose(
    metrics["loss"], 0.4 * metrics["loss_pretext"] + 0.6 * metrics["loss_image"] + 0.4 * loss, rtol=1e-5)
  # With a weight that is 0.4 larger, the parameters move by 0.4 times the slope of this loss more.
  moved = jax.tree.map(lambda a, b: (a - b) / 0.4, steps[0.4][0][1].params, steps[0.8][0][1].params)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(slopes))
  jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4 * largest), moved, slopes)


def test_the_helper_of_e_ssl_on_eight_devices():
  one, eight = (run(n, loss="infonce", angle_weight=0.4) for n in (1, 8))
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), one, eight)


def test_without_a_pretext_term_it_is_the_image_term_alone_by_hand():
  """NPID: no pretext crop, no pretext head, and Z from the image scores."""
  broken = make_batch(0)["index"][2],
  mesh, layout, network, make_state, _ = build(1, pretext_weight=0)
  start, batch = make_state(), make_batch(0, broken=broken, with_pretext=False)
  assert set(start.params) == {"trunk", "image_head"}
  embs = embeddings_by_hand(start, network, batch)
  terms, normaliser = objective_by_hand(start, layout, embs, batch, {"image": draw_by_hand(mesh, layout, "image")},
                                        loss="nce", pretext_weight=0)
  states, metrics = run(1, pretext_weight=0, broken=broken)
  assert set(metrics[0]) == {"loss", "loss_image", "similarity_own", "similarity_negatives", "negatives_beaten",
                             "embedding_spread", "learning_rate", "not_finite", "num_usable", VOID}
  assert [figures["num_usable"] for figures in metrics] == [N - 1] * 3
  np.testing.assert_allclose(metrics[0]["loss"], terms["loss"], rtol=1e-4)
  assert metrics[0]["loss"] == metrics[0]["loss_image"]
  np.testing.assert_allclose(states[1].normaliser, normaliser, rtol=1e-4)
  assert states[3].normaliser == states[1].normaliser
  rows = layout.row_of(batch["index"])
  expected = oracles.bank_update(start.bank, rows, embs[0], batch["valid"], momentum=0.5)
  np.testing.assert_allclose(states[1].bank, expected, atol=2e-5)


@functools.cache
def softmax_over_all_rows():
  """Returns the first step's loss with every row as a negative, written densely, and its gradient by the parameters."""
  broken = make_batch(0)["index"][2],
  _, layout, network, make_state, _ = build(1, pretext_weight=0, num_negatives=0)
  state, batch = make_state(), make_batch(0, broken=broken, with_pretext=False)
  there = [i for i in range(N) if i not in broken]  # the images of the data set, each with its own row
  own = np.searchsorted(there, batch["index"])  # of the broken one nothing is asked

  # In float64, from the embeddings: the mean of -log softmax over the rows of all images that are not broken.
  emb, _ = embeddings_by_hand(state, network, batch)
  bank = np.asarray(state.bank, np.float64)[layout.row_of(np.array(there))]
  each = []
  for b in np.flatnonzero(batch["valid"]):
    scores = [bank[j] @ emb[b] / TAU for j in range(len(there))]
    each.append(np.log(sum(np.exp(scores))) - scores[own[b]])

  def dense(params):
    image, *_ = views_fn(view_keys(7, 0, jnp.asarray(batch["index"])), batch["image_crop"])
    (out, _), _ = network.apply({"params": params, "batch_stats": state.batch_stats}, image, None, train=True,
                                mutable=["batch_stats"])
    emb = out / jnp.linalg.norm(out, axis=1, keepdims=True)
    log_p = jax.nn.log_softmax(jnp.matmul(emb, bank.T.astype(np.float32), precision="highest") / TAU, axis=1)
    return -jnp.mean(log_p[jnp.arange(B), own], where=batch["valid"])

  return np.mean(each), jax.device_get(jax.jit(jax.grad(dense))(state.params))


@pytest.mark.parametrize("num_devices", [1, 8])
def test_every_row_as_a_negative_is_the_softmax_over_the_whole_bank(num_devices):
  broken = make_batch(0)["index"][2],
  expected, gradient = softmax_over_all_rows()
  states, metrics = run(num_devices, loss="infonce", pretext_weight=0, num_negatives=0, num_steps=1, broken=broken,
                        optimizer=PLAIN_SGD)
  np.testing.assert_allclose(metrics[0]["loss"], expected, rtol=1e-5)
  found = jax.tree.map(lambda a, b: a - b, states[0].params, states[1].params)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(gradient))
  jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5 * largest), found, gradient)
  assert not states[1].usable[memory_bank.create_layout(N, num_devices=1, num_negatives=0).row_of(broken[0])]


def test_a_draw_for_each_image_by_hand_and_on_eight_devices():
  broken = make_batch(0)["index"][2],
  mesh, layout, network, make_state, _ = build(1, negative_sampling="per_image")
  start, batch = make_state(), make_batch(0, broken=broken)
  negatives = {term: draw_by_hand(mesh, layout, term, num_draws=B) for term in ("pretext", "image")}
  for drawn in negatives.values():
    assert len({tuple(row) for row in drawn.tolist()}) == B
    # Some images draw themselves, which has to have no weight; and the broken one is drawn.
    assert (drawn == layout.row_of(batch["index"])[:, None]).any() and layout.row_of(broken[0]) in drawn
  assert (negatives["image"] != negatives["pretext"]).any(axis=1).all()
  embs = embeddings_by_hand(start, network, batch)
  terms, normaliser = objective_by_hand(start, layout, embs, batch, negatives, loss="nce", pretext_weight=0.4)
  one, eight = (run(n, negative_sampling="per_image", broken=broken) for n in (1, 8))
  for name, expected in terms.items():
    np.testing.assert_allclose(one[1][0][name], expected, rtol=1e-4)
  np.testing.assert_allclose(one[0][1].normaliser, normaliser, rtol=1e-4)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), one, eight)
  assert abs(one[1][0]["loss_image"] - run(1, broken=broken)[1][0]["loss_image"]) > 1e-4  # another draw than the shared


class PlainTrunk(nn.Module):
  """A trunk without batch norm: what it makes of an image depends on no other."""

  batch_norm_axis: str | None = None
  batch_norm_group: int | None = None

  @nn.compact
  def __call__(self, images, *, train, views=1):
    self.variable("batch_stats", "unused", jnp.zeros, ())
    x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="conv")(images))
    return {"pooled": jnp.mean(x, axis=(1, 2))}


@pytest.mark.parametrize("options", [
  {"loss": "nce"}, {"loss": "infonce", "negative_sampling": "per_image"}, {"loss": "eq4", "num_negatives": 0}], ids=str)
@pytest.mark.parametrize("num_devices, micro_batches", [(1, 4), (2, 8)])
def test_parts_of_a_batch_make_the_step_of_the_whole(num_devices, micro_batches, options):
  """Without batch norm, with two broken images that fall into different parts: gradient, metrics and bank."""
  options |= {"trunk": PlainTrunk(), "broken": tuple(make_batch(0)["index"][[2, 5]]), "optimizer": PLAIN_SGD}
  whole, parts = run(1, **options), run(num_devices, micro_batches=micro_batches, **options)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), whole, parts)


def test_parts_are_the_same_images_on_any_number_of_devices():
  """Seen in the statistics of batch norm, which are those of a part, and move once a step by their mean."""
  one, two = run(1, micro_batches=4), run(2, micro_batches=4)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), one, two)
  whole, means = run(1)[0], [states[1].batch_stats["trunk"]["bn1"]["mean"] for states in (run(1)[0], one[0])]
  assert np.abs(means[0] - whole[0].batch_stats["trunk"]["bn1"]["mean"]).max() > 1e-3
  # The mean of the parts' means is that of the whole; f's and g's calls of the trunk each move it.
  np.testing.assert_allclose(*means, atol=1e-5)
  variances = [states[1].batch_stats["trunk"]["bn1"]["var"] for states in (whole, one[0])]
  assert np.abs(variances[0] - variances[1]).max() > 1e-6


def test_normaliser_is_set_once():
  states, _ = run(1)
  assert states[0].normaliser == 0
  assert states[1].normaliser == states[2].normaliser == states[3].normaliser > 0


def test_a_state_that_knows_the_normaliser_is_never_asked_for_it_again():
  """Nor does a step wait for the one before it to look at Z."""
  mesh, _, _, make_state, step = build(1)
  batch = jax.device_put(make_batch(0), mesh_lib.split(mesh))
  step._normaliser = None  # fails when it is called
  state = make_state().replace(normaliser=jnp.float32(300))
  state, _ = step(state, batch)
  with jax.transfer_guard("disallow_explicit"):
    state, _ = step(state, batch)
  assert state.normaliser == 300
  with pytest.raises(TypeError, match="not callable"):
    step(make_state(), batch)


def test_a_step_holds_two_forward_passes_and_no_third_for_the_normaliser():
  def num_convolutions(loss):
    mesh, _, _, make_state, step = build(1, loss=loss)
    batch = jax.device_put(make_batch(0), mesh_lib.split(mesh))
    return step.lower(make_state(), batch).as_text().count("stablehlo.convolution")
  assert num_convolutions("nce") == num_convolutions("infonce") > 0


@pytest.mark.parametrize("num_devices", [1, 8])
def test_broken_image_leaves_the_bank_from_the_step_that_meets_it(num_devices):
  index = make_batch(0)["index"][5]
  (start, first, second, _), _ = run(num_devices, loss="nce", broken=(index,))
  row = memory_bank.create_layout(N, num_devices=1, num_negatives=K).row_of(index)
  assert start.usable[row]
  for state in (first, second):
    np.testing.assert_array_equal(state.bank[row], start.bank[row])
    assert not state.usable[row] and state.usable.sum() == N - 1


def test_image_once_broken_stays_out_when_it_can_be_read_again():
  """A second step with the batch of the first: one image was broken then, and is whole now."""
  mesh, layout, _, make_state, step = build(1)
  index = make_batch(0)["index"][5]
  before, _ = step(make_state(), jax.device_put(make_batch(0, broken=(index,)), mesh_lib.split(mesh)))
  before_host = jax.device_get(before)
  after, _ = step(before, jax.device_put(make_batch(0), mesh_lib.split(mesh)))
  row = layout.row_of(index)
  assert not after.usable[row]
  np.testing.assert_array_equal(after.bank[row], before_host.bank[row])
  moved = layout.row_of(make_batch(0)["index"][6])
  assert np.abs(np.asarray(after.bank[moved]) - before_host.bank[moved]).max() > 1e-3


def test_bfloat16_trunk_keeps_the_state_in_float32():
  states, metrics = run(1, dtype=jnp.bfloat16)
  exact = run(1)[1]
  floats = [x.dtype for x in jax.tree.leaves(states[-1]) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert set(floats) == {np.dtype("float32")}
  assert metrics[0]["loss"] != exact[0]["loss"]
  np.testing.assert_allclose(metrics[0]["loss"], exact[0]["loss"], rtol=0.05)


def test_batch_of_broken_images_alone_changes_nothing_but_the_step():
  """Not even Z: it waits for the first image that can be read. Weight decay is off."""
  states, metrics = run(1, num_steps=1, broken=range(N), optimizer=PLAIN_SGD)
  jax.tree.map(np.testing.assert_array_equal, states[0].params, states[1].params)
  np.testing.assert_array_equal(states[0].bank, states[1].bank)
  assert states[1].normaliser == 0
  assert metrics[0]["loss"] == 0 and metrics[0]["num_usable"] == N - B


def test_health_figures_by_hand():
  _, metrics = run(1)
  figures = metrics[0]
  assert set(figures) == {"loss", "loss_image", "loss_pretext", "similarity_own", "similarity_own_pretext",
                          "similarity_negatives", "negatives_beaten", "embedding_spread", "learning_rate", "not_finite",
                          "num_usable", VOID}
  assert not figures["not_finite"].any()
  batch = make_batch(0)
  mesh, layout, network, make_state, _ = build(1)
  start = make_state()
  image, pretext, _ = views_fn(view_keys(7, 0, jnp.asarray(batch["index"])), batch["image_crop"],
                               batch["pretext_crop"])
  embs, _ = network.apply({"params": start.params, "batch_stats": start.batch_stats}, image, pretext, train=True,
                          mutable=["batch_stats"])
  image_emb, pretext_emb = (np.asarray(emb) / np.linalg.norm(emb, axis=1, keepdims=True) for emb in embs)
  own = np.asarray(start.bank)[layout.row_of(batch["index"])]
  np.testing.assert_allclose(figures["similarity_own"], np.mean(np.sum(own * image_emb, 1)), atol=1e-5)
  np.testing.assert_allclose(figures["similarity_own_pretext"], np.mean(np.sum(own * pretext_emb, 1)), atol=1e-5)
  np.testing.assert_allclose(figures["embedding_spread"], np.mean(np.std(image_emb, axis=0)) * D**0.5, rtol=1e-4)
  assert 0.2 < figures["negatives_beaten"] < 0.8
  assert abs(figures["similarity_negatives"]) < 0.2


def lower_big_step(num_devices, *, num_negatives):
  """Returns the programs of a step over a bank that dwarfs all else, 32 MiB."""
  mesh = mesh_lib.create_mesh(num_devices)
  layout = memory_bank.create_layout(BIG, num_devices=num_devices, num_negatives=num_negatives)
  network = Network(create_resnet("resnet8", stem="3x3s2"), ImageHead(128), PatchesHead(128))
  optimizer = create_optimizer(optax.constant_schedule(0.1), momentum=0.9, weight_decay=1e-4)
  state = jax.eval_shape(lambda: create_state(
    0, network, optimizer, layout, mesh=mesh, create_bank=partial(memory_bank.create, dim=128), inputs=INPUTS))
  loss_fn = losses.make_loss("nce", temperature=TAU, num_images=BIG, num_negatives=num_negatives or BIG)
  step = make_contrastive_step(
    network.with_batch_norm(axis=mesh_lib.AXIS), optimizer, views_fn,
    Contrast(loss_fn, layout, num_negatives=num_negatives, temperature=TAU), mesh, weights=Weights(0.5),
    momenta=Momenta(0.5))
  lowered = step.lower(state, make_batch(0))
  return lowered if isinstance(lowered, tuple) else (lowered,)


@functools.cache
def compile_big_step(num_devices, *, num_negatives):
  return [program.compile() for program in lower_big_step(num_devices, num_negatives=num_negatives)]


@pytest.mark.parametrize("num_negatives", [256, 0])
def test_a_step_takes_the_place_of_its_state(num_negatives):
  """Also of the bank, if a second program writes it; the batch stays with the caller."""
  programs = lower_big_step(8, num_negatives=num_negatives)
  donated = [[all(one.donated for one in jax.tree.leaves(given)) for given in program.args_info[0]]
             for program in programs]
  assert donated == ([[True, False]] if num_negatives else [[True, False, False], [True, *[False] * 4]])


@pytest.mark.parametrize("num_negatives", [256, pytest.param(0, marks=pytest.mark.slow)])
def test_step_holds_one_bank_and_never_gathers_it(full_compile, num_negatives):
  """With a bank that dwarfs all else: donated, not copied; and what travels between devices does not grow with it."""
  bank_bytes = 4 * 128 * BIG
  programs = compile_big_step(1, num_negatives=num_negatives)
  for program in programs:
    assert program.memory_analysis().temp_size_in_bytes < bank_bytes / 4
  last = programs[-1].memory_analysis()
  assert last.alias_size_in_bytes >= bank_bytes  # the bank given in is the bank given back
  assert last.output_size_in_bytes - last.alias_size_in_bytes < bank_bytes / 100
  for program in compile_big_step(8, num_negatives=num_negatives):
    assert program.memory_analysis().argument_size_in_bytes < bank_bytes / 8 + 2**21
    for line in program.as_text().splitlines():
      if "all-gather" in line or "all-reduce" in line or "collective-permute" in line or "all-to-all" in line:
        assert f"[{BIG}" not in line and f"[{BIG // 8}" not in line, line


@pytest.mark.parametrize("options", [{}, {"loss": "infonce", "num_negatives": 0}, {"pretext_weight": 0}])
def test_a_step_without_the_images_of_one_process_changes_nothing(options):
  """Neither do images that are found broken in this step, nor the rows of those that are there."""
  _, _, network, make_state, step = build(8, **options)
  mesh, state = mesh_lib.create_mesh(8), make_state()
  batches = [make_batch(i, broken=(5, 6), with_pretext=network.pretext_head is not None) for i in range(2)]
  state, metrics = step(state, jax.device_put(batches[0], mesh_lib.split(mesh)))
  before = jax.device_get(state)
  assert not metrics[VOID]
  lost = np.arange(B) < B // 8
  batches[1]["index"][lost], batches[1]["valid"][lost | (np.arange(B) == B - 1)] = -1, False
  state, metrics = step(state, jax.device_put(batches[1], mesh_lib.split(mesh)))
  assert metrics[VOID]
  jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
