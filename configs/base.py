"""Every field of a pre-training run, once, with its meaning and unit. The values are the paper's main run.

A new field has the value here that leaves everything as it was: that is its value in runs stored without the field.
"""

from ml_collections import ConfigDict


def get_base() -> ConfigDict:
  """Returns the settings of the paper's main run (section 3; vissl pirl_jigsaw_4node_resnet50.yaml), but for data."""
  config = ConfigDict()
  config.job = "pretrain"  # what launch.py does with this config
  config.name = ""  # of the run; without --workdir its folder is runs/NAME
  config.seed = 0  # of everything random: weights, bank, order, crops, views, negatives
  # "invariant": image and transformed image against the memory bank (PIRL, NPID); "covariant": the network tells which
  # transform it was (Jigsaw, RotNet); "supervised": which class. The last two use none of the fields from
  # num_negatives to loss, pretext_weight and bank.
  config.objective = "invariant"
  config.num_epochs = 800  # 0: the untrained network
  config.batch_size = 1024  # images in a step, over all devices
  # Parts of a batch that pass through the network one after the other, in as much less memory. The gradient is that of
  # the whole batch, but batch norm has the statistics of a part.
  config.micro_batches = 1
  config.num_negatives = 32_000  # for each term, a multiple of the bank's strata (256 or fewer); 0: every row
  config.negative_sampling = "shared"  # one draw for the batch; "per_image": one for each image, many times slower
  config.temperature = 0.07  # tau
  config.loss = "nce"  # "nce" (the official one), "infonce" (softmax), "eq4" (the paper's equations as written)
  config.pretext = "jigsaw"  # the transform: "jigsaw", "rotation", "rotation_jigsaw"
  config.pretext_weight = 0.5  # lambda: weight of the pretext term, the image term has the rest; 0: no pretext view

  config.data = data = ConfigDict()
  data.source = "tfds"  # "embedded" (textures, no download), "folder" or "tfds"
  data.name = ""  # tfds: name of the data set, as in its catalog
  data.root = ""  # folder: the folder of images; tfds: where prepared sets lie ("": its default)
  data.split = "train"  # tfds: a split; folder: a sub-folder ("": everything)
  data.labels = "none"  # folder: "folder" takes the sub-folders as classes; for kNN and objective=supervised only
  data.num_images = 0  # embedded: how many to draw; else so many images at random instead of all (0)
  data.image_size = 224  # pixels, side of the image view
  data.image_scale = (0.08, 1.0)  # share of the image's area that the image crop covers
  data.num_threads = 16  # that decode and crop
  data.max_bad_fraction = 0.05  # of the images that may turn out broken; with more the run stops

  config.jigsaw = jigsaw = ConfigDict()  # of "jigsaw" and "rotation_jigsaw"; "rotation" turns a crop like the image's
  jigsaw.crop_size = 255  # pixels, side of the crop that is cut into patches
  jigsaw.crop_scale = (0.6, 1.0)  # share of the image's area that it covers
  jigsaw.grid = 3  # cells a side
  jigsaw.patch_size = 64  # pixels, side of a patch, at most crop_size // grid
  jigsaw.augment = "patches"  # the list below is drawn for each patch; "crop": for the whole crop before it is cut
  jigsaw.num_permutations = 0  # orders of the patches; 0: all, 9!
  jigsaw.permutation_subset = "max_avg"  # they differ most on average, "max_min": the two most alike differ most

  # The official list (vissl pirl_jigsaw_4node_resnet50.yaml), drawn anew for the image and for each patch. 0: left out.
  config.photometric = photometric = ConfigDict()
  photometric.brightness = 0.4  # factor uniform in [1 - b, 1 + b]; contrast and saturation likewise
  photometric.contrast = 0.4
  photometric.saturation = 0.4
  photometric.hue = 0.2  # shift uniform in [-h, h], in turns of the colour circle, at most 0.5
  photometric.jitter_probability = 1.0  # of the four above together, in random order
  photometric.group_probability = 0.66  # of posterize, sharpness, solarize and autocontrast together
  photometric.grayscale_probability = 0.2
  photometric.blur_probability = 0.0  # Gaussian
  photometric.blur_radius = (0.1, 2.0)  # pixels, standard deviation
  photometric.flip_probability = 0.5  # horizontal

  # The list of the pretext views: that of the image, but for what is set here.
  config.pretext_photometric = ConfigDict({name: photometric.get_oneway_ref(name) for name in photometric})

  config.model = model = ConfigDict()
  model.arch = "resnet50"
  model.width = 1  # channels times this
  model.stem = "imagenet"  # "imagenet" (7x7, pooling), "3x3", "3x3s2" (stride 2, for CPUs)
  model.head = "linear"  # "linear", or "mlp" (vissl resnet50_mlphead.yaml)
  model.dim = 128  # of an embedding
  # Of the trunk: "float32" or "bfloat16"; weights, statistics and loss stay float32. "float64", with JAX_ENABLE_X64=1,
  # is for all of them, to tell rounding from mistakes.
  model.dtype = "float32"
  model.remat = False  # keep the inputs of the stages alone and compute the rest again for the gradient: less memory
  # Statistics over all devices, so that their number changes nothing; "device": each its own, as the authors ran it
  # (32 images on each of 32 GPUs).
  model.batch_norm = "global"

  config.bank = bank = ConfigDict()
  bank.momentum = 0.5  # weight of the old row
  bank.dtype = "float32"  # of storage: "float32", "bfloat16" or "float64"

  config.optimizer = optimizer = ConfigDict()
  optimizer.learning_rate = 0.12  # for a batch of 1,024; scaled in proportion to the batch
  optimizer.warmup_epochs = 0
  optimizer.warmup_factor = 0.0  # share of the rate at which the warm-up starts
  optimizer.schedule = "cosine"  # "cosine", or "steps": constant, but for a factor at each milestone
  optimizer.end_factor = 0.001  # cosine: share of the rate that is left at the end
  optimizer.update_interval = "epoch"  # cosine: it falls every "epoch", as in the official runs, or every "step"
  optimizer.milestones = (0.6, 0.8)  # steps: shares of the run
  optimizer.decay_factor = 0.1  # steps
  optimizer.momentum = 0.9
  optimizer.weight_decay = 1e-4  # not on batch norm
  optimizer.decay_biases = False  # nor on biases, unless this is set

  config.checkpoint = checkpoint = ConfigDict()
  checkpoint.every_steps = 2_500  # and at every evaluation and at the end
  checkpoint.keep = 3  # the last so many, and the one with the best kNN

  config.evaluate = evaluate = ConfigDict()
  evaluate.every_epochs = 10  # kNN of held-out images against the bank; 0: never
  evaluate.split = ""  # of the held-out images; "": none, and no kNN
  evaluate.num_images = 0  # embedded: how many held-out images to draw
  evaluate.k = 200  # neighbours, or as many as there are
  evaluate.temperature = 0.07
  evaluate.crop_fraction = 0.875  # share of the shorter side that the centre crop keeps
  evaluate.batch_size = 1024  # images, over all devices
  evaluate.learning = False  # ends the run with kNN on raw pixels, untrained and trained network

  config.log = log = ConfigDict()
  log.every_steps = 50
  return config
