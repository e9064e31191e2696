"""Lists and verifies a run's checkpoints: python launch.py --config=configs/checkpoints.py --config.checkpoint=RUN"""

from ml_collections import ConfigDict

from pirl_jax.errors import UserError

VARIANTS = ("",)


def get_config(variant: str = "") -> ConfigDict:
  """Returns the config, which has no variants.

  Raises:
    UserError: a variant is given.
  """
  if variant not in VARIANTS:
    raise UserError(f"configs/checkpoints.py has no variant {variant!r}")
  config = ConfigDict()
  config.job = "checkpoints"  # the job that launch.py runs
  config.checkpoint = ""  # the run's folder
  return config
