"""Batches: one stream, whatever the threads, the processes and the restarts."""

import dataclasses
import errno
import itertools
import subprocess
import sys
import threading
import time

import cv2
import jax
import numpy as np
import pytest
from launching import ROOT
from PIL import Image

from pirl_jax.data import reading
from pirl_jax.data.batches import (
  eval_batches,
  labelled_batches,
  place,
  steps_per_epoch,
  train_batches,
  void_batch,
)
from pirl_jax.data.crops import BrokenImage, centre_crop
from pirl_jax.data.embedded import TextureSource
from pirl_jax.data.records import Record
from pirl_jax.data.sources import DataSettings, open_source
from pirl_jax.data.subsets import Subset
from pirl_jax.errors import UserError

NUM_IMAGES, BATCH = 50, 8
SOURCE = TextureSource(NUM_IMAGES, size=32, split="train")


def take(count, source=SOURCE, **changes):
  arguments = dict(
    batch_size=BATCH,
    crops={"image_crop": (24, (0.2, 1.0)), "pretext_crop": (30, (0.6, 1.0))},
    seed=7,
    start_step=0,
    num_threads=0,
  )
  stream = train_batches(source, **{**arguments, **changes})
  try:
    return list(itertools.islice(stream, count))
  finally:
    stream.close()


def assert_same(found, expected):
  assert len(found) == len(expected)
  for one, other in zip(found, expected, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


def test_shapes_and_types():
  (batch,) = take(1)
  assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
    "image_crop": ((8, 24, 24, 3), "uint8"),
    "pretext_crop": ((8, 30, 30, 3), "uint8"),
    "index": ((8,), "int32"),
    "label": ((8,), "int32"),
    "valid": ((8,), "bool"),
  }
  assert batch["valid"].all()
  np.testing.assert_array_equal(batch["label"], SOURCE.labels()[batch["index"]])


@pytest.mark.parametrize("partial", [False, True])
def test_a_void_batch_looks_like_the_others_and_names_no_image(partial):
  (batch,) = take(1, partial=partial)
  void = void_batch({"image_crop": (24, (0.2, 1.0)), "pretext_crop": (30, (0.6, 1.0))}, BATCH, partial=partial)
  assert {name: (value.shape, value.dtype) for name, value in void.items()} == {
    name: (value.shape, value.dtype) for name, value in batch.items()}
  assert (void["index"] == -1).all() and not void["valid"].any()


def test_crops_nobody_asks_for_are_not_made_and_the_first_is_the_same_without_the_others():
  (both,), (one,) = take(1), take(1, crops={"image_crop": (24, (0.2, 1.0))})
  assert "pretext_crop" not in one
  np.testing.assert_array_equal(one["image_crop"], both["image_crop"])


def test_index_names_its_image():
  class Flat(TextureSource):
    """Every image is one colour, its index."""

    def __getitem__(self, index):
      return Record(np.full((20, 20, 3), index, np.uint8), 0)

  for batch in take(15, Flat(NUM_IMAGES, size=32, split="train"), num_threads=3):
    for row, index in enumerate(batch["index"]):
      assert np.all(batch["image_crop"][row] == index) and np.all(batch["pretext_crop"][row] == index)


def test_every_epoch_holds_each_image_at_most_once_in_another_order():
  per_epoch = steps_per_epoch(NUM_IMAGES, BATCH)
  assert per_epoch == 6
  stream = take(3 * per_epoch)
  epochs = [
    np.concatenate([b["index"] for b in stream[e * per_epoch : (e + 1) * per_epoch]]) for e in range(3)
  ]
  for epoch in epochs:
    assert len(set(epoch.tolist())) == len(epoch) == 48
  left_out = [frozenset(range(NUM_IMAGES)) - set(epoch.tolist()) for epoch in epochs]
  assert len(set(left_out)) == 3
  assert all(np.mean(a == b) < 0.2 for a, b in itertools.combinations(epochs, 2))


