"""Small networks with random variables, and files that others would have made of them."""

import jax
import jax.numpy as jnp
import numpy as np

from pirl_jax.models.heads import ImageHead, PatchesHead
from pirl_jax.models.network import Model, Network
from pirl_jax.models.resnet import ResNet, create_resnet
from pirl_jax.weights.names import to_torch

CHANNELS = 64
"""Pooled features of a resnet8."""


def randomised(like, seed=0):
  """Returns random variables of these shapes with which no layer is dead; variances are positive."""
  rng = np.random.default_rng(seed)

  def draw(path, value):
    name = path[-1].key
    if name == "kernel":
      return rng.normal(0, np.sqrt(2 / np.prod(value.shape[:-1])), value.shape).astype(np.float32)
    low, high = {"var": (0.5, 1.5), "scale": (0.5, 1.5)}.get(name, (-0.3, 0.3))
    return rng.uniform(low, high, value.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, like)


def shapes(network, *inputs, **options):
  return jax.eval_shape(lambda: network.init(jax.random.key(0), *inputs, train=False, **options))


def trunk_model(trunk, seed=0):
  network = Network(trunk)
  return Model(network, randomised(shapes(network, jnp.zeros((1, 64, 64, 3)), method="features"), seed))


def small_trunk(stem="imagenet"):
  return create_resnet("resnet8", stem=stem)


def small_bottleneck():
  return ResNet(blocks=(2, 1), bottleneck=True, channels=8)


def arrays_of(model):
  return to_torch({kind: tree["trunk"] for kind, tree in model.variables.items()})


def pirl_model(*, mlp=False, seed=0):
  network = Network(small_trunk(), ImageHead(16, mlp=mlp), PatchesHead(16, mlp=mlp))
  return Model(network, randomised(shapes(network, jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 9, 32, 32, 3))), seed))


def linear(params):
  """Returns (weight, bias) of a dense layer in PyTorch's order."""
  return np.ascontiguousarray(params["kernel"].T), params["bias"]


def renamed(model, layers, prefix=""):
  """Returns {name: array} of the heads; `layers` are {the publisher's name: (head, layer)}."""
  found = {}
  for name, (head, layer) in layers.items():
    found[f"{prefix}{name}.weight"], found[f"{prefix}{name}.bias"] = linear(model.variables["params"][head][layer])
  return found


VISSL = {"0.0.clf.0": ("pretext_head", "patch"), "0.2.clf.0": ("pretext_head", "embedding"),
         "1.0.clf.0": ("image_head", "embedding")}
VISSL_MLP = {"0.0.clf.0": ("pretext_head", "hidden"), "0.0.clf.2": ("pretext_head", "patch"),
             "0.2.clf.0": ("pretext_head", "embedding"), "1.0.clf.0": ("image_head", "hidden"),
             "1.0.clf.2": ("image_head", "embedding")}


def vissl_tree(trunk, heads, *, meta=True):
  """Returns what VISSL saves; `trunk` has torchvision's names."""
  model = {"trunk": {f"_feature_blocks.{name}": value for name, value in trunk.items()}, "heads": heads}
  base = {"model": model, **({"meta": {"trunk": {}, "heads": {}}} if meta else {})}
  return {"phase_idx": 7, "iteration": 12, "loss": {"nce_average.memory": np.ones((5, 16), np.float32),
                                                    "nce_average.params": np.array([4, 0.07, 2876.5, 0.5], np.float32)},
          "classy_state_dict": {"train": {}, "base_model": base, "optimizer": {"lr": 0.1, "on": True, "none": None}}}
