"""Makes blocks.npz: what tiny ResNets with their heads compute, by PyTorch's own operations in float64.

It needs PyTorch and nothing of pirl_jax. The file in the repository was made with torch 2.13.0 (CPU) and numpy 2.4.6:

  python tests/stored/make_blocks.py

A pass is one call of a network, in training (with the statistics of its batch) or with the running statistics. In the
file, FOLDER/names and FOLDER/values have several arrays behind each other, with a name and a shape for each:

  CASE/weights: parameters and running statistics by torchvision's names, i8, in 64ths
  CASE/PASS/given: "input" and "slope", i8, in 64ths
  CASE/PASS/train, CASE/PASS/eval: "embedding", "features/conv1" and the other stages; in training also the running
    statistics after the pass ("running/NAME"), the number of points that a layer took them of ("points/LAYER"), and
    the gradients of sum(embedding x slope) by every parameter and by the input ("gradient/NAME")

Features and gradients are stored as eight sums each, see `oracles.shadows`. Arrays have PyTorch's order of axes. The
variance that PyTorch keeps is the unbiased one of the batch: n/(n-1) times the one that normalises.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracles import shadows  # noqa: E402

PATCHES, IMAGES, DIM = 4, 4, 6
STEMS = {"imagenet": (7, 2), "3x3": (3, 1), "3x3s2": (3, 2)}  # side of the kernel, stride
CASES = {
  # name: (stem, channels, blocks of each stage, bottleneck, heads, sides of (image, patch), images in a group)
  "bottleneck-even": ("imagenet", 4, (2, 2), True, "mlp", (32, 17), None),
  "bottleneck-odd": ("imagenet", 4, (2, 2), True, "mlp", (37, 16), None),
  "bottleneck-groups": ("imagenet", 4, (1, 1), True, "linear", (23, 12), 2),
  "bottleneck-w2": ("imagenet", 2 * 2, (1, 1), True, "linear", (32, 17), None),
  "basic": ("3x3s2", 4, (2, 2), False, "linear", (15, 8), None),
  "jigsaw": ("3x3", 4, (1, 1), False, "jigsaw", (None, 7), 2),
}


class Pass:
  """One call of the network."""

  def __init__(self, case, arrays, *, training):
    self.stem, _, self.blocks, self.bottleneck, self.heads, _, self.group = CASES[case]
    self.training = training
    self.arrays = {name: torch.tensor(value / 64, requires_grad="running" not in name)
                   for name, value in arrays.items()}
    self.found, self.views = {}, 1

  def conv(self, name, x, stride, padding):
    return F.conv2d(x, self.arrays[f"{name}.weight"], stride=stride, padding=padding)

  def norm(self, name, x):
    """Each group is normalised alone; the running statistics become the mean of those that each group alone gives."""
    weight, bias, *running = (self.arrays[f"{name}.{part}"]
                              for part in ("weight", "bias", "running_mean", "running_var"))
    if not self.training:
      return F.batch_norm(x, *running, weight, bias, training=False, eps=1e-5)
    size = self.group * self.views if self.group else len(x)
    outs, moved = [], []
    for rows in x.split(size):
      own = [value.clone() for value in running]
      outs.append(F.batch_norm(rows, *own, weight, bias, training=True, momentum=0.1, eps=1e-5))
      moved.append(own)
    for part, values in zip(("mean", "var"), zip(*moved, strict=True), strict=True):
      self.found[f"running/{name}.running_{part}"] = torch.stack(values).mean(0).numpy()
    self.found[f"points/{name}"] = np.int64(size * x[0, 0].numel())
    return torch.cat(outs)

  def block(self, name, x, stride):
    y = x
    if self.bottleneck:  # v1.5: the stride is that of the 3x3
      y = F.relu(self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", y, 1, 0)))
      y = F.relu(self.norm(f"{name}.bn2", self.conv(f"{name}.conv2", y, stride, 1)))
      y = self.norm(f"{name}.bn3", self.conv(f"{name}.conv3", y, 1, 0))
    else:
      y = F.relu(self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", y, stride, 1)))
      y = self.norm(f"{name}.bn2", self.conv(f"{name}.conv2", y, 1, 1))
    if f"{name}.downsample.0.weight" in self.arrays:
      x = self.norm(f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x, stride, 0))
    return F.relu(x + y)

  def trunk(self, x):
    size, stride = STEMS[self.stem]
    x = F.relu(self.norm("bn1", self.conv("conv1", x, stride, size // 2)))
    self.found["features/conv1"] = shadows(x.detach())
    if self.stem == "imagenet":
      x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage, blocks in enumerate(self.blocks):
      for block in range(blocks):
        x = self.block(f"layer{stage + 1}.{block}", x, 2 if stage and not block else 1)
      self.found[f"features/res{stage + 2}"] = shadows(x.detach())
    x = x.mean((2, 3))
    self.found["features/pooled"] = shadows(x.detach())
    return x

  def linear(self, name, x):
    return F.linear(x, self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"])

  def image_head(self, x):
    if self.heads == "mlp":
      x = F.relu(self.linear("image_head.hidden", x))
    return self.linear("image_head.embedding", x)

  def pretext_head(self, x):
    if self.heads == "mlp":
      x = F.relu(self.linear("pretext_head.hidden", x))
    x = self.linear("pretext_head.patch", x)
    if self.heads == "mlp":
      x = F.relu(x)
    if self.heads == "jigsaw":
      x = F.relu(self.norm("pretext_head.bn", x))
    x = x.reshape(-1, PATCHES * x.shape[1])  # the patches of an image side by side, as they come
    return self.linear("pretext_head.logits" if self.heads == "jigsaw" else "pretext_head.embedding", x)

  def run(self, given, slope):
    """Returns {name: array}; given f[N, 3, H, W] images, or f[N, P, 3, H, W] patches."""
    leaf = torch.tensor(given, requires_grad=True)
    self.views = PATCHES if leaf.dim() == 5 else 1
    pooled = self.trunk(leaf.reshape(-1, *leaf.shape[-3:]))
    embedding = self.image_head(pooled) if self.views == 1 else self.pretext_head(pooled)
    self.found["embedding"] = embedding.detach().numpy()
    if self.training:
      (embedding * torch.tensor(slope)).sum().backward()
      for name, value in [*self.arrays.items(), ("input", leaf)]:
        if value.grad is not None:
          self.found[f"gradient/{name}"] = shadows(value.grad)
    return self.found


def shapes(case):
  """Returns {name: shape} of a network's arrays."""
  stem, channels, blocks, bottleneck, heads, _, _ = CASES[case]
  found = {}

  def conv(name, norm, out, inside, side):
    found[f"{name}.weight"] = (out, inside, side, side)
    found.update({f"{norm}.{part}": (out,) for part in ("weight", "bias", "running_mean", "running_var")})

  def linear(name, out, inside):
    found.update({f"{name}.weight": (out, inside), f"{name}.bias": (out,)})

  conv("conv1", "bn1", channels, 3, STEMS[stem][0])
  width = channels
  for stage, number in enumerate(blocks):
    inner = channels * 2**stage
    out = 4 * inner if bottleneck else inner
    for block in range(number):
      name = f"layer{stage + 1}.{block}"
      conv(f"{name}.conv1", f"{name}.bn1", inner, width, 1 if bottleneck else 3)
      conv(f"{name}.conv2", f"{name}.bn2", inner, inner, 3)
      if bottleneck:
        conv(f"{name}.conv3", f"{name}.bn3", out, inner, 1)
      if width != out or stage and not block:
        conv(f"{name}.downsample.0", f"{name}.downsample.1", out, width, 1)
      width = out
  if heads == "jigsaw":
    linear("pretext_head.patch", DIM, width)
    found.update({f"pretext_head.bn.{part}": (DIM,) for part in ("weight", "bias", "running_mean", "running_var")})
    linear("pretext_head.logits", DIM, PATCHES * DIM)
    return found
  for head, joined in (("image_head", width), ("pretext_head", PATCHES * DIM)):
    if heads == "mlp":
      linear(f"{head}.hidden", width, width)
    linear(f"{head}.embedding", DIM, joined)
  linear("pretext_head.patch", DIM, width)
  return found


