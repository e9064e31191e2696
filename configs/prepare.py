"""Writes a set of smaller copies of images, which a run reads faster.

  python launch.py --config=configs/prepare.py --config.data.root=IMAGES --config.name=photographs --config.root=SETS
  python launch.py --config=configs/pirl.py:imagenet --config.data.name=photographs --config.data.root=SETS
"""

from ml_collections import ConfigDict

from pirl_jax.errors import UserError

VARIANTS = ("",)


def get_config(variant: str = "") -> ConfigDict:
  """Returns the config, which has no variants.

  Raises:
    UserError: a variant is given.
  """
  if variant not in VARIANTS:
    raise UserError(f"configs/prepare.py has no variant {variant!r}")
  config = ConfigDict()
  config.job = "prepare"  # the job that launch.py runs
  config.name = ""  # of the new set, in lower case, with digits and underscores
  config.root = ""  # folder of prepared sets, in which the new set is written ("": TFDS's default)
  # Splits to read. folder: sub-folders; "" is the whole folder, and is stored as the split "train".
  config.splits = ("",)
  config.shorter_side = 512  # pixels; a larger image is shrunk to this size, a smaller image is kept as it is
  config.quality = 95  # of the JPEG files, 1 to 100

  config.data = data = ConfigDict()
  data.source = "folder"  # "folder", "tfds" or "webdataset": where the images come from
  data.name = ""  # tfds: name of the data set in TFDS's catalog
  data.root = ""  # folder: the folder of images; tfds: folder of prepared sets ("": TFDS's default)
  data.labels = "none"  # folder: "folder" takes the sub-folders as classes
  data.formats = "all"  # folder: see configs/base.py
  data.strict = True  # a JPEG whose decoder finds corrupt data counts as broken
  data.full_range = True  # an image of 16 bits is scaled by its own largest value
  data.upright = True  # a copy is turned as the EXIF orientation of the image says
  data.num_images = 0  # number of images to take at random of each split, 0 for all
  data.num_threads = 16  # threads that decode and encode
  data.max_bad_fraction = 0.05  # largest share of images that cannot be read; with more the preparation stops
  return config
