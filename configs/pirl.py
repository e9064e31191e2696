"""PIRL pre-training: python launch.py --config=configs/pirl.py[:VARIANT] [--workdir=DIR] [--config.FIELD=VALUE ...]

Without a variant it needs neither a download nor a GPU: the program draws the images itself, and the training takes 2
minutes on two CPU cores. With every variant, --config.pretext=rotation or rotation_jigsaw chooses another transform.
"""

import dataclasses
from collections.abc import Callable

from ml_collections import ConfigDict

from pirl_jax.configs import data_sets
from pirl_jax.configs.data_sets import compose, imagenet
from pirl_jax.views.recipe import GBLUR


def epochs(number: int) -> Callable[[ConfigDict], None]:
  """Returns a function of a config that sets the number of epochs."""
  def apply(config: ConfigDict) -> None:
    config.num_epochs = number
  apply.__doc__ = f"{number} epochs."
  return apply


def official(config: ConfigDict) -> None:
  """The authors' own run (vissl pirl_jigsaw_4node_resnet50.yaml on 32 GPUs) as far as it can be; slow.

  Each image has its own draw of negatives, which may hold the image's own row. Initial rows of the bank are means of 32
  unit vectors. An epoch ends with a partial batch. docs/systems.md compares this run with `imagenet`.
  """
  imagenet(config)
  config.negative_sampling = "per_image"
  config.own_row_is_negative = True
  config.bank.averaged = 32
  config.partial_batch = True


def analysis(config: ConfigDict) -> None:
  """The paper's section 4: 400 epochs, 4,096 negatives.

  The paper's linear top-1 is 62.2 % (jigsaw), 60.2 % (rotation) and 63.1 % (both).
  """
  imagenet(config)
  config.num_epochs = 400
  config.num_negatives = 4_096


def rotation(config: ConfigDict) -> None:
  """Sets the transform of PIRL (Rotation)."""
  config.pretext = "rotation"


def rotation_jigsaw(config: ConfigDict) -> None:
  """Sets the transform of PIRL (Rotation + Jigsaw)."""
  config.pretext = "rotation_jigsaw"


def mlp(config: ConfigDict) -> None:
  """MLP heads, softmax loss at temperature 0.1: vissl configs/config/pretrain/pirl/models/resnet50_mlphead.yaml."""
  config.model.head = "mlp"
  config.loss = "infonce"
  config.temperature = 0.1


def gblur(config: ConfigDict) -> None:
  """MLP heads with strong colour and blur: vissl configs/config/pretrain/pirl/transforms/photo_gblur.yaml."""
  mlp(config)
  config.photometric.update(dataclasses.asdict(GBLUR))


def wide(width: int) -> Callable[[ConfigDict], None]:
  """Returns a function of a config that sets a wider ResNet-50, as vissl's w2 and w4.

  It sets 400 epochs and bfloat16 in the trunk.
  """
  def apply(config: ConfigDict) -> None:
    imagenet(config)
    config.num_epochs = 400
    config.model.width = width
    config.model.dtype = "bfloat16"
  apply.__doc__ = f"ResNet-50 with {width} times as many channels, 400 epochs, bfloat16."
  return apply


def resnet101(config: ConfigDict) -> None:
  """Sets a deeper trunk, ResNet-101."""
  config.model.arch = "resnet101"


def pycontrast(config: ConfigDict) -> None:
  """PIRL of HobbitLong/PyContrast: 200 epochs, 65,536 negatives, softmax; linear top-1 is 61.7 % in its README.

  PyContrast cuts the patches from a crop that is flipped as a whole, without colour augmentation. Two details differ
  here. PyContrast draws one set of negatives for both terms; here each term has its own. PyContrast lets a patch start
  one pixel further in its cell; here the last pixel is not used, as in vissl.
  """
  imagenet(config)
  config.num_epochs = 200
  config.batch_size = 256
  config.num_negatives = 65_536
  config.loss = "infonce"
  config.jigsaw.augment = "crop"
  config.photometric.update(hue=0.4, group_probability=0.0)
  config.pretext_photometric.update(jitter_probability=0.0, grayscale_probability=0.0)
  config.optimizer.update(schedule="steps", milestones=(0.6, 0.8), decay_biases=True, decay_batch_norm=True)