def test_crops_of_one_image_differ_from_epoch_to_epoch_and_between_the_two():
  stream = take(30)
  crops = {}
  for batch in stream:
    for row, index in enumerate(batch["index"]):
      crops.setdefault(int(index), []).append(batch["image_crop"][row].tobytes())
  assert max(len(of_one) for of_one in crops.values()) >= 4
  assert all(len(set(of_one)) == len(of_one) for of_one in crops.values())
  (batch,) = take(1, crops=dict.fromkeys(("image_crop", "pretext_crop"), (30, (0.6, 1.0))))  # both are drawn alike
  for image, pretext in zip(batch["image_crop"], batch["pretext_crop"], strict=True):
    assert not np.array_equal(image, pretext)


def test_with_partial_batches_an_epoch_holds_every_image_once_and_its_start_fills_it_up():
  per_epoch = steps_per_epoch(NUM_IMAGES, BATCH, partial=True)
  assert per_epoch == 7
  stream = take(3 * per_epoch, partial=True)
  orders = []
  for epoch in range(3):
    batches = stream[epoch * per_epoch:(epoch + 1) * per_epoch]
    fills = np.concatenate([batch["fills"] for batch in batches])
    order = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(np.flatnonzero(fills), np.arange(NUM_IMAGES, 7 * BATCH))
    assert sorted(order[~fills]) == list(range(NUM_IMAGES))
    np.testing.assert_array_equal(order[fills], order[:6])
    assert all(len(set(batch["index"].tolist())) == BATCH for batch in batches)
    orders.append(order.tolist())
  assert orders[0] != orders[1] != orders[2] != orders[0]
  assert_same(take(8, partial=True, start_step=13, num_threads=2), stream[13:])
  halves = [take(21, partial=True, process=(number, 2)) for number in range(2)]
  assert_same([{name: np.concatenate([half[step][name] for half in halves]) for name in halves[0][step]}
               for step in range(21)], stream)


def test_partial_batches_change_nothing_if_all_batches_are_whole():
  whole = take(12, source=TextureSource(48, size=32, split="train"))
  found = take(12, source=TextureSource(48, size=32, split="train"), partial=True)
  assert not any(batch.pop("fills").any() for batch in found)
  assert_same(found, whole)
  assert "fills" not in whole[0]


def test_seeds_differ_and_any_integer_serves():
  streams = [np.concatenate([b["index"] for b in take(3, seed=seed)]).tolist() for seed in (0, 1, -1, 2**40)]
  assert len({tuple(stream) for stream in streams}) == 4


@pytest.mark.parametrize("num_threads", [1, 4])
def test_threads_change_nothing(num_threads):
  assert_same(take(14, num_threads=num_threads), take(14))


@pytest.mark.parametrize("start_step", [1, 5, 6, 7, 13])
def test_resume_from_any_step(start_step):
  assert_same(take(15 - start_step, start_step=start_step, num_threads=2), take(15)[start_step:])


def test_start_far_away_costs_nothing():
  start = time.perf_counter()
  take(1, start_step=10**7)
  assert time.perf_counter() - start < 2


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_together_see_the_single_stream(count):
  parts = [take(14, process=(index, count)) for index in range(count)]
  together = []
  for step in range(14):
    together.append({name: np.concatenate([part[step][name] for part in parts]) for name in parts[0][step]})
  assert_same(together, take(14))


class Damaged(TextureSource):
  """Images 3 and 5 cannot be decoded, 11 and 12 are gone."""

  def __getitem__(self, index):
    if index in (11, 12):
      raise BrokenImage(index)
    record = super().__getitem__(index)
    return record._replace(image=b"broken") if index in (3, 5) else record


@pytest.mark.parametrize("num_threads", [0, 2])
def test_broken_images_are_marked_and_change_no_other(num_threads):
  damaged = Damaged(NUM_IMAGES, size=32, split="train")
  seen = set()
  for found, whole in zip(take(12, damaged, num_threads=num_threads), take(12), strict=True):
    np.testing.assert_array_equal(found["index"], whole["index"])
    broken = np.isin(found["index"], [3, 5, 11, 12])
    np.testing.assert_array_equal(found["valid"], ~broken)
    seen |= set(found["index"][broken].tolist())
    for name in ("image_crop", "pretext_crop"):
      assert not found[name][broken].any()
      np.testing.assert_array_equal(found[name][~broken], whole[name][~broken])
  assert seen == {3, 5, 11, 12}


