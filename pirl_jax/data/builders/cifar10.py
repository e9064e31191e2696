"""CIFAR-10 from `cifar-10-binary.tar.gz` (https://www.cs.toronto.edu/~kriz/cifar.html, "binary version")."""

import tensorflow_datasets as tfds
from PIL import Image

from pirl_jax.data.builders import archives

_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_FOLDER = "cifar-10-batches-bin"
_SIZE = 32
_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """50,000 training and 10,000 test pictures of 32 x 32 px in 10 classes, stored as PNG."""

  VERSION = tfds.core.Version("3.0.2")
  url_infos = {
    _URL: tfds.core.download.checksums.UrlInfo(
      size=170052171,
      checksum="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
      filename="cifar-10-binary.tar.gz",
    )
  }

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description="CIFAR-10: 60,000 colour pictures of 32 x 32 px in 10 classes.",
      features=tfds.features.FeaturesDict(
        {
          "id": tfds.features.Text(),
          "image": tfds.features.Image(shape=(_SIZE, _SIZE, 3)),
          "label": tfds.features.ClassLabel(names=_NAMES),
        }
      ),
      supervised_keys=("image", "label"),
      homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
    )

  def _split_generators(self, dl_manager):
    path = archives.fetch(dl_manager, _URL)
    return {
      "train": self._generate_examples(path, "train", [f"data_batch_{i}.bin" for i in range(1, 6)]),
      "test": self._generate_examples(path, "test", ["test_batch.bin"]),
    }

  def _generate_examples(self, path, prefix, members):
    index = 0  # runs on over the files; as the key it also decides the stored order
    with archives.opened(path) as archive:
      for member in members:
        # One byte of label, then the red, the green and the blue plane, row by row.
        for record in archives.records(archive, f"{_FOLDER}/{member}", 1 + 3 * _SIZE**2):
          image = record[1:].reshape(3, _SIZE, _SIZE).transpose(1, 2, 0)
          yield (
            index,
            {
              "id": f"{prefix}_{index:05d}",
              "image": Image.fromarray(image.copy()),
              "label": int(record[0]),
            },
          )
          index += 1
