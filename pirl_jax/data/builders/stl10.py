"""STL-10 from `stl10_binary.tar.gz` (http://ai.stanford.edu/~acoates/stl10/)."""

import itertools

import tensorflow_datasets as tfds
from PIL import Image

from pirl_jax.data.builders import archives

_URL = "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"
_FOLDER = "stl10_binary"
_SIZE = 96
_NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


class Stl10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """5,000 training, 8,000 test and 100,000 unlabelled pictures of 96 x 96 px, stored as PNG."""

  VERSION = tfds.core.Version("1.0.0")
  url_infos = {
    _URL: tfds.core.download.checksums.UrlInfo(
      size=2640397119,
      checksum="f31fd99273a1acb8609c8db427cebb1de3f71de77758cdc0e22956e1289b9866",
      filename="stl10_binary.tar.gz",
    )
  }

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description="STL-10: colour pictures of 96 x 96 px, 13,000 in 10 classes and 100,000 unlabelled.",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(_SIZE, _SIZE, 3)),
          "label": tfds.features.ClassLabel(names=_NAMES),
        }
      ),
      supervised_keys=("image", "label"),
      homepage="http://ai.stanford.edu/~acoates/stl10/",
    )

  def _split_generators(self, dl_manager):
    path = archives.fetch(dl_manager, _URL)
    return {
      "train": self._generate_examples(path, "train_X.bin", "train_y.bin"),
      "test": self._generate_examples(path, "test_X.bin", "test_y.bin"),
      "unlabelled": self._generate_examples(path, "unlabeled_X.bin", None),
    }

  def _generate_examples(self, path, images, labels):
    with archives.opened(path) as archive:
      labelled = labels is not None
      # Labels count from 1 in the file. They are read whole, ahead of the pictures: to go to and fro in a
      # compressed archive is to unpack it again and again.
      labels = (
        [int(y[0]) - 1 for y in archives.records(archive, f"{_FOLDER}/{labels}", 1)] if labelled else []
      )
      pictures = archives.records(archive, f"{_FOLDER}/{images}", 3 * _SIZE**2)
      for index, (record, label) in enumerate(
        zip(pictures, labels if labelled else itertools.repeat(-1), strict=labelled)
      ):
        # Three planes, each column by column.
        image = record.reshape(3, _SIZE, _SIZE).transpose(2, 1, 0)
        yield index, {"image": Image.fromarray(image.copy()), "label": label}
