"""Compares the features of a restored network with those of its exported arrays, layer by layer.

Letters: N images, H W height and width, C channels.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pirl_jax.errors import UserError
from pirl_jax.models.network import Model
from pirl_jax.models.resnet import STEMS, ResNet
from pirl_jax.weights.forward import trunk_forward

TOLERANCE = 1e-5
"""Largest difference of a layer, as a share of its largest value. Both sides compute in float64, which gives about
1e-14; two arrays of one shape that are exchanged, or a transposed kernel, give 1e-2. (In float32 the rounding errors of
an untrained ResNet-50 alone are 1.2e-5.)"""

IMAGE_SHAPE = (1, 79, 65, 3)
"""Of the image that is compared: odd sides, which are not equal, show wrong padding and exchanged axes."""


def largest_differences(model: Model, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Returns {layer: largest difference, as a share of the largest value} of the network and its exported arrays.

  The network computes in JAX, see `trunk_features`; the arrays pass NumPy, see `forward`. Both are in float64.

  Args:
    model: a network, not an ensemble.
    arrays: of its trunk, by torchvision's names.
  """
  trunk: ResNet = model.single.trunk
  _, stride, pool = STEMS[trunk.stem]
  image = np.random.default_rng(0).normal(size=IMAGE_SHAPE)
  ours = trunk_features(model, image)
  theirs = trunk_forward(arrays, image.transpose(0, 3, 1, 2), stride=stride, pool=pool)
  return {layer: relative_difference(value, theirs[layer]) for layer, value in ours.items()}


def trunk_features(model: Model, image: np.ndarray) -> dict[str, np.ndarray]:
  """Returns the features of each layer f64[N, C, H, W] and "pooled" f64[N, C], in PyTorch's order of axes.

  They are computed on a CPU in float64, whatever the device and the type of the run.

  Args:
    model: a network, not an ensemble.
    image: f[N, H, W, 3], normalised.
  """
  trunk = model.single.trunk.clone(dtype=jnp.float64, remat=False)
  own = {kind: jax.tree.map(lambda value: np.asarray(value, np.float64), tree["trunk"])
         for kind, tree in model.variables.items()}
  with jax.default_device(jax.local_devices(backend="cpu")[0]), jax.enable_x64(True):
    # The program runs once: without LLVM's optimisations it is compiled in half the time.
    forward = jax.jit(lambda variables, image: trunk.apply(variables, image, train=False),
                      compiler_options={"xla_backend_optimization_level": 0})
    found: Any = forward(own, np.asarray(image, np.float64))
  names = ("conv1", *(name for name in found if name.startswith("res")), "pooled")
  return {layer: np.moveaxis(np.asarray(found[layer]), -1, 1) for layer in names}


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Returns the largest difference of two arrays of one shape, as a share of the largest absolute value of `theirs`."""
  return float(np.max(np.abs(ours - theirs)) / max(float(np.max(np.abs(theirs))), 1e-30))


def check_equal(differences: Mapping[str, float], *, what: str) -> str:
  """Returns a line with the largest difference of each layer; `what` names the file.

  Raises:
    UserError: a difference is above `TOLERANCE`.
  """
  shown = ", ".join(f"{layer} {value:.1e}" for layer, value in differences.items())
  if not all(value <= TOLERANCE for value in differences.values()):
    raise UserError(f"{what} does not compute what the run computes and was not written; largest difference, as a "
                    f"share of the largest value: {shown}; at most {TOLERANCE:g} is right")
  return f"largest difference to the run, as a share of the largest value: {shown}"
