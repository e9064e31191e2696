"""Studies: python launch.py --config=configs/study.py:STUDY [--workdir=DIR] [--config.FIELD=VALUE ...]

A study pre-trains its points, several seeds each, judges every run by the same evaluation and ends with a table and a
figure. Without a `variant` it needs neither a download nor a GPU. The same command goes on where it stopped; more
points and seeds, and other evaluations, add to the runs that are there.
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from pirl_jax.errors import UserError


def get_base() -> ConfigDict:
  """Returns the fields that every study has, once, with their meaning; the embedded data are set up to be quick."""
  config = ConfigDict()
  config.job = "study"  # what launch.py does with this config
  config.study = ""
  config.name = ""  # of the folder of table and figure, WORKDIR/NAME
  config.seeds = (0, 1, 2)  # of the pre-training

  # One point a line, or between semicolons: SERIES | X | SYSTEM FIELD=VALUE ...
  # SERIES and X (which may be empty) say where its figures stand, SYSTEM is a file of configs/ without ending, and its
  # fields are set as written. Values are written as on the command line, those with blanks in quotes.
  config.points = ""
  config.more_points = ""  # added to them
  config.reference = ""  # the point that the others are compared with, seed by seed: its SERIES X; "": none

  config.variant = ""  # of the systems' config files; "": the embedded textures
  # FIELD=VALUE ..., of every run, or SYSTEM:FIELD=VALUE, of those of a system; a point's own fields come after them.
  config.settings = ""
  config.evaluation = "knn"  # variant of configs/evaluate.py
  config.evaluation_settings = ""  # FIELD=VALUE ..., of every evaluation

  config.embedded = embedded = ConfigDict()  # the same two, taken first where there is no variant
  # A quarter of the pictures, each seen 24 times, teach more in 25,000 views than all of them. The rates are the best
  # for a seed that is in no study (100): of 0.025 to 0.2 for PIRL, of up to 1.6 for the covariant systems. NPID's is
  # that of seeds 0 to 2, because seed 100 misled: at 0.2 it got 46 %, they 29 % on average (43 % at 0.1).
  embedded.settings = (
    "data.num_images=1024 num_negatives=1024 batch_size=64 num_epochs=24 optimizer.learning_rate=0.2 "
    "evaluate.num_images=2048 evaluate.every_epochs=0 evaluate.learning=False checkpoint.every_steps=1_000_000 "
    "checkpoint.keep=1 npid:optimizer.learning_rate=0.1 jigsaw:optimizer.learning_rate=0.1 "
    "rotnet:optimizer.learning_rate=0.4")
  embedded.evaluation_settings = ""

  config.plot = "bars"  # "lines" (over X), "bars", "layers" (lines over the layers), "distances" (histograms)
  config.x_label = ""
  config.log_x = False
  return config


def pretext_weight(config: ConfigDict) -> None:
  """Accuracy over lambda, the weight of the pretext term: the paper's figure 6."""
  config.points = lines(f"PIRL | {weight} | pirl pretext_weight={weight}" for weight in (0, 0.25, 0.5, 0.75, 1))
  config.reference = "PIRL 0.5"
  config.update(plot="lines", x_label="lambda, weight of the pretext term")


def permutations(config: ConfigDict) -> None:
  """Accuracy over the number of permutations, PIRL and the network that predicts them: the paper's figure 7."""
  config.points = lines([
    *(f"PIRL | {number} | pirl jigsaw.num_permutations={number}" for number in (1, 10, 100, 1_000, 10_000)),
    "PIRL | 362880 | pirl jigsaw.num_permutations=0",  # all 9!
    # Of one permutation alone there is nothing to predict, and to predict 10,000 takes 90 million weights.
    *(f"Jigsaw | {number} | jigsaw jigsaw.num_permutations={number}" for number in (10, 100, 1_000))])
  config.reference = "PIRL 362880"
  config.update(plot="lines", x_label="number of permutations", log_x=True)


def negatives(config: ConfigDict) -> None:
  """Accuracy over the number of negatives: the paper's figure 8. The embedded set of a study allows 1,024 at most."""
  config.points = lines(f"PIRL | {number} | pirl num_negatives={number}" for number in (256, 512, 768, 1_024))
  config.reference = "PIRL 1024"
  config.update(plot="lines", x_label="number of negatives", log_x=True)


def pretext(config: ConfigDict) -> None:
  """Pretext tasks, each alone and in PIRL: the paper's table 5."""
  config.points = lines([
    "PIRL (Jigsaw) | | pirl",
    "PIRL (Rotation) | | pirl pretext=rotation",
    "PIRL (Rotation + Jigsaw) | | pirl pretext=rotation_jigsaw",
    "NPID++ | | npid",
    "Jigsaw | | jigsaw",
    "RotNet | | rotnet",
    RANDOM])
  config.reference = "PIRL (Jigsaw)"


def layers(config: ConfigDict) -> None:
  """Linear classifiers on every layer: the paper's figure 5 and table 7."""
  config.points = lines(["PIRL | | pirl", "Jigsaw | | jigsaw", "NPID++ | | npid", RANDOM])
  config.reference = "PIRL"
  config.evaluation = "linear_small"
  config.embedded.evaluation_settings = "linear.num_epochs=14 linear.cached=True"
  config.update(plot="layers", x_label="layer")


def invariance(config: ConfigDict) -> None:
  """Distances between the representations of an image and of its transformed version: the paper's figure 4."""
  config.points = lines(["PIRL | | pirl", "Jigsaw | | jigsaw", RANDOM])
  config.reference = "PIRL"
  config.evaluation = "invariance"
  # A network that predicts the transform has no f to compare g with.
  config.evaluation_settings = "invariance.representation=trunk"
  config.update(plot="distances", x_label="distance between image and transformed image")


def draw(config: ConfigDict) -> None:
  """Negatives drawn once for the whole batch, as here, against a draw for every image, as in the official code."""
  config.points = lines(f"PIRL | {sampling} | pirl num_negatives=512 negative_sampling={sampling}"
                        for sampling in ("shared", "per_image"))
  config.reference = "PIRL shared"


RANDOM = "Random | | random_init num_epochs=0"
"""The untrained network; the epochs stand here because the settings of the study would give it some."""


def lines(points: Iterable[str]) -> str:
  """Returns the points, one a line."""
  return "\n".join(points)


VARIANTS = {"lambda": pretext_weight} | {variant.__name__: variant for variant in (
  permutations, negatives, pretext, layers, invariance, draw)}


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
