"""STL-10 from `stl10_binary.tar.gz` (http://ai.stanford.edu/~acoates/stl10/)."""

import itertools
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from pirl_jax.data.builders import archives
from pirl_jax.data.builders.labelled import LabelledImages

_FOLDER = "stl10_binary"


class Stl10(LabelledImages, skip_registration=True):
  """5,000 training, 8,000 test and 100,000 unlabelled images of 96 x 96 px, stored as PNG."""

  VERSION = tfds.core.Version("1.0.0")
  URL = "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"
  SIDE = 96
  NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
  DESCRIPTION = "STL-10: colour images of 96 x 96 px, 13,000 in 10 classes and 100,000 unlabelled."
  HOMEPAGE = "http://ai.stanford.edu/~acoates/stl10/"
  SPLITS = {"train": ("train_X.bin", "train_y.bin"), "test": ("test_X.bin", "test_y.bin"),
            "unlabelled": ("unlabeled_X.bin", None)}
  url_infos = {
    URL: tfds.core.download.checksums.UrlInfo(
      size=2640397119,
      checksum="f31fd99273a1acb8609c8db427cebb1de3f71de77758cdc0e22956e1289b9866",
      filename="stl10_binary.tar.gz",
    )
  }

  def read(self, archive: tarfile.TarFile, *arguments: Any) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Yields the records of a file of images and of one of labels, which may be None."""
    images, labels = arguments
    labelled = labels is not None
    # Labels count from 1 in the file. They are read whole, ahead of the images: to go to and fro in a compressed
    # archive is to unpack it again and again.
    labels = [int(y[0]) - 1 for y in archives.records(archive, f"{_FOLDER}/{labels}", 1)] if labelled else (
      itertools.repeat(-1))
    records = archives.records(archive, f"{_FOLDER}/{images}", 3 * self.SIDE**2)
    for record, label in zip(records, labels, strict=labelled):
      # Three planes, each column by column.
      yield record.reshape(3, self.SIDE, self.SIDE).transpose(2, 1, 0).copy(), {"label": label}
