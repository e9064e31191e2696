"""The protocols by name. A new one is a file in this folder and a line in `PROTOCOLS`: see docs/extending.md."""

import importlib

from pirl_jax.errors import UserError
from pirl_jax.evaluation.protocol import Protocol, Reading

PROTOCOLS = {
  "knn": "knn",
  "linear": "linear",
  "svm": "svm",
  "low_shot": "low_shot",
  "semi_supervised": "semi_supervised",
  "invariance": "invariance",
  "retrieval": "retrieval",
  "features": "export",
  "predict": "predict",
}
"""The file of each protocol, by its name, which is also the name of its config group. `learning` is not listed, because
it does not evaluate a stored run."""


def protocol_of(name: str) -> Protocol:
  """Returns the protocol of this name. Its file is imported only now, so other protocols need not load its libraries.

  Raises:
    UserError: there is no protocol of this name.
  """
  if name not in PROTOCOLS:
    raise UserError(f"config.protocol={name!r} is unknown; choose from {', '.join(PROTOCOLS)}")
  return importlib.import_module(f"{__name__}.{PROTOCOLS[name]}").PROTOCOL


def reading_of(name: str) -> Reading:
  """Returns the `Reading` of the protocol of this name: the figures that a study takes from its results.

  Raises:
    UserError: there is no such protocol, or it has no figure that a study could compare.
  """
  reading = protocol_of(name).reading
  if reading is None:
    raise UserError(f"the protocol {name} gives no figure to compare")
  return reading
