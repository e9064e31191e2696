"""What a step needs, estimated from the network's layers in seconds, without a compiler.

The layers are counted exactly. How often XLA passes their values through memory, and how much of them it has at once,
are constants, found by comparing with programs that were compiled for an H100: tests/choosing/test_estimate.py has the
figures. Letters: B images of a batch, K negatives, D embedding, P patches.
"""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from pirl_jax import system
from pirl_jax.method import memory_bank
from pirl_jax.method.negatives import CHUNK_ROWS
from pirl_jax.models.network import variable_shapes
from pirl_jax.models.resnet import ResNet

KEPT = 0.9
"""Share of the kept inputs and outputs of convolutions, and of those at work, that is in memory at once."""

AT_WORK = 6
"""How many arrays of the size of the largest output are at work beside those that are kept."""

PASSES = 9.5
"""How often the inputs and outputs of convolutions pass through memory in a step."""

REMAT_PASSES = 2.7
"""The further passes of those that are computed again."""

PIXEL_PASSES = 22
"""How often the bytes of the crops pass through memory while the views are made."""

SCORE_PASSES, ROW_PASSES = 5, 14
"""How often the scores f32[B, K] of a view, and the rows f32[K, D] that they are taken with, pass through memory."""

PARAMETER_PASSES, PART_PASSES = 13, 4.5
"""How often the parameters pass through memory for gradient, momentum and update, and for each further micro-batch."""

ENCODER_PASSES, ENCODER_PARAMETER_PASSES = 2.3, 7
"""How often the inputs and outputs of convolutions, and the parameters, pass through memory for a momentum encoder."""

PASSING = "in passing: activations, gradient, scores"
"""Name of the memory that is needed during a step only."""


@dataclasses.dataclass(frozen=True)
class Needs:
  """What a step needs on one device.

  Attributes:
    memory: bytes by purpose.
    traffic: bytes through the device's memory, by part.
    flops: of the network and the scores.
    sent: bytes of what comes out of the collectives.
    collectives: number of them, one after the other.
    cycle_seconds: the compiler's estimate of the time, 0 if it gives none.
  """

  memory: Mapping[str, float]
  traffic: Mapping[str, float]
  flops: float
  sent: float = 0
  collectives: int = 0
  cycle_seconds: float = 0


@dataclasses.dataclass(frozen=True)
class Layer:
  """A convolution or a linear layer, with the numbers of one image.

  Attributes:
    call: which call of the trunk it belongs to: the trunk runs once for each view.
    stage: "conv1", "res2" and so on, or the name of a layer of a head.
    taken: numbers that go in; 0 if an earlier layer has taken the same.
    given: numbers that come out.
    flops: of the forward pass.
  """

  call: int
  stage: str
  taken: int
  given: int
  flops: int

  @property
  def numbers(self) -> int:
    """Returns how many numbers go in and come out."""
    return self.taken + self.given


@dataclasses.dataclass(frozen=True)
class Counted:
  """What is counted of a network.

  Attributes:
    layers: in the order in which they run.
    parameters: number of them.
    statistics: number of running statistics of batch norm.
    norms: number of calls of batch norm in a forward pass.
  """

  layers: tuple[Layer, ...]
  parameters: int
  statistics: int
  norms: int

  def kept(self, *, remat: bool) -> int:
    """Returns how many numbers of an image are in memory at once, with `model.remat` or without it."""
    at_work = AT_WORK * max(layer.given for layer in self.layers)
    if not remat:
      return sum(layer.numbers for layer in self.layers) + at_work
    inputs, outside, stages = 0, 0, Counter()
    for layer in self.layers:
      stage = layer.call, layer.stage
      if not layer.stage.startswith("res"):
        outside += layer.numbers
      elif stage not in stages:
        inputs += layer.taken
      stages[stage] += layer.numbers
    return inputs + outside + max(stages.values()) + at_work


NO_LAYERS = ("name", "seed", "job", "num_epochs", "batch_size", "micro_batches", "num_negatives", "init_from",
             "optimizer", "bank", "photometric", "pretext_photometric", "evaluate", "checkpoint", "log")
"""Fields and groups of a config that do not change the layers, so many configs have one count."""


def count(config: ConfigDict, num_classes: int) -> Counted:
  """Returns the layers of a run's network, traced for one image and never run.

  Args:
    config: of the run.
    num_classes: of the training images; only a supervised network depends on it.
  """
  given = config.to_dict()
  used = {name: value for name, value in given.items() if name not in NO_LAYERS}
  model = given["model"] | {"dtype": "float32", "remat": False}  # neither changes what there is to count
  return _count(json.dumps(used | {"model": model}, sort_keys=True), num_classes)


