"""`open_source`: the one door to every kind of pictures."""

from pirl_jax.data.embedded import TextureSource
from pirl_jax.data.folder import FolderSource
from pirl_jax.data.records import Record, Source
from pirl_jax.data.subsets import Subset, shuffled
from pirl_jax.errors import UserError

__all__ = ["Record", "Source", "open_source"]

SOURCES = ("embedded", "folder", "tfds")
LABELS = ("none", "folder")


def open_source(
  source: str,
  *,
  name: str,
  root: str,
  split: str,
  labels: str,
  image_size: int,
  num_images: int,
  class_names: tuple[str, ...] | None = None,
) -> Source:
  """Opens the pictures of one split; a TFDS set that is not there yet is prepared first.

  Args:
    source: "embedded", "folder" or "tfds".
    name: tfds: name of the data set, with its config and version if wanted ("imagenet2012", "cifar10:3.0.2").
    root: folder: the folder of pictures; tfds: its data directory, "" for its default.
    split: embedded: any name; folder: a sub-folder, "" for all; tfds: a split ("train", "train[:10%]").
    labels: folder: "folder" (the first sub-folder is the class) or "none". The other two bring their own
      labels.
    image_size: embedded only: side in pixels.
    num_images: embedded: how many to draw; else so many at random, the same ones in every run, or all (0).
    class_names: folder: the classes of the training pictures, when a held-out split is opened.

  Raises:
    UserError: for whatever a user can mend.
  """
  if source not in SOURCES:
    raise UserError(f"data.source={source!r} is unknown; choose one of: {', '.join(SOURCES)}")
  if labels not in LABELS:
    raise UserError(f"data.labels={labels!r} is unknown; choose one of: {', '.join(LABELS)}")
  if source == "embedded":
    return TextureSource(num_images, size=image_size, split=split)
  if source == "folder":
    pictures = FolderSource(root, split=split, labels=labels, class_names=class_names)
  else:
    from pirl_jax.data.tfds_source import TfdsSource  # half a second that the other two need not wait

    pictures = TfdsSource(name, data_dir=root, split=split)
  if num_images > len(pictures):
    raise UserError(f"num_images={num_images}, but there are only {len(pictures)} pictures; 0 takes all of them")
  return Subset(pictures, sorted(shuffled(range(len(pictures)), seed=0)[:num_images])) if num_images else pictures
