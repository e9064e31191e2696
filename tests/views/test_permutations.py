"""Subsets of permutations: the greedy rule, what it reaches, the same set for ever, and what is kept on disk."""

import hashlib
import itertools
import math
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from pirl_jax.errors import UserError
from pirl_jax.views import permutations
from pirl_jax.views.permutations import hamming_statistics, permutation_subset


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  permutation_subset.cache_clear()
  yield tmp_path / "pirl_jax"
  permutation_subset.cache_clear()


@pytest.fixture(scope="module")
def largest(tmp_path_factory):
  """10,000 permutations of nine by each rule; those before them are the smaller subsets."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    return {subset: permutation_subset(10_000, subset=subset) for subset in ("max_avg", "max_min")}


@pytest.fixture
def never_chosen(monkeypatch):
  monkeypatch.setattr(permutations, "_choose", lambda *_, **__: pytest.fail("chosen anew"))


def distance(one, other):
  return sum(a != b for a, b in zip(one, other, strict=True))


def greedy(count, num_patches, subset):
  remaining = list(itertools.permutations(range(num_patches)))  # in lexicographic order
  chosen = [remaining.pop(0)]
  while len(chosen) < count:
    best = best_score = None
    for candidate in remaining:
      distances = [distance(candidate, other) for other in chosen]
      score = (sum(distances), min(distances)) if subset == "max_avg" else (min(distances), sum(distances))
      if best is None or score > best_score:
        best, best_score = candidate, score
    remaining.remove(best)
    chosen.append(best)
  return np.array(chosen, np.uint8)


@pytest.mark.parametrize("subset", ["max_avg", "max_min"])
@pytest.mark.parametrize(
  ("num_patches", "counts"),
  [(1, [1]), (2, [1, 2]), (3, range(1, 7)), (4, range(1, 25)), (5, [60, 120]), (6, [30]), (7, [9])],
)
def test_it_is_the_greedy_choice(num_patches, counts, subset, monkeypatch, tmp_path):
  expected = greedy(max(counts), num_patches, subset)
  for count in counts:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(count)))  # no size may come from the file of another
    found = permutation_subset(count, num_patches=num_patches, subset=subset)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected[:count])


@pytest.mark.parametrize("subset", ["max_avg", "max_min"])
def test_all_orders_are_the_largest_subset(subset):
  found = permutation_subset(720, num_patches=6, subset=subset)
  assert {tuple(row) for row in found.tolist()} == set(itertools.permutations(range(6)))


def test_one_permutation_is_the_image_in_its_own_order():
  assert permutation_subset(1).tolist() == [list(range(9))]


@pytest.mark.parametrize(("subset", "digest"), [("max_avg", "26997ff085477676"), ("max_min", "95ec1c749b0fdaef")])
def test_a_subset_never_changes(largest, subset, digest):
  # A classifier of permutations knows them by their places in the subset, and so do the files of earlier runs.
  assert hashlib.sha256(largest[subset].tobytes()).hexdigest()[:16] == digest


def test_what_is_returned_cannot_be_changed():
  with pytest.raises(ValueError, match="read-only"):
    permutation_subset(3)[0] = 0


# Measured. No T permutations have a larger mean than those whose every column holds each patch equally often, or once
# more: 9 - 9 * pairs of equals / pairs, which is 8 T / (T - 1) where 9 divides T.
@pytest.mark.parametrize(
  ("subset", "count", "smallest", "mean"),
  [
    ("max_avg", 9, 9, 9.0),
    ("max_avg", 100, 4, 8.08),
    ("max_avg", 701, 2, 8.011412268188302),
    ("max_avg", 1000, 2, 8.008),
    ("max_avg", 2000, 2, 8.003998499249624),
    ("max_avg", 9999, 2, 8.00080016003201),
    ("max_avg", 10_000, 2, 8.0008),
    ("max_min", 9, 9, 9.0),
    ("max_min", 100, 6, 8.07959595959596),
    ("max_min", 701, 5, 8.011400040758101),
    ("max_min", 1000, 5, 8.007995995995996),
    ("max_min", 2000, 4, 8.003998499249624),
    ("max_min", 10_000, 3, 8.0008),
  ],
)
def test_distances_of_the_published_sizes(largest, subset, count, smallest, mean):
  found = hamming_statistics(largest[subset][:count])
  assert found == (smallest, pytest.approx(mean, abs=1e-9))
  each, more = divmod(count, 9)
  pairs_of_equals = 9 * (more * math.comb(each + 1, 2) + (9 - more) * math.comb(each, 2))
  bound = 9 - pairs_of_equals / math.comb(count, 2)
  if count % 9 == 0:
    assert bound == pytest.approx(8 * count / (count - 1), abs=1e-12)
  assert found[1] <= bound + 1e-12
  # "max_avg" reaches it; "max_min", which looks at the mean only between equals, falls short by less than 1e-3.
  assert found[1] == pytest.approx(bound, abs=1e-9 if subset == "max_avg" else 1e-3)


@pytest.mark.parametrize("count", [100, 701, 2000])
def test_it_lies_farther_apart_than_random_permutations(largest, count):
  rng = np.random.default_rng(0)
  for _ in range(3):
    random = np.stack([rng.permutation(9) for _ in range(count)]).astype(np.uint8)
    smallest, mean = hamming_statistics(random)
    assert hamming_statistics(largest["max_min"][:count])[0] > smallest
    assert hamming_statistics(largest["max_avg"][:count])[1] > mean


@pytest.mark.parametrize("kind", ["random", "far", "twice", "near"])
def test_statistics_are_those_of_all_pairs(kind):
  rng = np.random.default_rng(1)
  rows = {
    "random": [rng.permutation(6) for _ in range(40)],
    "far": [np.roll(np.arange(6), shift) for shift in range(6)],
    "twice": [*(rng.permutation(6) for _ in range(8)), np.arange(6), np.arange(6)],
    "near": [np.arange(6), [0, 1, 3, 2, 4, 5]],
  }[kind]
  rows = np.array(rows, np.uint8)
  distances = [distance(one, other) for one, other in itertools.combinations(rows.tolist(), 2)]
  smallest, mean = hamming_statistics(rows)
  assert smallest == min(distances) and mean == pytest.approx(sum(distances) / len(distances), abs=1e-12)


def test_one_permutation_has_no_distances():
  with pytest.raises(ValueError, match="fewer than two"):
    hamming_statistics(permutation_subset(1))


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ({"num_permutations": 0}, r"jigsaw.num_permutations=0 is not in 1\.\.362880, the orders of 9 patches"),
    ({"num_permutations": -5}, "jigsaw.num_permutations=-5"),
    ({"num_permutations": 362_881}, "jigsaw.num_permutations=362881"),
    ({"num_permutations": 25, "num_patches": 4}, r"1\.\.24, the orders of 4"),
    ({"num_permutations": 5, "num_patches": 16}, "16 patches.*jigsaw.grid <= 3.*jigsaw.num_permutations=0"),
    ({"num_permutations": 1, "num_patches": 0}, "0 patches"),
    ({"num_permutations": 5, "subset": "max"}, "jigsaw.permutation_subset='max' is unknown.*max_avg, max_min"),
  ],
)
def test_what_is_impossible_is_refused(arguments, words, folder):
  with pytest.raises(UserError, match=words) as error:
    permutation_subset(**arguments)
  assert "\n" not in str(error.value) and not folder.exists()


def test_what_was_chosen_is_kept_and_a_longer_file_serves(folder, request):
  longer = permutation_subset(20, num_patches=4)
  assert os.listdir(folder) == ["permutations-4-max_avg-20.npy"]
  others = permutation_subset(20, num_patches=4, subset="max_min")
  permutation_subset.cache_clear()
  request.getfixturevalue("never_chosen")
  for count in (20, 7, 1):
    np.testing.assert_array_equal(permutation_subset(count, num_patches=4), longer[:count])
    np.testing.assert_array_equal(permutation_subset(count, num_patches=4, subset="max_min"), others[:count])
  with pytest.raises(pytest.fail.Exception, match="chosen anew"):
    permutation_subset(21, num_patches=4)
  with pytest.raises(pytest.fail.Exception, match="chosen anew"):
    permutation_subset(5, num_patches=5)


class Bomb:
  """Leaves a file behind when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def altered(change):
  rows = permutation_subset(6, num_patches=3).copy()
  return change(rows)


