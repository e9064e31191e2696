"""Pre-training of image networks by pretext invariance (PIRL, arXiv 1912.01991) in JAX and Flax.

The door for Python, see docs/python.md. Each name is imported when it is first asked for, so that the package itself
loads neither JAX nor any other library.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pirl_jax.errors import UserError

if TYPE_CHECKING:
  from pirl_jax.evaluation.encoder import Encoder, load
  from pirl_jax.from_python import evaluate, pretrain

__all__ = ["Encoder", "UserError", "__version__", "evaluate", "load", "pretrain"]

__version__ = "0.1.0"

_ROOMS = {"load": "pirl_jax.evaluation.encoder", "Encoder": "pirl_jax.evaluation.encoder",
          "pretrain": "pirl_jax.from_python", "evaluate": "pirl_jax.from_python"}


def __getattr__(name: str) -> Any:
  """Returns what the package offers under that name, from the module in which it is written."""
  if name not in _ROOMS:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  globals()[name] = value = getattr(importlib.import_module(_ROOMS[name]), name)
  return value


def __dir__() -> list[str]:
  """Returns the names that are offered, those not yet imported too."""
  return sorted(__all__)
