"""NPID and NPID++, PIRL's loss without its pretext term: python launch.py --config=configs/npid.py[:VARIANT]

Wu et al. 2018 (arXiv 1805.01978). For the small sets all other settings are those of configs/pirl.py.
"""

from ml_collections import ConfigDict

from pirl_jax.configs import data_sets
from pirl_jax.configs.data_sets import compose


def npid(config: ConfigDict) -> None:
  """Sets lambda to 0: there is no pretext view."""
  config.pretext_weight = 0.0


def cifar10(config: ConfigDict) -> None:
  """lemniscate's cifar.py: softmax over every row of the bank, steps after 120 and 160 of 200 epochs.

  lemniscate reports a kNN accuracy of 80.8 %, at its training's temperature of 0.1. It normalises images by the mean
  and the deviation of CIFAR-10; here they are normalised by those of ImageNet, as everywhere.
  """
  data_sets.cifar10(config)
  npid(config)
  config.num_negatives = 0
  jitter(config)
  config.photometric.update(grayscale_probability=0.2, flip_probability=0.0)
  config.optimizer.update(schedule="steps", milestones=(0.6, 0.8), decay_biases=True, decay_batch_norm=True)
  config.evaluate.temperature = 0.1


def imagenet(config: ConfigDict) -> None:
  """vissl npid_8gpu_resnet.yaml: 200 epochs, batch 256, 4,096 negatives.

  Linear top-1 is 52.7 % in vissl and 54.0 % in the paper.
  """
  data_sets.imagenet(config)
  npid(config)
  config.num_epochs = 200
  config.batch_size = 256
  config.num_negatives = 4_096
  jitter(config)
  config.optimizer.update(schedule="steps", milestones=(0.6, 0.8), decay_biases=True)


def softmax(config: ConfigDict) -> None:
  """Sets the softmax over every row of the bank (lemniscate with nce-k 0)."""
  config.loss = "infonce"
  config.num_negatives = 0


def jitter(config: ConfigDict) -> None:
  """Sets NPID's photometric augmentations: colour jitter and no grey images. (In vissl they come before the crop.)"""
  config.photometric.update(hue=0.4, group_probability=0.0, grayscale_probability=0.0)


VARIANTS = {
  **{name: compose(data_set, npid) for name, data_set in data_sets.LABELLED.items()},
  "cifar10": cifar10,
  "imagenet": imagenet,
  "imagenet_softmax": compose(imagenet, softmax),
  # NPID++: NPID with the paper's settings and augmentations for PIRL, 800 epochs, 32,000 negatives. Linear top-1 is
  # 59.0 % in the paper and 56.7 % in vissl.
  "imagenet_plus": compose(data_sets.imagenet, npid),
  "imagenet_plus_softmax": compose(data_sets.imagenet, npid, softmax),
}


def get_config(variant: str = "") -> ConfigDict:
  """Returns the config of a variant; "" is the embedded data set.

  Raises:
    UserError: the variant is unknown.
  """
  return data_sets.create_config("npid", variant, VARIANTS)
