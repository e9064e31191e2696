"""The names and the order of axes that PyTorch gives the arrays of our networks, and back.

A trunk gets torchvision's names ("layer1.0.downsample.0.weight"). A head keeps its own names
("image_head.embedding.weight"), with PyTorch's words for the arrays of a layer.

Letters: H W height and width of a kernel, I O channels in and out.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Path = tuple[str, ...]

PARTS = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
"""PyTorch's name for each array of a layer."""

COUNTER = "num_batches_tracked"
"""PyTorch's batch norm has this scalar i64[] beside its statistics. Nothing reads it in an evaluation."""


def torch_name(path: Path) -> str:
  """Returns PyTorch's name of an array.

  Args:
    path: of the array in the parameters or statistics of a trunk, for example ("res2_0", "downsample_bn", "mean"), or
      of a network with the heads alone.
  """
  *layers, part = path
  name = ".".join(layers)
  if stage := re.match(r"res(\d+)_(\d+)", name):
    name = f"layer{int(stage[1]) - 1}.{stage[2]}{name[stage.end():]}"
  name = name.replace("downsample_conv", "downsample.0").replace("downsample_bn", "downsample.1")
  return f"{name}.{PARTS[part]}"


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the arrays by PyTorch's names: kernels [H, W, I, O] as [O, I, H, W], and [I, O] as [O, I].

  Args:
    variables: {"params": ..., "batch_stats": ...} of a trunk, or of heads by their names; f[...] each.
  """
  arrays = {}
  for path, value in _flat(variables).items():
    arrays[torch_name(path)] = np.ascontiguousarray(_turned(path, np.asarray(value)))
    if path[-1] == "var":
      arrays[f"{torch_name(path).rpartition('.')[0]}.{COUNTER}"] = np.zeros((), np.int64)
  return arrays


def shapes_in_torch(like: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """Returns {name: shape} of the arrays that `to_torch` makes of such variables, without the counters."""
  return {torch_name(path): _torch_shape(path, value.shape) for path, value in _flat(like).items()}


def from_torch(arrays: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict[str, Any]:
  """Returns variables {"params": ..., "batch_stats": ...} of the shapes and types of `like`; undoes `to_torch`.

  Args:
    arrays: by PyTorch's names, all of those of `shapes_in_torch(like)`.
    like: variables of the network; the arrays are not read.
  """
  return {kind: unflatten_dict({path: np.ascontiguousarray(_turned_back(path, arrays[torch_name(path)]), value.dtype)
                                for path, value in _leaves(tree).items()})
          for kind, tree in like.items()}


def _flat(variables: Mapping[str, Any]) -> dict[Path, Any]:
  return {path: value for tree in variables.values() for path, value in _leaves(tree).items()}


def _leaves(tree: Mapping[str, Any]) -> dict[Path, Any]:
  return flatten_dict(tree)


def _turned(path: Path, value: np.ndarray) -> np.ndarray:
  if path[-1] != "kernel":
    return value
  return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def _turned_back(path: Path, value: np.ndarray) -> np.ndarray:
  if path[-1] != "kernel":
    return value
  return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
  if path[-1] != "kernel":
    return shape
  return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
