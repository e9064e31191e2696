"""Every field of a pre-training run, with its meaning and unit. The values are the paper's settings.

The program chooses the value of a field that is None ("auto" on the command line) when the run starts; the fields that
can be chosen are CHOSEN in configs/data_sets.py.

If a field is added, its value here must be what the program did before: stored runs without the field get this value.
"""

from ml_collections import ConfigDict


def get_base() -> ConfigDict:
  """Returns the paper's settings for its main run (section 3; vissl pirl_jigsaw_4node_resnet50.yaml), without data.

  They differ from the authors' own run in a few points, for speed or for exactness. configs/pirl.py:imagenet_official
  is that run as far as it can be; docs/systems.md has the differences.
  """
  config = ConfigDict()
  config.job = "pretrain"  # the job that launch.py runs
  # True: the run is described, with its memory and its steps, and not started. A TFDS set that is missing is prepared.
  config.dry_run = False
  config.name = ""  # of the run; without --workdir the folder of the run is runs/NAME
  config.seed = 0  # of everything random: weights, bank, order, crops, views, negatives
  # "invariant": the image and the transformed image are compared with the memory bank (PIRL, NPID). "covariant": the
  # network predicts which transform was applied (Jigsaw, RotNet). "supervised": the network predicts the class.
  # "covariant" and "supervised" do not use the fields num_negatives, negative_sampling, temperature, loss,
  # pretext_weight and bank.
  config.objective = "invariant"
  # Folder of a run, or file of published weights (docs/weights.md): its trunk and, where they fit, heads are the first
  # weights; "": random ones.
  config.init_from = ""
  config.num_epochs = 800  # passes over the training images; 0: the untrained network
  config.batch_size = 1024  # images in a step, over all devices
  # True: an epoch holds every image; its last batch has the images that remain, and is filled up with others, which
  # have no weight. False: each epoch leaves out other images, fewer than a batch.
  config.partial_batch = False
  # Number of parts of a batch that pass through the network one after the other. More parts need less memory. The
  # gradient is that of the whole batch, but batch norm uses the statistics of each part (not with "groups").
  config.micro_batches = 1
  config.num_negatives = 32_000  # for each term, a multiple of the bank's strata (256 or fewer); 0: every row
  config.negative_sampling = "shared"  # one draw for the batch; "per_image": one draw for each image, many times slower
  # True: a draw that holds the image's own row counts this row as a negative, too, as in the official code. False: the
  # own row is never a negative, as in the paper.
  config.own_row_is_negative = False
  # Weight of a loss beside these two: a head predicts by which of four angles the image is turned (e-SSL); 0: none.
  config.angle_weight = 0.0
  # Weight of a second loss, whose positive is the row of another image that is nearest to the own row (NNCLR); 0: none.
  config.nearest_positive = 0.0
  # The negatives that count, by their rank among an image's negatives, most similar first: (0.0, 0.08) is the hardest
  # 8 %, (0.01, 0.1) a ring without the nearest hundredth. Not with loss=nce.
  config.negative_ranks = (0.0, 1.0)
  config.temperature = 0.07  # tau: cosine similarities are divided by it
  config.loss = "nce"  # "nce" (official code), "infonce" (softmax), "eq4" (the paper's equations as written)
  config.pretext = "jigsaw"  # the transform: "jigsaw", "rotation", "rotation_jigsaw"
  config.pretext_weight = 0.5  # lambda: weight of the pretext term; the image term has 1 - lambda; 0: no pretext view

  config.report = False  # True: at the end, report.html is written, one file that shows everything about the run
  config.export = False  # True: at the end, the trunk is written into the folder export, for timm and torchvision

  _add_images(config)
  _add_views(config)
  _add_network(config)
  _add_optimizer(config)
  _add_evaluation(config)
  return config


