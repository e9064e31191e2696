"""Evaluation: python launch.py --config=configs/evaluate.py:PROTOCOL --config.checkpoint=RUN[,RUN...], or RUN+RUN

A protocol with another source's settings is a variant of it (`linear_moco`). docs/evaluation.md says which protocol
answers which question.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from pirl_jax.configs.base import get_base as get_run_base
from pirl_jax.errors import UserError


def get_base() -> ConfigDict:
  """Returns the fields that every protocol has, once, with their meaning and unit."""
  config = ConfigDict()
  config.job = "evaluate"  # what launch.py does with this config
  config.protocol = ""
  config.name = ""  # of the result files, results/NAME.json; another name keeps what is there
  # The run's folder. Several with commas between them give one table and one plot; with pluses they are an ensemble.
  config.checkpoint = ""
  config.step = 0  # of the checkpoint; 0: the newest
  config.seed = 0  # of everything random in the evaluation

  # Without a value: as in the run. With a source given, nothing is taken from the run's data but sizes and threads.
  config.data = data = ConfigDict()
  data.source = placeholder(str)  # "embedded", "folder" or "tfds"
  data.name = placeholder(str)  # tfds: name of the data set
  data.root = placeholder(str)  # folder: the folder of images; tfds: where prepared sets lie
  data.split = placeholder(str)  # of the training images
  data.test_split = placeholder(str)  # of the held-out images
  data.labels = placeholder(str)  # folder: "folder" takes the sub-folders as classes
  data.num_images = placeholder(int)  # embedded: how many training images to draw; else so many at random, 0: all
  data.test_num_images = placeholder(int)  # the same of held-out images
  data.image_size = placeholder(int)  # pixels, side of the images as the network sees them
  data.crop_fraction = placeholder(float)  # share of the shorter side that the centre crop keeps
  data.batch_size = placeholder(int)  # test images at a time, over all devices
  data.num_threads = placeholder(int)  # that decode
  for name, value in get_run_base().data.items():  # what a single source has of its own, as in configs/base.py
    if name not in data and name not in ("image_scale", "max_bad_fraction"):  # the two are of training alone
      data[name] = placeholder(type(value))
  return config


def knn(config: ConfigDict) -> None:
  """Weighted nearest neighbours, no training: NPID section 3.4."""
  config.knn = knn = ConfigDict()
  knn.layer = "pooled"  # a layer of the trunk, or "embedding"
  knn.k = 200
  knn.temperature = 0.07


def linear(config: ConfigDict) -> None:
  """A linear classifier on each layer of the frozen trunk: the paper's appendix C."""
  config.linear = linear = ConfigDict()
  linear.layers = ""  # with commas between them; "": all
  linear.num_epochs = 28
  linear.batch_size = 256
  linear.learning_rate = 0.01  # for a batch of 256; scaled in proportion to the batch
  linear.schedule = "steps"  # "steps" or "cosine" (to zero)
  linear.milestones = (1 / 3, 2 / 3)  # shares of the epochs, where the rate falls: two, equally spaced
  linear.decay_factor = 0.1
  linear.momentum = 0.9
  linear.nesterov = False
  linear.weight_decay = 5e-4
  linear.head = "bn"  # before the linear layer: "bn" (no scale or shift), "bn_affine", "plain" (none)
  linear.image_scale = (0.08, 1.0)  # share of the image's area that the random crop covers
  linear.cached = False  # features taken once, without augmentation; for small data


def linear_ensemble(config: ConfigDict) -> None:
  """For an ensemble, --config.checkpoint=A+B: twice the epochs.

  The paper's PIRL-ens. has "longer" training of its linear layers; how much longer it does not tell.
  """
  linear(config)
  config.linear.num_epochs = 56


def linear_vissl(config: ConfigDict) -> None:
  """vissl's eval_resnet_8gpu_transfer_in1k_linear.yaml: three steps, Nesterov, scale and shift in the batch norm."""
  linear(config)
  config.linear.milestones = (2 / 7, 4 / 7, 6 / 7)  # 8, 16 and 24 of 28; for Places205 4, 8 and 12 of 14
  config.linear.nesterov = True
  config.linear.head = "bn_affine"


def linear_small(config: ConfigDict) -> None:
  """vissl's settings for CIFAR, STL-10 and the like: the whole image and its mirror image, no random crop."""
  linear_vissl(config)
  config.linear.image_scale = (1.0, 1.0)


def linear_moco(config: ConfigDict) -> None:
  """As MoCo: the pooled features alone, plain linear layer, rate 30, 100 epochs (pirl-like runs in vissl too)."""
  linear(config)
  config.linear.update(layers="pooled", num_epochs=100, learning_rate=30.0, milestones=(0.6, 0.8), weight_decay=0.0,
                       head="plain")


def linear_simclr(config: ConfigDict) -> None:
  """As SimCLR: the pooled features alone, plain linear layer, rate 0.3 with a cosine, 100 epochs."""
  linear(config)
  config.linear.update(layers="pooled", num_epochs=100, learning_rate=0.3, schedule="cosine", weight_decay=1e-6,
                       head="plain", nesterov=True)


def svm(config: ConfigDict) -> None:
  """Linear SVMs, one against the rest, cost by cross-validation: the protocol of VOC07, on any labels."""
  config.svm = svm = ConfigDict()
  svm.layers = ""  # "": the pooled features for images of up to 96 pixels, every map of the trunk for larger ones
  svm.costs = "paper"  # the grid: "paper" (fssb's, 26 values) or "vissl" (11)
  svm.num_folds = 3


