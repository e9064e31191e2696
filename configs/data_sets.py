"""The data sets, each with suitable views, network and training. Every system's config starts from one of these."""

from collections.abc import Callable, Iterable, Mapping

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from pirl_jax.configs.base import get_base
from pirl_jax.errors import UserError


def embedded(config: ConfigDict) -> None:
  """4,096 drawn textures, ResNet-8. In 2 minutes on two CPU cores the features' kNN rises from about 20 to 50 %."""
  small_network(config)
  config.num_epochs = 25
  config.data.source = "embedded"
  config.data.num_images = 4_096
  config.data.num_threads = 1
  # Without the photometric augmentations no structure is learnt: kNN 22 % instead of 54 % after 20 epochs, and 25 % at
  # twice the learning rate. The presumed reason: near-grey textures can then be distinguished by their brightness.
  config.optimizer.warmup_epochs = 1
  config.evaluate.split = "test"
  config.evaluate.num_images = 1_024
  config.evaluate.every_epochs = 5
  config.checkpoint.every_steps = 500
  config.log.every_steps = 16
  config.report = True
  config.export = True


def cifar10(config: ConfigDict) -> None:
  """CIFAR-10 by TFDS, ResNet-18 with a 3x3 stem. One GPU.

  NPID's settings for CIFAR-10 (lemniscate cifar.py: batch 128, learning rate 0.03, weight decay 5e-4, temperature 0.1,
  crops from a fifth of the area, softmax), with PIRL's cosine schedule instead of two steps, and PIRL's second view.
  This config has not been measured.
  """
  # The jigsaw uses a crop of 48 pixels. Cells of 16 and patches of 12 pixels keep the paper's ratio of 64 to 85. A
  # patch of 12 pixels gives the stride-8 trunk more than one point; a patch of 8 pixels, cut from 32, would not.
  small_images(config, image_size=32, cell=16, patch_size=12)
  resnet18(config)
  config.num_epochs = 200
  config.num_negatives = 4_096  # NPID's best on CIFAR-10 (its table 1)
  config.temperature = 0.1
  config.data.name = "cifar10"
  config.data.image_scale = (0.2, 1.0)
  config.evaluate.split = "test"


def stl10(config: ConfigDict) -> None:
  """STL-10 by TFDS, 100,000 unlabelled images of 96 pixels, ResNet-18 with a 3x3 stem. One GPU.

  The jigsaw has the cells of pirl_pytorch (32 pixels) and the paper's ratio of patch to cell. The 6,400 negatives and
  100 epochs are those of pirl_pytorch. This split has no labels, so there is no kNN; the health figures show whether
  the network learns. This config has not been measured.
  """
  small_images(config, image_size=96, cell=32, patch_size=24)
  resnet18(config)
  config.num_epochs = 100
  config.num_negatives = 6_400
  config.data.name = "stl10"
  config.data.split = "unlabelled"
  config.data.image_scale = (0.2, 1.0)


def folder(config: ConfigDict) -> None:
  """Any folder of images: --config.data.root=DIR. A laptop, a GPU or several; 50 images or ten million.

  The program chooses the fields of `CHOSEN` from the images and the devices when the run starts, and prints why. Each
  of them can be given.
  """
  own_images(config)
  leave_open(config, CHOSEN)


def folder_small(config: ConfigDict) -> None:
  """What `folder` chooses for 50,000 small images on a CPU. CIFAR-10: 12 minutes on two cores, kNN 47 %."""
  own_images(config)
  config.data.split = ""
  small_network(config)
  config.num_epochs = 15
  config.evaluate.every_epochs = 5


def own_images(config: ConfigDict) -> None:
  """Sets how a folder of anybody's images is read."""
  config.data.source = "folder"
  config.data.update(formats="all", reduced_decoding=True, upright=True, full_range=True)
  config.optimizer.update_interval = "step"
  config.evaluate.views = 512
  config.report = True
  config.export = True


CHOSEN = (
  "data.split", "data.labels", "evaluate.split", "data.holdout", "data.image_size", "data.image_scale",
  "data.num_threads", "data.kept_side", "jigsaw.crop_size", "jigsaw.patch_size", "evaluate.crop_fraction",
  "evaluate.batch_size", "evaluate.every_epochs", "evaluate.learning", "model.arch", "model.stem", "model.dtype",
  "model.remat", "model.batch_norm", "batch_size", "micro_batches", "num_negatives", "loss", "temperature",
  "num_epochs", "optimizer.learning_rate", "optimizer.weight_decay", "checkpoint.every_steps", "log.every_steps")
