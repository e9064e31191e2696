from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.extend.random import threefry_2x32
from jax.sharding import PartitionSpec as P

from pirl_jax.errors import UserError
from pirl_jax.method import memory_bank
from pirl_jax.runtime.mesh import AXIS, create_mesh, split

D = 16


def on_mesh(fn, mesh, in_specs, out_specs):
  return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def create(num_images, num_devices, num_negatives=32, dtype=jnp.float32):
  layout = memory_bank.create_layout(num_images, num_devices=num_devices, num_negatives=num_negatives)
  mesh = create_mesh(num_devices)
  make = jax.jit(partial(memory_bank.create, layout=layout, dim=D, dtype=dtype), out_shardings=split(mesh))
  return layout, mesh, *make(jax.random.key(3))


def read_and_update(bank, rows, emb, valid, *, momentum):
  own, = memory_bank.read(bank, rows, axis=AXIS)
  return memory_bank.update(bank, rows, own, emb, valid, momentum=momentum, axis=AXIS)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("num_images", [32, 103, 1024, 5003])
def test_every_image_has_a_row_of_its_own_and_padding_ends_each_stratum(num_images):
  layout, _, bank, usable = create(num_images, 1, num_negatives=256 if num_images > 900 else 32)
  rows = layout.row_of(np.arange(num_images))
  assert len(set(rows)) == num_images
  expected = np.zeros(layout.num_rows, bool)
  expected[rows] = True
  np.testing.assert_array_equal(usable, expected)
  assert layout.num_rows - num_images < layout.num_strata
  np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, atol=1e-6)


def test_averaged_rows_are_the_mean_of_as_many_banks_as_of_as_many_processes():
  layout = memory_bank.create_layout(5_003, num_devices=1, num_negatives=256)
  key = jax.random.key(3)
  found, usable = memory_bank.create(key, layout, dim=128, averaged=32)
  banks = [memory_bank.create(jax.random.fold_in(key, i) if i else key, layout, dim=128)[0] for i in range(32)]
  np.testing.assert_allclose(found, np.mean(banks, axis=0), atol=1e-6)
  found = np.asarray(found, np.float64)[usable]
  np.testing.assert_allclose(np.mean(np.linalg.norm(found, axis=1)), 32**-0.5, rtol=1e-2)
  # Z / N at tau 0.07, of which the official run on 32 processes has 1.31e6 / 1,281,167.
  emb = unit(np.random.default_rng(0).normal(size=(64, 128)))
  np.testing.assert_allclose(np.mean(np.exp(emb @ found.T / 0.07)), 1.025, rtol=5e-3)


@pytest.mark.parametrize("num_images, strata", [(2, 1), (16, 4), (103, 16), (1023, 128), (1024, 256), (1_281_167, 256)])
def test_number_of_strata_follows_from_the_images_alone(num_images, strata):
  for devices in {1, min(2, strata)}:
    layout = memory_bank.create_layout(num_images, num_devices=devices, num_negatives=strata)
    assert layout.num_strata == strata


@pytest.mark.parametrize("num_images, devices, negatives, said", [
  (100, 1, 128, "only 100 images; try --config.num_negatives=96"),
  (1024, 1, 300, "try --config.num_negatives=256"),
  (1024, 1, -256, "num_negatives=-256 is not 0 .all. .*try --config.num_negatives=256"),
  (1024, 3, 256, "3 devices do not divide the 256 strata"),
  (1, 1, 1, "nothing to tell apart"),
])
def test_what_does_not_fit_is_refused_with_the_way_out(num_images, devices, negatives, said):
  with pytest.raises(UserError, match=said):
    memory_bank.create_layout(num_images, num_devices=devices, num_negatives=negatives)


@pytest.mark.parametrize("num_images, dtype, devices, device_bytes, said", [
  (10**9, jnp.float32, 8, 80 * 10**9, None),  # 512 GB over 8 devices of 64 GB at most
  (10**9, jnp.float32, 4, 80 * 10**9, "takes 476.8 GiB, 119.2 GiB on each of 4 device.s., which have 74.5 GiB; use 8 "
                                      "such devices, or --config.bank.dtype=bfloat16"),
  (10**9, jnp.bfloat16, 2, 80 * 10**9, "use 4 such devices$"),
  (10**10, jnp.float32, 8, 16 * 10**9, "use larger devices, or"),
  (4_096, jnp.float32, 1, 2**20, "use 4 such devices"),
])
def test_a_bank_that_cannot_fit_is_refused_with_the_number_of_devices_that_would_do(num_images, dtype, devices,
                                                                                 device_bytes, said):
  layout = memory_bank.create_layout(num_images, num_devices=devices, num_negatives=256)
  def check():
    memory_bank.check_fits(layout, dim=128, dtype=dtype, num_devices=devices, device_bytes=device_bytes)
  if said is None:
    check()
  else:
    with pytest.raises(UserError, match=said):
      check()