def _add_images(config: ConfigDict) -> None:
  """Adds where the images come from, and how they are read and cropped."""
  config.data = data = ConfigDict()
  data.source = "tfds"  # "embedded" (textures, no download), "folder", "tfds" or "webdataset" (tar shards)
  data.name = ""  # tfds: name of the data set in TFDS's catalog
  # folder: the folder of images; tfds: folder of prepared sets ("": TFDS's default); webdataset: the folder of shards,
  # or a pattern of their paths, such as DIR/train-{000..099}.tar.
  data.root = ""
  # tfds: a split; folder: a sub-folder ("": the whole folder); webdataset: a sub-folder or a pattern of shards in root.
  data.split = "train"
  # "folder" takes the sub-folders as classes; webdataset: .cls, or "label" in .json, beside the image. For kNN and
  # objective=supervised only. The other sources always have their own labels.
  data.labels = "none"
  # embedded: number of images to draw. Others: number of images to take at random, 0 for all.
  data.num_images = 0
  # Share of the images that is held out for evaluations, in [0, 1), where the data have no split for it. The name of an
  # image alone decides.
  data.holdout = 0.0
  # pixels; not 0: each image is decoded once and stays in memory, with a shorter side of at most this size.
  data.kept_side = 0
  # folder: True goes on with a run whose folder has changed: images of the same name and size keep their rows of the
  # bank, new ones get new rows.
  data.grown = False
  # True: a JPEG is decoded at a half, a quarter or an eighth of its size, where the crops of a sample are no larger. A
  # photograph of 12 megapixels then costs a third of the time; images of ImageNet's size are read as before.
  data.reduced_decoding = False
  # True: an image is turned as the EXIF orientation of its camera says; False: it keeps its stored orientation, as in
  # the official runs.
  data.upright = False
  # True: an image of 16 bits is scaled by its own largest value; False: the upper 8 bits are kept.
  data.full_range = False
  # True: a JPEG whose decoder finds corrupt data counts as broken; False: it is an image, and what is missing is grey.
  data.strict = True
  # folder, webdataset: "common" reads .jpg, .jpeg, .png, .webp and .bmp; "all" also .jfif, .jpe, .tif, .tiff, .gif and
  # .avif, and .heic and .heif if pillow-heif is installed.
  data.formats = "common"
  data.image_size = 224  # pixels, side of the image view
  data.image_scale = (0.08, 1.0)  # range of the share of the image's area that the image crop covers
  data.num_threads = 16  # threads that decode and crop
  data.max_bad_fraction = 0.05  # largest share of images that cannot be read; with more the run stops


def _add_views(config: ConfigDict) -> None:
  """Adds the cut of the jigsaw and the photometric augmentations of both views."""
  # For "jigsaw" and "rotation_jigsaw"; the transform "rotation" uses the size and scale of the image crop.
  config.jigsaw = jigsaw = ConfigDict()
  jigsaw.crop_size = 255  # pixels, side of the crop that is cut into patches
  jigsaw.crop_scale = (0.6, 1.0)  # range of the share of the image's area that this crop covers
  jigsaw.grid = 3  # cells on each side
  jigsaw.patch_size = 64  # pixels, side of a patch, at most crop_size // grid
  jigsaw.augment = "patches"  # the list below is drawn for each patch; "crop": once for the crop before it is cut
  jigsaw.num_permutations = 0  # number of orders of the patches; 0: all, 9!
  # How the orders are chosen: "max_avg" maximises the mean distance between them, "max_min" the smallest distance.
  jigsaw.permutation_subset = "max_avg"

  # The photometric augmentations of the official run (vissl pirl_jigsaw_4node_resnet50.yaml), drawn independently for
  # the image and for each patch. A strength or probability of 0 switches an operation off.
  config.photometric = photometric = ConfigDict()
  photometric.brightness = 0.4  # factor uniform in [1 - b, 1 + b]
  photometric.contrast = 0.4  # factor uniform in [1 - c, 1 + c]
  photometric.saturation = 0.4  # factor uniform in [1 - s, 1 + s]
  photometric.hue = 0.2  # shift uniform in [-h, h], in turns of the colour circle, at most 0.5
  photometric.jitter_probability = 1.0  # probability of the four operations above together, in random order
  photometric.group_probability = 0.66  # probability of posterize, sharpness, solarize and autocontrast together
  photometric.grayscale_probability = 0.2  # probability that the colours are taken away
  photometric.blur_probability = 0.0  # probability of a Gaussian blur
  photometric.blur_radius = (0.1, 2.0)  # pixels, range of the standard deviation of the blur
  # RandAugment (PyContrast's InfoMin: 2 operations): the number of operations that are chosen for an image, of 15, each
  # applied with probability 0.5; 0: none.
  photometric.randaugment_operations = 0
  photometric.randaugment_magnitude = 10.0  # mean of the magnitude of an operation, in [0, 10]
  photometric.randaugment_deviation = 0.5  # standard deviation of the magnitude; it stays in [0, 10]
  photometric.flip_probability = 0.5  # probability of a horizontal flip

  # The photometric augmentations of the pretext views: those of the image, except for fields that are set here.
  config.pretext_photometric = ConfigDict({name: photometric.get_oneway_ref(name) for name in photometric})