"""Fields that can be left open; pirl_jax/choosing/ chooses their values."""


def leave_open(config: ConfigDict, fields: Iterable[str]) -> None:
  """Leaves these fields of `CHOSEN` without a value: the program chooses it when the run starts."""
  for field in fields:
    *groups, last = field.split(".")
    group = config
    for name in groups:
      group = group[name]
    with group.ignore_type():
      group[last] = placeholder(group.get_type(last))


def imagenet(config: ConfigDict) -> None:
  """ImageNet by TFDS, the paper's main run."""
  config.model.batch_norm = "groups"
  config.data.name = "imagenet2012"
  config.evaluate.split = "validation"
  config.evaluate.every_epochs = 25


def supervised_schedule(config: ConfigDict) -> None:
  """vissl's schedule for Jigsaw, RotNet and supervised networks: 105 epochs, learning rate 0.1 for a batch of 256.

  The learning rate falls after 30, 60, 90 and 100 epochs, and biases decay.
  """
  config.num_epochs = 105
  config.batch_size = 256
  config.optimizer.update(learning_rate=0.4, schedule="steps", milestones=(30 / 105, 60 / 105, 90 / 105, 100 / 105),
                          decay_biases=True)


def small_images(config: ConfigDict, *, image_size: int, cell: int, patch_size: int) -> None:
  """Sets the sizes of the views, in pixels, and makes the test crop the whole image."""
  config.data.image_size = image_size
  config.jigsaw.crop_size = cell * config.jigsaw.grid
  config.jigsaw.patch_size = patch_size
  config.evaluate.crop_fraction = 1.0
  config.optimizer.update_interval = "step"


def small_network(config: ConfigDict) -> None:
  """Sets a training that two CPU cores can do: a ResNet-8, views of 32 pixels, 2,048 negatives, softmax loss.

  The loss `nce` diverges on a few thousand images. On the embedded set, with learning rates of 0.03 to 0.4, the image
  loss was 300 to 2,400 instead of 9, and kNN was at chance. The presumed reason: The embeddings of a new network are
  nearly equal, and after an epoch of 32 steps the rows of the bank are nearly equal, too. In `nce` the sum over the
  negatives is unbounded. It seems to drive the embeddings around the sphere, and the bank follows: an image's own row,
  the oldest, is less similar to the image than the other rows are. On 50,000 images the loss rises, too:
  docs/own_images.md has the figures.
  """
  small_images(config, image_size=32, cell=12, patch_size=10)
  config.batch_size = 128
  config.num_negatives = 2_048
  config.loss = "infonce"
  config.temperature = 0.1
  config.data.image_scale = (0.2, 1.0)
  config.data.num_threads = 2
  config.model.arch = "resnet8"
  config.model.stem = "3x3s2"
  config.optimizer.learning_rate = 0.4
  config.evaluate.batch_size = 256
  config.evaluate.learning = True


def resnet18(config: ConfigDict) -> None:
  """Sets ResNet-18, batch 128, weight decay 5e-4 and softmax loss, as lemniscate (CIFAR-10) and pirl_pytorch (STL-10).

  The learning rate of 0.03 is lemniscate's. For small sets the softmax loss is the better choice, see `small_network`.
  """
  config.loss = "infonce"
  config.batch_size = 128
  config.model.arch = "resnet18"
  config.model.stem = "3x3"
  config.optimizer.learning_rate = 0.03 * 1024 / 128
  config.optimizer.weight_decay = 5e-4


LABELLED = {"": embedded, "cifar10": cifar10, "folder": folder, "folder_small": folder_small}
"""The variants that every system has, by name. These sets can have labels, which some systems need."""


def compose(*settings: Callable[[ConfigDict], None]) -> Callable[[ConfigDict], None]:
  """Returns a function of a config that applies the settings one after the other; `--help` shows their docstrings."""
  def apply(config: ConfigDict) -> None:
    for setting in settings:
      setting(config)
  apply.__doc__ = " ".join(doc.splitlines()[0] for setting in settings if (doc := setting.__doc__))
  return apply


def create_config(system: str, variant: str, variants: Mapping[str, Callable[[ConfigDict], None]]) -> ConfigDict:
  """Returns the config of a variant of a system.

  Raises:
    UserError: the variant is unknown.
  """
  if variant not in variants:
    raise UserError(f"configs/{system}.py has no variant {variant!r}; choose none or one of "
                    f"{', '.join(name for name in variants if name)}")
  config = get_base()
  config.name = f"{system}-{variant}" if variant else system
  variants[variant](config)
  return config
