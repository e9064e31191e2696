"""Chips to compile for without having one: their compilers run on any CPU machine.

The compilers come in wheels, `WHEELS`. What they compile cannot be run here, but their programs tell kernels, memory
and traffic, see `pirl_jax/planning`.
"""

import dataclasses
import importlib.metadata
import os
import re

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from pirl_jax.errors import UserError
from pirl_jax.runtime.mesh import AXIS


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip, as its maker and its compiler describe it.

  Attributes:
    name: as in "v5e-8", without the number of chips.
    platform: "tpu" or "cuda".
    memory: in bytes, as the driver reports it.
    bfloat16: FLOP a second.
    float32: FLOP a second.
    memory_rate: bytes a second between the chip and its memory.
    link_rate: bytes a second between the chip and the others.
    clock_rate: cycles a second, of a chip whose compiler estimates cycles; else 0.
  """

  name: str
  platform: str
  memory: float
  bfloat16: float
  float32: float
  memory_rate: float
  link_rate: float
  clock_rate: float = 0.0

  @property
  def default_pool(self) -> float:
    """Returns the bytes that JAX takes of the memory if nothing else is set."""
    return {"cuda": 0.75, "tpu": 0.98}[self.platform] * self.memory


CHIPS = {chip.name: chip for chip in (
  Chip("a100", "cuda", 85.1e9, 312e12, 19.5e12, 2.0e12, 300e9),
  Chip("h100", "cuda", 84_929_347_584, 989e12, 67e12, 3.35e12, 450e9),
  Chip("h200", "cuda", 150_754_820_096, 989e12, 67e12, 4.8e12, 450e9),
  # A TPU has no float32 units: six products of bfloat16 make one.
  Chip("v4", "tpu", 32 * 2**30, 275e12, 275e12 / 6, 1.2e12, 150e9),
  Chip("v5e", "tpu", 16 * 2**30, 197e12, 197e12 / 6, 0.82e12, 100e9, 1.5e9),
  Chip("v5p", "tpu", 95 * 2**30, 459e12, 459e12 / 6, 2.77e12, 300e9, 1.75e9),
  Chip("v6e", "tpu", 32 * 2**30, 918e12, 918e12 / 6, 1.64e12, 225e9, 1.75e9),
)}

TOPOLOGIES = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
"""Of a number of v5e or v6e chips."""

TOPOLOGIES_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
"""Of a number of v4 or v5p chips."""

NAMED_BY_CORES = ("v4", "v5p")
"""Google's names of these count cores: a v5p-8 has 4 chips."""

COMPILED = ("v5e", "v5p", "v6e", "h100", "h200")
"""Those that `chips_mesh` knows how to describe to their compiler."""

WHEELS = {
  "tpu": ("libtpu==0.0.42.*",),
  "cuda": ("jax-cuda13-plugin==0.10.2", "jax-cuda13-pjrt==0.10.2", "nvidia-cuda-nvcc==13.0.88",
           "nvidia-nvvm==13.0.88", "nvidia-cuda-runtime==13.0.96"),
}
"""Their requirements, as jax 0.10.2 asks for them."""

ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}
"""What libtpu otherwise asks the host of a TPU."""

XLA_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
"""Autotuning would run kernels on the GPU that is not there."""

TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""
"""An H100 or H200 as XLA describes it, but for bandwidth and size of its memory."""

TARGETS = {
  "h100": TARGET.format(bandwidth=3352320000000, memory=CHIPS["h100"].memory, name="NVIDIA H100 80GB HBM3"),
  "h200": TARGET.format(bandwidth=4800000000000, memory=CHIPS["h200"].memory, name="NVIDIA H200"),
}


def prepare_compilers() -> None:
  """Sets the environment that the compilers read. It is to be called before JAX looks for a device."""
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
  jax.config.update("jax_platforms", "cpu")


def read_name(name: str) -> tuple[Chip, int]:
  """Returns what the maker of a chip says of it, and the number of chips.

  Args:
    name: of chip and number: "v5e-8", "v6e-16", "h100", "h100-8", "h200"; a TPU without a number: 8.

  Raises:
    UserError: there is no such chip, or no slice of so many TPUs.
  """
  kind, _, number = name.partition("-")
  if kind not in CHIPS or not re.fullmatch(r"([1-9]\d*)?", number):
    raise UserError(f"chip={name!r} is unknown; choose from {', '.join(CHIPS)}, with a number of chips: v5e-8, h100-8")
  chip = CHIPS[kind]
  if chip.platform == "cuda":
    return chip, int(number or 1)
  slices, per_name = _slices(kind), 2 if kind in NAMED_BY_CORES else 1
  count, rest = divmod(int(number or 8), per_name)
  if rest or count not in slices:
    raise UserError(f"chip={name}: there is no such slice; choose from "
                    f"{', '.join(f'{kind}-{count * per_name}' for count in slices)}")
  return chip, count


def _slices(kind: str) -> dict[int, str]:
  return TOPOLOGIES_3D if kind in NAMED_BY_CORES else TOPOLOGIES


def way_to_compile(name: str) -> str:
  """Returns what has to be done before `chips_mesh` can compile for these chips, "" if nothing.

  Args:
    name: see `read_name`.
  """
  chip, _ = read_name(name)
  if chip.name not in COMPILED:
    return f"no compiler is known for {chip.name}; there is one for {', '.join(COMPILED)}"
  if all(_is_installed(wheel.partition("==")[0]) for wheel in WHEELS[chip.platform]):
    return ""
  wheels = " ".join(f'"{wheel}"' for wheel in WHEELS[chip.platform])
  return (f"pip install --no-deps --target=compilers {wheels}, and then PYTHONPATH=compilers (versions for jax 0.10.2; "
          f"this is {jax.__version__})")


def chips_mesh(name: str) -> tuple[Mesh, Chip]:
  """Returns the mesh, with the one axis "data", of chips that are not there, and what their maker says of one.

  Args:
    name: see `read_name`.

  Raises:
    UserError: an unknown name, or the chip's compiler is not installed.
  """
  chip, count = read_name(name)
  if way := way_to_compile(name):
    raise UserError(f"chip={name}: to compile for it: {way}")
  if chip.platform == "cuda":
    devices = topologies.get_topology_desc(
      platform="cuda", target_config=TARGETS[chip.name], topology=f"1x1x{count}").devices
  else:
    slices = _slices(chip.name)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip.name}:{slices[count]}").devices
  return Mesh(np.array(devices), (AXIS,)), chip


def _is_installed(wheel: str) -> bool:
  try:
    importlib.metadata.version(wheel)
  except importlib.metadata.PackageNotFoundError:
    return False
  return True
