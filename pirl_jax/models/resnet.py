"""ResNet trunks in torchvision's v1.5 layout (the stride sits in the 3x3 convolution), with named stages.

Letters: B batch, H W height and width, C channels.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pirl_jax.errors import UserError
from pirl_jax.models import convolution
from pirl_jax.models.batch_norm import create_batch_norm, in_groups
from pirl_jax.models.initializers import kernel_init
from pirl_jax.models.pooling import max_pool

ARCHITECTURES = {
  # name: (bottleneck blocks, blocks in each stage, channels of the first stage)
  "resnet8": (False, (1, 1, 1), 16),  # the small one, for CPUs
  "resnet18": (False, (2, 2, 2, 2), 64),
  "resnet34": (False, (3, 4, 6, 3), 64),
  "resnet50": (True, (3, 4, 6, 3), 64),
  "resnet101": (True, (3, 4, 23, 3), 64),
}

STEMS = {
  # name: (kernel, stride, max pooling)
  "imagenet": (7, 2, True),
  "3x3": (3, 1, False),  # small images keep their size
  "3x3s2": (3, 2, False),  # small images on a CPU: a quarter of the work
}


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
  """Returns max(x, 0), of any shape. The gradient looks for zeros in the result, which the next layer keeps anyway.

  From x > 0, which XLA makes of result > 0, a program would keep x, too, or compute x again. With batch norm in groups,
  that is 3 % more bytes in a step on a GPU and 9 % more memory.
  """
  return nn.relu(x)


relu.defvjp(lambda x: (relu(x),) * 2, lambda result, slope: (jnp.where(result != 0, slope, 0),))


class Block(nn.Module):
  """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the channels out (bottleneck)."""

  channels: int
  stride: int
  bottleneck: bool
  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns f[B, H/stride, W/stride, C'] with C' = channels (basic) or 4 channels (bottleneck), after ReLU."""
    out = self.channels * (4 if self.bottleneck else 1)
    y = x
    if self.bottleneck:
      y = relu(self.norm(name="bn1")(self.conv(self.channels, (1, 1), name="conv1")(y)))
      y = relu(self.norm(name="bn2")(self._conv3x3(self.stride, "conv2")(y)))
      y = self.norm(name="bn3")(self.conv(out, (1, 1), name="conv3")(y))
    else:
      y = relu(self.norm(name="bn1")(self._conv3x3(self.stride, "conv1")(y)))
      y = self.norm(name="bn2")(self._conv3x3(1, "conv2")(y))
    if x.shape[-1] != out or self.stride != 1:
      x = self.conv(out, (1, 1), strides=self.stride, name="downsample_conv")(x)
      x = self.norm(name="downsample_bn")(x)
    return relu(x + y)

  def _conv3x3(self, stride: int, name: str) -> nn.Module:
    # Padding of one on every side, as PyTorch: "SAME" pads only right and below when the stride is 2.
    return self.conv(self.channels, (3, 3), strides=stride, padding=1, name=name)


class ResNet(nn.Module):
  """The trunk: images in, the features of every stage out.

  Attributes:
    blocks: number of blocks of each stage res2, res3, ...
    bottleneck: bottleneck blocks (ResNet-50 and deeper) or basic ones.
    channels: channels of the first stage; each next stage has twice as many.
    stem: a key of `STEMS`.
    dtype: of the computation; parameters and batch statistics are float32, or float64 with it.
    batch_norm_axis: mesh axis over which batch statistics are taken; None: each device its own.
    batch_norm_group: number of images that have batch statistics of their own; None: all images.
    remat: the gradient keeps what goes into each stage alone and computes the rest of it again.
  """

  blocks: Sequence[int]
  bottleneck: bool
  channels: int
  stem: str = "imagenet"
  dtype: Any = jnp.float32
  batch_norm_axis: str | None = None
  batch_norm_group: int | None = None
  remat: bool = False

  if TYPE_CHECKING:
    def __hash__(self) -> int: ...  # Flax adds it, without declaring it

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool, views: int = 1) -> dict[str, jax.Array]:
    """Returns the features by name: "conv1" (after BN and ReLU, before pooling), "res2" ... and "pooled".

    "pooled" is the global average of the last stage, f32[B, C] (f64 where dtype is); the others are dtype[B, H, W, C].

    Args:
      images: f32[B, H, W, 3], normalised.
      train: batch norm takes the statistics of this batch and moves its running ones (eps 1e-5, and a tenth of
        the new value each call: PyTorch's momentum 0.1), or uses the running ones.
      views: number of consecutive entries of `images` that are views of one image; a group of batch norm has all views
        of its images.
    """
    exact = jnp.promote_types(self.dtype, jnp.float32)
    conv = partial(nn.Conv, use_bias=False, padding=0, dtype=self.dtype, param_dtype=exact, kernel_init=kernel_init,
                   conv_general_dilated=convolution.conv)
    group = self.batch_norm_group * views if train and self.batch_norm_group else None
    norm = create_batch_norm(train=train, dtype=self.dtype, param_dtype=exact, axis=self.batch_norm_axis, group=group)

    def flat(x: jax.Array) -> jax.Array:
      return x.reshape(-1, *x.shape[-3:])

    kernel, stride, pool = STEMS[self.stem]
    features = {}
    x = conv(self.channels, (kernel, kernel), strides=stride, padding=kernel // 2, name="conv1")(
      in_groups(images.astype(self.dtype), group))
    features["conv1"] = x = flat(relu(norm(name="bn1")(x)))
    x = in_groups(max_pool(x) if pool else x, group)

    def run_stage(_: nn.Module, x: jax.Array, stage: int) -> jax.Array:
      for block in range(self.blocks[stage]):
        x = Block(self.channels * 2**stage, 2 if stage and not block else 1, self.bottleneck, conv, norm,
                  name=f"res{stage + 2}_{block}")(x)
      return x

    if self.remat:
      run_stage = nn.remat(run_stage, static_argnums=(2,))
    for stage in range(len(self.blocks)):
      x = run_stage(self, x, stage)
      features[f"res{stage + 2}"] = flat(x)
    features["pooled"] = jnp.mean(flat(x).astype(exact), axis=(1, 2))
    return features


def create_resnet(arch: str, *, width: int = 1, stem: str = "imagenet", dtype: Any = jnp.float32,
                  batch_norm_axis: str | None = None, remat: bool = False) -> ResNet:
  """Returns the trunk of that name, every layer `width` times as wide (vissl's w2 and w4: `WIDTH_MULTIPLIER`).

  The other arguments are attributes of `ResNet`.

  Raises:
    UserError: an unknown architecture or stem, or a width below 1.
  """
  if arch not in ARCHITECTURES:
    raise UserError(f"model.arch={arch!r} is unknown; choose from {', '.join(ARCHITECTURES)}")
  if stem not in STEMS:
    raise UserError(f"model.stem={stem!r} is unknown; choose from {', '.join(STEMS)}")
  if width < 1:
    raise UserError(f"model.width={width}: the width multiplier is a whole number from 1")
  bottleneck, blocks, channels = ARCHITECTURES[arch]
  return ResNet(blocks=blocks, bottleneck=bottleneck, channels=channels * width, stem=stem, dtype=dtype,
                batch_norm_axis=batch_norm_axis, remat=remat)