class Failing(TextureSource):
  """The first `failures` reads of each image fail in the same way."""

  def __init__(self, error, failures):
    super().__init__(NUM_IMAGES, size=32, split="train")
    self._error, self._left = error, dict.fromkeys(range(NUM_IMAGES), failures)

  def __getitem__(self, index):
    if self._left[index]:
      self._left[index] -= 1
      raise self._error
    return super().__getitem__(index)


FAILURES = [(OSError(errno.EIO, "Input/output error"), r"the disk .*\(Input/output error\)"),
            (OSError(errno.ESTALE, "Stale file handle"), r".*\(Stale file handle\)"),
            (PermissionError(errno.EACCES, "Permission denied"), r".*\(Permission denied\)"),
            (OSError(errno.EMFILE, "Too many open files"), r".*\(Too many open files\)"),
            (TimeoutError(), r".*\(TimeoutError\)"), (MemoryError(), "memory is short")]


@pytest.mark.parametrize("error, said", FAILURES)
def test_a_failure_that_passes_costs_nothing_and_one_that_lasts_ends_the_run(error, said, monkeypatch):
  monkeypatch.setattr(reading, "PAUSES", (0.001,) * 3)
  for num_threads in (0, 2):
    assert_same(take(12, Failing(error, 3), num_threads=num_threads), take(12))
  with pytest.raises(UserError, match=r"texture \d+ .* cannot be read because " + said):
    take(1, Failing(error, 4), num_threads=2)
  with pytest.raises(UserError, match=said):
    reading.why_broken(Failing(error, 4), 0)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"batch_size": 51}, "batch_size=51.*50 images"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"process": (0, 3)}, "batch_size=8.*3 processes"),
    ({"crops": {"image_crop": (24, (0.0, 1.0))}}, "crops of image_crop cover 0.0 to 1.0"),
    ({"crops": {"pretext_crop": (24, (0.6, 1.2))}}, "crops of pretext_crop cover 0.6 to 1.2"),
  ],
)
def test_impossible_batches(changes, words):
  with pytest.raises(UserError, match=words):
    take(1, **changes)


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize("start", [0, 45, 50])
def test_eval_batches_go_through_all_in_order(num_threads, start):
  source = Damaged(NUM_IMAGES, size=32, split="train")
  found = list(
    eval_batches(
      source, batch_size=BATCH, image_size=32, crop_fraction=1.0, num_threads=num_threads, start=start
    )
  )
  assert all(len(batch["index"]) == BATCH for batch in found) and len(found) == -(-(50 - start) // BATCH)
  index = np.concatenate([np.zeros(0, int), *(batch["index"] for batch in found)])
  assert index[: 50 - start].tolist() == list(range(start, 50)) and (index[50 - start :] == -1).all()
  for batch in found:
    np.testing.assert_array_equal(batch["valid"], ~np.isin(batch["index"], [-1, 3, 5, 11, 12]))
    for row in np.flatnonzero(batch["valid"]):
      np.testing.assert_array_equal(batch["image"][row], SOURCE[batch["index"][row]].image)
      assert batch["label"][row] == SOURCE.labels()[batch["index"][row]]


@pytest.mark.parametrize("crop_fraction", [1.0, 0.875])
def test_eval_batches_squash_whole_images(crop_fraction):
  class Wide(TextureSource):
    """White at the left and the right edge, which a centre crop does not see."""

    def __getitem__(self, index):
      image = np.full((20, 40, 3), index, np.uint8)
      image[:, :6] = image[:, 34:] = 255
      return Record(image, 0)

  source = Wide(5, size=32, split="train")
  arguments = dict(batch_size=4, image_size=16, crop_fraction=crop_fraction, num_threads=0)
  for squash in (True, False):
    for batch in eval_batches(source, squash=squash, **arguments):
      for image, index in zip(batch["image"][batch["valid"]], batch["index"][batch["valid"]], strict=True):
        assert (image[:, 6:10] == index).all()
        assert (image[:, [0, -1]] == (255 if squash else index)).all()


@pytest.mark.parametrize("num_threads", [0, 1, 3, 16])
@pytest.mark.parametrize(
  ("batch_size", "size", "start"), [(1, 32, 0), (6, 24, 7), (24, 32, 0), (37, 32, 44), (64, 20, 1)])
def test_eval_batches_are_the_same_in_whatever_parts_they_are_read(num_threads, batch_size, size, start):
  source = Damaged(NUM_IMAGES, size=32, split="train")
  stream = eval_batches(
    source, batch_size=batch_size, image_size=size, crop_fraction=1.0, num_threads=num_threads, start=start
  )
  found, expected = list(stream), []
  for first in range(start, NUM_IMAGES, batch_size):
    rows = []
    for index in range(first, first + batch_size):
      there = index < NUM_IMAGES
      readable = there and index not in (3, 5, 11, 12)
      image = centre_crop(SOURCE[index].image, size=size, fraction=1.0) if readable else np.zeros((size, size, 3))
      # Of 11 and 12 there is not even a label to be had.
      label = index % 10 if there and index not in (11, 12) else -1
      rows.append({"image": image, "index": index if there else -1, "label": label, "valid": readable})
    expected.append({name: np.stack([row[name] for row in rows]) for name in ("image", "index", "label", "valid")})
  assert_same(found, expected)
  assert {name: value.dtype.name for name, value in found[0].items()} == {
    "image": "uint8", "index": "int32", "label": "int32", "valid": "bool"}


@pytest.mark.parametrize(("batch_size", "size"), [(4, 32), (64, 32), (1024, 224), (96, 224)])
def test_every_thread_has_a_part_of_a_test_batch_and_photographs_come_a_few_at_a_time(batch_size, size):
  parts = []
  every_thread = threading.Barrier(4, timeout=30)

  class Slow(TextureSource):
    def __getitem__(self, index):
      first = threading.get_ident() not in parts
      parts.append(threading.get_ident())
      if first:  # on a busy machine one thread could else be done before the next has begun
        every_thread.wait()
      time.sleep(0.002)
      return super().__getitem__(index)

  stream = eval_batches(Slow(batch_size, size=32, split="train"), batch_size=batch_size, image_size=size,
                        crop_fraction=1.0, num_threads=4)
  next(stream)
  stream.close()
  share = np.unique(parts, return_counts=True)[1]
  assert len(share) == 4 and share.min() >= batch_size // 8


def test_test_batches_are_read_no_further_ahead_than_four():
  asked = []

  class Counting(TextureSource):
    def __getitem__(self, index):
      asked.append(index)
      return super().__getitem__(index)

  stream = eval_batches(Counting(400, size=32, split="train"), batch_size=20, image_size=32, crop_fraction=1.0,
                        num_threads=2)
  next(stream)
  deadline = time.monotonic() + 5
  while len(asked) < 100 and time.monotonic() < deadline:
    time.sleep(0.02)
  time.sleep(0.3)
  # The one in hand, one ready, one that waits for its place, two in parts.
  assert sorted(asked) == list(range(100))
  stream.close()


def test_place_splits_rows_over_the_devices():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
  (batch,) = take(1)
  placed = place(batch, mesh)
  for name, value in placed.items():
    np.testing.assert_array_equal(value, batch[name])
    assert [shard.data.shape[0] for shard in value.addressable_shards] == [2] * 4
  with pytest.raises(UserError, match="8 images.*3 devices"):
    place(batch, jax.sharding.Mesh(np.array(jax.devices()[:3]), ("data",)))


def test_close_leaves_no_thread():
  before = threading.active_count()
  take(2, num_threads=3)
  deadline = time.monotonic() + 5
  while threading.active_count() > before and time.monotonic() < deadline:
    time.sleep(0.02)
  assert threading.active_count() <= before


def test_an_iterator_left_open_does_not_hold_up_the_exit():
  code = """
from pirl_jax.data.batches import train_batches
from pirl_jax.data.embedded import TextureSource
source = TextureSource(64, size=32, split="train")
stream = train_batches(source, crops={"image_crop": (24, (0.2, 1.0))}, batch_size=32, seed=0, start_step=0,
  num_threads=2)
next(stream)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_benchmark_prints_its_table(tmp_path):
  for number in range(60):
    noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((500, 375)).save(tmp_path / f"{number}.jpg")
  command = [sys.executable, "-m", "benchmarks.input_pipeline", str(tmp_path), "--seconds=0.2", "--rounds=2"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  ratio = float(done.stdout.splitlines()[-1].split()[-2])
  assert "60 images" in done.stdout and ratio > 1.5  # 4 on photographs


def take_labelled(count, source=SOURCE, **changes):
  arguments = dict(indices=np.arange(NUM_IMAGES), batch_size=BATCH, crop=(24, (0.2, 1.0)), seed=7,
                   start_step=0, num_threads=0)
  stream = labelled_batches(source, **{**arguments, **changes})
  try:
    return list(itertools.islice(stream, count))
  finally:
    stream.close()


SOME = np.array([3, 4, 5, 11, 12, 17, 20, 21, 30, 31, 32, 33, 40, 41, 42, 43, 44, 48, 49])


class Numbered(TextureSource):
  """The left half of every image is its index, the right half 100 more: whatever the crop, it can be read off."""

  def __getitem__(self, index):
    image = np.full((40, 40, 3), index, np.uint8)
    image[:, 20:] += 100
    return Record(image, int(self._labels[index]))


def test_labelled_shapes_and_types():
  (batch,) = take_labelled(1)
  assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
    "image": ((8, 24, 24, 3), "uint8"),
    "index": ((8,), "int32"),
    "label": ((8,), "int32"),
    "valid": ((8,), "bool"),
  }
  assert batch["valid"].all()


@pytest.mark.parametrize("indices", [np.arange(NUM_IMAGES), SOME])
def test_labelled_image_index_and_label_belong_together(indices):
  source = Numbered(NUM_IMAGES, size=32, split="train")
  seen = set()
  for batch in take_labelled(15, source, indices=indices, num_threads=3):
    np.testing.assert_array_equal(batch["label"], source.labels()[batch["index"]])
    for image, index in zip(batch["image"], batch["index"], strict=True):
      assert image.min() in (index, index + 100) and image.max() in (index, index + 100)
    seen |= set(batch["index"].tolist())
  assert seen == set(indices.tolist())


@pytest.mark.parametrize("indices", [np.arange(NUM_IMAGES), SOME])
def test_labelled_epochs_hold_an_image_at_most_once_in_another_order(indices):
  per_epoch = len(indices) // BATCH
  stream = take_labelled(3 * per_epoch, indices=indices)
  epochs = [np.concatenate([b["index"] for b in stream[e * per_epoch:(e + 1) * per_epoch]]) for e in range(3)]
  for epoch in epochs:
    assert len(set(epoch.tolist())) == len(epoch) == per_epoch * BATCH
  assert len({frozenset(epoch.tolist()) for epoch in epochs}) == 3  # those left over are others
  assert all(np.mean(a == b) < 0.3 for a, b in itertools.combinations(epochs, 2))


def test_labelled_crops_differ_from_epoch_to_epoch():
  crops = {}
  for batch in take_labelled(30):
    for row, index in enumerate(batch["index"]):
      crops.setdefault(int(index), []).append(batch["image"][row].tobytes())
  assert max(map(len, crops.values())) >= 4
  assert all(len(set(of_one)) == len(of_one) for of_one in crops.values())


def test_labelled_crops_cover_the_share_asked_for_and_half_are_flipped():
  class Ramp(TextureSource):
    """Brightness rises from 0 at the left by 4 a column."""

    def __getitem__(self, index):
      return Record(np.broadcast_to(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], (60, 60, 3)).copy(), 0)

  source = Ramp(NUM_IMAGES, size=32, split="train")

  def slopes(**changes):
    rows = np.concatenate([batch["image"][:, 12, :, 0] for batch in take_labelled(60, source, **changes)]).astype(int)
    return (rows[:, 20] - rows[:, 3]) / 17

  wide = slopes(crop=(24, (1.0, 1.0)))
  assert 0.42 < np.mean(wide < 0) < 0.58  # of 480 coins: within 3.5 standard deviations
  np.testing.assert_allclose(np.abs(wide), 4 * 60 / 24, rtol=0.05)  # the whole image on 24 columns
  # A sixteenth of the area is about a quarter of the width, between ratios of 3/4 and 4/3.
  assert np.all(np.abs(slopes(crop=(24, (1 / 16, 1 / 16)))) < 4 * 60 / 24 / 3)


def test_labelled_seeds_differ():
  streams = [np.concatenate([b["index"] for b in take_labelled(3, seed=seed)]).tolist() for seed in (0, 1, -1, 2**40)]
  assert len({tuple(stream) for stream in streams}) == 4
  assert_same(take_labelled(3, seed=2**40), take_labelled(3, seed=2**40))


@pytest.mark.parametrize(("start_step", "num_threads"), [(0, 4), (1, 0), (2, 1), (5, 2), (13, 2)])
def test_labelled_resume_from_any_step(start_step, num_threads):
  arguments = dict(indices=SOME)  # two batches an epoch
  assert_same(take_labelled(15 - start_step, start_step=start_step, num_threads=num_threads, **arguments),
              take_labelled(15, **arguments)[start_step:])


@pytest.mark.parametrize("count", [2, 4])
def test_labelled_processes_together_see_the_single_stream(count):
  parts = [take_labelled(14, process=(index, count)) for index in range(count)]
  together = []
  for step in range(14):
    together.append({name: np.concatenate([part[step][name] for part in parts]) for name in parts[0][step]})
  assert_same(together, take_labelled(14))


@pytest.mark.parametrize("num_threads", [0, 2])
def test_labelled_broken_images_are_marked_and_change_no_other(num_threads):
  damaged = Damaged(NUM_IMAGES, size=32, split="train")
  seen = set()
  for found, whole in zip(take_labelled(12, damaged, num_threads=num_threads), take_labelled(12), strict=True):
    np.testing.assert_array_equal(found["index"], whole["index"])
    broken = np.isin(found["index"], [3, 5, 11, 12])
    np.testing.assert_array_equal(found["valid"], ~broken)
    seen |= set(found["index"][broken].tolist())
    assert not found["image"][broken].any()
    for name in ("image", "label"):
      np.testing.assert_array_equal(found[name][~broken], whole[name][~broken])
  assert seen == {3, 5, 11, 12}


def test_labelled_batch_larger_than_the_subset():
  with pytest.raises(UserError, match="batch_size=20.*19 images"):
    take_labelled(1, indices=SOME, batch_size=20)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
  """A small and a large JPEG of the same size in each class of four."""
  folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
  for number in range(8):
    side = 400 if number % 2 else 40
    smooth = cv2.resize(rng.integers(0, 256, (7, 7, 3), np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(folder / f"{number}.jpg"), smooth)
  return DataSettings("folder", root=str(folder), split="")


@pytest.mark.parametrize("wrap", [lambda source: source, lambda source: Subset(source, range(8))])
def test_reduced_decoding_changes_large_images_alone_and_those_little(photographs, wrap):
  whole, reduced = (open_source(dataclasses.replace(photographs, reduced_decoding=value)) for value in (False, True))
  whole, reduced = wrap(whole), wrap(reduced)
  pairs = [*zip(take(3, whole), take(3, reduced), strict=True)]
  pairs += zip(*(eval_batches(source, batch_size=8, image_size=24, crop_fraction=0.875, num_threads=0)
                 for source in (whole, reduced)), strict=True)
  for one, other in pairs:
    np.testing.assert_array_equal(one["index"], other["index"])
    for name in one.keys() & {"image_crop", "pretext_crop", "image"}:
      for index, a, b in zip(one["index"], one[name].astype(int), other[name].astype(int), strict=True):
        assert (index % 2 and 0 < np.abs(a - b).mean() < 12) or (not index % 2 and (a == b).all()), (name, index)
