"""Writes the network of a run as files that other programs load, and the job `export`, which does so for any run.

A file gets its name only if the arrays in it compute what the run computes, see `equality`.
"""

import dataclasses
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.serialization import msgpack_restore, msgpack_serialize
from ml_collections import ConfigDict
from safetensors import numpy as safetensors

from pirl_jax.data.contents import FILE as IMAGE_LIST
from pirl_jax.errors import UserError
from pirl_jax.method.memory_bank import Layout
from pirl_jax.runs import Run, require_checkpoint
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.storage.files import replacing, write_file, write_json
from pirl_jax.weights import hub, onnx_graph, peers
from pirl_jax.weights.card import CARD, card_of, readme
from pirl_jax.weights.equality import check_equal, largest_differences
from pirl_jax.weights.names import COUNTER, to_torch
from pirl_jax.weights.opening import HEADS, WEIGHTS, locate_weights, open_any

BANK = "bank.safetensors"

METADATA = {"format": "pt"}
"""Of a safetensors file; transformers asks for it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsSettings:
  """What is exported; the fields are those of configs/export.py.

  Attributes:
    format: a name of `FORMATS`.
    heads: whether the heads are written, too.
    bank: whether the memory bank is written, too.
    licence: of the weights, an identifier of the Hugging Face Hub.
  """

  format: str = "timm"
  heads: bool = False
  bank: bool = False
  licence: str = "unknown"

  def __post_init__(self) -> None:
    if self.format not in FORMATS:
      raise UserError(f"format={self.format!r} is unknown; choose from {', '.join(FORMATS)}")


def run(config: ConfigDict, workdir: str) -> None:
  """Exports the network of a run, or of any file of weights, and prints what was written and how it is loaded.

  The folder is export in the run's folder, or export-FORMAT for another format than "timm"; `workdir` takes its place.

  Raises:
    UserError: the config or the run is wrong, the format has no such network, or the file does not compute what the run
      computes.
  """
  require_checkpoint(config.checkpoint)
  settings = WeightsSettings(format=config.format, heads=config.heads, bank=config.bank, licence=config.license)
  if config.push:
    hub.check_target(config.push, settings.format)
  path = locate_weights(config.checkpoint)
  opened = open_any(path, path.name, config.step, mesh_lib.create_mesh())
  name = "export" if settings.format == "timm" else f"export-{settings.format}"
  folder = Path(workdir) if workdir else (Path("runs", path.name) if path.is_file() else path) / name
  for line in export(opened, folder, settings):
    print(line)
  if config.push:
    print(hub.push(folder, config.push))


def export(run: Run, folder: Path, settings: WeightsSettings) -> list[str]:
  """Writes the network of a run into `folder`. Returns lines that say what was written and how equal it is.

  Args:
    run: an opened run or file of weights.
    folder: is created; older files of the same names are replaced.
    settings: what is written.

  Raises:
    UserError: see `run`.
    OSError: a file cannot be written.
  """
  write = FORMATS[settings.format]
  model = run.meta["config"]["model"]
  if settings.format == "detectron2" and (model["stem"] != "imagenet" or model["arch"] not in peers.TIMM):
    raise UserError(f"Detectron2 has no {model['arch']} with the stem {model['stem']}; choose from timm, torchvision, "
                    "onnx and flax")
  if settings.bank:
    check_bank(run)
  variables = jax.tree.map(np.asarray, run.model.variables)
  trunk = {kind: tree["trunk"] for kind, tree in variables.items()}

  def check(arrays: Mapping[str, np.ndarray]) -> str:
    return check_equal(largest_differences(run.model, arrays), what=str(folder))

  file, equal, lines = write(run, folder, trunk, check)
  written = [file, CARD, "README.md"]
  card = card_of(run)
  if settings.format == "timm" and peers.is_plain(model):
    sizes = card["preprocessing"]
    write_json(folder / "config.json", peers.timm_config(
      model, image_size=sizes["image_size"], crop_fraction=sizes["crop_fraction"]))
    written.append("config.json")
  if settings.heads:
    written.append(write_heads(variables, folder))
  else:
    (folder / HEADS).unlink(missing_ok=True)  # of an earlier export: they would belong to another step
  if settings.bank:
    written += write_bank(run, folder)
  write_json(folder / CARD, card)
  write_file(folder / "README.md", readme(card, lines, licence=settings.licence).encode())
  told = [] if settings.format == "timm" and peers.is_plain(model) else [line for line in lines if line]
  return [f"exported {run.label}, step {run.step}, to {folder}: {', '.join(written)}", equal, *told]


Written = tuple[str, str, list[str]]
"""Name of the file, line on the equality, and lines of Markdown that say how the file is loaded."""


def write_safetensors(run: Run, folder: Path, trunk: Mapping[str, Any],
                      check: Callable[[Mapping[str, np.ndarray]], str]) -> Written:
  """Writes model.safetensors with torchvision's names; `check` raises UserError unless the arrays compute the same."""
  content = safetensors.save(to_torch(trunk), METADATA)
  equal = check(safetensors.load(content))
  write_file(folder / WEIGHTS, content)
  model = run.meta["config"]["model"]
  code = peers.torchvision_code(model)
  lines = ["## Load it", "", "```python", "import pirl_jax", "", f'encoder = pirl_jax.load("{folder.name}")', "```", ""]
  if peers.is_plain(model):
    create = f'model = timm.create_model("local-dir:{folder.name}", pretrained=True, num_classes=0)'
    lines += ["With timm, from this folder or from the Hugging Face Hub (`hf-hub:USER/REPO`):", "",
              "```python", "import timm", "", create, "```", "", "With torchvision:"]
  else:
    lines += [f"timm has no {model['arch']} of width {model['width']} with the stem {model['stem']}. With torchvision, "
              "this code builds it:"]
  return WEIGHTS, equal, [*lines, "", "```python", *code, "```"]