def infomin(config: ConfigDict) -> None:
  """InfoMin of HobbitLong/PyContrast: rows of a momentum encoder, RandAugment; linear top-1 is 70.1 in its README.

  It is 67.4 after 100 epochs and 73.0 after 800. Differences beside those of `imagenet_pycontrast`: images are turned
  and sheared with bilinear interpolation, in PyContrast half of them bicubic; the head of the patches has a ReLU before
  its last layer, as in vissl; the second crops are put into other groups of batch norm in a fixed way, in PyContrast at
  random.
  """
  pycontrast(config)
  mlp(config)
  infomin_rows(config, encoder_momentum=0.999, queue=65_536)
  config.temperature = 0.15
  config.data.image_scale = (0.2, 1.0)
  config.photometric.update(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_probability=0.8,
                            blur_probability=0.5, randaugment_operations=2)
  config.pretext_photometric.update(blur_probability=0.0, randaugment_operations=0)
  config.optimizer.schedule = "cosine"


def infomin_small(config: ConfigDict) -> None:
  """InfoMin's rows and views for small images: a queue of 4,096 rows, a faster encoder, no blur. Not measured."""
  infomin_rows(config, encoder_momentum=0.99, queue=4_096)
  config.model.head = "mlp"
  config.temperature = 0.15
  config.jigsaw.augment = "crop"
  config.photometric.update(hue=0.1, jitter_probability=0.8, group_probability=0.0, randaugment_operations=2)
  config.pretext_photometric.update(jitter_probability=0.0, grayscale_probability=0.0, randaugment_operations=0)


def infomin_rows(config: ConfigDict, *, encoder_momentum: float, queue: int) -> None:
  """Sets what the rows of the bank are: what a momentum encoder makes of a second crop, and the last `queue` of them.

  A row that is an epoch older than the image's own row, which has just moved, can be told from it by its age alone.
  """
  config.num_negatives = 0
  config.bank.update(momentum=0.0, encoder_momentum=encoder_momentum, max_age=queue // config.batch_size)


def yfcc_1m(config: ConfigDict) -> None:
  """The paper's section 3.4: a million random images from a folder of YFCC-100M, --config.data.root=DIR; no labels.

  The other settings are those for ImageNet. The paper's linear top-1 on ImageNet is 57.8 %.
  """
  config.data.source = "folder"
  config.data.split = ""
  config.data.num_images = 1_000_000
  config.model.batch_norm = "groups"
  config.evaluate.every_epochs = 0


VARIANTS = {
  **data_sets.LABELLED,
  "stl10": data_sets.stl10,
  "cifar10_infomin": compose(data_sets.cifar10, infomin_small),
  # All numbers in these comments are linear top-1 in %, as published.
  # The paper's main run, on 32 V100 GPUs: 63.6 (64.3 in vissl; 62.9 after 200 epochs).
  "imagenet": imagenet,
  "imagenet_official": official,
  "imagenet_400ep": analysis,
  "imagenet_200ep": compose(imagenet, epochs(200)),
  "imagenet_rotation": compose(analysis, rotation),
  "imagenet_rotation_jigsaw": compose(analysis, rotation_jigsaw),
  "imagenet_mlp": compose(imagenet, mlp),
  # The best ResNet-50 of the official release: 69.9 (65.8 after 200 epochs).
  "imagenet_gblur": compose(imagenet, gblur),
  "imagenet_gblur_200ep": compose(imagenet, gblur, epochs(200)),
  "imagenet_w2": wide(2),  # 69.3
  "imagenet_w2_gblur": compose(wide(2), gblur),  # 70.9
  "imagenet_w4": wide(4),
  "imagenet_w4_gblur": compose(wide(4), gblur),
  "imagenet_r101": compose(imagenet, resnet101),
  "imagenet_pycontrast": pycontrast,
  "imagenet_infomin": infomin,
  "yfcc_1m": yfcc_1m,
}


def get_config(variant: str = "") -> ConfigDict:
  """Returns the config of a variant; "" is the embedded data set.

  Raises:
    UserError: the variant is unknown.
  """
  return data_sets.create_config("pirl", variant, VARIANTS)