def drawn(rng, name, shape):
  """Returns i8[shape] in 64ths: positive variances and mostly positive scales, weights with which no layer is dead."""
  if name.endswith("running_var"):
    value = rng.uniform(0.5, 1.5, shape)
  elif name in ("input", "slope"):
    value = rng.normal(size=shape)
  elif len(shape) > 1:
    value = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
  else:
    value = rng.normal(0 if name.endswith(("bias", "mean")) else 1, 0.3, shape)
  return np.clip(np.round(64 * value), -127, 127).astype(np.int8)


def packed(folder, arrays):
  """Returns the two arrays of a folder."""
  names = [" ".join([name, *map(str, np.shape(value))]) for name, value in arrays.items()]
  return {f"{folder}/names": np.array(names), f"{folder}/values": np.concatenate([*map(np.ravel, arrays.values())])}


def main():
  rng, stored = np.random.default_rng(0), {}
  for case, (*_, sides, _) in CASES.items():
    arrays = {name: drawn(rng, name, shape) for name, shape in shapes(case).items()}
    stored.update(packed(f"{case}/weights", arrays))
    for view, between, side in zip(("image", "pretext"), ((), (PATCHES,)), sides, strict=True):
      if side is None:
        continue
      given = {"input": drawn(rng, "input", (IMAGES, *between, 3, side, side)),
               "slope": drawn(rng, "slope", (IMAGES, DIM))}
      stored.update(packed(f"{case}/{view}/given", given))
      for mode in ("train", "eval"):
        one_pass = Pass(case, arrays, training=mode == "train")
        stored.update(packed(f"{case}/{view}/{mode}", one_pass.run(given["input"] / 64, given["slope"] / 64)))
  np.savez_compressed(Path(__file__).with_name("blocks.npz"), **stored)


if __name__ == "__main__":
  main()
