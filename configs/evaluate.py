"""Evaluation: python launch.py --config=configs/evaluate.py:PROTOCOL --config.checkpoint=RUN[,RUN...], or RUN+RUN

A variant such as `linear_moco` is a protocol with the settings of another publication. docs/evaluation.md says which
protocol answers which question.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from pirl_jax.configs.base import get_base as get_run_base
from pirl_jax.errors import UserError


def get_base() -> ConfigDict:
  """Returns the fields that every protocol has, with their meaning and unit."""
  config = ConfigDict()
  config.job = "evaluate"  # the job that launch.py runs
  config.protocol = ""
  config.name = ""  # of the result files, results/NAME.json; with another name an older result is kept
  # The run's folder. Several folders, separated by commas, are compared in one table and one plot. Folders joined by +
  # are evaluated as an ensemble.
  config.checkpoint = ""
  config.step = 0  # of the checkpoint; 0: the newest
  config.seed = 0  # of everything random in the evaluation

  # A field without a value is taken from the run. If data.source is given, only sizes, threads and how images are
  # decoded (reduced_decoding, full_range, upright, strict) are taken from the run; the other fields have the source's
  # defaults.
  config.data = data = ConfigDict()
  data.source = placeholder(str)  # "embedded", "folder", "tfds" or "webdataset"
  data.name = placeholder(str)  # tfds: name of the data set
  data.root = placeholder(str)  # folder: the folder of images; tfds: folder of prepared sets; webdataset: of shards
  data.split = placeholder(str)  # of the training images
  data.test_split = placeholder(str)  # of the held-out images
  data.labels = placeholder(str)  # "folder": the classes are the sub-folders; webdataset: they lie beside the images
  # Training images. embedded: number to draw. Others: number to take at random, 0 for all.
  data.num_images = placeholder(int)
  data.test_num_images = placeholder(int)  # the same for held-out images
  data.image_size = placeholder(int)  # pixels, side of the images as the network sees them
  data.crop_fraction = placeholder(float)  # share of the shorter side that the centre crop keeps
  data.batch_size = placeholder(int)  # test images at a time, over all devices
  data.num_threads = placeholder(int)  # threads that decode
  for name, value in get_run_base().data.items():  # further fields of configs/base.py, which a single source uses
    if name not in data and name not in ("image_scale", "max_bad_fraction", "grown"):  # for training only
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
  linear.layers = ""  # names separated by commas; "": all layers of the trunk
  linear.num_epochs = 28
  linear.batch_size = 256
  linear.learning_rate = 0.01  # for a batch of 256; scaled in proportion to the batch size
  linear.schedule = "steps"  # "steps" or "cosine" (to zero)
  linear.milestones = (1 / 3, 2 / 3)  # shares of the epochs after which the learning rate falls
  linear.decay_factor = 0.1
  linear.momentum = 0.9
  linear.nesterov = False
  linear.weight_decay = 5e-4
  linear.head = "bn"  # before the linear layer: "bn" (no scale or shift), "bn_affine", "plain" (none)
  linear.init = "normal"  # of the linear layer: "normal" (standard deviation 0.01), "pytorch" (PyTorch's default)
  linear.image_scale = (0.08, 1.0)  # range of the share of the image's area that the random crop covers
  # Folders of further test images, separated by commas: their sub-folders are some of the training images' classes.
  linear.further = ""
  linear.cached = False  # True: features are computed once, without augmentation; for small data sets


def linear_ensemble(config: ConfigDict) -> None:
  """For an ensemble, --config.checkpoint=A+B: twice the number of epochs.

  The paper trains the linear layers of PIRL-ens. "longer"; it does not say how much longer.
  """
  linear(config)
  config.linear.num_epochs = 56


def linear_vissl(config: ConfigDict) -> None:
  """vissl's eval_resnet_8gpu_transfer_in1k_linear.yaml: three steps, Nesterov, scale and shift in the batch norm.

  The linear layer starts as PyTorch's do.
  """
  linear(config)
  config.linear.milestones = (2 / 7, 4 / 7, 6 / 7)  # 8, 16 and 24 of 28; for Places205 4, 8 and 12 of 14
  config.linear.nesterov = True
  config.linear.head = "bn_affine"
  config.linear.init = "pytorch"


def linear_small(config: ConfigDict) -> None:
  """vissl's settings for CIFAR, STL-10 and the like: the whole image and its mirror image, no random crop.

  The linear layer starts as in `linear`, as for all results in docs/systems.md.
  """
  linear_vissl(config)
  config.linear.update(image_scale=(1.0, 1.0), init="normal")


def linear_moco(config: ConfigDict) -> None:
  """As MoCo: the pooled features alone, plain linear layer, learning rate 30, 100 epochs.

  These are those of MoCo's own code. vissl's file in this style differs by Nesterov's momentum and by PyTorch's initial
  weights: --config.linear.nesterov=True --config.linear.init=pytorch.
  """
  linear(config)
  config.linear.update(layers="pooled", num_epochs=100, learning_rate=30.0, milestones=(0.6, 0.8), weight_decay=0.0,
                       head="plain")


def linear_simclr(config: ConfigDict) -> None:
  """vissl's file in SimCLR's style: the pooled features alone, learning rate 0.3 with a cosine, 100 epochs."""
  linear(config)
  config.linear.update(layers="pooled", num_epochs=100, learning_rate=0.3, schedule="cosine", weight_decay=1e-6,
                       head="plain", init="pytorch")


def svm(config: ConfigDict) -> None:
  """Linear one-vs-rest SVMs, cost chosen by cross-validation: the protocol of VOC07, for any labelled images."""
  config.svm = svm = ConfigDict()
  svm.layers = ""  # "": the pooled features for images of up to 96 pixels, every map of the trunk for larger ones
  svm.costs = "paper"  # grid of costs: "paper" (fair_self_supervision_benchmark, 26 values) or "vissl" (11 values)
  svm.num_folds = 3


def svm_voc07(config: ConfigDict) -> None:
  """The paper's VOC07 figures: trained on trainval, tested on test."""
  svm(config)
  voc07(config)


