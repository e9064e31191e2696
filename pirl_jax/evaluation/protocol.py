"""What a protocol is: what it is given, how it is run, and what a study reads of its result."""

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
  """One run, or ensemble, under one protocol: all that a protocol's adapter reads.

  Attributes:
    config: of the evaluation.
    settings: the protocol's own group of the config, as the dataclass that the protocol names.
    subject: what is judged.
    data: the fields `DATA_FIELDS`, resolved.
    train, test: the images; `test` is None where there are none.
    open_split: opens any other split of the same data.
    mesh: the devices.
    snapshots: folder of what an interrupted protocol has done, gone when the evaluation has ended.
    output: stem of the files beside the result file.
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
    """Returns the run, for what needs more of it than features.

    Raises:
      UserError: it is an ensemble.
    """
    if self.subject.is_ensemble:
      folders = ",".join(str(run.folder) for run in self.subject.runs)
      raise UserError(f"{self.config.protocol} as asked for needs the weights, heads or memory bank of one run, and "
                      f"{self.subject.label} is an ensemble; give its runs one by one, --config.checkpoint={folders}")
    return self.subject.runs[0]

  def labelled_test(self) -> Images:
    """Returns the held-out images.

    Raises:
      UserError: there are none.
    """
    if self.test is None:
      raise UserError(f"{self.config.protocol} needs held-out images, and {self.subject.label} was trained without a "
                      "held-out split; name one with --config.data.test_split=...")
    return self.test

  def either(self, choice: str | None, field: str) -> Images:
    """Returns the training or the held-out images as `choice` says; None: the held-out ones where there are any."""
    if choice is None:
      return self.test or self.train
    if choice not in ("train", "test"):
      raise UserError(f"{field}={choice!r} is not possible: choose train or test")
    return self.train if choice == "train" else self.labelled_test()


def beside(evaluation: Evaluation, what: str, ending: str) -> Path:
  """Returns the path of a further file of one subject's evaluation, beside its result file."""
  several = evaluation.config.checkpoint.strip(", ").count(",") > 0
  label = re.sub(r"[^A-Za-z0-9_.+]+", "_", evaluation.subject.label) + "-" if several else ""
  return evaluation.output.with_name(f"{evaluation.output.name}-{label}{what}.{ending}")


@dataclasses.dataclass(frozen=True)
class Reading:
  """What a study takes from the result of a protocol.

  Attributes:
    figures: from the figures of a result to those of the study, by name; the first is drawn.
    by_layer: the figure of each layer, by its name in the study and in the result; None: there are none.
    distances: the figure that holds a histogram of distances, `counts` and `edges`; None: there is none.
    needs_test: the figures are of held-out images.
    needs_labels: the figures are there only if the images have labels.
  """

  figures: Callable[[dict[str, Any]], dict[str, float]]
  by_layer: tuple[str, str] | None = None
  distances: str | None = None
  needs_test: bool = True
  needs_labels: bool = True


@dataclasses.dataclass(frozen=True)
class Protocol:
  """One way to judge a network.

  Attributes:
    settings: a frozen dataclass with the fields of the protocol's group in configs/evaluate.py. Raises UserError for a
      value that is never possible.
    measure: takes an `Evaluation`, and hands the plain values on to what measures.
    check: takes it before anything is measured, and raises UserError if the network or the data is none for it.
    share: whether its table is in per cent.
    reading: what a study takes from a result; None: there is no figure to compare.
  """

  settings: type[Any]
  measure: Callable[[Evaluation], Outcome]
  check: Callable[[Evaluation], Any]
  share: bool = True
  reading: Reading | None = None
