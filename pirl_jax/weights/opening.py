"""Opens a network from whatever holds it: the folder of a run, an exported folder, or a file of weights."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from pirl_jax import system
from pirl_jax.configs.base import get_base
from pirl_jax.errors import UserError
from pirl_jax.models.network import Model, Network, variable_shapes
from pirl_jax.runs import Run, open_run, run_folder
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.files import read_json
from pirl_jax.storage.formats import upgrade_config
from pirl_jax.views.normalisation import MEAN, STD
from pirl_jax.weights.card import CARD, CARD_FORMAT
from pirl_jax.weights.containers import leaves_of, read_tree
from pirl_jax.weights.names import from_torch, shapes_in_torch
from pirl_jax.weights.publishers import (
  arrays_in,
  fitting,
  network_of_tree,
  remark_on,
  trunk_settings,
)

WEIGHTS, HEADS = "model.safetensors", "heads.safetensors"
"""The files of an exported folder that hold the trunk and, if they were asked for, the heads."""


def locate_weights(name: str, *, field: str = "--config.checkpoint") -> Path:
  """Returns the absolute path of a file of weights, of an exported folder or of the folder of a run.

  Args:
    name: the path that the user gave.
    field: name of the flag or argument, for the error message.

  Raises:
    UserError: `name` is none of them.
  """
  path = Path(name).expanduser().absolute()
  return path if path.is_file() or is_exported(path) else run_folder(name, field=field)


def is_exported(path: Path) -> bool:
  """Returns whether `path` is a folder with weights that was exported, by this program or for timm."""
  return (path / WEIGHTS).is_file() and not (path / "checkpoints").is_dir()


def model_in(name: str, *, stem: str = "") -> dict[str, str]:
  """Returns `arch` and `stem` of the network in a run, an exported folder or a file; {} if there is none of them.

  Args:
    name: the path that the user gave.
    stem: of the trunk, if it is known; a file does not say the stride of a 3 x 3 stem.

  Raises:
    UserError: the file cannot be read, or holds no ResNet of this program.
  """
  path = Path(name).expanduser()
  if path.is_file() or is_exported(path) and not (path / CARD).is_file():
    file = path if path.is_file() else path / WEIGHTS
    found = trunk_settings(arrays_in(read_tree(file), str(file))[1], str(file), stem=stem)
    return {part: found[f"model.{part}"] for part in ("arch", "stem")}
  config = (read_json(path / CARD) or {}).get("config") if is_exported(path) else read_json(path / "config.json")
  return {part: upgrade_config(config)["model"][part] for part in ("arch", "stem")} if config else {}


def open_any(path: Path, label: str, step: int, mesh: jax.sharding.Mesh, *, stem: str = "") -> Run:
  """Returns the network that `path` (see `locate_weights`) holds, replicated on every device of `mesh`.

  What was read from a file is printed. Weights that are not of a run of this program get the config of the paper's
  main run, with 0 epochs and their file as `init_from`.

  Args:
    path: of the run, folder or file.
    label: short name in tables and plots.
    step: of a checkpoint of a run; 0: the newest.
    mesh: the devices.
    stem: of the trunk, if it is known; a file does not say the stride of a 3 x 3 stem.

  Raises:
    UserError: see `open_run`, `read_tree` and `network_of_tree`; or `step` is given, and `path` has one network only.
  """
  if not path.is_file() and not is_exported(path):
    return open_run(path, label, step, mesh)
  found = _open_own(path, label) if (path / CARD).is_file() else _open_foreign(path, label, stem)
  if step and step != found.step:
    raise UserError(f"{path} holds one network only, of step {found.step}, and step={step} is asked for; leave it out")
  variables = jax.device_put(found.model.variables, mesh_lib.whole(mesh))
  return dataclasses.replace(found, model=Model(found.model.single, variables))


def _open_own(path: Path, label: str) -> Run:
  """Returns the network of a folder that this program has exported."""
  card = read_json(path / CARD)
  try:
    assert card is not None and card["format"] == CARD_FORMAT
    config = upgrade_config(card["config"])
    with_heads = (path / HEADS).is_file()
    network = system.network_of(config, num_classes=card["num_classes"])
    inputs = system.network_inputs(config)
    step, meta = card["step"], {"config": config, "num_classes": card["num_classes"], "data": None}
  except UserError:
    raise
  except Exception as error:  # a card that was changed may lack any field
    raise UserError(f"{path / CARD} is damaged, or written by another version of the program "
                    f"({type(error).__name__})") from error
  like: Any = variable_shapes(network, *inputs)
  network = network if with_heads else Network(network.trunk)
  variables: dict[str, Any] = {}
  trunk = {kind: tree["trunk"] for kind, tree in like.items()}
  heads = {kind: {name: value for name, value in tree.items() if name != "trunk"} for kind, tree in like.items()}
  for name, part, own in ((WEIGHTS, "the trunk", trunk), (HEADS, "the heads", heads)):
    if name == WEIGHTS or with_heads:
      arrays = fitting(dict(leaves_of(read_tree(path / name))), shapes_in_torch(own), str(path / name), part)
      for kind, tree in from_torch(arrays, own).items():
        variables.setdefault(kind, {}).update({"trunk": tree} if name == WEIGHTS else tree)
  return Run(label, path, step, True, meta, Model(network, variables))


def _open_foreign(path: Path, label: str, stem: str) -> Run:
  """Returns the network of a file, or of a folder for timm."""
  file = path if path.is_file() else path / WEIGHTS
  sizes = {} if path.is_file() else _timm_sizes(path)
  found = network_of_tree(read_tree(file), str(file), stem=stem)
  print(remark_on(found, file))
  # The config names the content, so that a result of another file of the same name is not taken for one of this file.
  with open(file, "rb") as opened:
    digest = hashlib.file_digest(opened, "sha256").hexdigest()[:12]
  config = get_base()
  config.update_from_flattened_dict({
    "name": f"{path.name}-{digest}", "init_from": str(path), "num_epochs": 0, "data.source": "",
    **found.settings, **sizes})
  meta = {"config": json.loads(json.dumps(config.to_dict())), "num_classes": 0, "data": None}
  return Run(label, path, 0, True, meta, Model(found.network, found.variables))


def _timm_sizes(path: Path) -> dict[str, Any]:
  """Returns the fields of a config that a timm folder's config.json sets.

  Raises:
    UserError: the network wants other colours than ImageNet's mean and standard deviation.
  """
  given: Mapping[str, Any] = (read_json(path / "config.json") or {}).get("pretrained_cfg", {})
  for name, own in (("mean", MEAN), ("std", STD)):
    if name in given and not all(abs(a - float(b)) < 1e-3 for a, b in zip(given[name], own, strict=True)):
      raise UserError(f"{path} wants images with {name} {given[name]}, and this program normalises with "
                      f"{[round(float(b), 3) for b in own]}; the features would be wrong")
  sizes: dict[str, Any] = {}
  if "input_size" in given:
    sizes["data.image_size"] = int(given["input_size"][-1])
  if "crop_pct" in given:
    sizes["evaluate.crop_fraction"] = float(given["crop_pct"])
  return sizes
