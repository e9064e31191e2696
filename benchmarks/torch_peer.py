"""The network of a PIRL run and its training step in PyTorch, for comparison: basic-block ResNets on small images.

It has no views and no memory bank: images, patches, own rows and negatives are given. Both passes, both heads, the
softmax loss and SGD are those of `pirl_jax`.
"""

import torch
from torch import nn
from torch.nn import functional as F


def _convolution(channels, features, size, stride):
  return nn.Conv2d(channels, features, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
  """A basic residual block, as torchvision's."""

  def __init__(self, channels: int, features: int, stride: int):
    super().__init__()
    self.conv1, self.bn1 = _convolution(channels, features, 3, stride), nn.BatchNorm2d(features)
    self.conv2, self.bn2 = _convolution(features, features, 3, 1), nn.BatchNorm2d(features)
    self.shortcut = nn.Sequential()
    if stride != 1 or channels != features:
      self.shortcut = nn.Sequential(_convolution(channels, features, 1, stride), nn.BatchNorm2d(features))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Returns f32[B, features, H / stride, W / stride]."""
    y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    return F.relu(y + self.shortcut(x))


class Network(nn.Module):
  """Trunk with a 3x3 stem and two linear heads: of the image, and of its patches."""

  def __init__(self, blocks: tuple[int, ...], channels: int, stem_stride: int, dim: int, num_patches: int):
    super().__init__()
    layers = [_convolution(3, channels, 3, stem_stride), nn.BatchNorm2d(channels), nn.ReLU()]
    width = channels
    for stage, count in enumerate(blocks):
      for block in range(count):
        features = channels * 2**stage
        layers.append(Block(width, features, 2 if stage and not block else 1))
        width = features
    self.trunk = nn.Sequential(*layers)
    self.image_head, self.patch = nn.Linear(width, dim), nn.Linear(width, dim)
    self.patches_head = nn.Linear(num_patches * dim, dim)

  def forward(self, images: torch.Tensor, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the embeddings f32[B, D] of images f32[B, 3, H, W] and of patches f32[B P, 3, h, w], of unit length."""
    pooled = self.trunk(patches).mean((2, 3))
    pretext = self.patches_head(self.patch(pooled).reshape(len(images), -1))
    image = self.image_head(self.trunk(images).mean((2, 3)))
    return F.normalize(image), F.normalize(pretext)


def create_step(network: Network, *, learning_rate: float, temperature: float):
  """Returns step(images, patches, own, negatives) -> loss, a float: one step of SGD.

  own f32[B, D] are the rows of the images, negatives f32[2, K, D] those of each of the two terms.
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