def write_detectron2(run: Run, folder: Path, trunk: Mapping[str, Any],
                     check: Callable[[Mapping[str, np.ndarray]], str]) -> Written:
  """Writes model.pkl with Detectron2's names; `check` raises UserError unless the arrays compute the same."""
  arrays = {name: value for name, value in to_torch(trunk).items() if not name.endswith(COUNTER)}
  equal = check(arrays)
  content = {"model": {peers.detectron2_name(name): value for name, value in arrays.items()},
             "__author__": "pirl_jax", "matching_heuristics": True}
  write_file(folder / "model.pkl", pickle.dumps(content, protocol=2))
  return "model.pkl", equal, [
    "## Load it", "", "With Detectron2, a config with these lines; other values cost accuracy without a message:", "",
    "```yaml", *peers.detectron2_config(run.meta["config"]["model"]), "```"]


def write_onnx(run: Run, folder: Path, trunk: Mapping[str, Any],
               check: Callable[[Mapping[str, np.ndarray]], str]) -> Written:
  """Writes model.onnx: image f32[N, 3, H, W] -> the pooled features f32[N, C]."""
  arrays = to_torch(trunk)
  equal = check(arrays)
  content = onnx_graph.model_of(arrays, stem=run.meta["config"]["model"]["stem"])
  equal += f"; {onnx_graph.check_pooled(run.model, content)}"
  write_file(folder / "model.onnx", content)
  return "model.onnx", equal, [
    "## Load it", "", "```python", "import onnxruntime", "",
    'session = onnxruntime.InferenceSession("model.onnx")',
    'pooled, = session.run(None, {"image": images})  # f32[N, 3, H, W], normalised as above', "```"]


def write_flax(run: Run, folder: Path, trunk: Mapping[str, Any],
               check: Callable[[Mapping[str, np.ndarray]], str]) -> Written:
  """Writes model.msgpack: {"params", "batch_stats"} of the trunk, as Flax serialises them."""
  content = msgpack_serialize(jax.tree.map(np.asarray, dict(trunk)))
  restored: Any = msgpack_restore(content)
  equal = check(to_torch(restored))
  write_file(folder / "model.msgpack", content)
  model = run.meta["config"]["model"]
  return "model.msgpack", equal, [
    "## Load it", "", "```python", "from flax.serialization import msgpack_restore",
    "from pirl_jax.models.resnet import create_resnet", "",
    f'trunk = create_resnet("{model["arch"]}", width={model["width"]}, stem="{model["stem"]}")',
    'variables = msgpack_restore(open("model.msgpack", "rb").read())',
    "features = trunk.apply(variables, images, train=False)  # by layer; images f32[N, H, W, 3], normalised as above",
    "```"]


FORMATS = {"timm": write_safetensors, "torchvision": write_safetensors, "detectron2": write_detectron2,
           "onnx": write_onnx, "flax": write_flax}
"""The function that writes each format."""


def write_heads(variables: Mapping[str, Any], folder: Path) -> str:
  """Writes the heads of a network into `HEADS`, with the names of this program. Returns the name of the file.

  Raises:
    UserError: the network has no heads.
  """
  heads = {kind: {name: value for name, value in tree.items() if name != "trunk"} for kind, tree in variables.items()}
  if not heads["params"]:
    raise UserError("heads=True, and the network has none; leave it out")
  write_file(folder / HEADS, safetensors.save(to_torch(heads), METADATA))
  return HEADS


def check_bank(run: Run) -> None:
  """Raises UserError if no run with a memory bank is exported."""
  if not run.meta.get("num_images") or run.meta["config"]["objective"] != "invariant":
    raise UserError(f"bank=True, and {run.label} is no run with a memory bank; leave it out")


def write_bank(run: Run, folder: Path) -> list[str]:
  """Writes the memory bank f32[N, D] in the order of the images, and the list of the images if the run has one.

  Returns:
    The names of the files.
  """
  with Checkpoints(run.folder / "checkpoints", keep=1) as checkpoints:
    bank = checkpoints.restore_bank(run.step, Layout(run.meta["num_images"], run.meta["num_strata"]))
  with replacing(folder / BANK) as file:
    file.write(safetensors.save({"bank": np.ascontiguousarray(bank)}, METADATA))
  if not (run.folder / IMAGE_LIST).exists():
    return [BANK]
  shutil.copyfile(run.folder / IMAGE_LIST, folder / IMAGE_LIST)
  return [BANK, IMAGE_LIST]
