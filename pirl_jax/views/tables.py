"""Tables of grey levels: how often each level occurs, what each level becomes, and PIL's equalize, which needs both.

Images are those of `operations`: whole levels, [3, H, W] of any dtype.
"""

import jax
import jax.numpy as jnp


def histogram(image: jax.Array) -> jax.Array:
  """Returns i32[3, 256]: how many pixels of each channel of `image` have each level."""
  return jax.lax.platform_dependent(image, cpu=_count_by_scatter, default=_count_by_comparisons)


def _count_by_scatter(image: jax.Array) -> jax.Array:
  return jnp.zeros(3 * 256, jnp.int32).at[_index(image).reshape(-1)].add(1, mode="promise_in_bounds").reshape(3, 256)


def _count_by_comparisons(image: jax.Array) -> jax.Array:
  """Returns the same by a comparison with every level: where a scatter's equal places would wait for each other.

  Four levels are counted at once, in the bytes of one number, as long as a column has less than 256 pixels. On a CPU
  this takes 87 ms for an image of 224 pixels, and the scatter 4 (on a busy machine).
  """
  bits = 8 if image.shape[1] < 256 else 16
  level, fields = image.astype(jnp.uint32), 32 // bits
  word, field = level >> fields // 2, level & fields - 1  # fields // 2 is the logarithm of 4 and of 2
  words = jnp.arange(256 // fields, dtype=jnp.uint32)[None, :, None, None]
  sums = jnp.sum(jnp.where(word[:, None] == words, jnp.uint32(1) << bits * field[:, None], 0), axis=2, dtype=jnp.uint32)
  counts = jnp.stack([sums >> bits * i & (1 << bits) - 1 for i in range(fields)], axis=2)
  return jnp.sum(counts, axis=3, dtype=jnp.int32).reshape(3, 256)  # of [3, words, fields, W]


def lookup(image: jax.Array, table: jax.Array) -> jax.Array:
  """Returns `image` with table[c, level] for each level of channel c. `table` holds whole levels, [3, 256]."""
  return jax.lax.platform_dependent(image, table, tpu=_by_selects, default=_by_gather)


def _by_gather(image: jax.Array, table: jax.Array) -> jax.Array:
  return table.astype(image.dtype).reshape(-1).at[_index(image)].get(mode="promise_in_bounds")


def _index(image: jax.Array) -> jax.Array:
  """Returns i32[3, H, W]: the place of each level in the three tables, one after the other."""
  return image.astype(jnp.int32) + 256 * jnp.arange(3)[:, None, None]


def _by_selects(image: jax.Array, table: jax.Array) -> jax.Array:
  """Returns the same without a gather, which is slow on a TPU: four levels of a table are the bytes of one number."""
  first, second, third, fourth = jnp.moveaxis(table.astype(jnp.uint32).reshape(3, 64, 4), 2, 0)
  words = first | second << 8 | third << 16 | fourth << 24
  level = image.astype(jnp.uint32)
  is_word = (level >> 2)[:, None] == jnp.arange(64, dtype=jnp.uint32)[None, :, None, None]
  word = jnp.sum(jnp.where(is_word, words[:, :, None, None], 0), axis=1, dtype=jnp.uint32)
  return (word >> 8 * (level & 3) & 255).astype(image.dtype)


def equalize(image: jax.Array) -> jax.Array:
  """Returns `image` with levels that are about equally frequent in each channel: PIL's ImageOps.equalize."""
  return lookup(image, equalize_table(histogram(image)))


def equalize_table(counts: jax.Array) -> jax.Array:
  """Returns i32[3, 256], PIL's table of new levels for a histogram i32[3, 256]."""
  before = jnp.cumsum(counts, axis=1) - counts
  rest = jnp.max(jnp.where(counts > 0, before, 0), axis=1, keepdims=True)  # all pixels but those of the highest level
  step = rest // 255
  table = jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255)
  return jnp.where(step > 0, table, jnp.arange(256)[None])


def extent(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (lowest, highest), i32[3, 1] each: the outermost levels that a histogram i32[3, 256] counts."""
  upto = jnp.cumsum(counts, axis=1)
  return (jnp.sum(upto == 0, axis=1, keepdims=True, dtype=jnp.int32),
          jnp.sum(upto < upto[:, -1:], axis=1, keepdims=True, dtype=jnp.int32))
