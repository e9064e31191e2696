"""Distance between the representations of an image and of its transformed version (PIRL, figure 4).

Letters: B batch, N images, T transforms of each image, P views that a transform makes, D numbers of a vector, C numbers
of trunk features, H S h w sides in pixels.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from sklearn.metrics import roc_auc_score

from pirl_jax import system
from pirl_jax.data.subsets import Subset, shuffled
from pirl_jax.errors import UserError
from pirl_jax.evaluation.features import unit_norm
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.outcome import Outcome
from pirl_jax.evaluation.protocol import Evaluation, Protocol, Reading
from pirl_jax.figures.curves import Curve
from pirl_jax.method.randomness import view_keys
from pirl_jax.models.network import Model, Network
from pirl_jax.runtime.mesh import AXIS, SPLIT, WHOLE, split, whole
from pirl_jax.runtime.progress import Progress
from pirl_jax.views.recipe import Recipe
from pirl_jax.views.two_views import make_views

NO_AUGMENTATION = Recipe(brightness=0, contrast=0, saturation=0, hue=0, jitter_probability=0, group_probability=0,
                         grayscale_probability=0, blur_probability=0, flip_probability=0)
"""With this recipe the two views differ by the pretext transform alone."""

LARGEST = 2.0
"""The distance of two opposite unit vectors."""

AXES = {
  "heads": "distance between f(image) and g(transformed image)",
  "trunk": "distance between trunk features of image and transformed image",
}
"""Label of the plot's x axis for each representation."""


@dataclasses.dataclass(frozen=True)
class InvarianceSettings:
  """Which vectors are compared, and for how many images.

  Attributes:
    split: "train" or "test" images; None takes the test images if there are any, else the training images.
    representation: "heads" or "trunk".
    num_pictures: number of images. The seed chooses them, the same ones on every machine; if there are fewer images,
      all are taken. This field keeps its old name because older results have it.
    num_transforms: T.
    num_bins: number of bins of the histogram.
    centred: whether the mean vector of the images is subtracted from those of the images, and that of the transformed
      images from theirs. These means say nothing about an image. Without them, distances of different networks and
      representations can be compared.
    augmented: whether the transformed images have the photometric augmentations of the run. Without these, an untrained
      network knows an image again by its colours.

  Raises:
    UserError: the representation is unknown, or a number is below 1.
  """

  split: str | None
  representation: str
  num_pictures: int
  num_transforms: int
  num_bins: int
  centred: bool
  augmented: bool

  def __post_init__(self) -> None:
    if self.representation not in AXES:
      raise UserError(f"invariance.representation={self.representation!r} is not possible: choose from "
                      f"{', '.join(AXES)}")
    for name in ("num_pictures", "num_transforms", "num_bins"):
      if getattr(self, name) < 1:
        raise UserError(f"invariance.{name}={getattr(self, name)}; choose 1 or more")