def svm_voc07(config: ConfigDict) -> None:
  """The paper's VOC07 figures: trained on trainval, judged on test."""
  svm(config)
  voc07(config)


def low_shot(config: ConfigDict) -> None:
  """The same SVMs on a few examples a class, as vissl's low-shot benchmark."""
  config.low_shot = low_shot = ConfigDict()
  low_shot.layers = ""  # as svm.layers; vissl takes res4 and res5
  low_shot.costs = "vissl"
  low_shot.shots = (1, 2, 4, 8, 16, 32, 64, 96)  # positive examples a class
  low_shot.num_draws = 5


def low_shot_voc07(config: ConfigDict) -> None:
  """vissl's low-shot VOC07."""
  low_shot(config)
  config.low_shot.layers = "res4,res5"
  voc07(config)


def semi_supervised(config: ConfigDict) -> None:
  """The whole network, fine-tuned on a share of the labels: the paper's section 3.3, by NPID's procedure."""
  config.semi_supervised = semi = ConfigDict()
  semi.fractions = (0.01, 0.1)  # of the labelled images, in (0, 1]
  semi.balanced = False  # the same share of every class instead of a plain draw
  semi.num_epochs = 70
  semi.batch_size = 256
  semi.learning_rate = 0.01  # for a batch of 256; scaled in proportion to the batch
  semi.milestones = (30 / 70, 60 / 70)  # shares of the epochs, where the rate falls
  semi.decay_factor = 0.1
  semi.momentum = 0.9
  semi.nesterov = False
  semi.weight_decay = 0.0
  semi.image_scale = (0.08, 1.0)  # share of the image's area that the random crop covers


def semi_supervised_vissl(config: ConfigDict) -> None:
  """vissl with PIRL's lists: one step down at epoch 30, Nesterov."""
  semi_supervised(config)
  config.semi_supervised.update(milestones=(30 / 70,), nesterov=True)


def semi_supervised_small(config: ConfigDict) -> None:
  """For data of some thousand images, where 10 % of the labels make one batch of 256 and 70 steps in all.

  Embedded run: 28.8 and 64.3 % top-1 instead of 21.1 and 41.4 %.
  """
  semi_supervised(config)
  config.semi_supervised.update(batch_size=32, learning_rate=0.08)


def semi_supervised_full(config: ConfigDict) -> None:
  """vissl's fine-tuning on all labels: 105 epochs, rate 0.1, down at 30, 60, 90 and 100."""
  semi_supervised(config)
  config.semi_supervised.update(fractions=(1.0,), num_epochs=105, learning_rate=0.1,
                                milestones=(30 / 105, 60 / 105, 90 / 105, 100 / 105), nesterov=True)


def invariance(config: ConfigDict) -> None:
  """Distances between an image and its transformed version: the paper's figure 4."""
  config.invariance = invariance = ConfigDict()
  invariance.split = placeholder(str)  # "train" or "test" images; without a value test, where there are any
  invariance.representation = "heads"  # f and g; "trunk": pooled features, for networks without f and g
  invariance.num_pictures = 2_000  # images; the name is that of stored results
  invariance.num_transforms = 10  # draws of t for each image
  invariance.num_bins = 50  # of the histogram over [0, 2]


def retrieval(config: ConfigDict) -> None:
  """Nearest neighbours of some images, as a plot; mean average precision."""
  config.retrieval = retrieval = ConfigDict()
  retrieval.layer = "pooled"  # a layer of the trunk, or "embedding"
  retrieval.gallery = "features"  # of the training images, or "bank": the run's memory bank
  retrieval.queries = placeholder(str)  # "train" or "test" images; without a value test, where there are any
  retrieval.num_queries = 1_000
  retrieval.num_shown = 8
  retrieval.num_neighbours = 8


def features(config: ConfigDict) -> None:
  """Writes features, labels and file names for use elsewhere."""
  config.features = features = ConfigDict()
  features.layer = "pooled"  # a layer of the trunk, or "embedding"
  features.splits = ()  # any splits of the data; (): data.split, and data.test_split where there is one
  features.format = "npz"  # "npz" or "parquet"


def voc07(config: ConfigDict) -> None:
  """Sets the data of the paper's SVMs; the archives are fetched by TFDS's name for them."""
  config.data.source = "tfds"
  config.data.name = "voc/2007"
  config.data.split = "train+validation"
  config.data.test_split = "test"


VARIANTS = {variant.__name__: variant for variant in (
  knn, linear, linear_ensemble, linear_vissl, linear_small, linear_moco, linear_simclr, svm, svm_voc07, low_shot,
  low_shot_voc07, semi_supervised, semi_supervised_vissl, semi_supervised_small, semi_supervised_full, invariance,
  retrieval, features)}


def get_config(variant: str = "") -> ConfigDict:
  """Returns the config of a protocol.

  Raises:
    UserError: none or an unknown one.
  """
  if variant not in VARIANTS:
    raise UserError(f"configs/evaluate.py needs a protocol, and {variant!r} is none; for example "
                    f"--config=configs/evaluate.py:knn; there are {', '.join(VARIANTS)}")
  config = get_base()
  fields_of_all = set(config)
  VARIANTS[variant](config)
  config.name = variant
  (config.protocol,) = set(config) - fields_of_all  # the group that the variant has added
  return config
