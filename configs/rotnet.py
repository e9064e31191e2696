"""RotNet, which predicts by which angle the image is turned: python launch.py --config=configs/rotnet.py[:VARIANT]

Gidaris et al. 2018. On the small sets everything but the objective is as in PIRL (Rotation): it is its covariant twin.
"""

from ml_collections import ConfigDict

from pirl_jax.configs import data_sets
from pirl_jax.configs.data_sets import compose


def covariant(config: ConfigDict) -> None:
  """Sets objective and transform."""
  config.objective = "covariant"
  config.pretext = "rotation"


def imagenet(config: ConfigDict) -> None:
  """vissl rotnet_8gpu_resnet.yaml: 105 epochs, batch 256; linear top-1 48.2 there, 48.9 in the paper.

  There the flip comes after the rotation, which makes 90 degrees of an image look like 270 degrees of its mirror
  image; here before it.
  """
  data_sets.imagenet(config)
  data_sets.supervised_schedule(config)
  covariant(config)
  config.photometric.update(jitter_probability=0.0, group_probability=0.0, grayscale_probability=0.0)


VARIANTS = {
  **{name: compose(data_set, covariant) for name, data_set in data_sets.LABELLED.items()},
  "imagenet": imagenet,
}


def get_config(variant: str = "") -> ConfigDict:
  """Returns the config of a variant; "" is the embedded data set.

  Raises:
    UserError: an unknown variant.
  """
  return data_sets.create_config("rotnet", variant, VARIANTS)
