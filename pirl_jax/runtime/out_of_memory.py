"""Turns an error that means "out of memory", on a device or on the host, into one line that says what to do."""

import contextlib
import errno
import re
from collections.abc import Callable, Iterator

import jax

from pirl_jax.errors import UserError

BY_XLA = re.compile(r"RESOURCE_EXHAUSTED|out of memory|hbm capacity", re.IGNORECASE)
"""What XLA's errors say, on GPUs, TPUs and CPUs."""

ON_HOST = re.compile(r"Insufficient memory|Unable to allocate|Cannot allocate memory|std::bad_alloc", re.IGNORECASE)
"""What NumPy, OpenCV, the system and C++ say."""

SIZE = re.compile(r"(\d[\d,.]*\s*[KMGT]i?B)|(\d+) bytes", re.IGNORECASE)


@contextlib.contextmanager
def told(way_out: Callable[[], str]) -> Iterator[None]:
  """A context in which running out of memory raises a UserError.

  Args:
    way_out: returns in words what to do; it is called only if memory runs out.

  Raises:
    UserError: memory ran out on a device or on the host.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    where = exhausted(error)
    if not where:
      raise
    size = SIZE.search(str(error))
    asked = f" (asked for {size[1] or f'{int(size[2]) / 2**30:.2f} GiB'})" if size else ""
    raise UserError(f"out of memory on the {where}{asked}; {way_out()}") from error


def exhausted(error: BaseException) -> str:
  """Returns "device" or "host" if the error means that this one has run out of memory, else ""."""
  one: BaseException | None = error
  while one is not None:
    if isinstance(one, jax.errors.JaxRuntimeError) and BY_XLA.search(str(one)):
      return "host" if jax.default_backend() == "cpu" else "device"
    no_memory = isinstance(one, MemoryError) or isinstance(one, OSError) and one.errno == errno.ENOMEM
    if no_memory or ON_HOST.search(str(one)):
      return "host"
    one = one.__cause__
  return ""