@functools.cache
def _count(config: str, num_classes: int) -> Counted:
  given = json.loads(config)
  network = system.network_of(given, num_classes=num_classes)
  inputs = system.network_inputs(given)
  layers, seen, calls = [], [], Counter()

  def record(run: Callable, args: tuple, kwargs: Mapping[str, Any], context: Any) -> Any:
    module = context.module
    if context.method_name != "__call__":
      return run(*args, **kwargs)
    calls[type(module)] += 1
    out = run(*args, **kwargs)
    if isinstance(module, nn.Conv | nn.Dense):
      taken, kernel, path = args[0], module.variables["params"]["kernel"], module.path
      known = any(taken is other for other in seen)
      seen.append(taken)
      layers.append(Layer(calls[ResNet], path[1].partition("_")[0] if len(path) > 2 else path[-1],
                          0 if known else taken.size, out.size, 2 * out.size * kernel.size // kernel.shape[-1]))
    return out

  def forward(variables: Any) -> Any:
    with nn.intercept_methods(record):
      return network.apply(variables, *inputs, train=True, mutable=["batch_stats"])

  variables = variable_shapes(network, *inputs)
  jax.eval_shape(forward, variables)
  parameters, statistics = (sum(leaf.size for leaf in jax.tree.leaves(variables[name]))
                            for name in ("params", "batch_stats"))
  return Counted(tuple(layers), parameters, statistics, calls[nn.BatchNorm])


def estimate(config: ConfigDict, *, num_images: int, num_classes: int, num_devices: int) -> Needs:
  """Returns what a step of a run needs on one device, estimated.

  Args:
    config: of the run.
    num_images: of the training set.
    num_classes: of the training images; only a supervised network depends on it.
    num_devices: devices that share the batch and the bank.

  Raises:
    UserError: the negatives or the devices do not fit the number of images.
  """
  counted, has_bank = count(config, num_classes), system.has_bank(config)
  images, parts, remat = config.batch_size // num_devices, config.micro_batches, config.model.remat
  layout = memory_bank.create_layout(num_images, num_devices=num_devices,
                                     num_negatives=config.num_negatives if has_bank else 0)
  pixels = images * sum(3 * size**2 for size, _ in system.crops_of(config).values())
  calls, dim = max(layer.call for layer in counted.layers), config.model.dim
  exact, itemsize = 8 if config.model.dtype == "float64" else 4, jnp.dtype(config.model.dtype).itemsize
  rows = layout.num_rows / num_devices * has_bank
  encoder = [layer for layer in counted.layers if layer.call == calls] if system.has_momentum_encoder(config) else []
  scored = min(config.num_negatives / num_devices or rows, rows)
  scores = config.batch_size * calls * scored  # by the embeddings of each view
  read = dim if config.negative_sampling == "per_image" else 1  # each image reads rows of its own
  held = scores * read / parts * (1 if config.num_negatives else min(1, CHUNK_ROWS / max(1, scored)))
  memory = {
    "weights, momentum, statistics": exact * ((2 + bool(encoder)) * counted.parameters + counted.statistics),
    "memory bank": rows * (dim * jnp.dtype(config.bank.dtype).itemsize + 1),
    "batch": pixels,
    PASSING: KEPT * itemsize * images / parts * counted.kept(remat=remat) + exact * counted.parameters * min(2, parts)
             + 2 * 4 * held}
  numbers = sum(layer.numbers * (PASSES + REMAT_PASSES * (remat and layer.stage.startswith("res")))
                for layer in counted.layers) + ENCODER_PASSES * sum(layer.numbers for layer in encoder)
  traffic = {
    "network": itemsize * images * numbers,
    "views": PIXEL_PASSES * pixels,
    "loss and bank": 4 * (SCORE_PASSES * scores * read + ROW_PASSES * parts * calls * scored * dim),
    "optimizer": exact * counted.parameters * (PARAMETER_PASSES + PART_PASSES * (parts - 1)
                                               + ENCODER_PARAMETER_PASSES * bool(encoder))}
  flops = (images * (3 * sum(layer.flops for layer in counted.layers) + sum(layer.flops for layer in encoder))
           + 4 * scores * dim)
  if num_devices == 1:
    return Needs(memory, traffic, flops)
  # The gradient, the embeddings and rows of the batch, and the statistics of each call of batch norm with their slopes.
  over_all = config.model.batch_norm == "global"
  sent = (exact * (counted.parameters + 2 * parts * calls * counted.statistics * over_all)
          + 4 * dim * config.batch_size * (calls + 1 + bool(encoder)) * has_bank)
  return Needs(memory, traffic, flops, sent, 2 * parts * counted.norms * over_all + 6)