def _add_network(config: ConfigDict) -> None:
  """Adds the trunk, the heads and the memory bank."""
  config.model = model = ConfigDict()
  model.arch = "resnet50"  # the trunk: "resnet8", "resnet18", "resnet34", "resnet50" or "resnet101"
  model.width = 1  # factor for the number of channels
  model.stem = "imagenet"  # "imagenet" (7x7, pooling), "3x3", "3x3s2" (stride 2, for CPUs)
  model.head = "linear"  # "linear", or "mlp" (vissl resnet50_mlphead.yaml)
  model.dim = 128  # dimensions of an embedding
  # Type in which the trunk computes: "float32" or "bfloat16"; weights, statistics and loss stay in float32. "float64"
  # (with JAX_ENABLE_X64=1) computes everything in float64, to distinguish rounding errors from mistakes.
  model.dtype = "float32"
  # True needs less memory: only the inputs of the stages are kept, the rest is computed again for the gradient.
  model.remat = False
  # "global": statistics of the whole batch. "groups": of each group of `batch_norm_group` images, as in the authors'
  # runs (32 images on each of 32 GPUs); no communication. With both, the number of devices does not matter. "device":
  # each device uses the statistics of its own images.
  model.batch_norm = "global"
  model.batch_norm_group = 32  # images; divides what passes through a device at once: batch / devices / micro-batches

  config.bank = bank = ConfigDict()
  bank.momentum = 0.5  # weight of the old row
  # Not 0: what a row moves to is what a copy of the network makes of a second crop of the image, and the image is
  # compared with the row that has moved (InfoMin, MoCo). This is what the copy keeps of itself at each step, in [0, 1).
  bank.encoder_momentum = 0.0
  # Not 0: only rows that were written in so many last steps are negatives, as in MoCo's queue, which is as long as this
  # number times the batch.
  bank.max_age = 0
  # Number of unit vectors whose mean an initial row is. The official run averages the banks of its 32 GPUs: its initial
  # rows have a norm of 0.18, and Z is 1.31 million instead of 2.83 million.
  bank.averaged = 1
  bank.dtype = "float32"  # type in which the bank is stored: "float32", "bfloat16" or "float64"


def _add_optimizer(config: ConfigDict) -> None:
  """Adds SGD and the schedule of its learning rate."""
  config.optimizer = optimizer = ConfigDict()
  optimizer.learning_rate = 0.12  # for a batch of 1,024; scaled in proportion to the batch size
  optimizer.warmup_epochs = 0  # epochs in which the learning rate rises to its full value
  optimizer.warmup_factor = 0.0  # share of the learning rate at which the warm-up starts
  optimizer.schedule = "cosine"  # "cosine", or "steps": constant between milestones, multiplied by a factor at each
  optimizer.end_factor = 0.001  # cosine: share of the learning rate at the end
  # The cosine and the warm-up change the rate every "epoch", as in the official runs, or every "step".
  optimizer.update_interval = "epoch"
  optimizer.milestones = (0.6, 0.8)  # steps: shares of the run
  optimizer.decay_factor = 0.1  # steps: factor at each milestone
  optimizer.momentum = 0.9  # of SGD
  optimizer.nesterov = False  # True: Nesterov's momentum, in PyTorch's form
  optimizer.weight_decay = 1e-4  # on kernels
  optimizer.decay_biases = False  # True: weight decay on the biases of linear layers, too
  optimizer.decay_batch_norm = False  # True: weight decay on scales and biases of batch norm, too


def _add_evaluation(config: ConfigDict) -> None:
  """Adds what happens beside the training: checkpoints, evaluations and the log."""
  config.checkpoint = checkpoint = ConfigDict()
  checkpoint.every_steps = 2_500  # a checkpoint is also written at every evaluation and at the end
  checkpoint.keep = 3  # number of newest checkpoints to keep; the one with the best kNN is kept, too

  config.evaluate = evaluate = ConfigDict()
  evaluate.every_epochs = 10  # kNN of held-out images against the bank; 0: never
  evaluate.split = ""  # of the held-out images; "": no held-out images and no kNN
  # Another set, with labels, on whose images kNN and a linear classifier are measured during the run: its source as in
  # data.source; "": a folder if there is evaluate.root, else there is no other set.
  evaluate.source = ""
  evaluate.root = ""  # folder or root of the other set, see data.root
  evaluate.name = ""  # name of the other set, if it is one of TFDS
  # embedded: number of held-out images to draw. folder, tfds: number to take at random, 0 for all.
  evaluate.num_images = 0
  evaluate.k = 200  # number of neighbours; if there are fewer images, all of them vote
  evaluate.temperature = 0.07  # tau of the neighbours' votes
  evaluate.crop_fraction = 0.875  # share of the shorter side that the centre crop keeps
  evaluate.batch_size = 1024  # images, over all devices
  # Number of images (held-out ones if there are enough) of which augmented views are compared at every evaluation and
  # at the end, without labels, for the verdict on the run; 0: never.
  evaluate.views = 0
  evaluate.learning = False  # True: at the end, kNN on raw pixels, the untrained and the trained network

  config.log = log = ConfigDict()
  log.every_steps = 50  # steps between two rows of metrics.jsonl
