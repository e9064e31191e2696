"""Subsets: pinned for ever, one within the other, balanced where asked."""

import hashlib

import numpy as np
import pytest

from pirl_jax.data.subsets import draw_subset, subset_digest
from pirl_jax.errors import UserError

LABELS = np.arange(4096, dtype=np.int32) % 10


def test_a_subset_never_changes():
  # Whoever has to change these numbers takes the meaning from every figure published with the old ones.
  plain = draw_subset(LABELS, 0.01, seed=0, balanced=False)
  assert plain[:5].tolist() == [46, 87, 282, 306, 366]
  assert subset_digest(plain) == "0c416a9fd1966f49"
  assert subset_digest(draw_subset(LABELS, 0.1, seed=3, balanced=False)) == "661aeacad3b22ab3"
  labels = np.arange(1000) % 7
  assert subset_digest(draw_subset(labels, 0.05, seed=0, balanced=True)) == "d810cc29f3469b65"


@pytest.mark.parametrize("seed", [0, 11, -2])
def test_a_subset_is_the_first_records_by_the_digest_of_seed_and_index(seed):
  labels = LABELS[:300].copy()
  labels[::7] = -1
  keys = {}
  for index in range(300):
    if index % 7:
      keys[hashlib.sha256(f"{seed}:{index}".encode()).hexdigest()] = index
  expected = [keys[key] for key in sorted(keys)][:64]  # round(0.25 * 257)
  found = draw_subset(labels, 0.25, seed=seed, balanced=False)
  assert len(keys) == 257 and found.dtype == np.int64
  assert found.tolist() == sorted(expected)


def test_the_classes_have_no_part_in_a_plain_subset():
  others = np.roll(LABELS, 1)
  np.testing.assert_array_equal(*(draw_subset(x, 0.1, seed=0, balanced=False) for x in (LABELS, others)))


@pytest.mark.parametrize("balanced", [False, True])
def test_a_smaller_subset_lies_within_a_larger_one(balanced):
  subsets = [set(draw_subset(LABELS, fraction, seed=5, balanced=balanced).tolist())
             for fraction in (0.001, 0.01, 0.05, 0.1, 0.5, 1.0)]
  assert all(small < large for small, large in zip(subsets, subsets[1:], strict=False))
  assert subsets[-1] == set(range(4096))


def test_balanced_takes_the_same_share_of_every_class_and_at_least_one():
  labels = np.repeat([0, 1, 2, 3, -1], [500, 200, 40, 3, 50])
  labels = np.random.default_rng(1).permutation(labels)
  found = draw_subset(labels, 0.1, seed=0, balanced=True)
  assert np.bincount(labels[found]).tolist() == [50, 20, 4, 1]
  # Of each class the first ones in the order of the plain subset.
  in_order = [set(draw_subset(np.where(labels == label, 0, -1), 0.1, seed=0, balanced=False).tolist())
              for label in (0, 1, 2)]
  for label, members in enumerate(in_order):
    assert set(found[labels[found] == label].tolist()) == members


def test_another_seed_gives_another_subset():
  one, other = (set(draw_subset(LABELS, 0.1, seed=seed, balanced=False).tolist()) for seed in (0, 1))
  assert 10 < len(one & other) < 80  # 410 * 0.1 = 41 in the mean


def test_a_digest_tells_subsets_apart():
  assert len({subset_digest(np.array(x)) for x in ([1, 23], [12, 3], [1, 2, 3], [123])}) == 4
  assert subset_digest(np.int32([4, 5])) == subset_digest(np.int64([4, 5]))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
  with pytest.raises(UserError, match=r"lies in \(0, 1\]"):
    draw_subset(LABELS, fraction, seed=0, balanced=False)


def test_a_fraction_of_no_image_is_refused():
  with pytest.raises(UserError, match="0.004 of 100 labelled images is none; take 0.01 or more"):
    draw_subset(np.zeros(100, np.int32), 0.004, seed=0, balanced=False)
  assert len(draw_subset(np.zeros(100, np.int32), 0.01, seed=0, balanced=False)) == 1
