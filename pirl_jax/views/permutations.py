"""Subsets of the orders of the jigsaw's patches, chosen so that the orders differ much from each other.

Noroozi & Favaro 2016, algorithm 1; vissl `extra_scripts/generate_jigsaw_permutations.py`. The distance of two orders is
the Hamming distance: the number of positions with different patches. It is never 1.

Letters: P patches, T permutations out of the P! possible ones.
"""

import contextlib
import functools
import itertools
import math
import os
import pathlib
import re
import tempfile

import numpy as np

from pirl_jax.errors import UserError
from pirl_jax.runtime.caching import cache_folder

SUBSETS = ("max_avg", "max_min")
MAX_PATCHES = 9  # 362,880 orders; ten patches have 3.6 million orders, the sixteen patches of the next grid 2e13


@functools.cache
def permutation_subset(num_permutations: int, *, num_patches: int = 9, subset: str = "max_avg") -> np.ndarray:
  """Returns u8[T, P], read-only: T different permutations of 0..P - 1 with large distances, the same on every machine.

  The first permutation is the identity. Each further one has the largest mean distance ("max_avg") or the largest
  smallest distance ("max_min") to the permutations before it. Of equals, the one with the larger other measure is
  taken, then the first in lexicographic order. So a smaller subset is the start of a larger one.

  The official script starts with a random permutation and takes the first of equals. The start does not matter for the
  distances, because relabelling the patches changes no distance. With the identity as the start, T = 1 is the image in
  its own order.

  10,000 permutations of nine patches take 3 s on one core. The result is stored in the folder pirl_jax of
  XDG_CACHE_HOME (~/.cache), if the folder can be written to.

  Args:
    num_permutations: T.
    num_patches: P.
    subset: "max_avg" or "max_min".

  Raises:
    UserError: T is not in 1..P!, P is not in 1..9, or `subset` is unknown.
  """
  if subset not in SUBSETS:
    raise UserError(f"jigsaw.permutation_subset={subset!r} is unknown; take one of {', '.join(SUBSETS)}")
  if not 1 <= num_patches <= MAX_PATCHES:
    raise UserError(
      f"no subset of the orders of {num_patches} patches can be chosen, only for 1 to {MAX_PATCHES} patches; "
      "take jigsaw.grid <= 3, or all orders with jigsaw.num_permutations=0"
    )
  if not 1 <= num_permutations <= math.factorial(num_patches):
    raise UserError(
      f"jigsaw.num_permutations={num_permutations} is not in 1..{math.factorial(num_patches)}, "
      f"the orders of {num_patches} patches"
    )
  permutations = _read(num_permutations, num_patches, subset)
  if permutations is None:
    permutations = _choose(num_permutations, num_patches, by_mean=subset == "max_avg")
    _write(permutations, subset)
  permutations.flags.writeable = False
  return permutations


def hamming_statistics(permutations: np.ndarray) -> tuple[int, float]:
  """Returns (smallest, mean) Hamming distance over all pairs of `permutations`, both in [0, P].

  Args:
    permutations: u8[T, P] of values below P <= 15.

  Raises:
    ValueError: there are fewer than two permutations.
  """
  count, num_patches = permutations.shape
  if count < 2:
    raise ValueError("the distances of fewer than two permutations are not defined")
  same = sum(math.comb(n, 2) for column in permutations.T for n in np.bincount(column).tolist())
  mean = num_patches - same / math.comb(count, 2)
  # Two permutations agree in m positions if and only if some choice of m columns is equal in both. For each choice, a
  # number is computed from the columns of every permutation, and equal numbers are searched. This takes a few hundred
  # searches at most, instead of T * T comparisons.
  digits = permutations * num_patches ** np.arange(num_patches, dtype=np.int64)
  for distance in range(num_patches):
    for columns in itertools.combinations(range(num_patches), num_patches - distance):
      if len(np.unique(digits[:, columns].sum(axis=1))) < count:
        return distance, mean
  return num_patches, mean


