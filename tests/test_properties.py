"""What holds for any shape and any value, tried on many: losses, bank, views, crops, and bad input of every kind."""

import contextlib
import functools
import importlib
import io
import itertools
import math
import re
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pirl_jax.data import crops, embedded
from pirl_jax.errors import UserError
from pirl_jax.method import losses, memory_bank, negatives
from pirl_jax.method.negatives import Scores
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.runtime.mesh import AXIS, SPLIT, WHOLE
from pirl_jax.storage.settings import flatten
from pirl_jax.training import parts as parts_lib
from pirl_jax.training import pretrain
from pirl_jax.views import jigsaw, normalisation, operations, permutations, photometric, rotation, two_views
from pirl_jax.views.recipe import Recipe

# The same examples at every run, and no folder of them left behind.
few = settings(max_examples=8, deadline=None, derandomize=True, database=None,
               phases=[Phase.explicit, Phase.generate])  # to shrink an example would compile hundreds of programs
many = settings(max_examples=300, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)


@functools.cache
def loss_fn(name, num_negatives):
  loss = losses.make_loss(name, temperature=0.07, num_images=500, num_negatives=num_negatives)
  return jax.jit(lambda positive, negative, weight: loss(
    positive, Scores(negative, weight), normaliser=jnp.float32(2_000))[0])


@pytest.mark.parametrize("name", ["nce", "infonce", "eq4"])
@few
@given(seed=seeds, batch=st.integers(1, 5), num_negatives=st.integers(1, 40), kept=st.floats(0, 1))
def test_losses(name, seed, batch, num_negatives, kept):
  rng = np.random.default_rng(seed)
  positive = (rng.uniform(-1, 1, batch) / 0.07).astype(np.float32)
  negative = (rng.uniform(-1, 1, (batch, num_negatives)) / 0.07).astype(np.float32)
  weight = (rng.random((batch, num_negatives)) < kept).astype(np.float32)
  options = dict(normaliser=2_000, num_images=500, num_negatives=num_negatives) if name == "nce" else {}
  fn = loss_fn(name, num_negatives)
  found = fn(positive, negative, weight)
  expected = getattr(oracles, name)(positive.astype(float), negative.astype(float), weight, **options)
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
  order = rng.permutation(num_negatives)
  np.testing.assert_allclose(fn(positive, negative[:, order], weight[:, order]), found, rtol=1e-5, atol=1e-6)
  hidden = np.where(weight > 0, negative, rng.uniform(-14, 14, negative.shape)).astype(np.float32)
  np.testing.assert_array_equal(fn(positive, hidden, weight), found)


@few
@given(seed=seeds, num_images=st.integers(32, 300), dim=st.integers(1, 9), num_devices=st.sampled_from([1, 2, 4, 8]),
       batch=st.integers(1, 16), momentum=st.floats(0, 1))
def test_bank(seed, num_images, dim, num_devices, batch, momentum):
  rng = np.random.default_rng(seed)
  layout = memory_bank.create_layout(num_images, num_devices=num_devices, num_negatives=0)
  rows = layout.row_of(np.arange(num_images))
  assert len(set(rows)) == num_images and max(rows) < layout.num_rows and layout.num_rows % num_devices == 0
  bank = np.asarray(memory_bank.normalise(jnp.asarray(rng.normal(size=(layout.num_rows, dim)), jnp.float32)))
  moved = rng.permutation(rows)[:batch]
  emb = np.asarray(memory_bank.normalise(jnp.asarray(rng.normal(size=(batch, dim)), jnp.float32)))
  valid = rng.random(batch) < 0.8

  def step(bank, rows, emb, valid):
    own, = memory_bank.read(bank, rows, axis=AXIS)
    return memory_bank.update(bank, rows, own, emb, valid, momentum=momentum, axis=AXIS), own

  mesh = mesh_lib.create_mesh(num_devices)
  mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(SPLIT, WHOLE, WHOLE, WHOLE), out_specs=(SPLIT, WHOLE)))
  found, own = mapped(bank, moved, emb, valid)
  np.testing.assert_array_equal(own, bank[moved])
  untouched = np.setdiff1d(np.arange(layout.num_rows), moved[valid])
  np.testing.assert_array_equal(np.asarray(found)[untouched], bank[untouched])
  lengths = np.linalg.norm(momentum * bank[moved] + (1 - momentum) * emb, axis=1)
  if np.all(lengths > 1e-3):  # opposite vectors have no direction between them
    np.testing.assert_allclose(found, oracles.bank_update(bank, moved, emb, valid, momentum=momentum), atol=2e-4)


