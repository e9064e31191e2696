"""The network of a PIRL run and its training step in PyTorch, for comparison.

The step has no views: images and patches are its arguments. Both forward passes, both heads, the losses and SGD are the
same as in `pirl_jax`. Letters: B batch, P patches, K negatives, D embedding, N images.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def _convolution(channels, features, size, stride):
  return nn.Conv2d(channels, features, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
  """A residual block, as torchvision's: two 3x3 convolutions or, as a bottleneck, 1x1, 3x3 and 1x1."""

  def __init__(self, channels: int, features: int, stride: int, *, bottleneck: bool):
    super().__init__()
    out = features * (4 if bottleneck else 1)
    # (channels out, size of the kernel, stride) of each convolution
    layers = ([(features, 1, 1), (features, 3, stride), (out, 1, 1)] if bottleneck
              else [(features, 3, stride), (features, 3, 1)])
    width, self.number = channels, len(layers)
    for number, (wide, size, step) in enumerate(layers, 1):
      setattr(self, f"conv{number}", _convolution(width, wide, size, step))
      setattr(self, f"bn{number}", nn.BatchNorm2d(wide))
      width = wide
    self.is_plain = stride == 1 and channels == out
    if not self.is_plain:
      self.downsample_conv, self.downsample_bn = _convolution(channels, out, 1, stride), nn.BatchNorm2d(out)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns f32[B, C, H / stride, W / stride]."""
    y = x
    for number in range(1, self.number + 1):
      y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
      if number < self.number:
        y = F.relu(y)
    if not self.is_plain:
      x = self.downsample_bn(self.downsample_conv(x))
    return F.relu(y + x)


class Network(nn.Module):
  """A trunk, and two linear heads: one for the image and one for its patches."""

  def __init__(self, blocks: tuple[int, ...], channels: int, stem: tuple[int, int, bool], dim: int, num_patches: int,
               *, bottleneck: bool = False):
    super().__init__()
    kernel, stride, self.pool = stem
    self.conv1, self.bn1 = _convolution(3, channels, kernel, stride), nn.BatchNorm2d(channels)
    width, self.stages = channels, []
    for stage, count in enumerate(blocks):
      for block in range(count):
        name = f"res{stage + 2}_{block}"
        setattr(self, name, Block(width, channels * 2**stage, 2 if stage and not block else 1, bottleneck=bottleneck))
        self.stages.append(name)
        width = channels * 2**stage * (4 if bottleneck else 1)
    self.image_head, self.patch = nn.Linear(width, dim), nn.Linear(width, dim)
    self.patches_head = nn.Linear(num_patches * dim, dim)

  def trunk(self, x: torch.Tensor) -> torch.Tensor:
    """Returns the pooled features f32[B, C] of images f32[B, 3, H, W]."""
    x = F.relu(self.bn1(self.conv1(x)))
    if self.pool:
      x = F.max_pool2d(x, 3, 2, 1)
    for name in self.stages:
      x = getattr(self, name)(x)
    return x.float().mean((2, 3))

  def forward(self, images: torch.Tensor, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the embeddings f32[B, D], of unit norm, of images f32[B, 3, H, W] and of patches f32[B P, 3, h, w]."""
    pretext_features, image_features = self.trunk(patches), self.trunk(images)
    with torch.autocast(images.device.type, enabled=False):  # the heads and what follows are in float32
      pretext = self.patches_head(self.patch(pretext_features).reshape(len(images), -1))
      return F.normalize(self.image_head(image_features)), F.normalize(pretext)

  def load(self, variables: Mapping[str, np.ndarray]) -> None:
    """Takes the variables of a network of `pirl_jax`, by their path: "params/trunk/res2_0/conv1/kernel"."""
    names = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    heads = {"image_head/embedding": "image_head", "pretext_head/patch": "patch",
             "pretext_head/embedding": "patches_head"}
    found = {}
    for path, value in variables.items():
      _, *layer, name = path.split("/")
      layer = "/".join(layer)
      layer = heads.get(layer) or layer.removeprefix("trunk/").replace("/", ".")
      value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
      found[f"{layer}.{names[name]}"] = torch.from_numpy(np.ascontiguousarray(value))
    missing, unknown = self.load_state_dict(found, strict=False)
    assert not unknown and all(name.endswith("num_batches_tracked") for name in missing), (missing, unknown)


