"""How other programs build the trunk of a run: the lines of code and the settings that a card shows."""

from collections.abc import Mapping
from typing import Any

from pirl_jax.models.resnet import ARCHITECTURES, STEMS
from pirl_jax.views.normalisation import MEAN, STD

TIMM = ("resnet18", "resnet34", "resnet50", "resnet101")
"""Architectures that timm and torchvision have under the same names."""


def is_plain(model: Mapping[str, Any]) -> bool:
  """Returns whether timm and torchvision have this trunk by name; `model` is the group of a run's config."""
  return model["arch"] in TIMM and model["width"] == 1 and model["stem"] == "imagenet"


def num_features(arch: str, width: int) -> int:
  """Returns the number of pooled features of a trunk, see `create_resnet`."""
  bottleneck, blocks, channels = ARCHITECTURES[arch]
  return channels * width * 2 ** (len(blocks) - 1) * (4 if bottleneck else 1)


def torchvision_code(model: Mapping[str, Any]) -> list[str]:
  """Returns the lines of Python that build the trunk with torchvision and load model.safetensors into it.

  Args:
    model: the group of a run's config.
  """
  bottleneck, blocks, channels = ARCHITECTURES[model["arch"]]
  channels *= model["width"]
  kernel, stride, pool = STEMS[model["stem"]]
  block = "Bottleneck" if bottleneck else "BasicBlock"
  imports, surgery = ["import torch", "import torchvision", "from safetensors.torch import load_file"], []
  if channels != 64 or len(blocks) != 4:
    imports.append(f"from torchvision.models.resnet import {block}")
    surgery += [f"model.inplanes, model.bn1 = {channels}, torch.nn.BatchNorm2d({channels})"]
    surgery += [f"model.layer{stage + 1} = model._make_layer({block}, {channels * 2**stage}, {count}"
                f"{', stride=2' if stage else ''})" for stage, count in enumerate(blocks)]
    surgery += [f"model.layer{stage + 1} = torch.nn.Identity()" for stage in range(len(blocks), 4)]
  if channels != 64 or model["stem"] != "imagenet":
    surgery.append(f"model.conv1 = torch.nn.Conv2d(3, {channels}, {kernel}, stride={stride}, padding={kernel // 2}, "
                   "bias=False)")
  if not pool:
    surgery.append("model.maxpool = torch.nn.Identity()")
  base = model["arch"] if model["arch"] in TIMM else "resnet18"
  return [*imports, f"model = torchvision.models.{base}()", *surgery, "model.fc = torch.nn.Identity()",
          'model.load_state_dict(load_file("model.safetensors"))', "model.eval()"]


def timm_config(model: Mapping[str, Any], *, image_size: int, crop_fraction: float) -> dict[str, Any]:
  """Returns the config.json with which timm loads the folder, for a trunk for which `is_plain` holds.

  Args:
    model: the group of a run's config.
    image_size: side in pixels of the square that the network sees.
    crop_fraction: share of the shorter side that the centre crop keeps.
  """
  points = -(-image_size // 32)
  return {
    "architecture": model["arch"], "num_classes": 0, "num_features": num_features(model["arch"], model["width"]),
    "global_pool": "avg",
    "pretrained_cfg": {
      "tag": "pirl", "custom_load": False, "input_size": [3, image_size, image_size], "fixed_input_size": False,
      "interpolation": "bilinear", "crop_pct": crop_fraction, "crop_mode": "center",
      "mean": _decimals(MEAN), "std": _decimals(STD), "num_classes": 0,
      "pool_size": [points, points], "first_conv": "conv1", "classifier": "fc"}}


def detectron2_name(name: str) -> str:
  """Returns Detectron2's name of an array with one of torchvision's."""
  if not name.startswith("layer"):
    name = f"stem.{name}"
  for stage in range(1, 5):
    name = name.replace(f"layer{stage}.", f"res{stage + 1}.")
  for number in range(1, 4):
    name = name.replace(f"bn{number}.", f"conv{number}.norm.")
  return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def detectron2_config(model: Mapping[str, Any]) -> list[str]:
  """Returns the lines that a YAML of Detectron2 needs for a trunk of ours; other values cost accuracy silently.

  Args:
    model: the group of a run's config.
  """
  bottleneck, _, channels = ARCHITECTURES[model["arch"]]
  channels *= model["width"]
  wide = [f"    STEM_OUT_CHANNELS: {channels}", f"    RES2_OUT_CHANNELS: {channels * (4 if bottleneck else 1)}",
          f"    WIDTH_PER_GROUP: {channels}"]
  return ["MODEL:",
          '  WEIGHTS: "model.pkl"',
          "  PIXEL_MEAN: [123.675, 116.28, 103.53]",
          "  PIXEL_STD: [58.395, 57.12, 57.375]",
          "  RESNETS:",
          f"    DEPTH: {model['arch'].removeprefix('resnet')}",
          "    STRIDE_IN_1X1: False",
          '    NORM: "SyncBN"',
          *(wide if channels != 64 or not bottleneck else []),
          "INPUT:",
          '  FORMAT: "RGB"']


def _decimals(values: Any) -> list[float]:
  return [round(float(value), 4) for value in values]