@few
@given(seed=seeds, num_images=st.integers(32, 300), dim=st.integers(1, 9),
       dtype=st.sampled_from(["float32", "bfloat16"]))
def test_a_new_bank(seed, num_images, dim, dtype):
  layout = memory_bank.create_layout(num_images, num_devices=1, num_negatives=0)
  bank, usable = memory_bank.create(jax.random.key(seed), layout, dim=dim, dtype=jnp.dtype(dtype))
  rows = np.asarray(memory_bank.vectors(bank))
  assert rows.shape == (layout.num_rows, dim) and rows.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6 if dtype == "float32" else 2e-2)
  assert set(np.flatnonzero(usable)) == set(layout.row_of(np.arange(num_images)))
  np.testing.assert_array_equal(memory_bank.stored(jnp.asarray(rows), jnp.dtype(dtype)), bank)


@settings(few, max_examples=5)
@given(seed=seeds, num_images=st.integers(32, 300), num_devices=st.sampled_from([1, 2, 4, 8]), each=st.integers(1, 3),
       batch=st.integers(1, 6), draws_each=st.booleans(), temperature=st.floats(0.05, 2))
def test_negatives_are_images_and_never_the_own_or_a_broken_one(
    seed, num_images, num_devices, each, batch, draws_each, temperature):
  rng = np.random.default_rng(seed)
  strata = memory_bank.create_layout(num_images, num_devices=1, num_negatives=0).num_strata
  layout = memory_bank.create_layout(num_images, num_devices=num_devices,
                                     num_negatives=min(each, num_images // strata) * strata)
  num_negatives, per_device = min(each, num_images // strata) * strata, layout.num_rows // num_devices
  bank, usable = memory_bank.create(jax.random.key(seed), layout, dim=4)
  rows = layout.row_of(rng.permutation(num_images)[:batch])
  valid = rng.random(batch) < 0.6
  emb = np.asarray(memory_bank.normalise(jnp.asarray(rng.normal(size=(batch, 4)), jnp.float32)))

  def step(bank, usable, rows, valid, emb):
    usable, counts = memory_bank.retire(usable, rows, valid, axis=AXIS)
    drawn = memory_bank.draw(jax.random.key(seed), layout, num_negatives=num_negatives, axis=AXIS,
                             num_draws=batch if draws_each else None)
    own, others = memory_bank.read(bank, rows, drawn, axis=AXIS)
    weight = memory_bank.weights(usable, rows, drawn, axis=AXIS)
    score = memory_bank.negative_scores(others, emb, temperature=temperature)
    globally = jnp.atleast_2d(drawn) + jax.lax.axis_index(AXIS) * per_device
    return usable, counts, own, globally, weight, score

  parts = jax.sharding.PartitionSpec(None, AXIS)
  mapped = jax.jit(jax.shard_map(step, mesh=mesh_lib.create_mesh(num_devices),
                                 in_specs=(SPLIT, SPLIT, WHOLE, WHOLE, WHOLE),
                                 out_specs=(SPLIT, WHOLE, WHOLE, parts, parts, parts)))
  usable, counts, own, drawn, weight, score = map(np.asarray, mapped(bank, usable, rows, valid, emb))
  np.testing.assert_array_equal(counts, valid)
  assert usable.sum() == num_images - (~valid).sum() and not usable[rows[~valid]].any()
  assert drawn.shape == (batch if draws_each else 1, num_negatives) and weight.shape == (batch, num_negatives)
  image_rows = layout.row_of(np.arange(num_images))
  assert np.isin(drawn, image_rows).all()
  for draw in drawn:
    counted = np.bincount(draw // layout.rows_per_stratum, minlength=strata)
    np.testing.assert_array_equal(counted, num_negatives // strata)
  np.testing.assert_array_equal(weight, (drawn != rows[:, None]) & usable[drawn])
  np.testing.assert_allclose(score, np.einsum("bd,bkd->bk", emb, np.broadcast_to(
    np.asarray(bank)[drawn], (batch, num_negatives, 4))) / temperature, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(memory_bank.positive_scores(own, emb, temperature=temperature),
                             (np.asarray(bank)[rows] * emb).sum(1) / temperature, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["nce", "infonce", "eq4"])
@settings(few, max_examples=3)
@given(seed=seeds, num_images=st.integers(32, 120), num_devices=st.sampled_from([1, 2, 4]), batch=st.integers(1, 4),
       chunk=st.integers(1, 40))
def test_every_row_in_chunks_is_every_row_at_once(name, seed, num_images, num_devices, batch, chunk):
  rng = np.random.default_rng(seed)
  layout = memory_bank.create_layout(num_images, num_devices=num_devices, num_negatives=0)
  bank, usable = memory_bank.create(jax.random.key(seed), layout, dim=4)
  rows = layout.row_of(rng.permutation(num_images)[:batch])
  emb = jnp.asarray(rng.normal(size=(batch, 4)), jnp.float32)
  loss = losses.make_loss(name, temperature=0.2, num_images=num_images, num_negatives=num_images)

  def whole_loss(emb):
    score = memory_bank.negative_scores(bank, emb, temperature=0.2)
    weight = (usable[None] & (jnp.arange(layout.num_rows)[None] != rows[:, None])).astype(jnp.float32)
    positive = memory_bank.positive_scores(bank[rows], emb, temperature=0.2)
    return jnp.sum(loss(positive, Scores(score, weight), normaliser=jnp.float32(num_images))[0])

  def split_loss(bank, usable, emb):
    local, _ = memory_bank.local_rows(bank, jnp.asarray(rows), axis=AXIS)
    own, = memory_bank.read(bank, jnp.asarray(rows), axis=AXIS)
    every = negatives.EveryRow(bank, usable, local, emb, 0.2, AXIS)
    positive = memory_bank.positive_scores(own, emb, temperature=0.2)
    return jnp.sum(loss(positive, every, normaliser=jnp.float32(num_images))[0])

  mapped = jax.shard_map(split_loss, mesh=mesh_lib.create_mesh(num_devices), in_specs=(SPLIT, SPLIT, WHOLE),
                         out_specs=WHOLE)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(negatives, "CHUNK_ROWS", chunk)
    found, slope = jax.jit(jax.value_and_grad(mapped, argnums=2))(bank, usable, emb)
  expected, expected_slope = jax.value_and_grad(whole_loss)(emb)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  np.testing.assert_allclose(slope, expected_slope, rtol=1e-3, atol=1e-4)


@few
@given(seed=seeds, batch=st.integers(1, 6), num_negatives=st.integers(1, 30), kept=st.floats(0, 1))
def test_normaliser(seed, batch, num_negatives, kept):
  rng = np.random.default_rng(seed)
  positive, negative = rng.uniform(-9, 9, batch), rng.uniform(-9, 9, (batch, num_negatives))
  weight, counts = rng.random(negative.shape) < kept, rng.random(batch) < 0.7
  sums = losses.nce_normaliser_sums(jnp.asarray(positive, jnp.float32), Scores(
    jnp.asarray(negative, jnp.float32), jnp.asarray(weight, jnp.float32)), jnp.asarray(counts))
  expected = oracles.nce_normaliser(positive, negative, weight, counts, num_images=500) if counts.any() else 0
  np.testing.assert_allclose(losses.nce_normaliser(*sums, num_images=500), expected, rtol=1e-4)


@many
@given(num_images=st.integers(-1, 2_000_000), num_devices=st.integers(1, 600), num_negatives=st.integers(-5, 70_000),
       dim=st.integers(1, 4_096), dtype=st.sampled_from(["float32", "bfloat16"]), memory=st.integers(1, 10**12))
def test_a_layout_is_possible_or_refused_with_one_that_is(num_images, num_devices, num_negatives, dim, dtype, memory):
  try:
    layout = memory_bank.create_layout(num_images, num_devices=num_devices, num_negatives=num_negatives)
  except UserError as error:
    better = re.search(r"--config.num_negatives=(\d+)", str(error))
    if better and num_images >= 2:
      memory_bank.create_layout(num_images, num_devices=1, num_negatives=int(better[1]))
    return
  assert layout.num_strata % num_devices == 0 and num_negatives % layout.num_strata == 0
  assert num_images <= layout.num_rows < num_images + layout.num_strata
  with contextlib.suppress(UserError):
    memory_bank.check_fits(layout, dim=dim, dtype=jnp.dtype(dtype), num_devices=num_devices, device_bytes=memory)
    assert layout.num_rows * dim * jnp.dtype(dtype).itemsize <= memory * num_devices


@few
@given(seed=seeds, grid=st.integers(1, 4), cell=st.integers(2, 9), spare=st.integers(0, 5), data=st.data())
def test_patches_are_parts_of_their_cells(seed, grid, cell, spare, data):
  size, patch_size = grid * cell + min(spare, grid - 1), data.draw(st.integers(1, cell))
  crop = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
  offsets, order, label = jigsaw.draw_jigsaw(jax.random.key(seed), size=size, grid=grid, patch_size=patch_size)
  patches = np.asarray(jigsaw.cut_patches(jnp.asarray(crop), offsets, order, grid=grid, patch_size=patch_size))
  assert sorted(np.asarray(order)) == list(range(grid * grid)) and label == -1
  for (y, x), number, patch in zip(np.asarray(offsets), np.asarray(order), patches, strict=True):
    assert 0 <= y <= cell - patch_size and 0 <= x <= cell - patch_size
    top, left = number // grid * cell + y, number % grid * cell + x
    np.testing.assert_array_equal(patch, crop[top:top + patch_size, left:left + patch_size])


@few
@given(seed=seeds, side=st.integers(1, 12), turns=st.integers(0, 3))
def test_rotation(seed, side, turns):
  image = np.random.default_rng(seed).random((side, side, 3)).astype(np.float32)
  np.testing.assert_array_equal(rotation.rotate(jnp.asarray(image), jnp.int32(turns)), np.rot90(image, turns))


@functools.cache
def augment(strength, blur):
  recipe = Recipe(
    brightness=strength, contrast=strength, saturation=strength, hue=strength / 2, jitter_probability=1.0,
    group_probability=0.66, grayscale_probability=0.2, blur_probability=blur, blur_radius=(0.1, 2.0),
    flip_probability=0.5)
  return jax.jit(lambda key, image: photometric.apply_photometric(
    image, photometric.draw_photometric(key, recipe=recipe)))


@few
@given(seed=seeds, strength=st.sampled_from([0.0, 0.4, 1.0]), blur=st.sampled_from([0.0, 0.5]),
       contents=st.sampled_from(["noise", "black", "white", "one pixel"]), side=st.sampled_from([1, 2, 7]))
def test_augmented_images_stay_images(seed, strength, blur, contents, side):
  image = {"noise": np.random.default_rng(seed).integers(0, 256, (3, side, side)),
           "black": np.zeros((3, side, side)), "white": np.full((3, side, side), 255),
           "one pixel": np.eye(3 * side * side)[0].reshape(3, side, side) * 255}[contents].astype(np.float32)
  found = np.asarray(augment(strength, blur)(jax.random.key(seed), image))
  assert found.shape == image.shape and np.isfinite(found).all() and found.min() >= 0 and found.max() <= 255


OPERATIONS = {  # with the numbers that they take, and the one of them that changes nothing
  "adjust_brightness": (st.floats(0, 3), 1.0), "adjust_contrast": (st.floats(0, 3), 1.0),
  "adjust_saturation": (st.floats(0, 3), 1.0), "adjust_sharpness": (st.floats(0, 3), 1.0),
  "adjust_hue": (st.floats(-0.5, 0.5), 0.0), "posterize": (st.integers(0, 8), 8),
  "solarize": (st.floats(0, 256), 256.0), "solarize_add": (st.integers(0, 110), 0),
  "gaussian_blur": (st.floats(0, 2.4), 0.0),
  "autocontrast": (None, None), "grayscale": (None, None)}


@functools.cache
def operation(name):
  return jax.jit(getattr(operations, name))


@pytest.mark.parametrize("name", OPERATIONS)
@few
@given(seed=seeds, data=st.data(), height=st.sampled_from([1, 2, 5]), width=st.sampled_from([1, 4]),
       contents=st.sampled_from(["noise", "one colour"]))
def test_operations_on_pixels(name, seed, data, height, width, contents):
  rng = np.random.default_rng(seed)
  shape = (3, height, width) if contents == "noise" else (3, 1, 1)
  image = np.broadcast_to(rng.integers(0, 256, shape), (3, height, width)).astype(np.float32)
  numbers, identity = OPERATIONS[name]
  kind = np.int32 if isinstance(identity, int) else np.float32
  found = np.asarray(operation(name)(image, *([] if numbers is None else [kind(data.draw(numbers))])))
  assert found.shape == image.shape and np.isfinite(found).all() and found.min() >= 0 and found.max() <= 255
  if identity is not None:
    tolerance = 1.01 if name == "adjust_hue" else 1e-3  # through HSV in whole steps
    np.testing.assert_allclose(operation(name)(image, kind(identity)), image, atol=tolerance)


@settings(few, max_examples=4)
@given(seed=seeds, name=st.sampled_from(["jigsaw", "rotation", "rotation_jigsaw"]), batch=st.integers(1, 4),
       side=st.sampled_from([6, 12]), num_permutations=st.sampled_from([0, 5]))
def test_views_have_the_shapes_and_labels_they_say(seed, name, batch, side, num_permutations):
  rng = np.random.default_rng(seed)
  recipe = Recipe(brightness=0.4, flip_probability=0.5)
  group = {"crop_size": side, "crop_scale": (0.5, 1.0), "grid": 2, "patch_size": 3,
           "num_permutations": num_permutations}
  pretext = two_views.create_pretext(name, image_size=side, image_scale=(0.5, 1.0), settings={"jigsaw": group})
  views_fn = jax.jit(two_views.make_views(pretext, recipe=recipe, pretext_recipe=recipe))
  image, crop = (rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8) for _ in range(2))
  keys = jax.random.split(jax.random.key(seed), batch)
  views, pretext_views, label = views_fn(keys, image, crop)
  assert views.shape == image.shape and pretext_views.shape == (batch, *pretext.view_shape)
  assert normalisation.denormalise(pretext_views).dtype == np.uint8 and np.isfinite(views).all()
  label = np.asarray(label)
  assert ((label >= 0) & (label < pretext.num_labels)).all() if pretext.num_labels else (label == -1).all()
  order = rng.permutation(batch)
  for moved, first in zip(views_fn(keys[order], image[order], crop[order]), (views, pretext_views, label), strict=True):
    np.testing.assert_array_equal(moved, np.asarray(first)[order])


@few
@given(data=st.data(), num_patches=st.integers(1, 6), subset=st.sampled_from(permutations.SUBSETS))
def test_subsets_of_permutations(data, num_patches, subset):
  count = data.draw(st.integers(1, min(60, math.factorial(num_patches))))
  found = permutations.permutation_subset.__wrapped__(count, num_patches=num_patches, subset=subset)
  assert found.shape == (count, num_patches) and len(set(map(tuple, found))) == count
  np.testing.assert_array_equal(np.sort(found, axis=1), np.broadcast_to(np.arange(num_patches), found.shape))
  np.testing.assert_array_equal(found[0], np.arange(num_patches))
  fewer = permutations.permutation_subset.__wrapped__(max(1, count // 2), num_patches=num_patches, subset=subset)
  np.testing.assert_array_equal(found[:len(fewer)], fewer)
  if count > 1:
    distances = [np.sum(a != b) for a, b in itertools.combinations(found, 2)]
    assert permutations.hamming_statistics(found) == (min(distances), pytest.approx(np.mean(distances)))


@many
@given(seed=seeds, height=st.integers(1, 3_000), width=st.integers(1, 3_000), low=st.floats(0.01, 1),
       high=st.floats(0.01, 1))
def test_crops_lie_within_the_image(seed, height, width, low, high):
  scale = min(low, high), max(low, high)
  top, left, crop_height, crop_width = crops.crop_box(
    np.random.default_rng(seed), height, width, scale, (3 / 4, 4 / 3))
  assert min(top, left) >= 0 and top + crop_height <= height and left + crop_width <= width
  assert crop_height >= 1 and crop_width >= 1


@functools.cache
def encoded(ending):
  image = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)
  return cv2.imencode(ending, image)[1].tobytes()


@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp", ".bmp"])
@many
@given(seed=seeds, changes=st.integers(0, 20), cut=st.booleans(), where=st.sampled_from(["anywhere", "header"]))
def test_a_damaged_image_is_broken_or_an_image_and_nothing_else(ending, seed, changes, cut, where):
  rng, content = np.random.default_rng(seed), bytearray(encoded(ending))
  for _ in range(changes):
    content[rng.integers(len(content) if where == "anywhere" else 40)] = rng.integers(256)
  if cut:
    content = content[:rng.integers(len(content))]
  try:
    found = crops.decode(bytes(content))
  except crops.BrokenImage:
    return
  assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3 and found.size


@many
@given(content=st.binary(max_size=200), magic=st.sampled_from([b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM"]))
def test_any_bytes_are_broken_or_an_image(content, magic):
  with contextlib.suppress(crops.BrokenImage):
    assert crops.decode(magic + content).shape[2] == 3


SYSTEMS = {name: importlib.import_module(f"pirl_jax.configs.{name}").get_config()
           for name in ("pirl", "npid", "jigsaw", "rotnet", "supervised", "random_init")}
SMALL = {"data.num_images": 64, "evaluate.num_images": 16, "num_negatives": 16, "batch_size": 16,
         "evaluate.batch_size": 16, "jigsaw.num_permutations": 0}
STRANGE = {
  bool: st.booleans(), int: st.sampled_from([-3, 0, 1, 2, 7, 17, 10**6, 10**12, 2**63]),
  float: st.sampled_from([np.nan, np.inf, -1.0, 0.0, 1e-30, 0.5, 1.0, 3.0, 1e30]),
  str: st.sampled_from(["", "x", "../..", "float16", "none", "\n", "tfds", "folder", "train", "mlp", "rotation"]),
  tuple: st.lists(st.sampled_from([np.nan, -1.0, 0.0, 0.3, 0.9, 1.0, 2.0]), max_size=3).map(tuple)}


@settings(many, max_examples=200)
@given(data=st.data(), system=st.sampled_from(sorted(SYSTEMS)), count=st.integers(1, 3))
def test_strange_values_are_refused_in_one_line_or_possible(data, system, count):
  """Before anything is compiled or written: the images are opened, and the state and the step are planned."""
  config = SYSTEMS[system].copy_and_resolve_references()
  fields = flatten(config.to_dict())
  config.update_from_flattened_dict({name: value for name, value in SMALL.items() if name in fields})
  for name in data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=count, max_size=count)):
    config.update_from_flattened_dict({name: data.draw(STRANGE[type(fields[name])])})
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
    patch.setattr(embedded, "MAX_BYTES", 10**7)  # more would be possible, and take a minute
    try:
      parts = pretrain.prepare(config, Path("nowhere"))
    except UserError as error:
      assert len(str(error).splitlines()) == 1
      return
    jax.eval_shape(parts.initial_state)
    parts_lib.make_step(parts)
    assert np.isfinite([parts.optimizer.learning_rate(step) for step in (0, parts.total_steps)]).all()
  assert not Path("nowhere").exists()
