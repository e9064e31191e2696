"""The untrained network, saved like a run, for evaluation: python launch.py --config=configs/random_init.py[:VARIANT]

The batch statistics are measured on the training images. Without this the features of a deep untrained network would be
pure noise.
"""

from ml_collections import ConfigDict

from pirl_jax.configs import data_sets
from pirl_jax.configs.data_sets import compose


def untrained(config: ConfigDict) -> None:
  """Leaves out the training."""
  config.num_epochs = 0
  config.evaluate.learning = False


VARIANTS = {name: compose(data_set, untrained)
            for name, data_set in {**data_sets.LABELLED, "imagenet": data_sets.imagenet}.items()}


def get_config(variant: str = "") -> ConfigDict:
  """Returns the config of a variant; "" is the embedded data set.

  Raises:
    UserError: the variant is unknown.
  """
  return data_sets.create_config("random_init", variant, VARIANTS)
