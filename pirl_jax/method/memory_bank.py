"""The memory bank: one unit vector for every image, split by rows over the devices.

Letters: N images, S strata, R rows of a stratum, B batch (of all devices), K negatives, D dimensions of an embedding.

The bank is one array [S * R, D]. Image i is in stratum i % S at position i // S, so its row is (i % S) * R + i // S.
A device holds S / devices whole strata. Every random number depends on the number of the stratum, not on the device.
Therefore a run is the same on any number of devices that divides S. The interleaving has a second purpose: a stratum
does not consist of a single class if the data set is sorted by class. If S does not divide N, the last rows of some
strata are padding, which is never drawn, read or written.

The functions that take `axis` run inside `jax.shard_map` over this mesh axis. They get a device's own rows and the
embeddings of the whole batch. Rows of the bank never leave their device; only sums are sent between devices.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

from pirl_jax.errors import UserError
from pirl_jax.method import products

ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)

MAX_STRATA = 256
"""Largest number of strata; it divides 4,096, 32,000 and 65,536, the usual numbers of negatives."""

CREATED_ROWS = 16_384
"""Number of rows that are drawn at a time when a bank is created: 8 MB with D = 128."""

MAX_SHARE = 0.8
"""Largest share of a device's memory that its part of the bank may take; the network needs memory, too."""


