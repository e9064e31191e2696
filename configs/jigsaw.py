"""The covariant jigsaw, which predicts the order of the patches: python launch.py --config=configs/jigsaw.py[:VARIANT]

Noroozi and Favaro 2016, as trained by Goyal et al. 2019 and in vissl. For the small sets all settings except the
objective are those of configs/pirl.py, so that the covariant and the invariant objective can be compared.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from pirl_jax.configs import data_sets
from pirl_jax.configs.data_sets import compose


def covariant(config: ConfigDict, *, num_permutations: int = 100) -> None:
  """Sets the objective, and the number of orders of the patches from which the network has to predict."""
  config.objective = "covariant"
  config.pretext = "jigsaw"
  config.jigsaw.num_permutations = num_permutations


def imagenet(num_permutations: int) -> Callable[[ConfigDict], None]:
  """Returns a function of a config that sets vissl's jigsaw_8gpu_resnet.yaml: 105 epochs, batch 256.

  The crop differs: vissl resizes the image's shorter side to 256 pixels and cuts out 255 x 255 pixels at random; here
  the crop is the random crop of PIRL's jigsaw. Of vissl's systems this one alone has a warm-up.
  """
  def apply(config: ConfigDict) -> None:
    data_sets.imagenet(config)
    data_sets.supervised_schedule(config)
    config.optimizer.update(warmup_epochs=5, warmup_factor=0.25)
    covariant(config, num_permutations=num_permutations)
    config.jigsaw.augment = "crop"
    config.photometric.update(jitter_probability=0.0, group_probability=0.0, grayscale_probability=0.66)
  apply.__doc__ = f"vissl's jigsaw_8gpu_resnet.yaml with {num_permutations:,} permutations: 105 epochs, batch 256."
  return apply


VARIANTS = {
  **{name: compose(data_set, covariant) for name, data_set in data_sets.LABELLED.items()},
  "imagenet": imagenet(2_000),  # linear top-1: 46.7 % in vissl, 45.7 % in the paper
  "imagenet_100": imagenet(100),  # 48.6 % in vissl
  "imagenet_10000": imagenet(10_000),  # 48.1 % in vissl
}


def get_config(variant: str = "") -> ConfigDict:
  """Returns the config of a variant; "" is the embedded data set.

  Raises:
    UserError: the variant is unknown.
  """
  return data_sets.create_config("jigsaw", variant, VARIANTS)
