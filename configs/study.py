"""Studies: python launch.py --config=configs/study.py:STUDY [--workdir=DIR] [--config.FIELD=VALUE ...]

A study pre-trains its points with several seeds each, evaluates every run in the same way, and ends with a table and a
figure. Without a `variant` it needs neither a download nor a GPU. The same command resumes a study that was stopped. If
points, seeds or an evaluation are added, only the new runs are trained. `:own` is a study without points, to be filled
in: docs/extending.md shows how.
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

NO_SYSTEMS = ("__init__", "base", "checkpoints", "data_sets", "evaluate", "export", "plan", "prepare", "report",
              "study")
"""Files of configs/ that do not describe a pre-training."""

OWN_FIELDS = ("job", "name", "seed")
OWN_EVALUATION_FIELDS = ("job", "protocol", "name", "checkpoint", "step")
"""Fields of a run's config and of an evaluation's config that the study sets itself."""


def get_base() -> ConfigDict:
  """Returns the fields that every study has, with their meaning. The settings for the embedded data are quick ones."""
  config = ConfigDict()
  config.job = "study"  # the job that launch.py runs
  config.study = ""  # first column of study.csv; for a study of the paper, the paper's panel is drawn, too
  config.name = ""  # the table and the figure are in the folder WORKDIR/NAME
  config.seeds = (0, 1, 2)  # of the pre-training

  # A point is (SERIES, X, SYSTEM, {"FIELD": VALUE, "GROUP.FIELD": VALUE}). SERIES is the name of the line to which the
  # point belongs. X is the position on the line, a number or a text, which may be "". SYSTEM is a file of configs/
  # without its ending. The fields are set in the config of the system.
  config.points = ()
  config.more_points = ()  # added to `points`
  config.reference = ""  # "SERIES X" of the point with which the others are compared, seed by seed; "": none

  config.variant = ""  # of the systems' config files; "": the embedded textures
  # settings: fields of every run. system_settings: fields of the runs of one system. evaluation_settings: fields of
  # every evaluation. A field without a value is as in the config of the run or the evaluation. A point's own fields are
  # set last.
  config.update(no_settings())
  config.evaluation = "knn"  # variant of configs/evaluate.py

  config.embedded = embedded = no_settings()  # the same three groups; without a variant they are applied first
  # With 25,000 views, a quarter of the images, each seen 24 times, gives a better kNN than all images. The learning
  # rates are the best ones for seed 100, which no study uses: tried were 0.025 to 0.2 for PIRL and up to 1.6 for the
  # covariant systems. NPID's learning rate is the best one for seeds 0 to 2, because seed 100 was misleading: at 0.2 it
  # got 46 %, but seeds 0 to 2 got 29 % on average (43 % at 0.1).
  embedded.settings.update(num_negatives=1024, batch_size=64, num_epochs=24)
  embedded.settings.data.num_images = 1024
  embedded.settings.optimizer.learning_rate = 0.2
  embedded.settings.evaluate.update(num_images=2048, every_epochs=0, learning=False)
  embedded.settings.checkpoint.update(every_steps=1_000_000, keep=1)
  embedded.system_settings.npid.optimizer.learning_rate = 0.1
  embedded.system_settings.jigsaw.optimizer.learning_rate = 0.1
  embedded.system_settings.rotnet.optimizer.learning_rate = 0.4

  config.plot = "bars"  # "lines" (over X), "bars", "layers" (lines over the layers), "distances" (histograms)
  config.title = ""  # title of the figure and the table; "": NAME: EVALUATION
  config.panel_title = ""  # title of the panel; "": the data and the network
  config.x_label = ""
  config.y_label = ""  # "": the figure that is measured; the unit and the spread over the seeds are added
  config.log_x = False
  return config


def no_settings() -> ConfigDict:
  """Returns the groups `settings`, `system_settings` and `evaluation_settings`, with all fields without a value."""
  evaluation = {}
  for variant in evaluate.VARIANTS:
    evaluation |= dict(unset(evaluate.get_config(variant), OWN_EVALUATION_FIELDS).items(preserve_field_references=True))
  return ConfigDict({
    "settings": unset(base.get_base(), OWN_FIELDS),
    "system_settings": {system: unset(base.get_base(), OWN_FIELDS) for system in systems()},
    "evaluation_settings": evaluation})


def unset(config: ConfigDict, without: Iterable[str] = ()) -> ConfigDict:
  """Returns the fields of `config`, except those named in `without`, with their types but without values."""
  return ConfigDict({name: unset(config[name]) if isinstance(config[name], ConfigDict)
                     else placeholder(config.get_type(name)) for name in config if name not in without})


@functools.cache
def systems() -> tuple[str, ...]:
  """Returns the names of the files of configs/ that describe a pre-training."""
  return tuple(sorted(path.stem for folder in configs.__path__ for path in Path(folder).glob("*.py")
                      if path.stem not in NO_SYSTEMS))


def sweep(series: str, system: str, field: str, values: Iterable[Any]) -> list[tuple]:
  """Returns a point for each value of one field of a system; the value is also the X of the point."""
  return [(series, value, system, {field: value}) for value in values]


def pretext_weight(config: ConfigDict) -> None:
  """Accuracy over lambda, the weight of the pretext term: the paper's figure 6."""
  config.points = sweep("PIRL", "pirl", "pretext_weight", (0, 0.25, 0.5, 0.75, 1))
  config.reference = "PIRL 0.5"
  config.update(plot="lines", x_label="lambda, weight of the pretext term")


