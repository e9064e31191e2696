"""The trunk in NumPy, computed from arrays with torchvision's names: an independent check of an exported file.

It shares no code with `pirl_jax.models`, so an array that was renamed or transposed wrongly shows. Everything is in
PyTorch's order of axes, and in float64.

Letters: N images, H W height and width, C channels, O channels out, k side of a kernel, h w height and width of the
result.
"""

from collections.abc import Mapping

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

EPSILON = 1e-5


def trunk_forward(arrays: Mapping[str, np.ndarray], images: np.ndarray, *, stride: int,
                  pool: bool) -> dict[str, np.ndarray]:
  """Returns the features of a ResNet by layer: "conv1", "res2", ... f64[N, C, H, W], and "pooled" f64[N, C].

  "conv1" is after batch norm and ReLU. The number and the kind of blocks are those of the names.

  Args:
    arrays: by torchvision's names.
    images: f[N, 3, H, W], normalised.
    stride: of the first convolution.
    pool: whether the 3 x 3 max pooling with stride 2 follows the first convolution.
  """
  x = _relu(_norm(arrays, "bn1", _conv(images.astype(np.float64), arrays["conv1.weight"], stride)))
  features = {"conv1": x}
  if pool:
    x = _max_pool(x)
  stage = 1
  while f"layer{stage}.0.conv1.weight" in arrays:
    block = 0
    while f"layer{stage}.{block}.conv1.weight" in arrays:
      x = _block(arrays, f"layer{stage}.{block}", x, 2 if stage > 1 and not block else 1)
      block += 1
    features[f"res{stage + 1}"] = x
    stage += 1
  features["pooled"] = x.mean(axis=(2, 3))
  return features


def _block(arrays: Mapping[str, np.ndarray], name: str, x: np.ndarray, stride: int) -> np.ndarray:
  bottleneck = f"{name}.conv3.weight" in arrays
  strides = (1, stride, 1) if bottleneck else (stride, 1)
  y = x
  for number, own in enumerate(strides, 1):
    y = _norm(arrays, f"{name}.bn{number}", _conv(y, arrays[f"{name}.conv{number}.weight"], own))
    if number < len(strides):
      y = _relu(y)
  if f"{name}.downsample.0.weight" in arrays:
    x = _norm(arrays, f"{name}.downsample.1", _conv(x, arrays[f"{name}.downsample.0.weight"], stride))
  return _relu(x + y)


def _relu(x: np.ndarray) -> np.ndarray:
  return np.maximum(x, 0)


def _conv(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
  """Returns f64[N, O, h, w]: the convolution with kernel [O, C, k, k], with padding k // 2."""
  side, pad = kernel.shape[2], kernel.shape[2] // 2
  padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
  windows = sliding_window_view(padded, (side, side), axis=(2, 3))[:, :, ::stride, ::stride]  # [N, C, h, w, k, k]
  return np.moveaxis(np.tensordot(windows, kernel.astype(np.float64), ((1, 4, 5), (1, 2, 3))), 3, 1)


def _norm(arrays: Mapping[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
  weight, bias, mean, var = (arrays[f"{name}.{part}"].astype(np.float64)[None, :, None, None]
                             for part in ("weight", "bias", "running_mean", "running_var"))
  return (x - mean) / np.sqrt(var + EPSILON) * weight + bias


def _max_pool(x: np.ndarray) -> np.ndarray:
  padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
  return sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::2, ::2].max(axis=(4, 5))
