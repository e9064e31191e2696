"""The jigsaw: a square crop is cut into cells, each cell gives one patch, the patches come in random order.

Paper appendix A.1; vissl `vissl/data/ssl_transforms/img_pil_to_patches_and_image.py` and `img_patches_tensor.py`.
Letters: S side of the crop, P = grid * grid patches, h w their sides, G side of a cell (S // grid), T orders.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pirl_jax.errors import UserError
from pirl_jax.models.heads import PatchesClassHead, PatchesHead
from pirl_jax.views.permutations import permutation_subset
from pirl_jax.views.photometric import ranks
from pirl_jax.views.pretext import Pretext


@dataclasses.dataclass(frozen=True)
class Jigsaw(Pretext):
  """The patches in random order; the label is the number of the order, where the orders are numbered.

  Attributes:
    crop_size: S, in pixels.
    crop_scale: range of the share of the image's area that the crop covers.
    grid: cells a side.
    patch_size: h = w, in pixels.
    augment: "patches": the photometric list and the flip are drawn for each patch; "crop": for the crop as a whole,
      before it is cut.
    num_permutations: T of the P! orders, see `permutation_subset`; 0: a fresh one of all, without a label.
    permutation_subset: how they are chosen, "max_avg" or "max_min".

  Raises:
    UserError: there is no room for the patches, no such set of orders, or an unknown way to augment.
  """

  crop_size: int
  crop_scale: tuple[float, float]
  grid: int
  patch_size: int
  augment: str = "patches"
  num_permutations: int = 0
  permutation_subset: str = "max_avg"
  head: ClassVar = PatchesHead
  covariant_head: ClassVar = PatchesClassHead
  settings: ClassVar = "jigsaw"

  def __post_init__(self) -> None:
    check_jigsaw(self.crop_size, grid=self.grid, patch_size=self.patch_size)
    if self.augment not in ("patches", "crop"):
      raise UserError(f"jigsaw.augment={self.augment!r} is unknown; choose from patches, crop")
    self._orders()

  def _orders(self) -> np.ndarray | None:
    """Returns the numbered orders, u8[T, P], or None for all of them."""
    if not self.num_permutations:
      return None
    return permutation_subset(self.num_permutations, num_patches=self.grid**2, subset=self.permutation_subset)

  @property
  def view_shape(self) -> tuple[int, int, int, int]:
    """Returns (P, h, w, 3)."""
    return self.grid**2, self.patch_size, self.patch_size, 3

  @property
  def num_labels(self) -> int:
    """Returns T, or 0 for all orders: 9! labels would need a layer of billions of weights."""
    return self.num_permutations

  def __call__(self, key: jax.Array, crop: jax.Array, augment: Callable[[jax.Array], jax.Array]) -> tuple[
      jax.Array, jax.Array]:
    """Returns (patches f32[P, h, w, 3], label i32[]), see `Pretext`."""
    offsets, permutation, label = draw_jigsaw(key, size=self.crop_size, grid=self.grid, patch_size=self.patch_size,
                                              orders=self._orders())
    cut = {"grid": self.grid, "patch_size": self.patch_size}
    if self.augment == "crop":
      return cut_patches(augment(crop[None])[0], offsets, permutation, **cut), label
    return augment(cut_patches(crop, offsets, permutation, **cut)), label


def draw_jigsaw(key: jax.Array, *, size: int, grid: int, patch_size: int,
                orders: jax.Array | np.ndarray | None = None) -> tuple[
    jax.Array, jax.Array, jax.Array]:
  """Returns (offsets i32[P, 2], permutation i32[P], label i32[]) for a crop of `size` pixels.

  `offsets` (y, x) are uniform in 0..G - patch_size - 1: 0..20 for cells of 85 and patches of 64. That the last place
  is never used is the official rule (an exclusive upper bound). `permutation` is uniform over `orders` u8[T, P], and
  `label` its number there; without them it is uniform over all P!, and the label is -1.
  """
  num_patches = grid * grid
  room = max(size // grid - patch_size, 1)
  draws = jax.random.uniform(key, (3, num_patches))
  offsets = jnp.floor(room * draws[:2].T).astype(jnp.int32)
  if orders is None:
    return offsets, ranks(draws[2]), jnp.int32(-1)
  label = jnp.floor(len(orders) * draws[2, 0]).astype(jnp.int32)
  return offsets, jnp.asarray(orders, jnp.int32)[label], label


def cut_patches(
  crop: jax.Array, offsets: jax.Array, permutation: jax.Array, *, grid: int, patch_size: int
) -> jax.Array:
  """Returns [P, h, w, 3]: patch j shows cell `permutation[j]` (rows first) of `crop` from `offsets[j]` (y, x) in it on.

  Pixels right of and below grid * G belong to no cell.
  """
  cell = crop.shape[0] // grid
  sizes = {"grid": grid, "cell": cell, "patch_size": patch_size}
  return jax.lax.platform_dependent(crop, offsets, permutation, tpu=partial(_cut_by_products, **sizes),
                                    default=partial(_cut_by_slices, **sizes))


def _cut_by_slices(crop: jax.Array, offsets: jax.Array, permutation: jax.Array, *, grid: int, cell: int,
                   patch_size: int) -> jax.Array:
  """Returns the patches, see `cut_patches`: under vmap a single gather of slices that cuts and shuffles at once.

  64 crops of 255 pixels on two cores take 1.8 ms. Selects over shifted copies took 16 ms there, and products with
  one-hot matrices 3 to 6 times the gather at 32 pixels. On an H100 the gather is one kernel.
  """
  corners = jnp.stack([permutation // grid, permutation % grid], axis=1) * cell + offsets

  def cut(corner: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice(crop, (*corner, jnp.zeros_like(corner[0])), (patch_size, patch_size, crop.shape[2]))

  return jax.vmap(cut)(corners)


def _cut_by_products(crop: jax.Array, offsets: jax.Array, permutation: jax.Array, *, grid: int, cell: int,
                     patch_size: int) -> jax.Array:
  """Returns the patches, see `cut_patches`: products with one-hot matrices take the cells, then rows, then columns.

  For a TPU, which makes the gather of slices a loop over the patches that copies the whole batch of crops in each turn:
  239 ms of a v5e for 128 crops of 255 pixels, by the compiler's estimate, where the products take 2. The products are
  exact: bfloat16 holds every byte, and a sum has one term that is not zero.
  """
  dtype, exact = crop.dtype, partial(jnp.einsum, preferred_element_type=jnp.bfloat16)
  levels = crop if dtype == jnp.uint8 else _bytes_of(crop)
  side, channels = grid * cell, levels.shape[2]
  cells = levels[:side, :side].astype(jnp.bfloat16).reshape(grid, cell, grid, cell, channels)
  rows, columns = jax.nn.one_hot(
    offsets.T[:, :, None] + jnp.arange(patch_size)[None, None], cell, dtype=jnp.bfloat16)  # [P, h, G], [P, w, G]
  order = jax.nn.one_hot(permutation, grid * grid, dtype=jnp.bfloat16).reshape(-1, grid, grid)
  out = exact("pij,iyjxc->pyxc", order, cells)
  out = exact("phy,pyxc->phxc", rows, out)
  out = exact("pwx,phxc->phwc", columns, out).astype(jnp.uint8)
  return out if dtype == jnp.uint8 else jax.lax.bitcast_convert_type(
    out.reshape(*out.shape[:3], crop.shape[2], dtype.itemsize), dtype)


def _bytes_of(image: jax.Array) -> jax.Array:
  """Returns the bytes of a floating image f[H, W, C] as channels, u8[H, W, C * bytes of a number]."""
  return jax.lax.bitcast_convert_type(image, jnp.uint8).reshape(*image.shape[:2], -1)


def check_jigsaw(size: int, *, grid: int, patch_size: int) -> None:
  """Raises `UserError` when a crop of `size` pixels has no `grid` x `grid` cells with room for `patch_size` pixels."""
  if grid < 1 or patch_size < 1:
    raise UserError(f"jigsaw.grid={grid} and jigsaw.patch_size={patch_size} must be at least 1")
  cell = size // grid
  if patch_size > cell:
    raise UserError(
      f"jigsaw.patch_size={patch_size} is larger than a cell: {size} pixels // grid={grid} = {cell}; "
      f"take patch_size <= {cell} or a jigsaw.crop_size of at least {patch_size * grid} pixels"
    )