def measure_invariance(model: Model, images: Images, settings: InvarianceSettings, *, mesh: Mesh,
                       views_fn: Callable, pretext_size: int, seed: int) -> Outcome:
  """Returns the distribution of the l2 distance, in [0, 2], between unit vectors of v_I and v_It.

  v_I is the centre crop of an image. `views_fn` makes v_It from the same part of the image, T times with different
  random draws. With "heads" the vectors are f(v_I) and g(v_It), as in the paper. With "trunk" they are the pooled
  features of v_I, and the mean of the pooled features of the P views of v_It; every network has these, whatever it was
  trained for. Trunk features follow a ReLU and are never negative, so their distances are at most sqrt(2). Therefore
  distances of heads and distances of trunks cannot be compared, unless `settings.centred`.

  A network that maps all images to one vector has small distances, too. For comparison, distances between an image and
  the transformed version of another image (the next one) are measured as well ("mismatched").

  The outcome's figures: `matched` and `mismatched`, each with `mean`, `std`, `min`, `max`, `median`, and `counts` and
  `edges` of the histogram over [0, 2]; `separation`, the probability that a mismatched distance is larger than a
  matched one (area under the ROC curve; 0.5 is chance); `representation`, `num_images`, `num_transforms`, `num_broken`.

  Args:
    model: the frozen network.
    images: the images to choose from.
    settings: what is compared; `split` is not used here, because `images` are of that split already.
    mesh: the devices.
    views_fn: see `make_views`; with `NO_AUGMENTATION` for both views they differ by the transform alone.
    pretext_size: S, side in pixels of the crop that `views_fn` transforms.
    seed: of the choice of images and of the transforms. A transform depends on the seed, its number in 0, ..., T - 1
      and the image alone.

  Raises:
    UserError: the network does not have the representation, or fewer than two images can be read.
  """
  representation = settings.representation
  check_representation(model.single, representation)
  index = shuffled(range(len(images)), seed=seed)[:settings.num_pictures]
  image_emb, pretext_emb, num_broken = _embed(model, images, index, settings, mesh=mesh, views_fn=views_fn,
                                              pretext_size=pretext_size, seed=seed)
  if len(image_emb) < 2:
    raise UserError(f"{len(image_emb)} of {len(index)} images can be read; distances to another image need two images")
  if settings.centred:
    image_emb, pretext_emb = image_emb - image_emb.mean(0), pretext_emb - pretext_emb.mean((0, 1))
  image_emb, pretext_emb = unit_norm(image_emb), unit_norm(pretext_emb)
  matched = _distances(image_emb, pretext_emb)
  mismatched = _distances(image_emb, np.roll(pretext_emb, -1, axis=0))
  is_other = np.repeat([0, 1], [matched.size, mismatched.size])
  separation = float(roc_auc_score(is_other, np.concatenate([matched, mismatched], axis=None)))

  edges = np.linspace(0, LARGEST, settings.num_bins + 1)
  figures = {"matched": _describe(matched, edges), "mismatched": _describe(mismatched, edges),
             "separation": separation, "representation": representation, "num_images": len(image_emb),
             "num_transforms": settings.num_transforms, "num_broken": num_broken}
  density = np.array(figures["matched"]["counts"]) / matched.size / (edges[1] - edges[0])
  return Outcome(
    figures,
    table={"mean distance": figures["matched"]["mean"], "standard deviation": figures["matched"]["std"],
           "mean distance to another image": figures["mismatched"]["mean"],
           "the first over the third": _relative(figures), "separation (chance: 0.5)": separation},
    curve=Curve(f"{AXES[representation]}{', centred' if settings.centred else ''}", "density",
                ((edges[1:] + edges[:-1]) / 2).tolist(), density.tolist()))


def check_representation(network: Network, representation: str) -> None:
  """Raises UserError if the representation is "heads" and the network lacks one of the heads f and g."""
  if representation == "heads" and (network.image_head is None or network.pretext_head is None):
    raise UserError("this network has no heads f and g, because it was not trained to represent an image and its "
                    "transformed version alike; compare the features of its trunk: "
                    "--config.invariance.representation=trunk")


