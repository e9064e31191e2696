"""Steps whose rows come from a momentum encoder: by hand in float64, on eight devices, in parts, void."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from test_step import (
  PLAIN_SGD,
  B,
  D,
  PlainTrunk,
  build,
  draw_by_hand,
  embeddings_by_hand,
  make_batch,
  objective_by_hand,
  run,
  views_fn,
)

from pirl_jax.method.programs import VOID
from pirl_jax.method.randomness import view_keys
from pirl_jax.runtime import mesh as mesh_lib

MU, M = 0.3, 0.9
OPTIONS = {"bank_momentum": MU, "encoder_momentum": M}


def second_by_hand(state, network, batch, step, groups=(range(B),)):
  """Returns what the momentum encoder makes of the second crops, unit rows f64[B, D], in groups with own statistics."""
  keys = jax.vmap(lambda key: jax.random.fold_in(key, 4))(view_keys(7, step, jnp.asarray(batch["index"])))
  image, *_ = views_fn(keys, batch["second_crop"])
  found = np.zeros((B, D))
  for group in groups:
    (emb, _), _ = network.apply({"params": state.momentum_encoder, "batch_stats": state.batch_stats},
                                image[np.array(group)], None, train=True, mutable=["batch_stats"])
    found[list(group)] = emb
  return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_the_first_step_by_hand():
  """The rows move before the views are compared with them, and to what the encoder makes of the second crop."""
  broken = make_batch(0)["index"][2],
  mesh, layout, network, _, _ = build(1, **OPTIONS)
  (start, end, *_), (metrics, *_) = run(1, broken=broken, **OPTIONS)
  batch = make_batch(0, broken=broken, with_second=True)
  rows = layout.row_of(batch["index"])
  bank = oracles.bank_update(start.bank, rows, second_by_hand(start, network, batch, 0), batch["valid"], momentum=MU)
  terms, normaliser = objective_by_hand(
    start, layout, embeddings_by_hand(start, network, batch), batch,
    {term: draw_by_hand(mesh, layout, term) for term in ("pretext", "image")}, loss="nce", pretext_weight=0.4,
    own=bank[rows])
  for name, expected in terms.items():
    np.testing.assert_allclose(metrics[name], expected, rtol=1e-4)
  np.testing.assert_allclose(end.normaliser, normaliser, rtol=1e-4)
  np.testing.assert_allclose(end.bank, bank, atol=2e-5)


def test_later_rows_are_the_encoders_which_follows_the_network():
  _, layout, network, _, _ = build(1, loss="infonce", **OPTIONS)
  states, _ = run(1, loss="infonce", **OPTIONS)
  jax.tree.map(np.testing.assert_array_equal, states[0].momentum_encoder, states[0].params)
  for step, (before, after) in enumerate(zip(states, states[1:], strict=False)):
    batch = make_batch(step, with_second=True)
    np.testing.assert_allclose(after.bank, oracles.bank_update(
      before.bank, layout.row_of(batch["index"]), second_by_hand(before, network, batch, step), batch["valid"],
      momentum=MU), atol=2e-5)
    expected = jax.tree.map(lambda old, new: M * old + (1 - M) * new, before.momentum_encoder, after.params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), after.momentum_encoder, expected)


@pytest.mark.parametrize("num_devices, options, size", [
  (2, {"group": 4}, 4), (4, {}, 4)], ids=["groups on two devices", "devices"])
def test_second_crops_share_no_statistics_with_the_images_of_their_group(num_devices, options, size):
  options = options | {"loss": "infonce", "batch_norm": None, **OPTIONS}
  _, layout, network, _, _ = build(num_devices, **options)
  (start, end), _ = run(num_devices, num_steps=1, **options)
  batch = make_batch(0, with_second=True)
  images = [set(range(first, first + size)) for first in range(0, B, size)]
  groups = [[first + size * i for i in range(B // size)] for first in range(size)]
  assert all(len(set(group) & together) <= 1 for group in groups for together in images)
  bank = oracles.bank_update(start.bank, layout.row_of(batch["index"]),
                             second_by_hand(start, network, batch, 0, groups), batch["valid"], momentum=MU)
  np.testing.assert_allclose(end.bank, bank, atol=2e-5)


def test_eight_devices_take_the_steps_of_one():
  options = {"loss": "infonce", "num_negatives": 0, "nearest_positive": 0.5, "broken": (3, 9), **OPTIONS}
  one, eight = (run(n, **options) for n in (1, 8))
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), one, eight)


def test_parts_of_a_batch_make_the_step_of_the_whole():
  options = {"loss": "infonce", "trunk": PlainTrunk(), "optimizer": PLAIN_SGD, **OPTIONS}
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), run(1, **options),
               run(2, micro_batches=4, **options))


def test_a_void_step_leaves_the_encoder_as_it_is():
  mesh, _, _, make_state, step = build(8, loss="infonce", **OPTIONS)
  batch = make_batch(0, with_second=True)
  batch["index"][B // 2] = -1
  state = make_state()
  before = jax.device_get(state)
  after, metrics = step(state, jax.device_put(batch, mesh_lib.split(mesh)))
  assert metrics[VOID]
  jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(after))
