"""Trained classifiers, kept beside the result of the protocol that trained them, to classify further images.

A file is an uncompressed `.npz` without pickle: `about` holds JSON, and every other array is one of the classifier's,
by its place in the tree ("params/linear/kernel").
"""

import dataclasses
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pirl_jax.errors import UserError
from pirl_jax.evaluation.outcome import Outcome
from pirl_jax.evaluation.protocol import Evaluation, beside
from pirl_jax.storage.files import replacing

ENDING = "classifier.npz"


class Kept(NamedTuple):
  """A kept classifier.

  Attributes:
    path: of the file.
    about: `protocol`, `step` and `weights` (see `Run.weights`; older files lack it) of the evaluation that trained it,
      `image_size` in pixels, `class_names`, `top1` on the held-out images, and what the protocol adds.
    variables: the arrays, a tree of dicts.
  """

  path: Path
  about: dict[str, Any]
  variables: dict[str, Any]


def keeping(evaluation: Evaluation, measure: Callable[..., Outcome]) -> Outcome:
  """Returns the outcome of measure(keep=); what it passes to `keep` is written beside the result of the evaluation.

  Args:
    evaluation: of the protocol.
    measure: calls keep(the classifier's arrays as a tree of dicts, the same on every device, and what the protocol adds
      to `Kept.about`).
  """
  path = beside(evaluation, *ENDING.split("."))

  def keep(variables: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    if jax.process_index():
      return
    told = {"protocol": evaluation.config.protocol, "step": evaluation.subject.step,
            "weights": evaluation.subject.weights, "image_size": evaluation.train.image_size,
            "class_names": evaluation.train.source.class_names, **about}
    arrays: dict[str, Any] = {"/".join(place): np.asarray(value) for place, value in flatten_dict(variables).items()}
    with replacing(path) as file:
      np.savez(file, about=np.frombuffer(json.dumps(told).encode(), np.uint8), **arrays)

  outcome = measure(keep=keep)
  return dataclasses.replace(outcome, figures=outcome.figures | {"written": [str(path)]})


def read_classifier(path: Path) -> Kept:
  """Returns the classifier in a file.

  Raises:
    UserError: the file is damaged, or no classifier of this program.
  """
  try:
    with np.load(path) as stored:
      about = json.loads(stored["about"].tobytes())
      arrays = {tuple(name.split("/")): stored[name] for name in stored.files if name != "about"}
    about["protocol"], about["step"], about["image_size"], about["class_names"], about["top1"]
  except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(f"{path} is no classifier of this program, or damaged ({type(error).__name__}); move it away and "
                    "train the classifier again") from error
  return Kept(path, about, unflatten_dict(arrays))
