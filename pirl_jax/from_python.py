"""Pre-training and evaluation as launch.py does them, called from Python: in this process, its signals left alone."""

from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pirl_jax.errors import UserError
from pirl_jax.evaluation import evaluate as evaluation
from pirl_jax.runtime.quieting import hushed
from pirl_jax.training import pretrain as training
from pirl_jax.training.stopping import Stopping


def pretrain(config: ConfigDict | Mapping[str, Any], workdir: str | PathLike[str] = "") -> Path:
  """Returns the absolute folder of the run, once it has been pre-trained as `config` says.

  What the run prints and writes is what launch.py does, and so is how it goes on: the same call in the same folder
  continues from the newest checkpoint, and does nothing where all is done.

  Ctrl-C is Python's own KeyboardInterrupt: the steps since the last checkpoint are lost and done again by the next
  call. (launch.py saves before it stops; but a library must not end the process that it is called in.)

  Args:
    config: with every field, as configs/pirl.py:get_config returns it; or as a dict, such as that in a run's
      config.json.
    workdir: the folder of the run; "": runs/NAME.

  Raises:
    UserError: the config, the data or what lies in `workdir` does not allow it. Nothing has been compiled or written.
  """
  config = _config_of(config, "pretrain")
  folder = Path(fspath(workdir) or f"runs/{config.name}").expanduser()
  with hushed():
    training.pretrain_with(config, folder, Stopping())  # not entered: it takes no signals
  return folder.absolute()


def evaluate(config: ConfigDict | Mapping[str, Any], workdir: str | PathLike[str] = "") -> dict[str, dict[str, Any]]:
  """Returns the figures of each run that `config.checkpoint` names, by the run's label: the name of its folder.

  The figures are those under "figures" of the result file, JSON values; accuracies lie in [0, 1]. Result file, table
  and plot are written and printed as by launch.py.

  Args:
    config: with every field, as configs/evaluate.py:get_config returns it; or as a dict.
    workdir: where results/ is written; "": into the run's folder, those of several runs into runs/compare.

  Raises:
    UserError: the config, a checkpoint or the data does not allow it. Nothing has been compiled or written.
  """
  with hushed():
    outcomes = evaluation.run(_config_of(config, "evaluate"), fspath(workdir))
  return {label: outcome.figures for label, outcome in outcomes.items()}


def _config_of(config: ConfigDict | Mapping[str, Any], job: str) -> ConfigDict:
  """Returns the config as a ConfigDict, after a check that it is one for that job."""
  if not isinstance(config, ConfigDict | Mapping):
    raise UserError(f"config is of type {type(config).__name__}; give a ConfigDict, as configs/*.py:get_config returns "
                    "it, or a dict of all its fields")
  if config.get("job") != job:
    raise UserError(f"the config has job={config.get('job')!r}, and {job} needs one with job={job!r}")
  return config if isinstance(config, ConfigDict) else ConfigDict(config)
