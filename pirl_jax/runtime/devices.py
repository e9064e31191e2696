"""What a run computes on, in one line, and a warning if a card is there and not used."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax

from pirl_jax.runtime import memory, mesh

GPU_TRACES = ("/proc/driver/nvidia/version", "/dev/nvidia0")
"""Files that NVIDIA's driver makes."""

TPU_TRACES = ("/dev/accel0", "/dev/vfio/0")
"""Files of the TPUs of a TPU VM."""


def lines() -> Iterator[str]:
  """Yields a line that names all devices, and a warning if a card is there and JAX computes on the CPU."""
  device = jax.devices()[0]
  if device.platform == "cpu":
    number = f"{jax.device_count()} x " if jax.device_count() > 1 else ""
    yield f"devices: {number}CPU ({num_cores()} cores, {memory.host_bytes() / 2**30:.1f} GiB)"
    if warning := unused_card():
      yield warning
    return
  yield f"devices: {jax.device_count()} x {device.device_kind} ({mesh.device_bytes() / 2**30:.1f} GiB for JAX on each)"


def unused_card() -> str:
  """Returns a warning that names a card which is there and which JAX does not use, "" if there is none.

  If the environment chooses the CPU (JAX_PLATFORMS), there is nothing to warn of.
  """
  if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
    return ""
  if any(Path(name).exists() for name in GPU_TRACES) or shutil.which("nvidia-smi"):
    installed = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    return "WARNING: there is an NVIDIA GPU, and JAX does not use it; " + (
      "its CUDA plug-in is installed and found no driver that fits; the reason is told by: python -c 'import jax; "
      "jax.devices(\"cuda\")'" if installed else 'install JAX for it: pip install -U "jax[cuda13]"')
  if any(Path(name).exists() for name in TPU_TRACES):
    installed = importlib.util.find_spec("libtpu")
    return "WARNING: there is a TPU, and JAX does not use it; " + (
      "perhaps another program holds it" if installed else 'install JAX for it: pip install -U "jax[tpu]"')
  return ""


def num_cores() -> int:
  """Returns the number of cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
