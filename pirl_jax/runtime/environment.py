"""What in the environment of a process changes the numbers of a run, beside its config, images and devices."""

import os
import re
from typing import Any

import jax

DRAWS = ("jax_default_prng_impl", "jax_enable_x64", "jax_threefry_partitionable", "jax_random_seed_offset")
"""JAX's settings that give other views, negatives or first weights, or compute in other types."""

ROUNDING = ("jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_disable_most_optimizations")
"""JAX's settings that change last bits."""

_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")

_NO_NUMBERS = re.compile(r"--xla_(force_host_platform_device_count|dump_\w+|.*(parallel|timeout|cache)\w*)(=.*)?")
"""Flags of XLA that change no number."""


def numeric_environment() -> dict[str, dict[str, Any]]:
  """Returns {"draws": {...}, "rounding": {...}}, JSON values by name.

  A run with other "draws" is another run. Other "rounding" changes last bits, as another kind of device does.
  """
  values = jax.config.values
  rounding = {name: values.get(name) for name in ROUNDING}
  for name in _VARIABLES:
    flags = [flag for flag in os.environ.get(name, "").split() if not _NO_NUMBERS.fullmatch(flag)]
    rounding[name] = " ".join(sorted(flags))
  return {"draws": {name: values.get(name) for name in DRAWS}, "rounding": rounding}
