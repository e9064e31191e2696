"""Pre-training of image networks by pretext invariance (PIRL, arXiv 1912.01991) in JAX and Flax.

This module is the interface for Python, see docs/python.md. Each name is imported at its first use, so importing the
package loads neither JAX nor any other library.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pirl_jax.errors import UserError

if TYPE_CHECKING:
  from pirl_jax.evaluation.encoder import Encoder, load
  from pirl_jax.launching.from_python import evaluate, pretrain

__all__ = ["Encoder", "UserError", "__version__", "evaluate", "load", "pretrain"]

__version__ = "0.1.0"

_ROOMS = {"load": "pirl_jax.evaluation.encoder", "Encoder": "pirl_jax.evaluation.encoder",
          "pretrain": "pirl_jax.launching.from_python", "evaluate": "pirl_jax.launching.from_python"}


def __getattr__(name: str) -> Any:
  """Returns the public function or class of this name, imported from its module."""
  if name not in _ROOMS:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  globals()[name] = value = getattr(importlib.import_module(_ROOMS[name]), name)
  return value


def __dir__() -> list[str]:
  """Returns the public names, including those that have not been imported yet."""
  return sorted(__all__)
