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
}
"""From the name, which is that of the config's group, to the file. (`learning` is no evaluation of a stored run.)"""


def protocol_of(name: str) -> Protocol:
  """Returns the protocol of that name; its file is read only now, so that nobody waits for another one's libraries.

  Raises:
    UserError: there is none.
  """
  if name not in PROTOCOLS:
    raise UserError(f"config.protocol={name!r} is unknown; choose from {', '.join(PROTOCOLS)}")
  return importlib.import_module(f"{__name__}.{PROTOCOLS[name]}").PROTOCOL


def reading_of(name: str) -> Reading:
  """Returns what a study takes from a result of the protocol of that name.

  Raises:
    UserError: there is no such protocol, or it gives no figure to compare.
  """
  reading = protocol_of(name).reading
  if reading is None:
    raise UserError(f"the protocol {name} gives no figure to compare")
  return reading
