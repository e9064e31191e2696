"""Builds the pretext transform, the views and the network from a run's config, in training and in evaluations.

The objectives: "invariant" is PIRL, or NPID if the weight of the pretext term is 0. "covariant" predicts the transform
(Jigsaw, RotNet; paper equation 2). "supervised" predicts the class.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from pirl_jax.errors import UserError
from pirl_jax.models.heads import ClassHead, ImageHead
from pirl_jax.models.network import Network
from pirl_jax.models.resnet import create_resnet
from pirl_jax.views.pretext import Pretext
from pirl_jax.views.recipe import Recipe
from pirl_jax.views.rotation import NUM_ANGLES
from pirl_jax.views.two_views import create_pretext, make_views

Config = ConfigDict | Mapping[str, Any]
"""The config of a run, as a ConfigDict or as read from JSON."""

OBJECTIVES = ("invariant", "covariant", "supervised")


def uses_image(config: Config) -> bool:
  """Returns whether the loss uses the image view."""
  return config["objective"] != "covariant"


def uses_pretext(config: Config) -> bool:
  """Returns whether the loss uses the pretext view."""
  return config["objective"] == "covariant" or config["objective"] == "invariant" and config["pretext_weight"] > 0


def has_bank(config: Config) -> bool:
  """Returns whether the run keeps a memory bank."""
  return config["objective"] == "invariant"


def has_momentum_encoder(config: Config) -> bool:
  """Returns whether a momentum encoder makes the rows of the bank, see `method.momentum_encoder`."""
  return has_bank(config) and config["bank"]["encoder_momentum"] > 0


def has_ages(config: Config) -> bool:
  """Returns whether the rows of the bank leave the negatives when they are old, `bank.max_age`."""
  return has_bank(config) and config["bank"]["max_age"] > 0


def pretext_of(config: Config) -> Pretext:
  """Returns the pretext transform that a config names, even if the loss does not use it.

  Raises:
    UserError: see `create_pretext`.
  """
  return create_pretext(config["pretext"], image_size=config["data"]["image_size"],
                        image_scale=tuple(config["data"]["image_scale"]), settings=config)


def views_of(config: Config) -> Callable:
  """Returns the views_fn of `make_views` for the training images of a run."""
  recipes = {"recipe": recipe_of(config, "photometric"), "pretext_recipe": recipe_of(config, "pretext_photometric")}
  return make_views(pretext_of(config) if uses_pretext(config) else None, **recipes)


def recipe_of(config: Config, group: str) -> Recipe:
  """Returns the photometric augmentations of a group of the config, "photometric" or "pretext_photometric"."""
  return Recipe(**config[group])


def crops_of(config: Config) -> dict[str, tuple[int, tuple[float, float]]]:
  """Returns {name: (side in pixels, range of the share of the area)} of the crops from which the views are made."""
  data, crops = config["data"], {}
  if uses_image(config):
    crops["image_crop"] = data["image_size"], tuple(data["image_scale"])
  if uses_pretext(config):
    pretext = pretext_of(config)
    crops["pretext_crop"] = pretext.crop_size, pretext.crop_scale
  if has_momentum_encoder(config):
    crops["second_crop"] = crops["image_crop"]
  return crops


def network_of(config: Config, *, num_classes: int) -> Network:
  """Returns the network of a config. Its batch norm does not use a mesh axis.

  Args:
    config: of the run.
    num_classes: number of classes of the training images; only the supervised network depends on it.

  Raises:
    UserError: see `create_resnet` and `create_pretext`; or there are fewer than two classes or transforms to predict.
  """
  model = config["model"]
  trunk = create_resnet(model["arch"], width=model["width"], stem=model["stem"], dtype=jnp.dtype(model["dtype"]),
                        remat=model["remat"])
  if config["objective"] == "supervised":
    if num_classes < 2:
      raise UserError(f"objective=supervised needs labels of two classes or more, and the training images have "
                      f"{num_classes}; folders of classes are taken with --config.data.labels=folder")
    return Network(trunk, image_head=ClassHead(num_classes))
  if config["objective"] == "covariant":
    pretext = pretext_of(config)
    if pretext.num_labels < 2:
      raise UserError(f"objective=covariant predicts the transform, and pretext={config['pretext']} has "
                      f"{pretext.num_labels or 'no'} label(s) for it; "
                      "number the orders, --config.jigsaw.num_permutations=2000")
    return Network(trunk, pretext_head=pretext.covariant_head(pretext.num_labels))
  dim, mlp = model["dim"], model["head"] == "mlp"
  return Network(trunk, image_head=ImageHead(dim, mlp=mlp),
                 pretext_head=pretext_of(config).head(dim, mlp=mlp) if uses_pretext(config) else None,
                 angle_head=ClassHead(NUM_ANGLES) if config["angle_weight"] else None)


def network_inputs(config: Config) -> tuple[jax.Array | None, jax.Array | None]:
  """Returns (image f32[1, H, W, 3], pretext view f32[1, P, h, w, 3]), zeros, to initialise the network.

  A view that the loss does not use is None.
  """
  size = config["data"]["image_size"]
  return (jnp.zeros((1, size, size, 3)) if uses_image(config) else None,
          jnp.zeros((1, *pretext_of(config).view_shape)) if uses_pretext(config) else None)