def low_shot(config: ConfigDict) -> None:
  """The same SVMs on a few examples per class, as in vissl's low-shot benchmark."""
  config.low_shot = low_shot = ConfigDict()
  low_shot.layers = ""  # as svm.layers; vissl takes res4 and res5
  low_shot.costs = "vissl"
  low_shot.shots = (1, 2, 4, 8, 16, 32, 64, 96)  # positive examples per class
  low_shot.num_draws = 5  # draws of the examples for each number


def low_shot_voc07(config: ConfigDict) -> None:
  """vissl's low-shot VOC07."""
  low_shot(config)
  config.low_shot.layers = "res4,res5"
  voc07(config)


def semi_supervised(config: ConfigDict) -> None:
  """The whole network, fine-tuned on a share of the labels: the paper's section 3.3, by NPID's procedure."""
  config.semi_supervised = semi = ConfigDict()
  semi.fractions = (0.01, 0.1)  # shares of the labelled images, in (0, 1]
  semi.balanced = False  # True: the same share of every class; False: drawn from all images alike
  semi.num_epochs = 70
  semi.batch_size = 256
  semi.learning_rate = 0.01  # for a batch of 256; scaled in proportion to the batch size
  semi.milestones = (30 / 70, 60 / 70)  # shares of the epochs after which the learning rate falls
  semi.decay_factor = 0.1
  semi.momentum = 0.9
  semi.nesterov = False
  semi.weight_decay = 0.0
  semi.image_scale = (0.08, 1.0)  # range of the share of the image's area that the random crop covers


def semi_supervised_vissl(config: ConfigDict) -> None:
  """vissl's settings with PIRL's lists of images: the learning rate falls once, after epoch 30; Nesterov momentum."""
  semi_supervised(config)
  config.semi_supervised.update(milestones=(30 / 70,), nesterov=True)


