"""RotNet, which predicts the angle by which the image is turned: python launch.py --config=configs/rotnet.py[:VARIANT]

Gidaris et al. 2018. For the small sets all settings except the objective are those of PIRL (Rotation), so that the
covariant and the invariant objective can be compared.
"""

from ml_collections import ConfigDict

from pirl_jax.configs import data_sets
from pirl_jax.configs.data_sets import compose


def covariant(config: ConfigDict) -> None:
  """Sets the objective and the transform."""
  config.objective = "covariant"
  config.pretext = "rotation"


def imagenet(config: ConfigDict) -> None:
  """vissl rotnet_8gpu_resnet.yaml: 105 epochs, batch 256; linear top-1 is 48.2 % in vissl and 48.9 % in the paper.

  Two details differ. In vissl the flip comes after the rotation, so an image turned by 90 degrees may look like its
  mirror image turned by 270 degrees. Here the flip comes before the rotation. vissl turns the whole image on a canvas
  of the old size, before the crop. So a quarter of a 500 x 375 image that was turned by 90 or 270 degrees is black,
  which tells its angle. Here the crop is turned, which needs no black.
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
    UserError: the variant is unknown.
  """
  return data_sets.create_config("rotnet", variant, VARIANTS)
