"""What the protocols share that tell classes: labels, and the rank of the true class.

Letters: N images, L classes.
"""

import numpy as np

from pirl_jax.errors import UserError
from pirl_jax.evaluation.inputs import Images


def check_classes(train: Images, test: Images, *, protocol: str) -> None:
  """Raises UserError unless both have labels, one an image, of the same classes."""
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
  """Returns the labels of the training images, i32[N], -1 where one has none.

  Raises:
    UserError: see `check_classes`; or there are classes, and not a single image of one split has a label.
  """
  check_classes(train, test, protocol=protocol)
  labels = {name: images.labels() for name, images in (("training", train), ("held-out", test))}
  for name, found in labels.items():
    if not np.any(found >= 0):
      raise UserError(f"{protocol} needs labels, and none of the {len(found)} {name} images has one")
  return labels["training"]


def true_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Returns how many classes come before the true one, i[N]; of equal logits the lower class comes first.

  Args:
    logits: f32[N, L].
    labels: i32[N], in [0, L).
  """
  own = np.take_along_axis(logits, labels[:, None], axis=1)  # [N, 1]
  before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1])[None] < labels[:, None]))
  return before.sum(axis=1)
