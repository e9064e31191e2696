"""What holds for any shape and any value, tried on many: losses, bank, views, crops, and bad input of every kind."""

import contextlib
import functools

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import pirl
from pirl_jax import losses, memory_bank, pretrain
from pirl_jax import mesh as mesh_lib
from pirl_jax.data import crops
from pirl_jax.errors import UserError
from pirl_jax.logbook import flatten
from pirl_jax.mesh import AXIS, SPLIT, WHOLE
from pirl_jax.negatives import Scores
from pirl_jax.views import jigsaw, photometric, rotation

# The same examples at every run, and no folder of them left behind.
few = settings(max_examples=8, deadline=None, derandomize=True, database=None)
many = settings(max_examples=300, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)

pytestmark = pytest.mark.usefixtures("quick_compile")


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
  recipe = photometric.Recipe(
    brightness=strength, contrast=strength, saturation=strength, hue=strength / 2, jitter_probability=1.0,
    group_probability=0.66, grayscale_probability=0.2, blur_probability=blur, blur_radius=(0.1, 2.0),
    flip_probability=0.5)
  return jax.jit(lambda key, image: photometric.apply_photometric(
    image, photometric.draw_photometric(key, recipe=recipe)))


@few
@given(seed=seeds, strength=st.sampled_from([0.0, 0.4, 1.0]), blur=st.sampled_from([0.0, 0.5]),
       contents=st.sampled_from(["noise", "black", "white", "one pixel"]), side=st.sampled_from([1, 2, 7]))
def test_augmented_pictures_stay_pictures(seed, strength, blur, contents, side):
  image = {"noise": np.random.default_rng(seed).integers(0, 256, (3, side, side)),
           "black": np.zeros((3, side, side)), "white": np.full((3, side, side), 255),
           "one pixel": np.eye(3 * side * side)[0].reshape(3, side, side) * 255}[contents].astype(np.float32)
  found = np.asarray(augment(strength, blur)(jax.random.key(seed), image))
  assert found.shape == image.shape and np.isfinite(found).all() and found.min() >= 0 and found.max() <= 255


@many
@given(seed=seeds, height=st.integers(1, 3_000), width=st.integers(1, 3_000), low=st.floats(0.01, 1),
       high=st.floats(0.01, 1))
def test_crops_lie_within_the_picture(seed, height, width, low, high):
  scale = min(low, high), max(low, high)
  top, left, crop_height, crop_width = crops.crop_box(
    np.random.default_rng(seed), height, width, scale, (3 / 4, 4 / 3))
  assert min(top, left) >= 0 and top + crop_height <= height and left + crop_width <= width
  assert crop_height >= 1 and crop_width >= 1


@functools.cache
def encoded(ending):
  picture = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)
  return cv2.imencode(ending, picture)[1].tobytes()


@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp", ".bmp"])
@many
@given(seed=seeds, changes=st.integers(0, 20), cut=st.booleans(), where=st.sampled_from(["anywhere", "header"]))
def test_a_damaged_picture_is_broken_or_a_picture_and_nothing_else(ending, seed, changes, cut, where):
  rng, content = np.random.default_rng(seed), bytearray(encoded(ending))
  for _ in range(changes):
    content[rng.integers(len(content) if where == "anywhere" else 40)] = rng.integers(256)
  if cut:
    content = content[:rng.integers(len(content))]
  try:
    found = crops.decode(bytes(content))
  except crops.BrokenPicture:
    return
  assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3 and found.size


@many
@given(content=st.binary(max_size=200), magic=st.sampled_from([b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM"]))
def test_any_bytes_are_broken_or_a_picture(content, magic):
  with contextlib.suppress(crops.BrokenPicture):
    assert crops.decode(magic + content).shape[2] == 3


FIELDS = flatten(pirl.get_config().to_dict())
STRANGE = {
  bool: st.booleans(), int: st.integers(-3, 10**12), float: st.floats(),
  str: st.sampled_from(["", "x", "../..", "float16", "none", "\n"]),
  tuple: st.tuples(st.floats(), st.floats())}


@many
@given(data=st.data(), name=st.sampled_from(sorted(FIELDS)))
def test_a_strange_value_is_refused_in_one_line_or_possible(data, name):
  config = pirl.get_config()
  config.update_from_flattened_dict({name: data.draw(STRANGE[type(FIELDS[name])])})
  try:
    pretrain.check_config(config)
  except UserError as error:
    assert name.split(".")[-1] in str(error)
