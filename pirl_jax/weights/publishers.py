"""What each publisher of weights calls the trunk and the heads, and how a network of ours is made of them.

A publisher is recognised by the names alone. The trunk must be complete; heads that this program does not have are
named and left out.

Letters: P patches of an image, C trunk features, D numbers of an embedding.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pirl_jax.errors import UserError
from pirl_jax.models.heads import ClassHead, ImageHead, PatchesClassHead, PatchesHead
from pirl_jax.models.network import Network, variable_shapes
from pirl_jax.models.resnet import ARCHITECTURES, STEMS, create_resnet
from pirl_jax.weights.containers import Stored, leaves_of
from pirl_jax.weights.names import COUNTER, from_torch, shapes_in_torch
from pirl_jax.weights.peers import num_features

WRAPPERS = ("model_state_dict", "state_dict", "model")
"""Entries of a file beside which training programs keep their optimizer."""

PREFIXES = (
  # Before the trunk's names: (prefix, publisher, prefix of the heads, names that are known and not read)
  ("module.encoder_q.", "MoCo", "module.encoder_q.", r"module\.(encoder_k|queue|queue_ptr)\b"),
  ("module.encoder.", "PyContrast", "module.", ""),
  ("encoder.", "PyContrast", "", ""),
  ("base_model._feature_blocks.", "VISSL", "base_model.heads.", ""),
  ("trunk._feature_blocks.", "VISSL", "heads.", ""),
  ("_feature_blocks.", "VISSL", "heads.", ""),
  ("trunk.base_model._feature_blocks.", "VISSL", "heads.", ""),
  ("", "torchvision or timm", "", ""),
)

PATCHES = 9
"""P of all published jigsaw networks."""


@dataclasses.dataclass(frozen=True)
class HeadNames:
  """Heads as a publisher names them.

  Attributes:
    layers: {our head and layer: the publisher's name}.
    image, pretext: each a function from {our head and layer: number of its outputs} to the head, or None.
    settings: the fields of a run's config in which the system differs from PIRL.
  """

  layers: dict[str, str]
  image: Callable[[Mapping[str, int]], nn.Module] | None = None
  pretext: Callable[[Mapping[str, int]], nn.Module] | None = None
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def _image(*, mlp: bool = False) -> Callable[[Mapping[str, int]], nn.Module]:
  return lambda outputs: ImageHead(outputs["image_head.embedding"], mlp=mlp)


def _patches(*, mlp: bool = False) -> Callable[[Mapping[str, int]], nn.Module]:
  return lambda outputs: PatchesHead(outputs["pretext_head.embedding"], mlp=mlp)


def _layouts() -> tuple[HeadNames, ...]:
  """Returns all known heads."""
  pirl = {"pretext_head.patch": "0.0.clf.0", "pretext_head.embedding": "0.2.clf.0", "image_head.embedding": "1.0.clf.0"}
  pirl_mlp = {"pretext_head.hidden": "0.0.clf.0", "pretext_head.patch": "0.0.clf.2",
              "pretext_head.embedding": "0.2.clf.0", "image_head.hidden": "1.0.clf.0"}
  jigsaw = {"pretext_head.patch": "0.clf.0", "pretext_head.bn": "0.clf.1", "pretext_head.logits": "2.clf.0"}
  pycontrast = {"pretext_head.patch": "head_jig.fc1", "pretext_head.embedding": "head_jig.fc2"}
  npid = {"objective": "invariant", "pretext_weight": 0.0}
  mlp = {"model.head": "mlp"}

  def classes(outputs: Mapping[str, int]) -> nn.Module:
    return PatchesClassHead(outputs["pretext_head.logits"])

  return (
    HeadNames(pirl, _image(), _patches()),
    HeadNames(pirl_mlp | {"image_head.embedding": "1.0.clf.2"}, _image(mlp=True), _patches(mlp=True), mlp),
    # vissl's wide networks: nothing between the two linear layers of the image head, see `_folded`.
    HeadNames(pirl_mlp | {"image_head.embedding": "1.0.clf.1"}, _image(), _patches(mlp=True), mlp),
    HeadNames({"image_head.embedding": "0.clf.0"}, _image(), settings=npid),
    HeadNames({"pretext_head.logits": "0.clf.0"}, pretext=lambda outputs: ClassHead(outputs["pretext_head.logits"]),
           settings={"objective": "covariant", "pretext": "rotation"}),
    HeadNames(jigsaw, pretext=classes, settings={"objective": "covariant", "jigsaw.num_permutations": 2_000}),
    HeadNames(pycontrast | {"image_head.embedding": "head.0"}, _image(), _patches()),
    HeadNames({"image_head.embedding": "head.0"}, _image(), settings=npid),
    HeadNames({"image_head.hidden": "head.0", "image_head.embedding": "head.2"}, _image(mlp=True), settings=npid | mlp),
    HeadNames({"image_head.embedding": "fc"}, _image(), settings=npid),
    HeadNames({"image_head.hidden": "fc.0", "image_head.embedding": "fc.2"}, _image(mlp=True), settings=npid | mlp),
  )


@dataclasses.dataclass(frozen=True)
class Imported:
  """A network of ours, made of the arrays of a file.

  Attributes:
    publisher: whose names the file has.
    network, variables: the network, and {"params", "batch_stats"} f32[...] on the host.
    settings: the fields of a run's config that are known from the file.
    bank, normaliser: the memory bank f32[N, D] in the publisher's order of the images, and Z of the loss `nce`, read
      when asked for; None if the file has none.
    remarks: what was left out, in words.
  """

  publisher: str
  network: Network
  variables: dict[str, Any]
  settings: dict[str, Any]
  bank: Stored | None
  normaliser: float | None
  remarks: tuple[str, ...]


def network_of_tree(tree: Mapping[str, Any], what: str, *, stem: str = "", dtype: Any = jnp.float32) -> Imported:
  """Returns the network that a file holds.

  Args:
    tree: see `containers.read_tree`.
    what: the file, for messages.
    stem: of the trunk, if it is known; a 3 x 3 stem does not say its stride.
    dtype: in which the trunk computes.

  Raises:
    UserError: the trunk is not complete, holds arrays that no trunk of ours has, or is of an unknown architecture; or a
      known head is not complete.
  """
  publisher, trunk, others = arrays_in(tree, what)
  settings = trunk_settings(trunk, what, stem=stem)
  resnet = create_resnet(settings["model.arch"], width=settings["model.width"], stem=settings["model.stem"],
                         dtype=dtype)
  like = variable_shapes(resnet, jnp.zeros((1, 64, 64, 3)))
  arrays = fitting(trunk, shapes_in_torch(like), what, f"the trunk {settings['model.arch']}")
  variables = {kind: {"trunk": tree} for kind, tree in from_torch(arrays, like).items()}
  network, remarks = Network(resnet), ()
  if others:
    network, variables, extra, remarks = _with_heads(network, variables, others, publisher, what,
                                                     num_features(settings["model.arch"], settings["model.width"]))
    settings |= extra
  bank, normaliser = _memory(tree.get("loss"))
  return Imported(publisher, network, variables, settings, bank, normaliser, remarks)


def arrays_in(tree: Mapping[str, Any], what: str) -> tuple[str, dict[str, Stored], dict[str, Stored]]:
  """Returns (publisher, arrays of the trunk by torchvision's names, other arrays that belong to heads).

  Args:
    tree: see `containers.read_tree`.
    what: the file, for messages.

  Raises:
    UserError: there is no ResNet under the names of a known publisher.
  """
  leaves = dict(leaves_of(_state_dict(tree)))
  prefix, publisher, head_prefix, unread = next(
    entry for entry in PREFIXES if not entry[0] or any(name.startswith(f"{entry[0]}layer1.") for name in leaves))
  if not any(name.startswith(f"{prefix}layer1.") for name in leaves):
    raise UserError(f"{what} holds no ResNet under the names of torchvision, timm, VISSL, PyContrast or MoCo"
                    f" ({len(leaves)} arrays{''.join(f', {name}' for name in list(leaves)[:3])})")
  trunk, others = {}, {}
  for name, array in leaves.items():
    own = name.removeprefix(prefix)
    if name.startswith(prefix) and re.match(r"(conv1|bn1|layer\d+)\.", own):
      trunk[own] = array
    elif not (unread and re.match(unread, name)):
      others[name.removeprefix(head_prefix)] = array
  return publisher, trunk, others


def _state_dict(tree: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the entry of a file that holds the arrays of the network."""
  if isinstance(tree.get("classy_state_dict"), dict):
    model = tree["classy_state_dict"].get("base_model", {}).get("model", {})
    return {name: model[name] for name in ("trunk", "heads") if isinstance(model.get(name), dict)}
  for name in WRAPPERS:
    if isinstance(tree.get(name), dict):
      return _state_dict(tree[name])
  return tree


def _memory(loss: Any) -> tuple[Stored | None, float | None]:
  """Returns (memory bank, Z) of VISSL's loss, None for what is not there."""
  found = dict(leaves_of(loss)) if isinstance(loss, dict) else {}
  params = next((array for name, array in found.items() if name.endswith("nce_average.params")), None)
  bank = next((array for name, array in found.items() if name.endswith("nce_average.memory")), None)
  # K, T, Z, momentum; Z is negative before the first batch has set it.
  z = float(params.read()[2]) if params is not None and params.shape[0] > 2 else -1.0
  return bank, z if z > 0 else None


def trunk_settings(trunk: Mapping[str, Stored], what: str, *, stem: str = "") -> dict[str, Any]:
  """Returns `model.arch`, `model.width` and `model.stem` of a trunk, judged by its names and by the stem's shape.

  Args:
    trunk: arrays by torchvision's names; one may be missing.
    what: the file, for messages.
    stem: of the trunk, if its convolution is 3 x 3.

  Raises:
    UserError: no architecture has these blocks, or the stem is 3 x 3 and not known.
  """
  bottleneck = any(name.endswith(".conv3.weight") for name in trunk)
  blocks: dict[int, int] = {}
  for name in trunk:
    if place := re.match(r"layer(\d+)\.(\d+)\.", name):
      blocks[int(place[1])] = max(blocks.get(int(place[1]), 0), int(place[2]) + 1)
  counts = tuple(blocks[stage] for stage in sorted(blocks))
  arch = next((name for name, (kind, numbers, _) in ARCHITECTURES.items() if (kind, numbers) == (bottleneck, counts)),
              None)
  if arch is None:
    kind = "bottleneck" if bottleneck else "basic"
    raise UserError(f"{what} holds a ResNet with {counts} {kind} blocks; this program has "
                    + ", ".join(f"{name} {numbers}" for name, (_, numbers, _) in ARCHITECTURES.items()))
  channels = next((trunk[name].shape[0] for name in ("bn1.weight", "conv1.weight") if name in trunk), 0)
  kernel = trunk["conv1.weight"].shape[2:] if "conv1.weight" in trunk else ()
  if kernel != (3, 3):
    stem = "imagenet"
  elif stem not in STEMS or STEMS[stem][0] != 3:
    raise UserError(f"{what} has a 3 x 3 stem, and the file does not say its stride; give the exported folder of a "
                    "run, or start a run with --config.init_from and --config.model.stem")
  return {"model.arch": arch, "model.width": max(1, channels // ARCHITECTURES[arch][2]),
          "model.stem": stem}


def fitting(arrays: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], what: str,
            part: str) -> dict[str, np.ndarray]:
  """Returns the arrays that `shapes` names, f32[...], read from the file.

  Args:
    arrays: of the file; `COUNTER` of a batch norm may be there or not.
    shapes: of all arrays that are needed, by name.
    what: the file, for messages.
    part: the part of the network, for messages.

  Raises:
    UserError: an array is missing, is not known or has another shape, or a value is not finite.
  """
  given = {name: array for name, array in arrays.items() if name.rpartition(".")[2] != COUNTER}
  missing = sorted(shapes.keys() - given.keys())
  over = sorted(given.keys() - shapes.keys())
  other = sorted(f"{name} {given[name].shape} instead of {shapes[name]}" for name in given.keys() & shapes.keys()
                 if given[name].shape != shapes[name])
  if missing or over or other:
    counts = [f"{len(shapes) - len(missing) - len(other)} of {len(shapes)} fit"] + [
      f"{len(names)} {word} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
      for word, names in (("missing", missing), ("left over", over), ("of another shape", other)) if names]
    raise UserError(f"{what}: the arrays are not those of {part}: {', '.join(counts)}; nothing was loaded")
  found = {name: given[name].read() for name in shapes}
  if bad := [name for name, value in found.items() if not np.isfinite(value).all()]:
    raise UserError(f"{what}: {bad[0]} holds values that are not finite")
  return found


def _with_heads(network: Network, variables: dict[str, Any], others: Mapping[str, Stored], publisher: str, what: str,
                channels: int) -> tuple[Network, dict[str, Any], dict[str, Any], tuple[str, ...]]:
  """Returns (network with its heads, variables, settings, remarks); `channels` is C."""
  modules = {name.rpartition(".")[0] for name in others}
  layout = next((layout for layout in _layouts() if _fits(layout, modules, others, publisher)), None)
  if layout is None:
    if publisher == "torchvision or timm" and modules - {"fc"}:
      names = sorted(name for name in others if not name.startswith("fc."))
      raise UserError(f"{what}: {len(names)} arrays are left over that no trunk has ({', '.join(names[:3])}"
                      f"{', ...' if len(names) > 3 else ''}); nothing was loaded")
    shown = ", ".join(f"{name} {array.shape}" for name, array in sorted(others.items())[:4])
    return network, variables, {}, (f"left out, because no head of this program has these layers: {shown}"
                                    + (", ..." if len(others) > 4 else ""),)
  own = {f"{ours}.{part}": array for ours, theirs in layout.layers.items() for name, array in others.items()
         for module, _, part in [name.rpartition(".")] if module == theirs}
  own = _folded(own) if "image_head.hidden" in layout.layers and layout.layers["image_head.embedding"].endswith(
    ".clf.1") else own
  outputs = {ours: own[f"{ours}.weight"].shape[0] if f"{ours}.weight" in own else 0
             for ours in layout.layers if f"{ours}.weight" in own or ours not in own}
  network = Network(network.trunk, layout.image(outputs) if layout.image else None,
                    layout.pretext(outputs) if layout.pretext else None)
  like = head_shapes(network, channels)
  arrays = fitting(own, shapes_in_torch(like), what, "the heads")
  heads = from_torch(arrays, like)
  merged = {kind: variables[kind] | heads.get(kind, {}) for kind in variables}
  dim = {"model.dim": outputs["image_head.embedding"]} if "image_head.embedding" in outputs else {}
  return network, merged, layout.settings | dim, ()


def _fits(layout: HeadNames, modules: set[str], others: Mapping[str, Stored], publisher: str) -> bool:
  """Returns whether the names are those of a layout; one name alone is not enough to know the kind of a head."""
  if modules != set(layout.layers.values()):
    return False
  if modules == {"fc"}:
    return publisher == "MoCo"  # otherwise it is the classifier of a supervised network
  if modules == {"0.clf.0"}:
    outputs = next(iter(others.values())).shape[0]
    return outputs == (4 if "pretext_head.logits" in layout.layers else 128)
  return True


def head_shapes(network: Network, channels: int) -> dict[str, Any]:
  """Returns the variables of the heads alone, as shapes: {"params": {"image_head": ...}, "batch_stats": ...}.

  Args:
    network: with one head or two.
    channels: C.
  """
  like: dict[str, Any] = {"params": {}, "batch_stats": {}}
  for name, shape in (("image_head", (1, channels)), ("pretext_head", (1, PATCHES, channels))):
    head = getattr(network, name)
    if isinstance(head, ImageHead | ClassHead):
      shape = (1, channels)
    if head is not None:
      made = jax.eval_shape(lambda head=head, shape=shape: head.init(
        jax.random.key(0), jnp.zeros(shape), train=False))
      for kind, tree in made.items():
        like[kind][name] = tree
  return like


def _folded(own: dict[str, Stored]) -> dict[str, Stored]:
  """Returns the arrays with the two linear layers of the image head as one, which computes the same."""
  names = ("image_head.hidden.weight", "image_head.hidden.bias", "image_head.embedding.weight",
           "image_head.embedding.bias")
  if not all(name in own for name in names):
    return own
  first, first_bias, second, second_bias = (own[name].read().astype(np.float64) for name in names)
  weight, bias = second @ first, second @ first_bias + second_bias
  rest = {name: array for name, array in own.items() if not name.startswith("image_head.")}
  return rest | {names[2]: Stored(weight.shape, lambda: weight), names[3]: Stored(bias.shape, lambda: bias)}


def remark_on(found: Imported, path: Path) -> str:
  """Returns a line on what was read from a file."""
  heads = [name.removesuffix("_head") for name in ("image_head", "pretext_head")
           if getattr(found.network, name) is not None]
  settings = found.settings
  parts = [f"{path}: {settings['model.arch']}", *([f"{settings['model.width']} times as wide"]
                                                  if settings["model.width"] > 1 else []),
           f"under the names of {found.publisher}", "heads: " + (", ".join(heads) or "none")]
  if found.bank is not None:
    parts.append(f"memory bank {found.bank.shape}" + (f", Z {found.normaliser:.6g}" if found.normaliser else ""))
  return ", ".join(parts) + "".join(f"; {remark}" for remark in found.remarks)
