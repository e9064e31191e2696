"""One HTML file that shows runs: python launch.py --config=configs/report.py --config.checkpoint=RUN[,RUN...]

The file is RUN/report.html or, for several runs, runs/compare/report.html; --workdir=DIR writes it to DIR.
"""

from ml_collections import ConfigDict

from pirl_jax.errors import UserError

VARIANTS = ("",)


def get_config(variant: str = "") -> ConfigDict:
  """Returns the config, which has no variants.

  Raises:
    UserError: a variant is given.
  """
  if variant not in VARIANTS:
    raise UserError(f"configs/report.py has no variant {variant!r}")
  config = ConfigDict()
  config.job = "report"  # the job that launch.py runs
  config.checkpoint = ""  # the run's folder; several folders, separated by commas, are compared
  return config
