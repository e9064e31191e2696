"""Studies: python launch.py --config=configs/study.py:STUDY [--workdir=DIR] [--config.FIELD=VALUE ...]

A study pre-trains its points, several seeds each, judges every run by the same evaluation and ends with a table and a
figure. Without a `variant` it needs neither a download nor a GPU. The same command goes on where it stopped; more
points and seeds, and other evaluations, add to the runs that are there. `:own` is a study without points, to be filled:
docs/extending.md shows how.
"""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from pirl_jax import configs
from pirl_jax.configs import base, evaluate
from pirl_jax.errors import UserError

NO_SYSTEMS = ("__init__", "base", "checkpoints", "data_sets", "evaluate", "study")
"""Files of configs/ that describe no pre-training."""

OWN_FIELDS = ("job", "name", "seed")
OWN_EVALUATION_FIELDS = ("job", "protocol", "name", "checkpoint", "step")
"""What a study sets itself, of a run and of an evaluation."""


def get_base() -> ConfigDict:
  """Returns the fields that every study has, once, with their meaning; the embedded data are set up to be quick."""
  config = ConfigDict()
  config.job = "study"  # what launch.py does with this config
  config.study = ""  # in the first column of study.csv; if it is one of the paper's, the paper's panel is drawn too
  config.name = ""  # of the folder of table and figure, WORKDIR/NAME
  config.seeds = (0, 1, 2)  # of the pre-training

  # A point is (SERIES, X, SYSTEM, {"FIELD": VALUE, "GROUP.FIELD": VALUE}): SERIES is the name of its line, X its place
  # there (a number, or a text, which may be ""), SYSTEM a file of configs/ without ending, and its fields are set.
  config.points = ()
  config.more_points = ()  # added to them
  config.reference = ""  # the point that the others are compared with, seed by seed: its "SERIES X"; "": none

  config.variant = ""  # of the systems' config files; "": the embedded textures
  # settings: fields of every run, system_settings: of the runs of one system, evaluation_settings: of every evaluation.
  # Without a value a field is as in the config of the run or of the evaluation. A point's own fields come last.
  config.update(no_settings())
  config.evaluation = "knn"  # variant of configs/evaluate.py

  config.embedded = embedded = no_settings()  # the same three, taken first if there is no variant
  # A quarter of the images, each seen 24 times, teach more in 25,000 views than all of them. The rates are the best
  # for a seed that is in no study (100): of 0.025 to 0.2 for PIRL, of up to 1.6 for the covariant systems. NPID's is
  # that of seeds 0 to 2, because seed 100 misled: at 0.2 it got 46 %, they 29 % on average (43 % at 0.1).
  embedded.settings.update(num_negatives=1024, batch_size=64, num_epochs=24)
  embedded.settings.data.num_images = 1024
  embedded.settings.optimizer.learning_rate = 0.2
  embedded.settings.evaluate.update(num_images=2048, every_epochs=0, learning=False)
  embedded.settings.checkpoint.update(every_steps=1_000_000, keep=1)
  embedded.system_settings.npid.optimizer.learning_rate = 0.1
  embedded.system_settings.jigsaw.optimizer.learning_rate = 0.1
  embedded.system_settings.rotnet.optimizer.learning_rate = 0.4

  config.plot = "bars"  # "lines" (over X), "bars", "layers" (lines over the layers), "distances" (histograms)
  config.title = ""  # above the figure and the table; "": NAME: EVALUATION
  config.panel_title = ""  # above the panel; "": the data and the network
  config.x_label = ""
  config.y_label = ""  # "": what the evaluation measures; the unit and the spread over the seeds are added
  config.log_x = False
  return config


def no_settings() -> ConfigDict:
  """Returns the fields of runs (for all systems, and for each) and of evaluations, all of them without a value."""
  evaluation = {}
  for variant in evaluate.VARIANTS:
    evaluation |= dict(unset(evaluate.get_config(variant), OWN_EVALUATION_FIELDS).items(preserve_field_references=True))
  return ConfigDict({
    "settings": unset(base.get_base(), OWN_FIELDS),
    "system_settings": {system: unset(base.get_base(), OWN_FIELDS) for system in systems()},
    "evaluation_settings": evaluation})


def unset(config: ConfigDict, without: Iterable[str] = ()) -> ConfigDict:
  """Returns the fields of `config` without their values, each with its type, but for those of the names `without`."""
  return ConfigDict({name: unset(config[name]) if isinstance(config[name], ConfigDict)
                     else placeholder(config.get_type(name)) for name in config if name not in without})


@functools.cache
def systems() -> tuple[str, ...]:
  """Returns the names of the files of configs/ that describe a pre-training."""
  return tuple(sorted(path.stem for folder in configs.__path__ for path in Path(folder).glob("*.py")
                      if path.stem not in NO_SYSTEMS))


