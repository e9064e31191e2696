"""Pre-training and evaluation, called from Python. They run in the calling process and do not change its signals."""

from collections.abc import Mapping
from os import PathLike, fspath
from os.path import expanduser
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pirl_jax.errors import UserError
from pirl_jax.evaluation import evaluate as evaluation
from pirl_jax.runtime.quieting import hushed
from pirl_jax.runtime.speaking import unfailing
from pirl_jax.training import pretrain as training
from pirl_jax.training.stopping import Stopping


def pretrain(config: ConfigDict | Mapping[str, Any], workdir: str | PathLike[str] = "") -> Path:
  """Pre-trains a run as `config` says, and returns the absolute folder of the run.

  The run prints and writes the same as with launch.py. The same call in the same folder resumes from the newest
  checkpoint; if the run is finished, the call does nothing.

  Ctrl-C raises KeyboardInterrupt. The steps since the last checkpoint are then lost, and the next call repeats them.
  (launch.py saves the state before it stops, but a library must not end the process that calls it.)

  Args:
    config: a config with every field, as configs/pirl.py:get_config returns it, or a dict of all its fields, as in a
      run's config.json.
    workdir: the folder of the run; "" for runs/NAME.

  Raises:
    UserError: the config or the data are wrong, or `workdir` holds something else. In this case nothing has been
      compiled or written.
  """
  config = _config_of(config, "pretrain")
  folder = Path(fspath(workdir) or f"runs/{config.name}").expanduser()
  with hushed(), unfailing():
    training.pretrain_with(config, folder, Stopping())  # not entered: it takes no signals
  return folder.absolute()


def evaluate(config: ConfigDict | Mapping[str, Any], workdir: str | PathLike[str] = "") -> dict[str, dict[str, Any]]:
  """Evaluates the runs that `config.checkpoint` names. Returns their figures by the run's label, its folder's name.

  The figures are the JSON values under "figures" in the result file; accuracies lie in [0, 1]. The result file and the
  plot are written and the table is printed, as with launch.py.

  Args:
    config: a config with every field, as configs/evaluate.py:get_config returns it, or a dict of all its fields.
    workdir: the folder in which results/ is written; "" for the run's folder, or runs/compare for several runs.

  Raises:
    UserError: the config, a checkpoint or the data does not fit the evaluation. In this case nothing has been compiled
      or written.
  """
  with hushed(), unfailing():
    outcomes = evaluation.run(_config_of(config, "evaluate"), expanduser(fspath(workdir)))
  return {label: outcome.figures for label, outcome in outcomes.items()}


def _config_of(config: ConfigDict | Mapping[str, Any], job: str) -> ConfigDict:
  """Returns the config as a ConfigDict, after checking that it is a config for `job`."""
  if not isinstance(config, ConfigDict | Mapping):
    raise UserError(f"config is of type {type(config).__name__}; give a ConfigDict, as configs/*.py:get_config returns "
                    "it, or a dict of all its fields")
  if config.get("job") != job:
    raise UserError(f"the config has job={config.get('job')!r}, and {job} needs one with job={job!r}")
  return config if isinstance(config, ConfigDict) else ConfigDict(config)
