"""What the builders of small images with one label each share: they are stored as PNG, of one size."""

import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from pirl_jax.data.builders import archives


class LabelledImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A set of images of `SIDE` x `SIDE` px in the classes `NAMES`, in one archive at `URL`.

  A subclass says in `members` what is in which split, and in `read` how a split's records are read.
  """

  URL: ClassVar[str]
  SIDE: ClassVar[int]
  NAMES: ClassVar[tuple[str, ...]]
  DESCRIPTION: ClassVar[str]
  HOMEPAGE: ClassVar[str]
  MORE_FEATURES: ClassVar[dict] = {}
  SPLITS: ClassVar[dict[str, tuple]]
  """The arguments of `read` by split."""

  def read(self, archive: tarfile.TarFile, *arguments: Any) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Yields u8[SIDE, SIDE, 3] and the other features of each record of a split."""
    raise NotImplementedError

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self, description=self.DESCRIPTION, supervised_keys=("image", "label"), homepage=self.HOMEPAGE,
      features=tfds.features.FeaturesDict({
        **self.MORE_FEATURES, "image": tfds.features.Image(shape=(self.SIDE, self.SIDE, 3)),
        "label": tfds.features.ClassLabel(names=self.NAMES)}))

  def _split_generators(self,
                        dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    path = archives.fetch(dl_manager, self.URL)
    return {split: self._generate_examples(path, *arguments) for split, arguments in self.SPLITS.items()}

  def _generate_examples(self, path: pathlib.Path, *arguments: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    with archives.opened(path) as archive:
      # The index is the key, which decides the order in which TFDS stores the records.
      for index, (image, features) in enumerate(self.read(archive, *arguments)):
        yield index, {"image": Image.fromarray(image), **features}
