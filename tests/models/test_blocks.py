"""Numbers through the real blocks, stems and heads, against blocks.npz, which PyTorch's operations have made."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import shadows

from pirl_jax.models import heads, resnet
from pirl_jax.models.heads import ImageHead, PatchesClassHead, PatchesHead
from pirl_jax.models.network import Network, variable_shapes
from pirl_jax.models.resnet import create_resnet
from pirl_jax.weights.names import from_torch, to_torch

STORED = Path(__file__).parents[1] / "stored" / "blocks.npz"
LINEAR, MLP = ((ImageHead(6, mlp=mlp), PatchesHead(6, mlp=mlp)) for mlp in (False, True))
CASES = {
  # name: (bottleneck, blocks of each stage, options of `create_resnet`, heads, images in a group)
  "bottleneck-even": (True, (2, 2), {"stem": "imagenet"}, MLP, None),
  "bottleneck-odd": (True, (2, 2), {"stem": "imagenet"}, MLP, None),
  "bottleneck-groups": (True, (1, 1), {"stem": "imagenet"}, LINEAR, 2),
  "bottleneck-w2": (True, (1, 1), {"stem": "imagenet", "width": 2}, LINEAR, None),
  "basic": (False, (2, 2), {"stem": "3x3s2"}, LINEAR, None),
  "jigsaw": (False, (1, 1), {"stem": "3x3"}, (None, PatchesClassHead(6)), 2),
}
PASSES = [(case, view) for case in CASES for view in ("image", "pretext") if (case, view) != ("jigsaw", "image")]


@cache
def stored(folder):
  """Returns {name: array} of a folder of the file; whole 64ths as float64."""
  with np.load(STORED) as file:
    names, values = file[f"{folder}/names"], file[f"{folder}/values"]
  values, found, begin = values / 64 if values.dtype == np.int8 else values, {}, 0
  for name, *shape in map(str.split, names.tolist()):
    shape = tuple(map(int, shape))
    found[name] = values[begin:begin + int(np.prod(shape))].reshape(shape)
    begin += found[name].size
  return found


def create_network(case, dtype, patch):
  bottleneck, blocks, options, (image_head, pretext_head), _ = CASES[case]
  patch.setitem(resnet.ARCHITECTURES, "tiny", (bottleneck, blocks, 2 if "width" in options else 4))
  return Network(create_resnet("tiny", dtype=dtype, **options), image_head, pretext_head)


def by_part(variables):
  """Returns (kind, part, tree) of the trunk's and the heads' parameters and statistics, named as in PyTorch."""
  for kind, tree in variables.items():
    yield kind, "trunk", tree["trunk"]
    yield kind, "heads", {name: head for name, head in tree.items() if name != "trunk"}


def stored_variables(case, like, dtype):
  """Returns the variables of the file in the order of `like`."""
  arrays, found = stored(f"{case}/weights"), {kind: {} for kind in like}
  for kind, part, tree in by_part(like):
    values = from_torch(arrays, {kind: tree})[kind]
    found[kind].update({"trunk": values} if part == "trunk" else values)
  assert len(jax.tree.leaves(found)) == len(arrays)
  return jax.tree.map(lambda value: np.asarray(value, dtype), found)


def named(variables):
  return {name: value for kind, _, tree in by_part(variables) for name, value in to_torch({kind: tree}).items()}


def compute(case, view, dtype):
  """Returns what the network computes in {"train": ..., "eval": ...}, by the names of the file."""
  given, slope = (np.asarray(stored(f"{case}/{view}/given")[name], dtype) for name in ("input", "slope"))
  given = np.moveaxis(given, -3, -1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(heads, "PATCH_FEATURES", 6)
    network = create_network(case, dtype, patch)
    example = jnp.zeros((1, 4, 16, 16, 3), dtype)
    like = variable_shapes(network, example[0] if network.image_head else None, example)
    variables = stored_variables(case, like, dtype)

    def embed(params, given, train):
      """Returns the embedding, and {"batch_stats": ..., "intermediates": ...} with the trunk's features."""
      return network.with_batch_norm(group=CASES[case][4]).apply(
        {**variables, "params": params}, given, train=train, method=f"embed_{view}", mutable=["batch_stats"],
        capture_intermediates=lambda module, _: module.name == "trunk")

    def loss(params, given):
      embedding, other = embed(params, given, True)
      return jnp.sum(embedding * slope), (embedding, other)

    @jax.jit
    def both(params, given):
      gradients, train = jax.grad(loss, (0, 1), has_aux=True)(params, given)
      return gradients, train, embed(params, given, False)

    (gradients, by_input), *modes = both(variables["params"], given)
  found = {}
  for mode, (embedding, other) in zip(("train", "eval"), modes, strict=True):
    features = other["intermediates"]["trunk"]["__call__"][0]
    found[mode] = {"embedding": embedding, **{
      f"features/{name}": shadows(np.moveaxis(value, -1, 1)) for name, value in features.items()}}
  for name, value in named({"params": gradients}).items():
    found["train"][f"gradient/{name}"] = shadows(value)
  found["train"]["gradient/input"] = shadows(np.moveaxis(by_input, -1, -3))
  for name, value in named({"batch_stats": modes[0][1]["batch_stats"]}).items():
    found["train"][f"running/{name}"] = value
  return found


def as_flax(expected, before):
  """Returns the numbers of the file with Flax's running variances.

  PyTorch's moves by a tenth of the unbiased variance of the batch, which is n/(n-1) times the biased one of Flax.
  """
  expected = dict(expected)
  for name in [name for name in expected if name.startswith("points/")]:
    layer, points = name.removeprefix("points/"), expected.pop(name)
    kept = 0.9 * before[f"{layer}.running_var"]
    expected[f"running/{layer}.running_var"] = kept + (expected[f"running/{layer}.running_var"] - kept) * (
      1 - 1 / points)
  return expected


def check(case, view, dtype, tolerance):
  found = compute(case, view, dtype)
  for mode, values in found.items():
    expected = as_flax(stored(f"{case}/{view}/{mode}"), stored(f"{case}/weights"))
    computed = {name: value for name, value in values.items() if not name.endswith("num_batches_tracked")}
    # Where the loss does not depend on a parameter of the other head, PyTorch has no gradient and JAX has zeros.
    absent = {name for name in computed.keys() - expected.keys() if "_head." in name and not np.any(computed[name])}
    assert computed.keys() - absent == expected.keys()
    for name, value in expected.items():
      np.testing.assert_allclose(np.float64(computed[name]), value, rtol=0, err_msg=f"{case}, {view}, {mode}: {name}",
                                 atol=tolerance * max(1, np.abs(value).max()))


@pytest.mark.parametrize(("case", "view"), PASSES)
def test_in_float64(case, view):
  with jax.enable_x64(True):
    check(case, view, jnp.float64, 1e-11)


@pytest.mark.parametrize("view", ["image", "pretext"])
def test_in_float32(view):
  check("bottleneck-odd", view, jnp.float32, 1e-4)
