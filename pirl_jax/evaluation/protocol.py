"""The interface of a protocol: its inputs, its functions, and the figures that a study reads from its result."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from pirl_jax.errors import UserError
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.outcome import Outcome
from pirl_jax.evaluation.subjects import Subject
from pirl_jax.runs import Run


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The evaluation of one run or ensemble by one protocol: everything that the functions of a protocol need.

  Attributes:
    config: of the evaluation.
    settings: the protocol's own group of the config, as an instance of `Protocol.settings`.
    subject: the run or ensemble that is evaluated.
    data: the values of `evaluate.DATA_FIELDS`.
    train, test: the training and the held-out images; `test` is None if there are no held-out images.
    open_split: opens any other split of the same data.
    mesh: the devices.
    snapshots: folder in which a protocol stores unfinished work, to resume after an interruption. The folder is deleted
      when the evaluation has finished.
    output: path of the result file without its ending; the names of further files start with it.
  """

  config: ConfigDict
  settings: Any
  subject: Subject
  data: dict[str, Any]
  train: Images
  test: Images | None
  open_split: Callable[[str], Images]
  mesh: jax.sharding.Mesh
  snapshots: Path
  output: Path

  def single_run(self) -> Run:
    """Returns the run, for protocols that need more than the features of the network.

    Raises:
      UserError: the subject is an ensemble.
    """
    if self.subject.is_ensemble:
      folders = ",".join(str(run.folder) for run in self.subject.runs)
      raise UserError(f"{self.config.protocol} with these settings needs the weights, heads or memory bank of one run, "
                      f"and {self.subject.label} is an ensemble; give its runs one by one, "
                      f"--config.checkpoint={folders}")
    return self.subject.runs[0]

  def labelled_test(self) -> Images:
    """Returns the held-out images.

    Raises:
      UserError: there are no held-out images.
    """
    if self.test is None:
      raise UserError(f"{self.config.protocol} needs held-out images, and {self.subject.label} was trained without a "
                      "held-out split; name one with --config.data.test_split=...")
    return self.test

  def either(self, choice: str | None, field: str) -> Images:
    """Returns the training images if `choice` is "train", and the held-out images if it is "test".

    With None the held-out images are returned if there are any, else the training images.

    Raises:
      UserError: another choice (`field` names the config field), or there are no held-out images.
    """
    if choice is None:
      return self.test or self.train
    if choice not in ("train", "test"):
      raise UserError(f"{field}={choice!r} is not possible: choose train or test")
    return self.train if choice == "train" else self.labelled_test()


def beside(evaluation: Evaluation, what: str, ending: str) -> Path:
  """Returns the path of a further file of this evaluation, in the folder of the result file.

  Args:
    evaluation: of one run or ensemble.
    what: the part of the file's name that says what the file holds.
    ending: of the file, without the dot.
  """
  several = evaluation.config.checkpoint.strip(", ").count(",") > 0
  label = re.sub(r"[^A-Za-z0-9_.+]+", "_", evaluation.subject.label) + "-" if several else ""
  return evaluation.output.with_name(f"{evaluation.output.name}-{label}{what}.{ending}")


@dataclasses.dataclass(frozen=True)
class Reading:
  """The figures that a study takes from the result of a protocol.

  Attributes:
    figures: function from the figures of a result to the figures of the study, by name; the first figure is plotted.
    by_layer: (name in the study, name in the result) of a figure that every layer has, or None.
    distances: name of the figure that holds a histogram of distances with `counts` and `edges`, or None.
    needs_test: True if the figures need held-out images.
    needs_labels: True if the figures need labels.
  """

  figures: Callable[[dict[str, Any]], dict[str, float]]
  by_layer: tuple[str, str] | None = None
  distances: str | None = None
  needs_test: bool = True
  needs_labels: bool = True


@dataclasses.dataclass(frozen=True)
class Protocol:
  """One way to evaluate a network.

  Attributes:
    settings: a frozen dataclass with the fields of the protocol's group in configs/evaluate.py. It raises UserError for
      a value that is never possible.
    measure: function of an `Evaluation` that runs the protocol and returns its outcome.
    check: function of an `Evaluation` that is called before anything is measured. It raises UserError if the protocol
      cannot be used with this network or these images.
    share: True if the table shows shares in per cent.
    reading: the figures that a study takes from a result, or None if a study cannot use the protocol.
  """

  settings: type[Any]
  measure: Callable[[Evaluation], Outcome]
  check: Callable[[Evaluation], Any]
  share: bool = True
  reading: Reading | None = None
