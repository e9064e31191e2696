"""The covariant jigsaw, which predicts the order of the patches: python launch.py --config=configs/jigsaw.py[:VARIANT]

Noroozi and Favaro 2016, as trained by Goyal et al. 2019 and in vissl. On the small sets everything but the objective is
as in configs/pirl.py: it is PIRL's covariant twin.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from pirl_jax.configs import data_sets
from pirl_jax.configs.data_sets import compose


def covariant(config: ConfigDict, *, num_permutations: int = 100) -> None:
  """Sets the objective, and how many orders of the patches there are to tell apart."""
  config.objective = "covariant"
  config.pretext = "jigsaw"
  config.jigsaw.num_permutations = num_permutations


def imagenet(num_permutations: int) -> Callable[[ConfigDict], None]:
  """Returns vissl's jigsaw_8gpu_resnet.yaml: 105 epochs, batch 256.

  There the image's shorter side becomes 256 pixels and 255 x 255 of them are cut at random; here it is the random
  crop of PIRL's jigsaw.
  """
  def apply(config: ConfigDict) -> None:
    data_sets.imagenet(config)
    data_sets.supervised_schedule(config)
    covariant(config, num_permutations=num_permutations)
    config.jigsaw.augment = "crop"
    config.photometric.update(jitter_probability=0.0, group_probability=0.0, grayscale_probability=0.66)
  return apply


VARIANTS = {
  **{name: compose(data_set, covariant) for name, data_set in data_sets.LABELLED.items()},
  "imagenet": imagenet(2_000),  # linear top-1 46.7 in vissl; 45.7 in the paper
  "imagenet_100": imagenet(100),  # 48.6
  "imagenet_10000": imagenet(10_000),  # 48.1
}


def get_config(variant: str = "") -> ConfigDict:
  """Returns the config of a variant; "" is the embedded data set.

  Raises:
    UserError: an unknown variant.
  """
  return data_sets.create_config("jigsaw", variant, VARIANTS)
