"""Batches: one stream, whatever the threads, the processes and the restarts."""

import itertools
import pathlib
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from pirl_jax.data.batches import eval_batches, place, steps_per_epoch, train_batches
from pirl_jax.data.embedded import TextureSource
from pirl_jax.data.records import Record
from pirl_jax.errors import UserError

NUM_IMAGES, BATCH = 50, 8
SOURCE = TextureSource(NUM_IMAGES, size=32, split="train")


def take(count, source=SOURCE, **changes):
  arguments = dict(
    batch_size=BATCH,
    image_size=24,
    image_scale=(0.2, 1.0),
    pretext_size=30,
    pretext_scale=(0.6, 1.0),
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
    "valid": ((8,), "bool"),
  }
  assert batch["valid"].all()


def test_index_names_its_picture():
  class Flat(TextureSource):
    """Every picture is one colour, its index."""

    def __getitem__(self, index):
      return Record(np.full((20, 20, 3), index, np.uint8), 0)

  for batch in take(15, Flat(NUM_IMAGES, size=32, split="train"), num_threads=3):
    for row, index in enumerate(batch["index"]):
      assert np.all(batch["image_crop"][row] == index) and np.all(batch["pretext_crop"][row] == index)


def test_every_epoch_holds_each_picture_at_most_once_in_another_order():
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


def test_crops_of_one_picture_differ_from_epoch_to_epoch_and_between_the_two():
  stream = take(30)
  crops = {}
  for batch in stream:
    for row, index in enumerate(batch["index"]):
      crops.setdefault(int(index), []).append(batch["image_crop"][row].tobytes())
  assert max(len(of_one) for of_one in crops.values()) >= 4
  assert all(len(set(of_one)) == len(of_one) for of_one in crops.values())
  (batch,) = take(1, image_size=30, image_scale=(0.6, 1.0))  # now both crops are drawn alike
  for image, pretext in zip(batch["image_crop"], batch["pretext_crop"], strict=True):
    assert not np.array_equal(image, pretext)


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
  parts = [take(14, process_index=index, process_count=count) for index in range(count)]
  together = []
  for step in range(14):
    stacked = {name: np.stack([part[step][name] for part in parts], axis=1) for name in parts[0][step]}
    together.append({name: value.reshape(BATCH, *value.shape[2:]) for name, value in stacked.items()})
  assert_same(together, take(14))


class Damaged(TextureSource):
  """Pictures 3 and 5 cannot be decoded, 11 is gone, 12 may not be read."""

  def __getitem__(self, index):
    if index == 11:
      raise FileNotFoundError(index)
    if index == 12:
      raise PermissionError(index)
    record = super().__getitem__(index)
    return record._replace(image=b"broken") if index in (3, 5) else record


@pytest.mark.parametrize("num_threads", [0, 2])
def test_broken_pictures_are_marked_and_change_no_other(num_threads):
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


def test_a_failing_disk_is_no_broken_picture():
  class Failing(TextureSource):
    def __getitem__(self, index):
      raise OSError(5, "Input/output error")

  with pytest.raises(OSError, match="Input/output"):
    take(1, Failing(NUM_IMAGES, size=32, split="train"), num_threads=2)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"batch_size": 51}, "batch_size=51.*50 pictures"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"process_count": 3}, "batch_size=8.*3 processes"),
    ({"image_scale": (0.0, 1.0)}, "image crops cover 0.0 to 1.0"),
    ({"pretext_scale": (0.6, 1.2)}, "pretext crops cover 0.6 to 1.2"),
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


def test_place_splits_rows_over_the_devices():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
  (batch,) = take(1)
  placed = place(batch, mesh)
  for name, value in placed.items():
    np.testing.assert_array_equal(value, batch[name])
    assert [shard.data.shape[0] for shard in value.addressable_shards] == [2] * 4
  with pytest.raises(UserError, match="8 pictures.*3 devices"):
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
stream = train_batches(source, batch_size=32, image_size=24, seed=0,
  image_scale=(0.2, 1.0), pretext_size=30, pretext_scale=(0.6, 1.0), start_step=0, num_threads=2)
next(stream)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_benchmark_prints_its_table(tmp_path):
  for number in range(60):
    noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((500, 375)).save(tmp_path / f"{number}.jpg")
  command = [sys.executable, "-m", "benchmarks.input_pipeline", str(tmp_path), "--seconds=0.2", "--rounds=2"]
  root = pathlib.Path(__file__).parents[1]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
  assert done.returncode == 0, done.stderr
  ratio = float(done.stdout.splitlines()[-1].split()[-2])
  assert "60 pictures" in done.stdout and ratio > 1.5  # 4 on photographs