@pytest.mark.parametrize("num_devices", [2, 8])
def test_bank_and_draw_do_not_depend_on_the_number_of_devices(num_devices):
  def draw(num_devices):
    layout, mesh, bank, usable = create(103, num_devices)
    def drawn_vectors(bank):
      return bank[memory_bank.draw(jax.random.key(5), layout, num_negatives=32, axis=AXIS)]
    return np.asarray(bank), np.asarray(usable), np.asarray(on_mesh(drawn_vectors, mesh, P(AXIS), P(AXIS))(bank))
  for one, many in zip(draw(1), draw(num_devices), strict=True):
    np.testing.assert_array_equal(one, many)


def test_draw_is_uniform_over_the_images_and_never_padding():
  layout, mesh, _, usable = create(103, 1)
  draw = on_mesh(lambda key: memory_bank.draw(key, layout, num_negatives=32, axis=AXIS), mesh, P(), P(AXIS))
  rows = np.concatenate([draw(jax.random.key(i)) for i in range(600)])
  counts = np.bincount(rows, minlength=layout.num_rows)
  assert (counts[~np.asarray(usable)] == 0).all()
  # 103 images in 16 strata: 7 strata of 7 and 9 of 6, of each of which two rows are drawn.
  expected = np.where(np.arange(layout.num_rows) // layout.rows_per_stratum < 7, 1200 / 7, 1200 / 6)[np.asarray(usable)]
  chi_square = np.sum((counts[np.asarray(usable)] - expected) ** 2 / expected)
  assert 45 < chi_square < 140  # 87 degrees of freedom; 1e-4 either side


def draws_of(layout, mesh, *, num_negatives, num_draws):
  """Returns key -> the global rows of a draw, i32[K] or i32[num_draws, K]."""
  def draw(key):
    local = memory_bank.draw(key, layout, num_negatives=num_negatives, axis=AXIS, num_draws=num_draws)
    return local + jax.lax.axis_index(AXIS) * (layout.num_rows // mesh.size)
  return on_mesh(draw, mesh, P(), P(None, AXIS) if num_draws else P(AXIS))


def test_a_draw_for_each_image_is_uniform_in_every_stratum_and_apart_from_the_others():
  layout, mesh, _, usable = create(103, 1)
  draw = draws_of(layout, mesh, num_negatives=32, num_draws=24)
  rows = np.stack([draw(jax.random.key(i)) for i in range(60)])  # [60, 24, 32]
  strata = rows // layout.rows_per_stratum
  np.testing.assert_array_equal(np.sort(strata, axis=2), np.broadcast_to(np.arange(32) // 2, rows.shape))
  counts = np.bincount(rows.reshape(-1), minlength=layout.num_rows)
  assert (counts[~np.asarray(usable)] == 0).all()
  of_stratum = 60 * 24 * 2
  expected = np.where(np.arange(layout.num_rows) // layout.rows_per_stratum < 7, of_stratum / 7, of_stratum / 6)
  chi_square = np.sum(((counts - expected) ** 2 / expected)[np.asarray(usable)])
  assert 45 < chi_square < 140  # 87 degrees of freedom; 1e-4 either side
  # Two images agree in a place as often as chance has it, and so do the two draws of one image from a stratum.
  chance = (7 / 7 + 9 / 6) / 16
  for same in (rows[:, :-1] == rows[:, 1:], rows[:, :1] == rows[:, 7:8], rows[:, :, ::2] == rows[:, :, 1::2],
               rows[:-1] == rows[1:]):
    assert abs(same.mean() - chance) < 5 * (chance / same.size) ** 0.5


@pytest.mark.parametrize("num_devices", [2, 8])
def test_a_draw_for_each_image_does_not_depend_on_the_number_of_devices(num_devices):
  drawn = []
  for number in (1, num_devices):
    layout, mesh, _, _ = create(103, number)
    drawn.append(draws_of(layout, mesh, num_negatives=32, num_draws=5)(jax.random.key(2)))
  np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("num_negatives, num_draws", [(64, None), (64, 8)])
def test_scores_and_weights_against_loops(num_devices, num_negatives, num_draws):
  layout, mesh, bank, usable = create(103, num_devices)
  rng = np.random.default_rng(0)
  index = rng.permutation(103)[:8]
  rows = layout.row_of(index)
  emb = unit(rng.normal(size=(8, D))).astype(np.float32)
  assert 7 not in index
  broken = layout.row_of(7)
  usable = usable.at[broken].set(False)

  def score(bank, usable, rows, emb):
    negatives = memory_bank.draw(jax.random.key(5), layout, num_negatives=num_negatives, axis=AXIS,
                                 num_draws=num_draws)
    first = jax.lax.axis_index(AXIS) * bank.shape[0]
    own, others = memory_bank.read(bank, rows, negatives, axis=AXIS)
    weight = memory_bank.weights(usable, rows, negatives, axis=AXIS)
    return (memory_bank.positive_scores(own, emb, temperature=0.2),
            memory_bank.negative_scores(others, emb, temperature=0.2), weight, first + negatives)

  drawn_specs = P(None, AXIS) if num_draws else P(AXIS)
  scores = on_mesh(score, mesh, (P(AXIS), P(AXIS), P(), P()), (P(), P(None, AXIS), P(None, AXIS), drawn_specs))
  positive, negative, weight, drawn = (np.asarray(x) for x in scores(bank, usable, jnp.asarray(rows), emb))
  drawn = np.broadcast_to(drawn, negative.shape)
  there = set(layout.row_of(np.arange(103)).tolist())
  bank64, emb64 = np.asarray(bank, np.float64), emb.astype(np.float64)
  own = 0
  for i in range(8):
    np.testing.assert_allclose(positive[i], bank64[rows[i]] @ emb64[i] / 0.2, atol=1e-5)
    for k, row in enumerate(drawn[i].tolist()):
      np.testing.assert_allclose(negative[i, k], bank64[row] @ emb64[i] / 0.2, atol=1e-5)
      assert weight[i, k] == (row in there and row not in (rows[i], broken))
      own += row == rows[i]
  assert own > 0, "no image drew itself, so this test has shown nothing"
  assert broken in drawn


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 5e-3)])
def test_update_moves_the_rows_of_the_batch_and_no_others(num_devices, dtype, tolerance):
  layout, mesh, bank, _ = create(103, num_devices, dtype=dtype)
  rng = np.random.default_rng(0)
  index = np.append(rng.permutation(102)[:15], 102)  # the last image is among them: its neighbour is padding
  rows, valid = layout.row_of(index), np.arange(16) != 3
  emb = unit(rng.normal(size=(16, D))).astype(np.float32)
  update = on_mesh(partial(read_and_update, momentum=0.5), mesh, (P(AXIS), P(), P(), P()), P(AXIS))
  new = update(bank, jnp.asarray(rows), emb, valid)
  assert new.dtype == bank.dtype and new.dtype.itemsize == jnp.dtype(dtype).itemsize
  old, new = (np.asarray(memory_bank.vectors(x), np.float64) for x in (bank, new))
  np.testing.assert_allclose(new, oracles.bank_update(old, rows, emb, valid, momentum=0.5), atol=tolerance)
  untouched = np.setdiff1d(np.arange(layout.num_rows), rows[valid])
  np.testing.assert_array_equal(new[untouched], old[untouched])
  np.testing.assert_allclose(np.linalg.norm(new[rows], axis=1), 1, atol=tolerance)


def test_worked_number_of_the_update():
  # m = (0.6, 0.8), z = (1, 0), mu = 0.5, from the official rule; mu weighs the old row, so 0.9 stays nearer to it.
  update = on_mesh(lambda *args: (read_and_update(*args, momentum=0.5), read_and_update(*args, momentum=0.9)),
                   create_mesh(1), (P(AXIS), P(), P(), P()), P(AXIS))
  half, most = update(jnp.array([[0.6, 0.8]]), jnp.array([0]), jnp.array([[1.0, 0.0]]), jnp.array([True]))
  np.testing.assert_allclose(half, [[0.8944272, 0.4472136]], rtol=1e-6)
  np.testing.assert_allclose(most, unit(np.array([[0.64, 0.72]])), rtol=1e-6)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_retire_switches_off_the_broken_images_for_good(num_devices):
  layout, mesh, _, usable = create(103, num_devices)
  retire = on_mesh(partial(memory_bank.retire, axis=AXIS), mesh, (P(AXIS), P(), P()), (P(AXIS), P()))
  index, valid = np.array([0, 50, 102, 7]), np.array([True, False, False, True])
  after, counts = retire(usable, jnp.asarray(layout.row_of(index)), valid)
  changed = np.flatnonzero(np.asarray(after) != np.asarray(usable))
  assert set(changed) == set(layout.row_of(np.array([50, 102])))
  np.testing.assert_array_equal(counts, valid)
  again, counts = retire(after, jnp.asarray(layout.row_of(index)), np.ones(4, bool))
  np.testing.assert_array_equal(again, after)
  np.testing.assert_array_equal(counts, valid)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_there_is_no_second_bank_however_it_is_stored(full_compile, dtype):
  bank = memory_bank.stored(jnp.ones((100_000, 128)), dtype)
  update = jax.jit(jax.shard_map(partial(read_and_update, momentum=0.5), mesh=create_mesh(1),
                                 in_specs=(P(AXIS), P(), P(), P()), out_specs=P(AXIS)), donate_argnums=0)
  memory = update.lower(bank, jnp.arange(64), jnp.ones((64, 128)), jnp.ones(64, bool)).compile().memory_analysis()
  assert memory.alias_size_in_bytes == bank.nbytes and memory.temp_size_in_bytes < bank.nbytes / 20


def test_a_bank_of_bfloat16_is_rounded_as_numpy_rounds_it_and_nothing_else():
  x = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
  kept = memory_bank.stored(jnp.asarray(x), jnp.bfloat16)
  assert kept.dtype == jnp.uint16
  np.testing.assert_array_equal(memory_bank.vectors(kept), x.astype(jnp.bfloat16).astype(np.float32))


@pytest.mark.parametrize("num_images, created_rows", [(103, 10_000), (103, 16), (5_003, 1_000)])
@pytest.mark.parametrize("num_devices", [1, 8])
def test_a_bank_made_a_few_rows_at_a_time_is_that_made_at_once(monkeypatch, num_images, created_rows, num_devices):
  monkeypatch.setattr(memory_bank, "CREATED_ROWS", created_rows)
  layout, _, bank, _ = create(num_images, num_devices, num_negatives=0)
  bound = (D / 3) ** -0.5
  whole = jax.random.uniform(jax.random.key(3), (layout.num_rows, D), jnp.float32, -bound, bound)
  np.testing.assert_allclose(bank, memory_bank.normalise(whole), rtol=1e-6, atol=1e-7)


def test_the_entries_of_rows_far_out_are_those_of_jax():
  """Beyond 2**32 entries, where the number of an entry has two words: compared with JAX's own hash of it."""
  key, rows = jax.random.key(5), np.array([0, 2**25 - 1, 2**25, 2**28 + 77])
  found = memory_bank._uniform(key, jnp.asarray(rows, jnp.uint32), 128)
  bound = (128 / 3) ** -0.5
  for row, entries in zip(rows.tolist(), np.asarray(found), strict=True):
    numbers = [row * 128 + d for d in range(128)]
    high, low = (jnp.asarray([f(number) for number in numbers], jnp.uint32) for f in
                 (lambda number: number >> 32, lambda number: number % 2**32))
    first, second = jnp.split(threefry_2x32(jax.random.key_data(key), jnp.concatenate([high, low])), 2)
    unit = (np.asarray(first ^ second) >> 9) / 2**23
    np.testing.assert_allclose(entries, (2 * unit - 1) * bound, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_making_a_bank_takes_little_more_memory_than_the_bank(full_compile, dtype):
  layout = memory_bank.create_layout(1_000_000, num_devices=1, num_negatives=0)
  make = jax.jit(partial(memory_bank.create, layout=layout, dim=128, dtype=dtype))
  memory = make.lower(jax.random.key(0)).compile().memory_analysis()
  assert memory.output_size_in_bytes > 2 * 128 * 1_000_000 and memory.temp_size_in_bytes < 2**27