def create_step(network: Network, *, learning_rate: float, temperature: float):
  """Returns step(images, patches, own, negatives) -> loss, a float: one step of SGD with the softmax loss.

  `own` f32[B, D] are the rows of the images, `negatives` f32[2, K, D] the negatives of each of the two terms.
  """
  optimizer = torch.optim.SGD(network.parameters(), lr=learning_rate, momentum=0.9, weight_decay=1e-4)

  def step(images, patches, own, negatives):
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros(())
    for embedding, others in zip(network(images, patches), negatives, strict=True):
      positive = (embedding * own).sum(1, keepdim=True)
      scores = torch.cat([positive, embedding @ others.T], 1) / temperature
      loss = loss + 0.5 * F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))
    loss.backward()
    optimizer.step()
    return loss.item()

  return step


class BankStep:
  """A whole step but for the views: two passes, a memory bank f32[N, D], the loss `nce`, SGD, the rows moved.

  The network may be compiled. The negatives are drawn once for the batch or, as PyContrast draws them, for each image.
  """

  def __init__(self, network, bank: torch.Tensor, *, num_negatives: int, temperature: float, per_image: bool,
               autocast: bool):
    self.network, self.bank, self.normaliser = network, bank, torch.zeros((), device=bank.device)
    self.num_negatives, self.temperature, self.per_image, self.autocast = (
      num_negatives, temperature, per_image, autocast)
    self.ready = False  # the first batch sets the normaliser
    self.optimizer = torch.optim.SGD(network.parameters(), lr=0.12, momentum=0.9, weight_decay=1e-4)

  def __call__(self, images: torch.Tensor, patches: torch.Tensor, index: torch.Tensor,
               negatives: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """Returns the loss f32[] of a step.

    Args:
      images: u8[B, H, W, 3].
      patches: u8[B, P, h, w, 3].
      index: i64[B], rows of the bank.
      negatives: of the image and of the pretext term, i64[K] or i64[B, K]; None: they are drawn.
    """
    self.optimizer.zero_grad(set_to_none=True)
    if negatives is None:
      shape = (len(index), self.num_negatives) if self.per_image else (self.num_negatives,)
      negatives = tuple(torch.randint(len(self.bank), shape, device=self.bank.device) for _ in range(2))
    with torch.autocast(self.bank.device.type, torch.bfloat16, enabled=self.autocast):
      image, pretext = self.network(_normalised(images), _normalised(patches.flatten(0, 1)))
    own = self.bank[index]
    scores = [self._scores(embedding, own, others, index)
              for embedding, others in zip((image, pretext), negatives, strict=True)]
    if not self.ready:
      with torch.no_grad():
        positive, others, weight = scores[1]
        total, number = positive.exp().sum() + (others.exp() * weight).sum(), len(positive) + weight.sum()
        self.normaliser, self.ready = len(self.bank) * total / number, True
    loss = 0.5 * torch.stack([self._nce(*given).mean() for given in scores]).sum()
    loss.backward()
    self.optimizer.step()
    with torch.no_grad():
      self.bank[index] = F.normalize(0.5 * own + 0.5 * image)
    return loss.detach()

  def _scores(self, embedding, own, others, index):
    """Returns the scores f32[B] and f32[B, K], and the weights f32[B, K]: 0 for the own row."""
    positive, rows = (embedding * own).sum(1) / self.temperature, self.bank[others]
    scores = torch.bmm(rows, embedding[:, :, None])[:, :, 0] if self.per_image else embedding @ rows.T
    return positive, scores / self.temperature, (others != index[:, None]).float()

  def _nce(self, positive, negatives, weight):
    """Returns the loss f32[B], see `pirl_jax.method.losses.nce`."""
    noise, log_z, eps = self.num_negatives / len(self.bank), self.normaliser.log(), 2.0**-23
    total = (torch.log1p(((negatives - log_z).exp() + eps) / noise) * weight).sum(1)
    return torch.log((positive - log_z).exp() + noise + eps) - (positive - log_z) + total


def _normalised(levels):
  """Returns images f32[B, 3, H, W], channels last in memory, of levels u8[B, H, W, 3]."""
  mean, std = (torch.tensor(x, device=levels.device) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
  return ((levels / 255 - mean) / std).permute(0, 3, 1, 2)
