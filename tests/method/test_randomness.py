"""The keys of a step: which they are, because a run that resumes, and one on other devices, must draw the same."""

import jax
import jax.numpy as jnp
import numpy as np

from pirl_jax.method.randomness import step_keys, view_keys


def test_keys_are_those_of_seed_step_and_image():
  seed, step, index = 7, 3, jnp.int32([5, 0, 5, 11])
  views, pretext, image = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)
  for keys, key in ((step_keys(seed, step)["pretext"], pretext), (step_keys(seed, step)["image"], image),
                    (view_keys(seed, step, index)[1], jax.random.fold_in(views, 0))):
    np.testing.assert_array_equal(jax.random.key_data(keys), jax.random.key_data(key))
  found = jax.random.key_data(view_keys(seed, step, index))
  np.testing.assert_array_equal(found[0], found[2])
  assert len(np.unique(found, axis=0)) == 3