@dataclasses.dataclass(frozen=True)
class Layout:
  """The positions of the images' rows in a bank [S * R, D]. `num_images` is N, `num_strata` is S."""

  num_images: int
  num_strata: int

  @property
  def rows_per_stratum(self) -> int:
    """Returns R, the smallest number with S * R >= N."""
    return -(-self.num_images // self.num_strata)

  @property
  def num_rows(self) -> int:
    """Returns S * R, the number of rows including the padding."""
    return self.num_strata * self.rows_per_stratum

  def row_of(self, index: ArrayT) -> ArrayT:
    """Returns the rows i32[...] in [0, S * R) of images with the indices i32[...] in [0, N), for numpy or JAX."""
    return index % self.num_strata * self.rows_per_stratum + index // self.num_strata


def create_layout(num_images: int, *, num_devices: int, num_negatives: int) -> Layout:
  """Returns the layout of a bank [S * R, D] for N images.

  S is 256, or for a small set the largest power of two up to N / 4. S depends on N alone, so a run can move to another
  number of devices.

  Args:
    num_images: N.
    num_devices: number of devices that share the bank.
    num_negatives: K; 0 for every row, or for a run without a bank.

  Raises:
    UserError: there are more negatives than images, the number of devices does not divide S, or the number of negatives
      is not a multiple of S.
  """
  if num_images < 2:
    raise UserError(f"{num_images} image(s): there is nothing to tell apart; at least 2 are needed")
  num_strata = _num_strata(num_images)
  if num_negatives > num_images:
    raise UserError(f"num_negatives={num_negatives}, but there are only {num_images} images; "
                    f"try --config.num_negatives={_multiple_below(num_images, num_strata)}, or 0 for all of them")
  if num_negatives < 0 or num_negatives % num_strata:
    below = max(num_strata, _multiple_below(num_negatives, num_strata))
    raise UserError(f"num_negatives={num_negatives} is not 0 (all) or a positive multiple of {num_strata}, the number "
                    f"of strata of a bank of {num_images} images; try --config.num_negatives={below}")
  if num_strata % num_devices:
    raise UserError(f"{num_devices} devices do not divide the {num_strata} strata of a bank of {num_images} images; "
                    f"use 1, 2, 4 ... or {num_strata} devices")
  return Layout(num_images, num_strata)


def negatives_within(wanted: int, num_images: int) -> int:
  """Returns the largest number of negatives up to `wanted` that a bank of `num_images` allows, see `create_layout`."""
  return _multiple_below(min(wanted, num_images), _num_strata(num_images))


def _num_strata(num_images: int) -> int:
  return min(MAX_STRATA, 1 << max(0, (num_images // 4).bit_length() - 1))


def check_fits(layout: Layout, *, dim: int, dtype: Any, num_devices: int, device_bytes: int) -> None:
  """Raises UserError if a device's part of the bank [S * R, D] would take more than `MAX_SHARE` of its memory.

  Args:
    layout: of the bank.
    dim: D.
    dtype: type in which the bank is stored.
    num_devices: number of devices that share the bank.
    device_bytes: memory of each device in bytes.
  """
  bank_bytes = layout.num_rows * dim * jnp.dtype(dtype).itemsize
  room = MAX_SHARE * device_bytes
  if bank_bytes / num_devices <= room:
    return
  enough = [2**power for power in range(layout.num_strata.bit_length()) if bank_bytes / 2**power <= room]
  way_out = f"use {enough[0]} such devices" if enough else "use larger devices"
  if jnp.dtype(dtype).itemsize > 2:
    way_out += ", or --config.bank.dtype=bfloat16 for a smaller bank"
  of_all, of_each, there = (size / 2**30 for size in (bank_bytes, bank_bytes / num_devices, device_bytes))
  raise UserError(f"the bank of {layout.num_images:,} images takes {of_all:,.1f} GiB, {of_each:,.1f} GiB on each of "
                  f"{num_devices} device(s), which have {there:,.1f} GiB; {way_out}")


def _multiple_below(number: int, unit: int) -> int:
  return number // unit * unit


def normalise(x: jax.Array) -> jax.Array:
  """Returns x f32[..., D] with unit L2 norm along the last axis; a zero vector stays zero and has a zero gradient."""
  # As in PyTorch's normalize the norm is at least 1e-12. The maximum is taken before the square root, because the slope
  # of the square root at 0 is infinite.
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def create(key: jax.Array, layout: Layout, *, dim: int, dtype: Any = jnp.float32,
           averaged: int = 1) -> tuple[jax.Array, jax.Array]:
  """Returns the bank [S * R, D], rows in the form of `stored`, and `usable` bool[S * R], False on padding.

  Each entry is drawn uniformly from +-1/sqrt(D/3), then each row is normalised (vissl/losses/nce_loss.py, `norm_init`).
  vissl then averages the banks of all processes before the first step (`sync_memory`). With `averaged` a row is the
  mean of that many unit vectors. Its norm is then about 1/sqrt(averaged) until its first update, and Z is smaller.

  The rows are drawn a few at a time, with the same result as all at once. All at once would need several times the
  memory of the bank.
  """
  strata, rows = layout.num_strata, layout.rows_per_stratum
  size = min(rows, max(1, CREATED_ROWS // strata))
  stratum = jnp.arange(strata)[:, None]

  def unit_rows(key: jax.Array, row: jax.Array) -> jax.Array:
    return normalise(_uniform(key, row, dim).astype(jnp.promote_types(dtype, jnp.float32)))

  def fill(number: jax.Array, bank: jax.Array) -> jax.Array:
    first = jnp.minimum(number * size, rows - size)
    row = stratum * rows + first + jnp.arange(size)[None]

    def add(other: jax.Array, total: jax.Array) -> jax.Array:
      return total + unit_rows(jax.random.fold_in(key, other), row)

    block = jax.lax.fori_loop(1, averaged, add, unit_rows(key, row)) / averaged
    return jax.lax.dynamic_update_slice_in_dim(bank, stored(block, dtype), first, axis=1)

  empty = jnp.zeros((strata, rows, dim), stored(jnp.zeros(()), dtype).dtype)
  bank = jax.lax.fori_loop(0, -(-rows // size), fill, empty)
  usable = jnp.arange(rows)[None] < _images_in_stratum(layout, stratum)
  return jnp.reshape(bank, (-1, dim)), jnp.reshape(usable, -1)


def _uniform(key: jax.Array, row: jax.Array, dim: int) -> jax.Array:
  """Returns the initial entries f32[*row, D], in +-1/sqrt(D/3), of the given rows of the bank.

  The entries are those of `jax.random.uniform` for the whole bank: entry i is computed from the hash of i.
  """
  row = row.astype(jnp.uint32)[..., None]
  low = row * dim  # the lower 32 bits of the number of the row's first entry ...
  high = ((row >> 16) * dim + ((row & 0xFFFF) * dim >> 16)) >> 16  # ... and its upper 32 bits
  entry = low + jnp.arange(dim, dtype=jnp.uint32)[(None,) * (row.ndim - 1)]
  high = jnp.broadcast_to(high, entry.shape) + (entry < low)
  first, second = jax.random.key_data(key)
  bits = jnp.bitwise_xor(*threefry2x32_p.bind(
    jnp.broadcast_to(first, entry.shape), jnp.broadcast_to(second, entry.shape), high, entry))
  unit = jax.lax.bitcast_convert_type(bits >> 9 | 0x3F800000, jnp.float32) - 1  # 23 bits, in [0, 1)
  bound = np.float32((dim / 3) ** -0.5)
  return jnp.maximum(-bound, unit * (2 * bound) - bound)


def stored(vectors: jax.Array, dtype: Any) -> jax.Array:
  """Returns vectors f32[..., D] in the form in which a bank of this type stores them, [..., D].

  bfloat16 is stored as its bits, u16[..., D]. The reason: to read or write some rows of a bfloat16 array, XLA's CPU
  backend first converts the whole array to float32.
  """
  vectors = vectors.astype(dtype)
  return jax.lax.bitcast_convert_type(vectors, jnp.uint16) if vectors.dtype == jnp.bfloat16 else vectors


def vectors(rows: jax.Array) -> jax.Array:
  """Returns rows of a bank [..., D], see `stored`, as vectors f32[..., D] to compute with."""
  rows = jax.lax.bitcast_convert_type(rows, jnp.bfloat16) if rows.dtype == jnp.uint16 else rows
  return rows.astype(jnp.promote_types(rows.dtype, jnp.float32))


def _images_in_stratum(layout: Layout, stratum: jax.Array) -> jax.Array:
  return layout.num_images // layout.num_strata + (stratum < layout.num_images % layout.num_strata)


def draw(key: jax.Array, layout: Layout, *, num_negatives: int, axis: str, num_draws: int | None = None) -> jax.Array:
  """Returns this device's part of a draw of K negatives with replacement: local rows i32[K / devices].

  The draw is stratified: K / S uniform draws from the images of each stratum. If S does not divide N, some strata have
  one image fewer, and their images are drawn slightly more often: 0.02 % for ImageNet. The whole batch shares the draw,
  because a draw for every image gathers B x K x D numbers, at 16 to 31 times the cost.

  Args:
    key: of the draw.
    layout: of the bank.
    num_negatives: K, at least 1.
    axis: the mesh axis that splits the bank.
    num_draws: B for one independent draw per image, then the result is i32[B, K / devices]; None for a shared draw.
  """
  num_local = layout.num_strata // jax.lax.axis_size(axis)
  local = jnp.arange(num_local)
  stratum = jax.lax.axis_index(axis) * num_local + local

  def draw_positions(stratum: jax.Array) -> jax.Array:
    stratum_key = jax.random.fold_in(key, stratum)
    shape = (num_draws or 1, num_negatives // layout.num_strata)
    return jax.random.randint(stratum_key, shape, 0, _images_in_stratum(layout, stratum))

  positions = jax.vmap(draw_positions, out_axes=1)(stratum)  # [draws, S / devices, K / S]
  draws = jnp.reshape(local[None, :, None] * layout.rows_per_stratum + positions, (positions.shape[0], -1))
  return draws if num_draws else draws[0]


def local_rows(bank: jax.Array, rows: jax.Array, *, axis: str) -> tuple[jax.Array, jax.Array]:
  """Returns (local i32[...], mine bool[...]): the numbers of global rows on this device, and which of them it holds.

  Args:
    bank: [rows of this device, ...], the bank or `usable`.
    rows: i32[...], global rows.
    axis: the mesh axis that splits the bank.
  """
  local = rows - jax.lax.axis_index(axis) * bank.shape[0]
  return local, (local >= 0) & (local < bank.shape[0])


def read(bank: jax.Array, rows: jax.Array, *negatives: jax.Array, axis: str) -> tuple[jax.Array, ...]:
  """Returns the vectors at `rows`, f32[B, D], and the vectors of each draw of negatives, f32[..., K / devices, D].

  Everything is read with a single gather, on which the update depends. With two or more gathers, XLA cannot prove that
  all reads precede the update and copies the whole bank; `optimization_barrier` does not help.

  Args:
    bank: [rows of this device, D], see `stored`.
    rows: i32[B], global rows; their vectors are the same on every device.
    negatives: draws i32[K / devices] or i32[B, K / devices] of this device's local rows.
    axis: the mesh axis that splits the bank.
  """
  local, mine = local_rows(bank, rows, axis=axis)
  wanted = [jnp.where(mine, local, 0), *(draw.reshape(-1) for draw in negatives)]
  ends = list(itertools.accumulate(len(part) for part in wanted))
  own, *others = jnp.split(vectors(bank[jnp.concatenate(wanted)]), ends[:-1])
  others = (part.reshape(*draw.shape, -1) for part, draw in zip(others, negatives, strict=True))
  return jax.lax.psum(jnp.where(mine[:, None], own, 0), axis), *others


def weights(usable: jax.Array, rows: jax.Array, negatives: jax.Array, *, with_own: bool = False,
            axis: str) -> jax.Array:
  """Returns f32[B, K / devices]: 0 if a negative is the image itself or an image that was found broken, else 1.

  Args:
    usable: bool[rows of this device].
    rows: i32[B], the images' own rows.
    negatives: i32[K / devices] or i32[B, K / devices], local rows.
    with_own: True if the image itself counts, too.
    axis: the mesh axis that splits the bank.
  """
  local, _ = local_rows(usable, rows, axis=axis)
  negatives = negatives if negatives.ndim == 2 else negatives[None]
  return ((with_own | (negatives != local[:, None])) & usable[negatives]).astype(jnp.float32)


def positive_scores(own: jax.Array, embeddings: jax.Array, *, temperature: float) -> jax.Array:
  """Returns the scores f32[B] of embeddings f32[B, D] with the images' own rows f32[B, D], all unit vectors."""
  return jnp.sum(own * embeddings, axis=1) / temperature


def negative_scores(others: jax.Array, embeddings: jax.Array, *, temperature: float,
                    product: Callable = products.exact) -> jax.Array:
  """Returns the scores of the batch with the negatives, f32[B, K / devices].

  Args:
    others: f32[K / devices, D] or f32[B, K / devices, D], unit rows of the negatives.
    embeddings: f32[B, D], unit vectors.
    temperature: tau.
    product: of embeddings and rows that are the same for all images, see `products`.
  """
  if others.ndim == 3:
    return jnp.einsum("bd,bkd->bk", embeddings, others, precision=jax.lax.Precision.HIGHEST) / temperature
  return product(embeddings, others) / temperature


def moved_row(own: jax.Array, *, embeddings: jax.Array, momentum: float) -> jax.Array:
  """Returns normalise(momentum * row + (1 - momentum) * embedding), f32[..., D], of rows and embeddings f32[..., D]."""
  return normalise(momentum * own + (1 - momentum) * embeddings)


@jax.named_scope("bank")
def update(bank: jax.Array, rows: jax.Array, own: jax.Array, embeddings: jax.Array, valid: jax.Array, *,
           momentum: float, axis: str) -> jax.Array:
  """Returns this device's part of the bank after these rows have moved, see `moved_row`.

  `momentum` is the weight of the old row (paper, section 2.2; vissl/losses/nce_loss.py, `update_memory`). No other row
  changes.

  Args:
    bank: [rows of this device, D], see `stored`.
    rows: i32[B], global rows, all different.
    own: f32[B, D], the old vectors of these rows.
    embeddings: f32[B, D], unit vectors f(v_I) of the whole batch.
    valid: bool[B]; the rows of broken images (False) do not change.
    momentum: in [0, 1].
    axis: the mesh axis that splits the bank.
  """
  local, mine = local_rows(bank, rows, axis=axis)
  new = moved_row(own, embeddings=embeddings, momentum=momentum)
  dtype = jnp.bfloat16 if bank.dtype == jnp.uint16 else bank.dtype
  return bank.at[_own_or_dropped(bank, local, mine & valid)].set(stored(new, dtype), mode="drop")


def retire(usable: jax.Array, rows: jax.Array, valid: jax.Array, *, axis: str) -> tuple[jax.Array, jax.Array]:
  """Returns (new `usable` bool[rows of this device], counts bool[B]): broken images are marked and no longer count.

  `counts` is the same on every device. It is False for an image that could not be read in this step or in an earlier
  one. Without this memory an image that can be read only sometimes would make a run depend on when it was interrupted.

  Args:
    usable: bool[rows of this device].
    rows: i32[B], global rows.
    valid: bool[B], which images could be read in this step.
    axis: the mesh axis that splits the bank.
  """
  local, mine = local_rows(usable, rows, axis=axis)
  usable = usable.at[_own_or_dropped(usable, local, mine & ~valid)].set(False, mode="drop")
  counts = jax.lax.psum((mine & usable[jnp.where(mine, local, 0)]).astype(jnp.int32), axis)
  return usable, counts > 0


def stamp(written: jax.Array, rows: jax.Array, valid: jax.Array, step: jax.Array, *, axis: str) -> jax.Array:
  """Returns this device's part of `written` i32[...], with the number of this step, i32[], at the rows it writes.

  Args:
    written: i32[rows of this device].
    rows: i32[B], global rows.
    valid: bool[B]; the rows of broken images (False) are not written.
    step: i32[].
    axis: the mesh axis that splits the bank.
  """
  local, mine = local_rows(written, rows, axis=axis)
  return written.at[_own_or_dropped(written, local, mine & valid)].set(step, mode="drop")


def _own_or_dropped(array: jax.Array, local: jax.Array, chosen: jax.Array) -> jax.Array:
  # Rows that are not chosen get a number past the end, which `mode="drop"` ignores; a negative number would wrap.
  return jnp.where(chosen, local, array.shape[0])
