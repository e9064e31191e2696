"""The run that a newcomer sees first. Slow: python -m pytest -m slow"""

import json

import pytest

from pirl_jax.configs import pirl
from pirl_jax.training import pretrain


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_embedded_run_learns_far_more_than_pixels_and_random_features_know(tmp_path, seed):
  config = pirl.get_config()
  config.seed = seed
  pretrain.run(config, str(tmp_path / "run"))
  table = json.loads((tmp_path / "run" / "results" / "learning.json").read_text())
  assert table["num_test"] >= 1_000
  assert table["trained"] >= table["raw_pixels"] + 0.20
  assert table["trained"] >= table["untrained"] + 0.15