def sweep(series: str, system: str, field: str, values: Iterable[Any]) -> list[tuple]:
  """Returns a point for each value of one field of a system; the value is its X, too."""
  return [(series, value, system, {field: value}) for value in values]


def pretext_weight(config: ConfigDict) -> None:
  """Accuracy over lambda, the weight of the pretext term: the paper's figure 6."""
  config.points = sweep("PIRL", "pirl", "pretext_weight", (0, 0.25, 0.5, 0.75, 1))
  config.reference = "PIRL 0.5"
  config.update(plot="lines", x_label="lambda, weight of the pretext term")


def permutations(config: ConfigDict) -> None:
  """Accuracy over the number of permutations, PIRL and the network that predicts them: the paper's figure 7."""
  config.points = [
    *sweep("PIRL", "pirl", "jigsaw.num_permutations", (1, 10, 100, 1_000, 10_000)),
    ("PIRL", 362_880, "pirl", {"jigsaw.num_permutations": 0}),  # all 9!
    # Of one permutation alone there is nothing to predict, and to predict 10,000 takes 90 million weights.
    *sweep("Jigsaw", "jigsaw", "jigsaw.num_permutations", (10, 100, 1_000))]
  config.reference = "PIRL 362880"
  config.update(plot="lines", x_label="number of permutations", log_x=True)


def negatives(config: ConfigDict) -> None:
  """Accuracy over the number of negatives: the paper's figure 8. The embedded set of a study allows 1,024 at most."""
  config.points = sweep("PIRL", "pirl", "num_negatives", (256, 512, 768, 1_024))
  config.reference = "PIRL 1024"
  config.update(plot="lines", x_label="number of negatives", log_x=True)


def pretext(config: ConfigDict) -> None:
  """Pretext tasks, each alone and in PIRL: the paper's table 5."""
  config.points = [
    ("PIRL (Jigsaw)", "", "pirl", {}),
    ("PIRL (Rotation)", "", "pirl", {"pretext": "rotation"}),
    ("PIRL (Rotation + Jigsaw)", "", "pirl", {"pretext": "rotation_jigsaw"}),
    ("NPID++", "", "npid", {}),
    ("Jigsaw", "", "jigsaw", {}),
    ("RotNet", "", "rotnet", {}),
    RANDOM]
  config.reference = "PIRL (Jigsaw)"


def layers(config: ConfigDict) -> None:
  """Linear classifiers on every layer: the paper's figure 5 and table 7."""
  config.points = [("PIRL", "", "pirl", {}), ("Jigsaw", "", "jigsaw", {}), ("NPID++", "", "npid", {}), RANDOM]
  config.reference = "PIRL"
  config.evaluation = "linear_small"
  config.embedded.evaluation_settings.linear.update(num_epochs=14, cached=True)
  config.update(plot="layers", x_label="layer")


def invariance(config: ConfigDict) -> None:
  """Distances between the representations of an image and of its transformed version: the paper's figure 4."""
  config.points = [("PIRL", "", "pirl", {}), ("Jigsaw", "", "jigsaw", {}), RANDOM]
  config.reference = "PIRL"
  config.evaluation = "invariance"
  # A network that predicts the transform has no f to compare g with.
  config.evaluation_settings.invariance.representation = "trunk"
  config.update(plot="distances", x_label="distance between image and transformed image")


def draw(config: ConfigDict) -> None:
  """Negatives drawn once for the whole batch, as here, against a draw for every image, as in the official code."""
  config.points = [("PIRL", sampling, "pirl", {"num_negatives": 512, "negative_sampling": sampling})
                   for sampling in ("shared", "per_image")]
  config.reference = "PIRL shared"


def own(config: ConfigDict) -> None:
  """A study of one's own, without points: they and whatever else differs are set on the command line, or in a file.

  The file may lie anywhere: it starts from `get_config("own")`, and docs/extending.md has one.
  """


RANDOM = ("Random", "", "random_init", {"num_epochs": 0})
"""The untrained network; the epochs stand here because the settings of the study would give it some."""

VARIANTS = {"lambda": pretext_weight} | {variant.__name__: variant for variant in (
  permutations, negatives, pretext, layers, invariance, draw, own)}


def get_config(variant: str = "") -> ConfigDict:
  """Returns the config of a study.

  Raises:
    UserError: none or an unknown one.
  """
  if variant not in VARIANTS:
    raise UserError(f"configs/study.py needs a study, and {variant!r} is none; for example "
                    f"--config=configs/study.py:lambda; there are {', '.join(VARIANTS)}")
  config = get_base()
  config.study = config.name = variant
  VARIANTS[variant](config)
  return config