def _choose(count: int, num_patches: int, *, by_mean: bool) -> np.ndarray:
  """Returns u8[count, P], chosen by the rule of `permutation_subset`."""
  # A permutation is split into a head and a tail. In lexicographic order, permutations with the same head are
  # neighbours, and their tails are the orders of the remaining patches. Nine patches have 3,024 heads of 4 patches, and
  # only 126 sets of remaining patches. So 3,024 heads and 126 * 120 tails are compared instead of 362,880 rows of nine,
  # which takes 55 us instead of 170 us for each step.
  permutations = _all_permutations(num_patches)
  tail = min(5, num_patches)
  block = math.factorial(tail)
  heads = permutations[::block, :num_patches - tail].T.copy()  # [P - tail, heads]
  sets, set_of_head = np.unique(permutations[::block, num_patches - tail:], axis=0, return_inverse=True)
  tails = np.moveaxis(sets[:, _all_permutations(tail)], 2, 0).copy()  # [tail, sets, block]

  total = np.zeros(len(permutations), np.int32)  # for each permutation: equal positions, summed over the chosen ones
  most = np.zeros(len(permutations), np.uint8)  # for each permutation: equal positions, maximum over the chosen ones
  first, second = (total, most) if by_mean else (most, total)
  chosen = np.zeros(count, np.int64)
  for step in range(1, count):
    latest = permutations[chosen[step - 1]]
    same = (tails == latest[num_patches - tail:, None, None]).sum(axis=0, dtype=np.uint8)[set_of_head]
    same += (heads == latest[:num_patches - tail, None]).sum(axis=0, dtype=np.uint8)[:, None]
    same = same.reshape(-1)
    total += same
    np.maximum(most, same, out=most)  # for a chosen permutation this is P, more than for any other
    total[chosen[step - 1]] = np.iinfo(np.int32).max // 2
    equals = np.flatnonzero(first == first.min())
    chosen[step] = equals[second[equals].argmin()]
  return permutations[chosen]


def _all_permutations(num_patches: int) -> np.ndarray:
  """Returns all permutations u8[P!, P] in lexicographic order."""
  flat = itertools.chain.from_iterable(itertools.permutations(range(num_patches)))
  return np.fromiter(flat, np.uint8).reshape(-1, num_patches)


def _read(count: int, num_patches: int, subset: str) -> np.ndarray | None:
  """Returns u8[count, P] from the smallest stored file with at least `count` permutations, or None."""
  sizes = []
  with contextlib.suppress(OSError, RuntimeError):
    folder = cache_folder()
    names = [re.fullmatch(rf"permutations-{num_patches}-{subset}-(\d+)\.npy", name) for name in os.listdir(folder)]
    sizes = sorted(int(name[1]) for name in names if name)
  for size in sizes:
    if size >= count:
      # A file may be cut short, unreadable, no array or an array of objects. In every case it can be computed again.
      with contextlib.suppress(Exception), open(folder / _file_name(size, num_patches, subset), "rb") as file:
        permutations = np.lib.format.read_array(file, allow_pickle=False)
        if _is_whole(permutations, size, num_patches):
          return permutations[:count].copy()
  return None


def _is_whole(permutations: np.ndarray, count: int, num_patches: int) -> bool:
  return (
    permutations.dtype == np.uint8
    and permutations.shape == (count, num_patches)
    and (permutations[0] == np.arange(num_patches)).all()
    and (np.sort(permutations, axis=1) == permutations[0]).all()
    and len(np.unique(permutations, axis=0)) == count
  )


def _write(permutations: np.ndarray, subset: str) -> None:
  """Stores the permutations for other runs; if this is not possible, each run computes them again."""
  with contextlib.suppress(OSError, RuntimeError):
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".", dir=folder)  # a name that no other process uses
    try:
      with open(handle, "wb") as file:
        np.lib.format.write_array(file, permutations, allow_pickle=False)
      os.replace(temporary, folder / _file_name(len(permutations), permutations.shape[1], subset))
    finally:
      pathlib.Path(temporary).unlink(missing_ok=True)


def _file_name(count: int, num_patches: int, subset: str) -> str:
  return f"permutations-{num_patches}-{subset}-{count}.npy"