def permutations(config: ConfigDict) -> None:
  """Accuracy over the number of permutations, for PIRL and for a network that predicts them: the paper's figure 7."""
  config.points = [
    *sweep("PIRL", "pirl", "jigsaw.num_permutations", (1, 10, 100, 1_000, 10_000)),
    ("PIRL", 362_880, "pirl", {"jigsaw.num_permutations": 0}),  # all 9!
    # With one permutation there is nothing to predict; predicting 10,000 takes 90 million weights.
    *sweep("Jigsaw", "jigsaw", "jigsaw.num_permutations", (10, 100, 1_000))]
  config.reference = "PIRL 362880"
  config.update(plot="lines", x_label="number of permutations", log_x=True)


def negatives(config: ConfigDict) -> None:
  """Accuracy over the number of negatives: the paper's figure 8. The embedded set of a study allows 1,024 at most."""
  config.points = sweep("PIRL", "pirl", "num_negatives", (256, 512, 768, 1_024))
  config.reference = "PIRL 1024"
  config.update(plot="lines", x_label="number of negatives", log_x=True)


def pretext(config: ConfigDict) -> None:
  """Pretext tasks, each by itself and as a transform of PIRL: the paper's table 5."""
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
  """Distances between the representations of an image and of its transformed version: the paper's figure 4.

  The vectors are centred, and the transformed images have the photometric augmentations: docs/evaluation.md says why.
  """
  config.points = [("PIRL", "", "pirl", {}), ("NPID++", "", "npid", {}), ("Jigsaw", "", "jigsaw", {}), RANDOM]
  config.reference = "PIRL"
  config.evaluation = "invariance"
  # A network that predicts the transform has no f to compare g with.
  config.evaluation_settings.invariance.update(representation="trunk", centred=True, augmented=True)
  config.update(plot="distances", x_label="distance between image and transformed image")


def draw(config: ConfigDict) -> None:
  """One draw of negatives for the whole batch, this project's default, or one for every image, as in the official code.
  """
  config.points = [("PIRL", sampling, "pirl", {"num_negatives": 512, "negative_sampling": sampling})
                   for sampling in ("shared", "per_image")]
  config.reference = "PIRL shared"


def own(config: ConfigDict) -> None:
  """A study of your own: points and other fields are set on the command line, or in a config file of your own.

  The file may be in any folder. It starts from `get_config("own")`; docs/extending.md has an example.
  """


RANDOM = ("Random", "", "random_init", {"num_epochs": 0})
"""The untrained network. The number of epochs is set here because the study's settings would otherwise set another."""

VARIANTS = {"lambda": pretext_weight} | {variant.__name__: variant for variant in (
  permutations, negatives, pretext, layers, invariance, draw, own)}


def get_config(variant: str = "") -> ConfigDict:
  """Returns the config of a study.

  Raises:
    UserError: no study is given, or the study is unknown.
  """
  if variant not in VARIANTS:
    raise UserError(f"configs/study.py needs a study, and {variant!r} is none; for example "
                    f"--config=configs/study.py:lambda; there are {', '.join(VARIANTS)}")
  config = get_base()
  config.study = config.name = variant
  VARIANTS[variant](config)
  return config
