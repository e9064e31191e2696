"""The data sets, and the views, network and training that suit them; every system's config starts from one of these."""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from pirl_jax.configs.base import get_base
from pirl_jax.errors import UserError


def embedded(config: ConfigDict) -> None:
  """4,096 drawn textures, ResNet-8. Two CPU cores, 2 minutes: kNN of the features goes from about 20 to 50 %."""
  small_network(config)
  config.num_epochs = 25
  config.data.source = "embedded"
  config.data.num_images = 4_096
  config.data.num_threads = 1
  # Without the photometric group no structure is learnt (kNN 22 % instead of 54 % after 20 epochs), presumably because
  # near-grey textures can then be told apart by their brightness. At twice the rate it is 25 %.
  config.optimizer.warmup_epochs = 1
  config.evaluate.split = "test"
  config.evaluate.num_images = 1_024
  config.evaluate.every_epochs = 5
  config.checkpoint.every_steps = 500
  config.log.every_steps = 16


def cifar10(config: ConfigDict) -> None:
  """CIFAR-10 by TFDS, ResNet-18 with a 3x3 stem. One GPU.

  NPID's CIFAR-10 settings (lemniscate cifar.py: batch 128, rate 0.03, decay 5e-4, temperature 0.1, crops from a fifth
  of the area, softmax), with a cosine instead of the two steps, as PIRL has it, and PIRL's second view. Not measured.
  """
  # 48 pixels for the jigsaw: cells of 16 and patches of 12 keep the paper's ratio of 64 to 85, and 12 pixels leave
  # the stride-8 trunk more than a point to look at, where patches of 8 cut from 32 pixels would not.
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

  The jigsaw of pirl_pytorch (cells of 32) with the paper's ratio of patch to cell; its 6,400 negatives and 100 epochs.
  There are no labels in this split, so health figures take the place of kNN. Not measured.
  """
  small_images(config, image_size=96, cell=32, patch_size=24)
  resnet18(config)
  config.num_epochs = 100
  config.num_negatives = 6_400
  config.data.name = "stl10"
  config.data.split = "unlabelled"
  config.data.image_scale = (0.2, 1.0)


def folder(config: ConfigDict) -> None:
  """Any folder of images: --config.data.root=DIR. ResNet-50 at 224 pixels: one GPU or more.

  For other sizes see `small_images`; for a CPU there is `folder_small`.
  """
  config.num_epochs = 200
  config.batch_size = 256
  config.num_negatives = 4_096
  config.data.source = "folder"
  config.data.split = ""
  config.optimizer.update_interval = "step"


def folder_small(config: ConfigDict) -> None:
  """A folder of small images on a CPU: views of 32 pixels, ResNet-8. CIFAR-10: 15 minutes on two cores, kNN 47 %."""
  folder(config)
  small_network(config)
  config.num_epochs = 15
  config.evaluate.every_epochs = 5


def imagenet(config: ConfigDict) -> None:
  """ImageNet by TFDS, with the settings of the paper's main run."""
  config.data.name = "imagenet2012"
  config.evaluate.split = "validation"
  config.evaluate.every_epochs = 25


def supervised_schedule(config: ConfigDict) -> None:
  """vissl's schedule for Jigsaw, RotNet and supervised networks: rate 0.1 for 256, steps at 30, 60, 90, 100 of 105."""
  config.num_epochs = 105
  config.batch_size = 256
  config.optimizer.update(learning_rate=0.4, warmup_epochs=5, warmup_factor=0.25, schedule="steps",
                          milestones=(30 / 105, 60 / 105, 90 / 105, 100 / 105))


def small_images(config: ConfigDict, *, image_size: int, cell: int, patch_size: int) -> None:
  """Sets the sizes of the views, in pixels, and a test crop that is the whole image."""
  config.data.image_size = image_size
  config.jigsaw.crop_size = cell * config.jigsaw.grid
  config.jigsaw.patch_size = patch_size
  config.evaluate.crop_fraction = 1.0
  config.optimizer.update_interval = "step"


def small_network(config: ConfigDict) -> None:
  """Sets what two CPU cores can train: a ResNet-8, views of 32 pixels, 2,048 negatives, softmax loss.

  `nce` diverges on a few thousand images (embedded set, rates 0.03 to 0.4: image loss of 300 to 2,400 instead of 9, kNN
  at chance). The embeddings of a new network are all alike, and within an epoch of 32 steps so are the rows; the sum
  over the negatives, unbounded in `nce`, then seems to drive embeddings and bank round the sphere one after the other:
  an image's own row, the oldest, is less similar to it than the others are. On 50,000 images the loss fell slowly over
  the 3.6 epochs that were tried.
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
  """Sets what lemniscate (CIFAR-10) and pirl_pytorch (STL-10) share: ResNet-18, batch 128, decay 5e-4, softmax loss.

  The rate, 0.03, is lemniscate's. The softmax is the better choice for small sets anyway, see `small_network`.
  """
  config.loss = "infonce"
  config.batch_size = 128
  config.model.arch = "resnet18"
  config.model.stem = "3x3"
  config.optimizer.learning_rate = 0.03 * 1024 / 128
  config.optimizer.weight_decay = 5e-4


LABELLED = {"": embedded, "cifar10": cifar10, "folder": folder, "folder_small": folder_small}
"""By the variant's name: every system has these, and with them whatever it needs to learn from labels."""


def compose(*settings: Callable[[ConfigDict], None]) -> Callable[[ConfigDict], None]:
  """Returns the function that applies these one after the other."""
  def apply(config: ConfigDict) -> None:
    for setting in settings:
      setting(config)
  return apply


def create_config(system: str, variant: str, variants: Mapping[str, Callable[[ConfigDict], None]]) -> ConfigDict:
  """Returns the config of a variant of a system.

  Raises:
    UserError: an unknown variant.
  """
  if variant not in variants:
    raise UserError(f"configs/{system}.py has no variant {variant!r}; choose none or one of "
                    f"{', '.join(name for name in variants if name)}")
  config = get_base()
  config.name = f"{system}-{variant}" if variant else system
  variants[variant](config)
  return config