def semi_supervised_small(config: ConfigDict) -> None:
  """For sets of a few thousand images, for which 10 % of the labels would make one batch of 256 and 70 steps in all.

  On the embedded run, 1 % and 10 % of the labels give 28.8 and 64.3 % top-1, instead of 21.1 and 41.4 % with the
  settings of `semi_supervised`.
  """
  semi_supervised(config)
  config.semi_supervised.update(batch_size=32, learning_rate=0.08)


def semi_supervised_full(config: ConfigDict) -> None:
  """vissl's fine-tuning on all labels: 105 epochs, learning rate 0.1, lowered after 30, 60, 90 and 100 epochs."""
  semi_supervised(config)
  config.semi_supervised.update(fractions=(1.0,), num_epochs=105, learning_rate=0.1,
                                milestones=(30 / 105, 60 / 105, 90 / 105, 100 / 105), nesterov=True)


def invariance(config: ConfigDict) -> None:
  """Distances between an image and its transformed version: the paper's figure 4."""
  config.invariance = invariance = ConfigDict()
  invariance.split = placeholder(str)  # "train" or "test" images; without a value, test images if there are any
  invariance.representation = "heads"  # f and g; "trunk": pooled features, for networks without f and g
  invariance.num_pictures = 2_000  # number of images; the field keeps this name because stored results have it
  invariance.num_transforms = 10  # random transforms of each image
  invariance.num_bins = 50  # bins of the histogram over [0, 2]
  # True: the mean vector of the images is subtracted from theirs, that of the transformed images from theirs; only then
  # can distances of different networks be compared.
  invariance.centred = False
  invariance.augmented = False  # True: the transformed images have the run's photometric augmentations, too


def retrieval(config: ConfigDict) -> None:
  """Image retrieval: a plot with the nearest neighbours of some images, and mean average precision."""
  config.retrieval = retrieval = ConfigDict()
  retrieval.layer = "pooled"  # a layer of the trunk, or "embedding"
  retrieval.gallery = "features"  # "features" of the training images, or "bank": the rows of the run's memory bank
  retrieval.queries = placeholder(str)  # "train" or "test" images; without a value, test images if there are any
  retrieval.num_queries = 1_000
  retrieval.num_shown = 8  # queries in the plot
  retrieval.num_neighbours = 8  # neighbours of each query in the plot


def features(config: ConfigDict) -> None:
  """Writes features, labels and file names into a file for other programs."""
  config.features = features = ConfigDict()
  features.layer = "pooled"  # a layer of the trunk, or "embedding"
  features.splits = ()  # any splits of the data; (): data.split and, if there is one, data.test_split
  features.format = "npz"  # "npz" or "parquet"


def predict(config: ConfigDict) -> None:
  """Writes the classes of any images, --config.data.root=DIR, by what `linear` or `semi_supervised` has kept."""
  config.predict = predict = ConfigDict()
  predict.classifier = placeholder(str)  # "linear" or "semi_supervised"; without a value, the newest
  config.data.update(source="folder", split="", test_split="", labels="none", formats="all")


def voc07(config: ConfigDict) -> None:
  """Sets the data of the paper's SVMs: VOC2007, which TFDS calls voc/2007."""
  config.data.source = "tfds"
  config.data.name = "voc/2007"
  config.data.split = "train+validation"
  config.data.test_split = "test"


VARIANTS = {variant.__name__: variant for variant in (
  knn, linear, linear_ensemble, linear_vissl, linear_small, linear_moco, linear_simclr, svm, svm_voc07, low_shot,
  low_shot_voc07, semi_supervised, semi_supervised_vissl, semi_supervised_small, semi_supervised_full, invariance,
  retrieval, features, predict)}


def get_config(variant: str = "") -> ConfigDict:
  """Returns the config of a protocol.

  Raises:
    UserError: no protocol is given, or the protocol is unknown.
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
