"""How a folder of images is arranged: split into training and test images, sorted into classes, or neither."""

import dataclasses
import os
from collections.abc import Iterable

from pirl_jax.data.folder import endings_of
from pirl_jax.data.records import check_text, printable
from pirl_jax.errors import UserError

TRAIN = ("train", "training")
"""Names of a sub-folder of training images, in lower case."""

TEST = ("test", "testing", "val", "valid", "validation", "eval")
"""Names of a sub-folder of held-out images, in lower case, the preferred ones first."""


@dataclasses.dataclass(frozen=True)
class Arrangement:
  """What lies in a folder of images.

  Attributes:
    split: the sub-folder of the training images, "" for the whole folder.
    test_split: the sub-folder of the held-out images, "" if there is none.
    labels: "folder" if the images are sorted into one sub-folder a class, else "none"; see `DataSettings.labels`.
    why: in words, why the images have these labels.
  """

  split: str
  test_split: str
  labels: str
  why: str


def arrangement_of(root: str, formats: str = "all", split: str | None = None) -> Arrangement:
  """Returns how the images below `root` are arranged. Only the folders of the first two levels are listed.

  Args:
    root: the folder.
    formats: a key of `folder.ENDINGS`.
    split: the sub-folder of the training images if the user has named it, None if not.

  Raises:
    UserError: there is no such folder, or it cannot be listed.
  """
  check_text("data.root", root)
  root = os.path.abspath(os.path.expanduser(root))
  has_images, names = _listed(root, formats)
  by_name = {name.lower(): name for name in names}
  train = split if split is not None else next((by_name[name] for name in TRAIN if name in by_name), "")
  test = next((by_name[name] for name in TEST if name in by_name and by_name[name] != train), "")
  if split is None and train and not test and (has_images or _filled(root, names, formats) != [train]):
    train = ""
  if not train:
    test = ""
  inside = os.path.join(root, train)
  has_images, names = _listed(inside, formats)
  classes = _filled(inside, names, formats)
  if not has_images and len(classes) >= 2 and all(_listed(os.path.join(inside, name), formats)[0] for name in classes):
    return Arrangement(train, test, "folder", f"{len(classes)} sub-folders with images are the classes")
  return Arrangement(train, test, "none", "the images are not sorted into one sub-folder for each class")


def _filled(folder: str, names: Iterable[str], formats: str) -> list[str]:
  """Returns those of the sub-folders that hold an image or a folder."""
  return [name for name in names if any(_listed(os.path.join(folder, name), formats))]


def arrangement_of_shards(root: str) -> Arrangement:
  """Returns how the tar shards below `root` are arranged: in sub-folders or, by their names, in one folder.

  Args:
    root: the folder of shards, or a pattern of their paths, which is taken as it is.
  """
  check_text("data.root", root)
  why = "the labels that lie beside the images, if there are any"
  folder = os.path.expanduser(root)
  if not os.path.isdir(folder):
    return Arrangement("", "", "folder", why)
  names = sorted(os.listdir(folder))
  shards = [name.lower() for name in names if name.lower().endswith(".tar")]
  by_name = {name.lower(): name for name in names if os.path.isdir(os.path.join(folder, name))}
  for train in TRAIN:
    for test in TEST:
      if train in by_name and test in by_name:
        return Arrangement(by_name[train], by_name[test], "folder", why)
      if any(train in name for name in shards) and any(test in name for name in shards):
        return Arrangement(f"*{train}*.tar", f"*{test}*.tar", "folder", why)
  return Arrangement("", "", "folder", why)


def holds_images(root: str, formats: str = "all") -> bool:
  """Returns whether one of the first ten thousand files below `root` is an image by its ending."""
  number = 0
  for _, _, names in os.walk(os.path.expanduser(root)):
    if any(name.lower().endswith(endings_of(formats)) for name in names):
      return True
    number += len(names)
    if number > 10_000:
      break
  return False


def _listed(folder: str, formats: str) -> tuple[bool, list[str]]:
  """Returns whether images lie directly in the folder, and the names of its sub-folders, sorted."""
  try:
    with os.scandir(folder) as entries:
      return _sorted_out(entries, endings_of(formats))
  except OSError as error:
    raise UserError(f"data.root: {printable(folder)} cannot be listed ({error.strerror}); give the folder of images, "
                    "--config.data.root=DIR") from error


def _sorted_out(entries: Iterable[os.DirEntry], endings: tuple[str, ...]) -> tuple[bool, list[str]]:
  has_images, folders = False, []
  for entry in entries:
    if entry.name.startswith("."):
      continue
    if entry.is_dir():
      folders.append(entry.name)
    else:
      has_images = has_images or entry.name.lower().endswith(endings)
  return has_images, sorted(folders)