def _embed(model: Model, images: Images, index: Sequence[int], settings: InvarianceSettings, *, mesh: Mesh,
           views_fn: Callable, pretext_size: int, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
  """Returns (vectors of the images f64[N, D], of the transformed images f64[N, T, D], number of broken images).

  Images that cannot be read are left out.
  """
  embed = _make_embed(model.single, views_fn, mesh, settings.representation, settings.num_transforms, seed)
  variables = jax.device_put(model.variables, whole(mesh))
  chosen = dataclasses.replace(images, source=Subset(images.source, index))
  parts, num_broken = [], 0
  with (closing(chosen.test_batches()) as image_batches,
        closing(dataclasses.replace(chosen, image_size=pretext_size).test_batches()) as crop_batches,
        Progress("invariance", len(index)) as progress):
    for image, crop in zip(image_batches, crop_batches, strict=True):
      there, valid = image["index"] >= 0, image["valid"]
      # The transforms depend on the image's index in the whole set, not on the choice of images.
      number = np.where(there, np.asarray(index)[image["index"]], 0).astype(np.int32)
      batch = jax.device_put((image["image"], crop["image"], number), split(mesh))
      image_emb, pretext_emb = (np.asarray(x) for x in embed(variables, *batch))
      parts.append((image_emb[valid], np.swapaxes(pretext_emb, 0, 1)[valid]))
      num_broken += int(np.count_nonzero(there & ~valid))
      progress.update(int(there.sum()))
  image_emb, pretext_emb = (np.concatenate(arrays).astype(np.float64) for arrays in zip(*parts, strict=True))
  return image_emb, pretext_emb, num_broken


# Cached, so that all runs of the same network share one compiled program.
@functools.cache
def _make_embed(network: Network, views_fn: Callable, mesh: Mesh, representation: str, num_transforms: int,
                seed: int) -> Callable:
  """Returns embed(variables, image u8[B, H, H, 3], crop u8[B, S, S, 3], number i32[B]) -> f32[B, D], f32[T, B, D]."""
  embed_image, embed_pretext = {
    "heads": ("embed_image", "embed_pretext"), "trunk": (_trunk_of_image, _trunk_of_pretext)}[representation]

  def device_embed(variables: Any, image: jax.Array, crop: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    def transformed(draw: jax.Array | int) -> tuple[jax.Array, jax.Array]:
      image_view, pretext_view, _ = views_fn(view_keys(seed, draw, number), image, crop)
      pretext_emb: Any = network.apply(variables, pretext_view, method=embed_pretext)
      return image_view, pretext_emb

    image_view, _ = transformed(0)
    image_emb: Any = network.apply(variables, image_view, method=embed_image)
    # One transform at a time: T transforms at once would need T times the memory of a training batch's patches.
    return image_emb, jax.lax.map(lambda draw: transformed(draw)[1], jnp.arange(num_transforms))

  mapped = jax.shard_map(device_embed, mesh=mesh, in_specs=(WHOLE, SPLIT, SPLIT, SPLIT),
                         out_specs=(SPLIT, PartitionSpec(None, AXIS)))
  return jax.jit(mapped, out_shardings=whole(mesh))


def _trunk_of_image(network: Network, image: jax.Array) -> jax.Array:
  """Returns the pooled trunk features f32[B, C] of images f32[B, H, W, 3]."""
  return network.features(image)["pooled"]


def _trunk_of_pretext(network: Network, pretext: jax.Array) -> jax.Array:
  """Returns the mean over the P views of pooled trunk features, f32[B, C], of pretext views f32[B, P, h, w, 3]."""
  batch, views = pretext.shape[:2]
  pooled = network.features(jnp.reshape(pretext, (batch * views, *pretext.shape[2:])))["pooled"]
  return jnp.mean(jnp.reshape(pooled, (batch, views, -1)), axis=1)


def _distances(image_emb: np.ndarray, pretext_emb: np.ndarray) -> np.ndarray:
  """Returns the l2 distances f64[N, T] of vectors f64[N, D] and f64[N, T, D]."""
  return np.linalg.norm(image_emb[:, None] - pretext_emb, axis=-1)


def _relative(figures: Mapping[str, Any]) -> float:
  """Returns the mean distance to the own transformed version over that to another one; NaN if both are 0."""
  own, other = figures["matched"]["mean"], figures["mismatched"]["mean"]
  return own / other if other else float("nan")


def _describe(distances: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
  # Rounding may make the distance of two opposite vectors slightly larger than 2.
  counts, _ = np.histogram(np.minimum(distances, LARGEST), edges)
  return {"mean": float(distances.mean()), "std": float(distances.std()), "min": float(distances.min()),
          "max": float(distances.max()), "median": float(np.median(distances)), "counts": counts.tolist(),
          "edges": edges.tolist()}


def _measure(evaluation: Evaluation) -> Outcome:
  run = evaluation.single_run()
  config = run.meta["config"]
  pretext = system.pretext_of(config)
  colours = system.recipe_of(config, "pretext_photometric") if evaluation.settings.augmented else NO_AUGMENTATION
  return measure_invariance(
    run.model, evaluation.either(evaluation.settings.split, "invariance.split"), evaluation.settings,
    mesh=evaluation.mesh, pretext_size=pretext.crop_size, seed=evaluation.config.seed,
    views_fn=make_views(pretext, recipe=NO_AUGMENTATION, pretext_recipe=colours))


def _check(evaluation: Evaluation) -> None:
  check_representation(evaluation.single_run().model.single, evaluation.settings.representation)


def _figures_of_a_study(found: Mapping[str, Any]) -> dict[str, float]:
  return {"mean distance": found["matched"]["mean"], "standard deviation of the distance": found["matched"]["std"],
          "distance over that to another image": _relative(found), "separation": found["separation"]}


PROTOCOL = Protocol(InvarianceSettings, _measure, _check, share=False,
                    reading=Reading(_figures_of_a_study, distances="matched", needs_test=False, needs_labels=False))
