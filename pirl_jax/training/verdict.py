"""The verdict on a run: has the network learnt? A sentence at the end of the run, from figures that need no labels.

docs/verdict.md explains the figures and shows runs of each kind.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pirl_jax import system
from pirl_jax.errors import UserError
from pirl_jax.method.negatives import Scores
from pirl_jax.storage.files import write_json
from pirl_jax.storage.logbook import Logbook
from pirl_jax.training.measuring import calibrate
from pirl_jax.training.parts import Parts, loss_of
from pirl_jax.training.starting import first_state
from pirl_jax.training.view_figures import ViewFigures
from pirl_jax.views.rotation import NUM_ANGLES

LEARNT, NOT_LEARNT, DIVERGED, COLLAPSED = "has learnt", "has not learnt", "diverged", "collapsed"

MISTAKES_REMOVED = 0.25
"""A network has learnt if at least this share of the untrained network's mistakes are gone. A mistake is a view
of which the nearest neighbour shows another image. The threshold is a share, because an untrained network is right in 1
to 15 % of the cases, and more often if there are few images. Runs of 75 steps had -0.01, and of 1,000 steps 0.6."""

WORSE_THAN_CHANCE = 3.0
"""A run has diverged if its loss ends above this multiple of chance. The softmax losses start at about 1.1 times chance
and fall; `nce` on 700 images ended at 30 times chance."""

LEAST_RANK = 5.0
"""A network has collapsed if it has not learnt and the rank of its embeddings is below this value. Runs at far too high
learning rates had 2.2 to 3.1; the lowest rank of a sound run, after 75 steps, was 11.8."""

SHARE_OF_UNTRAINED = 0.25
"""A network has collapsed only if the rank is also below this share of the untrained network's rank. Few images may
have a low rank from the start. Collapsed runs had 0.1, and sound runs 0.4 or more."""

NEARLY_ONE = 1.2
"""A network has collapsed in any case if the rank is below this value: its vectors are nearly a point."""

THRESHOLDS = {"mistakes_removed": MISTAKES_REMOVED, "worse_than_chance": WORSE_THAN_CHANCE, "least_rank": LEAST_RANK,
              "share_of_untrained": SHARE_OF_UNTRAINED, "nearly_one": NEARLY_ONE}
"""The thresholds by name, as verdict.json has them."""


def chance_loss(parts: Parts) -> float:
  """Returns the loss, in nats, of a network that cannot tell images, transforms or classes apart."""
  config = parts.config
  if config.objective == "supervised":
    return math.log(len(parts.train.class_names))
  if config.objective == "covariant":
    return math.log(system.pretext_of(config).num_labels)
  num_images = parts.layout.num_images
  first, last = config.negative_ranks
  number = config.num_negatives or num_images - 1
  if system.has_ages(config):  # of each draw, or of all rows, the share that is new enough
    number = round(number * min(1, config.bank.max_age * config.batch_size / num_images))
  scores = jnp.zeros((1, math.ceil(last * number) - math.floor(first * number)))
  loss, _ = loss_of(config, parts.layout)(jnp.zeros(1), Scores(scores, jnp.ones_like(scores)),
                                          normaliser=jnp.float32(num_images))
  return float(loss[0]) + config.angle_weight * math.log(NUM_ANGLES)


def last_loss(rows: Sequence[Mapping[str, Any]], *, num_steps: int) -> float | None:
  """Returns the mean loss of the rows of the last `num_steps` steps, None if there is no finite one.

  Args:
    rows: of metrics.jsonl, in order.
    num_steps: steps that count, >= 1.
  """
  losses = [row["loss"] for row in rows if row["step"] > rows[-1]["step"] - num_steps and row.get("loss") is not None]
  return float(np.mean(losses)) if losses else None


def judge(figures: Mapping[str, float], untrained: Mapping[str, float], *, loss: float | None,
          chance: float) -> tuple[str, str]:
  """Returns one of `LEARNT`, `NOT_LEARNT`, `DIVERGED` and `COLLAPSED`, and the sentence that says why.

  Args:
    figures: of the trained network: `nearest_view` and, if it has embeddings, `embedding_rank`, else `feature_rank`.
    untrained: the same of the untrained network.
    loss: at the end of the run.
    chance: see `chance_loss`.
  """
  name = "embedding_rank" if "embedding_rank" in figures else "feature_rank"
  found, before = figures["nearest_view"], untrained["nearest_view"]
  asked = before + MISTAKES_REMOVED * (1 - before)
  rank, rank_before = figures[name], untrained[name]
  views = f"it finds another view of an image in {found:.1%} of the cases, untrained {before:.1%}"
  if loss is not None and loss > WORSE_THAN_CHANCE * chance:
    return DIVERGED, (f"the training has diverged: the loss ends at {loss:.4g}, and chance is {chance:.4g}; "
                      "--config.loss=infonce or a lower optimizer.learning_rate may help")
  if found >= asked:
    return LEARNT, f"the network has learnt: {views}"
  if rank < max(NEARLY_ONE, min(LEAST_RANK, SHARE_OF_UNTRAINED * rank_before)):
    return COLLAPSED, (f"the network has collapsed: its vectors have rank {rank:.1f}, untrained {rank_before:.1f}, and "
                       f"{views}; a lower optimizer.learning_rate or more negatives may help")
  return NOT_LEARNT, (f"the network has not learnt: {views}, and {asked:.1%} or more is asked; more num_epochs help "
                      "most often")


def give(parts: Parts, book: Logbook, view_figures: ViewFigures) -> None:
  """Says the verdict on a run that is over, and writes results/verdict.json.

  The figures of the trained network are those of the run's last row; those of the untrained network, with the batch
  statistics of the same views, are measured here. If there are no figures, because fewer than two images of the sample
  can be read, there is no verdict.
  """
  last = book.rows[-1]
  if "nearest_view" not in last:
    book.say("no verdict: fewer than two images of the sample can be read")
    return
  untrained = view_figures(calibrate(parts, parts.initial_state(with_bank=False), view_figures.batches()))
  figures = {name: last[name] for name in ("bank_rank", *untrained) if name in last}
  loss, chance = last_loss(book.rows, num_steps=parts.steps_per_epoch), chance_loss(parts)
  word, sentence = judge(figures, untrained, loss=loss, chance=chance)
  if parts.config.init_from:
    with contextlib.suppress(UserError):  # the other run may be gone when this one ends
      start = view_figures(first_state(parts))["nearest_view"]
      sentence += f"; with the first weights, of {parts.config.init_from}, it was {start:.1%}"
  about = view_figures.about
  book.say(f"{'' if word == LEARNT else 'WARNING: '}{sentence} ({about['num_images']:,} {about['images']} among "
           f"{about['num_gallery']:,})")
  if jax.process_index() == 0:
    with book.tolerant("verdict.json"):
      write_json(parts.workdir / "results" / "verdict.json", {
        "verdict": word, "sentence": sentence, "figures": {**figures, "loss": loss}, "untrained": untrained,
        "chance": {"loss": chance, "nearest_view": 1 / about["num_gallery"]}, "thresholds": THRESHOLDS,
        "step": last["step"], **about})


def write_broken_off(folder: Path, said: str) -> None:
  """Writes results/verdict.json of a run in this folder that ends because of numbers that are not finite.

  Args:
    folder: of the run.
    said: which numbers, and in which step.
  """
  write_json(folder / "results" / "verdict.json", {
    "verdict": DIVERGED, "sentence": f"the training has diverged: {said}", "figures": {}, "untrained": {},
    "thresholds": THRESHOLDS})
