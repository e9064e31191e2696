"""CIFAR-10 from `cifar-10-binary.tar.gz` (https://www.cs.toronto.edu/~kriz/cifar.html, "binary version")."""

import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from pirl_jax.data.builders import archives
from pirl_jax.data.builders.labelled import LabelledImages

_FOLDER = "cifar-10-batches-bin"


class Cifar10(LabelledImages, skip_registration=True):
  """50,000 training and 10,000 test images of 32 x 32 px in 10 classes, stored as PNG."""

  VERSION = tfds.core.Version("3.0.2")
  URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
  SIDE = 32
  NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
  DESCRIPTION = "CIFAR-10: 60,000 colour images of 32 x 32 px in 10 classes."
  HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
  MORE_FEATURES = {"id": tfds.features.Text()}
  SPLITS = {"train": ("train", [f"data_batch_{i}.bin" for i in range(1, 6)]), "test": ("test", ["test_batch.bin"])}
  url_infos = {
    URL: tfds.core.download.checksums.UrlInfo(
      size=170052171,
      checksum="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
      filename="cifar-10-binary.tar.gz",
    )
  }

  def read(self, archive: tarfile.TarFile, *arguments: Any) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Yields the records of the files, one after the other; their numbers run on."""
    prefix, members = arguments
    index = 0
    for member in members:
      # One byte of label, then the red, the green and the blue plane, row by row.
      for record in archives.records(archive, f"{_FOLDER}/{member}", 1 + 3 * self.SIDE**2):
        image = record[1:].reshape(3, self.SIDE, self.SIDE).transpose(1, 2, 0)
        yield image.copy(), {"id": f"{prefix}_{index:05d}", "label": int(record[0])}
        index += 1
