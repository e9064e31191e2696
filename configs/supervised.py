"""The supervised baseline, which predicts the class: python launch.py --config=configs/supervised.py[:VARIANT]

The trunk is the same as for PIRL. It is trained on all labels of the training images. For the small sets the
augmentation is crops and flips alone.
"""

from ml_collections import ConfigDict

from pirl_jax.configs import data_sets
from pirl_jax.configs.data_sets import compose


def supervised(config: ConfigDict) -> None:
  """Sets the objective and the usual augmentation; a folder's sub-folders are its classes."""
  config.objective = "supervised"
  config.data.labels = "folder"
  config.photometric.update(jitter_probability=0.0, group_probability=0.0, grayscale_probability=0.0)


def imagenet(config: ConfigDict) -> None:
  """vissl supervised_8gpu_resnet.yaml: 105 epochs, batch 256; linear top-1 is 75.5 % in vissl and 75.9 % in the paper.

  The augmentation has colour jitter, too, and SGD has Nesterov's momentum.
  """
  data_sets.imagenet(config)
  data_sets.supervised_schedule(config)
  supervised(config)
  config.photometric.update(jitter_probability=1.0, hue=0.4)
  config.optimizer.nesterov = True


VARIANTS = {
  **{name: compose(data_set, supervised) for name, data_set in data_sets.LABELLED.items()},
  "imagenet": imagenet,
}


def get_config(variant: str = "") -> ConfigDict:
  """Returns the config of a variant; "" is the embedded data set.

  Raises:
    UserError: the variant is unknown.
  """
  return data_sets.create_config("supervised", variant, VARIANTS)
