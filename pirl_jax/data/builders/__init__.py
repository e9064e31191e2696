"""CIFAR-10, STL-10 and VOC2007 for TFDS, prepared without TensorFlow from the official archives.

TFDS's own builders of these read the archives through TensorFlow. These have the same names, versions,
features, splits and keys, so that a set that TFDS has prepared is taken as it lies on disk. They stay out of
TFDS's registry: there the names are taken.
"""

from pirl_jax.data.builders.cifar10 import Cifar10
from pirl_jax.data.builders.stl10 import Stl10
from pirl_jax.data.builders.voc2007 import Voc

OWN_BUILDERS = {"cifar10": Cifar10, "stl10": Stl10, "voc/2007": Voc}
