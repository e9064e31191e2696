"""Which form of a computation a platform gets."""

from collections.abc import Callable
from typing import Any

import jax


def by_platform(*arguments: Any, gpu: Callable, default: Callable) -> Any:
  """Returns gpu(*arguments) in a program for a GPU of any maker, and default(*arguments) in every other program.

  The results of both have the same shapes and types. A program holds only the form of its platform.
  """
  return jax.lax.platform_dependent(*arguments, cuda=gpu, rocm=gpu, default=default)
