"""Runs of a study that a program with fewer config fields has trained."""

import json

from pirl_jax.configs import pirl
from pirl_jax.studies.points import older_folder


def test_a_run_that_was_stored_without_a_field_or_a_group_is_found_under_its_old_name(tmp_path):
  config = pirl.get_config()
  config.name, config.seed = "pirl-22222222-3", 3
  stored = json.loads(json.dumps(config.to_dict())) | {"name": "pirl-11111111-3"}
  del stored["bank"], stored["optimizer"]["decay_biases"]
  (tmp_path / "pirl-00000000-3").mkdir()
  (tmp_path / "pirl-00000000-3" / "config.json").write_text("{")
  folder = tmp_path / "pirl-11111111-3"
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(stored))
  assert older_folder(tmp_path, "pirl-*-3", config) == folder
  assert older_folder(tmp_path, "pirl-*-4", config) is None
  config.bank.momentum = 0.7
  assert older_folder(tmp_path, "pirl-*-3", config) is None
