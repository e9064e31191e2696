"""What the checkpoints of a run are worth: python launch.py --config=configs/checkpoints.py --config.checkpoint=RUN"""

from ml_collections import ConfigDict

from pirl_jax.errors import UserError

VARIANTS = ("",)


def get_config(variant: str = "") -> ConfigDict:
  """Returns the config; there is one alone.

  Raises:
    UserError: a variant is asked for.
  """
  if variant not in VARIANTS:
    raise UserError(f"configs/checkpoints.py has no variant {variant!r}")
  config = ConfigDict()
  config.job = "checkpoints"  # what launch.py does with this config
  config.checkpoint = ""  # the run's folder
  return config
