"""What a run will need, before it is started: python launch.py --config=configs/plan.py:SYSTEM[:VARIANT] ...

SYSTEM[:VARIANT] is the run, as in --config=configs/SYSTEM.py:VARIANT, and its fields are set with --config.run.FIELD:

  python launch.py --config=configs/plan.py:pirl:imagenet --config.run.model.dtype=bfloat16 --config.chip=h100-8

No data, GPU or TPU is needed. Printed are the memory of a device by purpose and whether the run fits, the bytes sent,
the time of a step, the host cores for decoding, and the time of the whole run.
"""

import importlib

from ml_collections import ConfigDict

from pirl_jax.configs.study import systems
from pirl_jax.errors import UserError

VARIANTS = ("",)


def get_config(variant: str = "") -> ConfigDict:
  """Returns the config of the plan of a run, by default of the paper's main run.

  Raises:
    UserError: there is no such run.
  """
  name, _, of_system = (variant or "pirl:imagenet").partition(":")
  if name not in systems():
    raise UserError(f"configs/plan.py needs a run, and {name!r} is no system; choose from {', '.join(systems())}, with "
                    "a variant: --config=configs/plan.py:pirl:imagenet")
  config = ConfigDict()
  config.job = "plan"  # the job that launch.py runs
  config.run = importlib.import_module(f"pirl_jax.configs.{name}").get_config(of_system)  # every field of the run
  config.chip = "h100"  # with the number of chips: h100-8, v5e-8; the names are in pirl_jax/runtime/chips.py
  config.memory = 0.0  # GiB of a device, for a smaller card of the same kind; 0: the chip's own memory
  config.images = 0  # training images; 0: as many as the data set of the run is known to have
  config.classes = 1_000  # of the training images, for objective=supervised
  # True: the step is compiled with the chip's own compiler, in one to five minutes, if the compiler is installed.
  # False: an estimate, in seconds.
  config.compile = True
  config.efficiency = 0.8  # share of the maker's rates of arithmetic, memory and links that is reached
  return config