@pytest.mark.parametrize(
  "damage",
  [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: path.write_bytes(b"PK\x03\x04 no archive either"),
    lambda path: path.write_bytes(path.read_bytes().replace(b"(6, 3)", b"(6, 3")),
    lambda path: path.write_bytes(path.read_bytes().replace(b"(6, 3), }  ", b"(60, 30), }")),
    lambda path: np.save(path, altered(lambda rows: rows.astype(np.int64))),
    lambda path: np.save(path, altered(lambda rows: rows[:5])),
    lambda path: np.save(path, altered(lambda rows: rows.reshape(-1))),
    lambda path: np.save(path, altered(lambda rows: rows[::-1])),
    lambda path: np.save(path, altered(lambda rows: rows[[0, 1, 2, 3, 4, 4]])),
    lambda path: np.save(path, altered(lambda rows: np.concatenate([rows[:5], np.zeros((1, 3), np.uint8)]))),
    lambda path: (path.unlink(), path.symlink_to("nowhere")),
  ],
)
def test_a_damaged_file_is_made_anew(folder, damage):
  expected = permutation_subset(6, num_patches=3)
  path = folder / "permutations-3-max_avg-6.npy"
  whole = path.read_bytes()
  damage(path)
  assert not path.exists() or path.read_bytes() != whole
  permutation_subset.cache_clear()
  np.testing.assert_array_equal(permutation_subset(6, num_patches=3), expected)
  assert path.read_bytes() == whole and os.listdir(folder) == [path.name]


