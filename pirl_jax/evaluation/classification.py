"""Shared by the protocols that classify images: checks of the labels, and the rank of the true class.

Letters: N images, L classes.
"""

import numpy as np

from pirl_jax.errors import UserError
from pirl_jax.evaluation.inputs import Images


def check_classes(train: Images, test: Images, *, protocol: str) -> None:
  """Raises UserError unless both sets have the same classes and one label per image; `protocol` is for the message."""
  for name, images in (("training", train), ("held-out", test)):
    if images.source.multi_label:
      raise UserError(f"{protocol} needs one label an image, and each of the {name} images may show several "
                      "classes; choose other data, or the protocol svm")
    if not images.source.class_names:
      raise UserError(f"{protocol} needs labels, and the {name} images have none "
                      "(for folders of classes: --config.data.labels=folder)")
  names, test_names = (images.source.class_names for images in (train, test))
  if names != test_names:
    different = ", ".join(sorted(set(names) ^ set(test_names))[:5]) or "the order"
    raise UserError(f"the {len(names)} classes of the training images are not the {len(test_names)} of the held-out "
                    f"images (different: {different}); choose splits of one data set")


def read_labels(train: Images, test: Images, *, protocol: str) -> np.ndarray:
  """Returns the labels of the training images, i32[N], with -1 for an image without a label.

  Raises:
    UserError: see `check_classes`; or no image of one of the splits has a label, although there are classes.
  """
  check_classes(train, test, protocol=protocol)
  labels = {name: images.labels() for name, images in (("training", train), ("held-out", test))}
  for name, found in labels.items():
    if not np.any(found >= 0):
      raise UserError(f"{protocol} needs labels, and none of the {len(found)} {name} images has one")
  return labels["training"]


def true_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Returns how many classes rank before the true class, i[N] in [0, L); of equal logits the lower class ranks first.

  Args:
    logits: f32[N, L].
    labels: i32[N], in [0, L).
  """
  own = np.take_along_axis(logits, labels[:, None], axis=1)  # [N, 1]
  before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1])[None] < labels[:, None]))
  return before.sum(axis=1)
