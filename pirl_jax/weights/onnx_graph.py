"""The trunk as an ONNX graph, with the optional package onnx."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np

from pirl_jax.errors import UserError
from pirl_jax.models.network import Model
from pirl_jax.models.resnet import STEMS
from pirl_jax.weights.equality import IMAGE_SHAPE, relative_difference, trunk_features
from pirl_jax.weights.forward import EPSILON

OPSET = 17

TOLERANCE = 1e-4
"""Largest difference of the pooled features, as a share of the largest: the graph computes in float32."""


def model_of(arrays: Mapping[str, np.ndarray], *, stem: str) -> bytes:
  """Returns the bytes of an ONNX model: "image" f32[N, 3, H, W], normalised, to "pooled" f32[N, C].

  Args:
    arrays: of the trunk, by torchvision's names.
    stem: a key of `STEMS`.

  Raises:
    UserError: the package onnx is not installed.
  """
  if importlib.util.find_spec("onnx") is None:
    raise UserError("format=onnx needs the package onnx: pip install onnx onnxruntime")
  import onnx
  from onnx import helper, numpy_helper

  nodes: list[Any] = []

  def add(kind: str, inputs: list[str], result: str, **attributes: Any) -> str:
    nodes.append(helper.make_node(kind, inputs, [result], **attributes))
    return result

  def conv_norm(x: str, conv: str, norm: str, stride: int, *, relu: bool) -> str:
    side = arrays[f"{conv}.weight"].shape[2]
    x = add("Conv", [x, f"{conv}.weight"], f"{conv}.out", strides=[stride] * 2, pads=[side // 2] * 4)
    parts = [f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    x = add("BatchNormalization", [x, *parts], f"{norm}.out", epsilon=EPSILON)
    return add("Relu", [x], f"{norm}.relu") if relu else x

  _, stride, pool = STEMS[stem]
  x = conv_norm("image", "conv1", "bn1", stride, relu=True)
  if pool:
    x = add("MaxPool", [x], "maxpool.out", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
  blocks = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in arrays if name.startswith("layer")))
  for block in sorted(blocks, key=lambda name: tuple(map(int, name.removeprefix("layer").split(".")))):
    count = 3 if f"{block}.conv3.weight" in arrays else 2
    stride = 2 if block.endswith(".0") and block != "layer1.0" else 1
    y = x
    for number in range(1, count + 1):
      y = conv_norm(y, f"{block}.conv{number}", f"{block}.bn{number}", stride if number == count - 1 else 1,
                    relu=number < count)
    if f"{block}.downsample.0.weight" in arrays:
      x = conv_norm(x, f"{block}.downsample.0", f"{block}.downsample.1", stride, relu=False)
    x = add("Relu", [add("Add", [x, y], f"{block}.sum")], f"{block}.out")
  add("Flatten", [add("GlobalAveragePool", [x], "average")], "pooled", axis=1)
  tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in arrays.items() if value.ndim]
  image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["N", 3, "H", "W"])
  pooled = helper.make_tensor_value_info("pooled", onnx.TensorProto.FLOAT, ["N", arrays_width(arrays)])
  graph = helper.make_graph(nodes, "trunk", [image], [pooled], tensors)
  made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="pirl_jax")
  made.ir_version = 8
  onnx.checker.check_model(made)
  return made.SerializeToString()


def arrays_width(arrays: Mapping[str, np.ndarray]) -> int:
  """Returns the number of pooled features: the channels out of the last convolution of the last stage."""
  last = max(name for name in arrays if name.startswith("layer") and ".0.conv" in name)
  return len(arrays[last])


def check_pooled(model: Model, content: bytes) -> str:
  """Returns a line with the largest difference of the pooled features of an ONNX model to those of the network.

  They are computed with onnxruntime or, if it is not installed, with ONNX's own reference.

  Raises:
    UserError: they differ by more than `TOLERANCE`.
  """
  image = np.random.default_rng(0).normal(size=IMAGE_SHAPE).astype(np.float32)
  feeds = {"image": np.ascontiguousarray(image.transpose(0, 3, 1, 2))}
  if importlib.util.find_spec("onnxruntime") is not None:
    import onnxruntime

    what = "onnxruntime"
    found, = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, feeds)
  else:
    import onnx.reference

    what = "ONNX's reference"
    found, = onnx.reference.ReferenceEvaluator(onnx.load_from_string(content)).run(None, feeds)
  difference = relative_difference(trunk_features(model, image)["pooled"], np.asarray(found))
  if not difference <= TOLERANCE:
    raise UserError(f"the ONNX model differs from the network by {difference:.1e} in {what}, and at most {TOLERANCE:g} "
                    "is right; it was not written")
  return f"{what} {difference:.1e}"