@pytest.mark.parametrize("in_array", [True, False])
def test_nothing_is_unpickled(folder, tmp_path, in_array):
  folder.mkdir()
  path, burst = folder / "permutations-3-max_avg-6.npy", tmp_path / "burst"
  if in_array:
    np.save(path, np.array([Bomb(burst)], object), allow_pickle=True)
  else:
    path.write_bytes(pickle.dumps(Bomb(burst)))
  with open(path, "rb") as file:
    np.load(file, allow_pickle=True)
  assert burst.exists()  # so it is live
  burst.unlink()
  assert len(permutation_subset(6, num_patches=3)) == 6
  assert not burst.exists()


def test_a_damaged_longer_file_does_not_hide_a_whole_one(folder, request):
  shorter = permutation_subset(10, num_patches=4)
  (folder / "permutations-4-max_avg-12.npy").write_bytes(b"")
  (folder / "permutations-4-max_avg-many.npy").write_bytes(b"")
  whole = permutation_subset(24, num_patches=4)
  permutation_subset.cache_clear()
  request.getfixturevalue("never_chosen")
  np.testing.assert_array_equal(permutation_subset(10, num_patches=4), shorter)
  np.testing.assert_array_equal(permutation_subset(11, num_patches=4), whole[:11])


def test_it_works_where_nothing_can_be_kept(monkeypatch, tmp_path):
  expected = permutation_subset(6, num_patches=3)
  (tmp_path / "file").touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  permutation_subset.cache_clear()
  np.testing.assert_array_equal(permutation_subset(6, num_patches=3), expected)

  def homeless():
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setattr(pathlib.Path, "home", homeless)
  permutation_subset.cache_clear()
  np.testing.assert_array_equal(permutation_subset(6, num_patches=3), expected)


def test_a_failed_write_leaves_nothing_behind(monkeypatch, folder):
  def full(*_, **__):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np.lib.format, "write_array", full)
  assert len(permutation_subset(6, num_patches=3)) == 6
  assert os.listdir(folder) == []


@pytest.mark.parametrize("value", [None, "", "relative"])
def test_without_an_absolute_xdg_cache_home_it_is_the_home_folder(monkeypatch, tmp_path, value):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  if value is None:
    monkeypatch.delenv("XDG_CACHE_HOME")
  else:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
  permutation_subset(2, num_patches=3)
  assert os.listdir(tmp_path) == ["home"]
  assert os.listdir(tmp_path / "home/.cache/pirl_jax") == ["permutations-3-max_avg-2.npy"]


def test_several_processes_may_do_it_at_once(folder):
  program = (
    "import hashlib, sys; from pirl_jax.views.permutations import permutation_subset; print('ready', flush=True); "
    "sys.stdin.readline(); print(hashlib.sha256(permutation_subset(300, num_patches=6).tobytes()).hexdigest())"
  )
  root = pathlib.Path(permutations.__file__).parents[2]
  started = [
    subprocess.Popen(
      [sys.executable, "-c", program], cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    for _ in range(4)
  ]
  for process in started:
    assert process.stdout.readline() == "ready\n"
  for process in started:
    process.stdin.write("go\n")
    process.stdin.flush()
  found = {process.communicate()[0].strip() for process in started}
  assert not any(process.returncode for process in started)
  assert found == {hashlib.sha256(permutation_subset(300, num_patches=6).tobytes()).hexdigest()}
  assert os.listdir(folder) == ["permutations-6-max_avg-300.npy"]
