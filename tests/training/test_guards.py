"""What a run makes of numbers that are not finite, and of a collapse."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from pirl_jax.errors import UserError
from pirl_jax.training.guards import Guard


def guard(folder, said):
  return Guard(folder, image_name=lambda index: f"image {index}", say=said.append)


def test_the_first_bad_step_is_named_with_its_images(tmp_path):
  watch = guard(tmp_path, [])
  watch.note(1, np.array([5, 6]), jnp.zeros(5, bool))
  watch.check()
  watch.note(2, np.array([7, 8]), jnp.zeros(5, bool))
  watch.note(3, np.array([1, 2]), jnp.array([False, True, True, False, False]))
  watch.note(4, np.array([3, 4]), jnp.ones(5, bool))
  with pytest.raises(UserError, match="in step 3, the gradients held .* not finite, then the parameters; .*") as error:
    watch.check()
  assert "\n" not in str(error.value)
  assert json.loads((tmp_path / "not_finite.json").read_text()) == {
    "step": 3, "not_finite": ["the gradients", "the parameters"],
    "images": [{"index": 1, "name": "image 1"}, {"index": 2, "name": "image 2"}]}
  watch.check()  # each is looked at once


def test_collapse_is_warned_of_once():
  said = []
  watch = guard(None, said)
  for step, spread in ((1, 0.9), (2, 0.04), (3, 0.01)):
    watch.warn_of_collapse(step, {"embedding_spread": spread})
  watch.warn_of_collapse(4, {"loss": 1.0})  # a system without embeddings
  assert len(said) == 1 and said[0].startswith("WARNING: step 2: all embeddings")
