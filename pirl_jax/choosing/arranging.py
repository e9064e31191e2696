"""Chooses which images of a folder are for training, which are held out, whether they have classes."""

import dataclasses

from ml_collections import ConfigDict

from pirl_jax.choosing.choices import Choice, open_fields, with_values
from pirl_jax.data.arrangement import Arrangement, arrangement_of, arrangement_of_shards
from pirl_jax.weights.opening import model_in

HOLDOUT = 0.1
"""Share of the images that is held out where the folder has no split for it."""


AS_A_SET = Arrangement("train", "", "none", "labels that are stored with the images are read in any case")
"""Of a source that is no folder, or of a folder that is not there yet."""


def arrange(config: ConfigDict) -> tuple[ConfigDict, list[Choice]]:
  """Returns the config with its open fields that say which images are read, and what was chosen.

  Raises:
    UserError: the folder cannot be listed, or `init_from` is a file that cannot be read.
  """
  data, found = config.data, AS_A_SET
  if data.source == "folder" and data.root:
    found = arrangement_of(data.root, data.formats, data.split)
  elif data.source == "webdataset" and data.root:
    found = arrangement_of_shards(data.root)
  if data.holdout:  # a share that is given takes the place of a split that is found
    found = dataclasses.replace(found, test_split="")
  split = found.test_split if config.evaluate.split is None else config.evaluate.split
  named = f"there is {split}" if split else "there are no train and test"
  possible = [
    Choice("data.split", found.split, named if split else "all images" if not found.split else "the usual name"),
    Choice("data.labels", found.labels, found.why),
    Choice("evaluate.split", found.test_split, named),
    Choice("data.holdout", 0.0 if split else HOLDOUT,
           f"{split} is held out" if split else "for kNN or the verdict; the names of the images decide")]
  first = model_in(config.init_from, stem=config.model.stem or "") if config.init_from else {}
  possible += [Choice(f"model.{name}", value, f"as in {config.init_from}") for name, value in first.items()]
  left_open = open_fields(config)
  made = [choice for choice in possible if choice.field in left_open]
  return with_values(config, {choice.field: choice.value for choice in made}), made
