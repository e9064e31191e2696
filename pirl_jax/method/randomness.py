"""The random keys of a step. They depend on the seed, the step and the image alone.

Letters: B batch.
"""

import jax


def view_keys(seed: jax.Array | int, step: jax.Array | int, index: jax.Array) -> jax.Array:
  """Returns the keys of the images' views in a step, key[B], from the seed, the step and the images' indices i32[B]."""
  return jax.vmap(jax.random.fold_in, (None, 0))(step_keys(seed, step)["views"], index)


def step_keys(seed: jax.Array | int, step: jax.Array | int) -> dict[str, jax.Array]:
  """Returns the keys of a step, key[] each: "views" for the views, "pretext" and "image" for the terms' negatives.

  Args:
    seed: u32[], of the run.
    step: i32[], number of steps taken so far.
  """
  keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)
  return dict(zip(("views", "pretext", "image"), keys, strict=True))
