"""Fixed subsets of the images: the same on every machine and with every version of the libraries.

The records are sorted by the SHA-256 digest of the text SEED:INDEX, and the first ones are taken. No random generator
is involved, because a later version of a library may change its stream. A smaller subset is part of a larger one.

Letters: N records of a source, n records of a subset.
"""

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from pirl_jax.data.records import Record, Source
from pirl_jax.errors import UserError


class Subset(Source):
  """The records of a source whose indices are in `index`, in the order of `index`."""

  def __init__(self, source: Source, index: Sequence[int] | np.ndarray) -> None:
    self._source, self._index = source, np.asarray(index)
    self.class_names, self.multi_label = source.class_names, source.multi_label
    self.slow_labels, self.decoding = source.slow_labels, source.decoding
    self.fingerprint = f"{source.fingerprint}[{subset_digest(self._index)}]"
    self.description = f"{len(self._index)} of: {source.description}"

  def __len__(self) -> int:
    return len(self._index)

  def __getitem__(self, index: int) -> Record:
    return self._source[int(self._index[index])]

  def image_name(self, index: int) -> str:
    """Returns the name that the image has in the source."""
    return self._source.image_name(int(self._index[index]))

  def listing(self) -> list[str] | None:
    """Returns a line for each record of the subset, see `Source.listing`."""
    lines = self._source.listing()
    return None if lines is None else [lines[index] for index in self._index]

  def sizes(self) -> np.ndarray | None:
    """Returns i64[n], see `Source.sizes`."""
    sizes = self._source.sizes()
    return None if sizes is None else sizes[self._index]

  def holds(self, path: str | os.PathLike[str]) -> bool:
    """Returns whether an image that is written below `path` would be an image of the source."""
    return self._source.holds(path)

  def labels(self) -> np.ndarray | None:
    """Returns i32[n], or None if the source has no labels."""
    labels = self._source.labels()
    return None if labels is None else labels[self._index]

  def targets(self) -> np.ndarray | None:
    """Returns i8[n, C], see `Source.targets`, or None if the source has no labels."""
    targets = self._source.targets()
    return None if targets is None else targets[self._index]


def held_out_of(source: Source, share: float, *, held_out: bool) -> Subset:
  """Returns the images that are held out, or the others. Which ones they are depends on the images' names alone.

  Args:
    source: the images.
    share: in (0, 1), of the images that are held out; of a small set the share is hit roughly.
    held_out: True returns the images that are held out, False the others.

  Raises:
    UserError: there are fewer than two images.
  """
  digests = np.fromiter((int.from_bytes(_digest(source.image_name(index))[:8], "big")
                         for index in range(len(source))), np.uint64, len(source))
  if len(source) < 2:
    raise UserError(f"data.holdout={share} of {len(source)} image(s) is not possible; give more images, or "
                    "--config.data.holdout=0")
  chosen = digests < np.uint64(share * 2**64)
  chosen[digests.argmin()], chosen[digests.argmax()] = True, False  # each part of a small set has an image
  part = Subset(source, np.flatnonzero(chosen == held_out))
  if (lines := part.listing()) is not None:  # an image that comes to the other part changes nothing here
    part.fingerprint = f"{source.fingerprint.partition(':')[0]}:{len(part)}:{_digest(chr(10).join(lines)).hex()[:32]}"
  part.description = f"{len(part)} {'held out' if held_out else 'kept for training'} of: {source.description}"
  return part


def shuffled(records: Sequence[int], *, seed: int) -> list[int]:
  """Returns the records sorted by the digest of SEED:INDEX."""
  return sorted(map(int, records), key=lambda index: _digest(f"{seed}:{index}"))


def draw_subset(labels: np.ndarray, fraction: float, *, seed: int, balanced: bool) -> np.ndarray:
  """Returns the indices of the records of a subset, i64[n], in ascending order.

  Of m labelled records the subset holds `round(fraction * m)`, where a half rounds to even. Classes play no part, so a
  small subset may lack some of them. With `balanced` the rule holds for each class, with m its number of records, and
  every class keeps at least one record.

  Args:
    labels: i32[N], -1 for a record without a label; such a record is in no subset.
    fraction: in (0, 1].
    seed: any integer; another seed gives another subset.
    balanced: True takes the same share of every class.

  Raises:
    UserError: the fraction is out of range, or so small that the subset would be empty.
  """
  if not 0 < fraction <= 1:
    raise UserError(f"a subset of {fraction} of the labels is not possible: the fraction lies in (0, 1]")
  labels = np.asarray(labels)
  labelled = np.flatnonzero(labels >= 0)
  order = np.array(shuffled(labelled.tolist(), seed=seed), np.int64)
  if balanced:
    by_class = [order[labels[order] == label] for label in np.unique(labels[labelled])]
    taken = [members[:max(1, round(fraction * len(members)))] for members in by_class]
    taken = np.concatenate([order[:0], *taken])
  else:
    taken = order[:round(fraction * len(order))]
  if not len(taken):
    least = min(1.0, 1 / max(len(order), 1))
    raise UserError(f"a fraction of {fraction} of {len(order)} labelled images is none; "
                    f"take {least:.2g} or more")
  return np.sort(taken)


def subset_digest(indices: np.ndarray) -> str:
  """Returns 16 hexadecimal digits that identify a subset i64[n]: equal digests mean equal records."""
  return _digest(",".join(map(str, np.asarray(indices).tolist()))).hex()[:16]


def _digest(text: str) -> bytes:
  return hashlib.sha256(text.encode()).digest()
