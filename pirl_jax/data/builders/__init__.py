"""CIFAR-10, STL-10 and VOC2007 for TFDS, prepared without TensorFlow from the official archives.

TFDS's own builders of these sets need TensorFlow to read the archives. The builders here have the same names, versions,
features, splits and keys, so a set that TFDS has prepared is used as it is on disk. The builders here are not in TFDS's
registry, because TFDS's own builders have these names there.
"""

from pirl_jax.data.builders.cifar10 import Cifar10
from pirl_jax.data.builders.stl10 import Stl10
from pirl_jax.data.builders.voc2007 import Voc

OWN_BUILDERS = {"cifar10": Cifar10, "stl10": Stl10, "voc/2007": Voc}
