"""Figures of a representation that need no labels: rank, LiDAR, alignment, uniformity, and the nearest view.

Everything is computed on the host in float64. The singular values are square roots of eigenvalues of the Gram matrix:
with 2,048 rows this takes a hundredth of the time of a singular value decomposition. A float32 Gram matrix would not
do: its rounding errors look like directions of their own, and a rank of 15.8 becomes 15.9.

Letters: N images, V augmented views of each image, G entries of a gallery, D numbers of a vector.
"""

import numpy as np

NOISE_FLOOR = 1e-4
"""Added to the diagonal of the scatter within the images for LiDAR, as in its paper (2312.04000, delta)."""

PAIRS_AT_A_TIME = 2**20
"""Number of pairs whose distances are in memory at once: 8 MB."""


def effective_rank(strengths: np.ndarray) -> float:
  """Returns exp(entropy of p), p = strengths / their sum, in [1, D]; 0 if all strengths are 0.

  This is the number of equal directions that would have the same entropy.

  Args:
    strengths: f[D], at least 0: singular values or eigenvalues.
  """
  strengths = np.asarray(strengths, np.float64)
  strengths = strengths[strengths > 0]
  if not len(strengths):
    return 0.0
  p = strengths / strengths.sum()
  return float(np.exp(-np.sum(p * np.log(p))))


def rank_me(features: np.ndarray) -> float:
  """Returns RankMe (2210.02885) of f[N, D], in [1, min(N, D)]: the effective rank of the singular values.

  The features are not centred: without their mean, features that have collapsed to a point are noise of full rank.
  If a number is not finite, the rank is NaN.
  """
  if not np.isfinite(features).all():
    return float("nan")
  return effective_rank(np.sqrt(_squared_singular_values(np.asarray(features, np.float64))))


def lidar(views: np.ndarray) -> float:
  """Returns LiDAR (2312.04000) of f[N, V, D], in [1, min(N - 1, D)].

  LiDAR is the effective rank of Sw^-1/2 Sb Sw^-1/2. Sb is the scatter of the images' means, and Sw is the mean scatter
  of an image's views, plus `NOISE_FLOOR`. Directions in which the views of an image differ as much as the images
  themselves do not count. The absolute strength of the noise hardly matters, so LiDAR is never read alone.

  Args:
    views: N and V at least 2.
  """
  views = np.asarray(views, np.float64)
  num_images, num_views, dim = views.shape
  means = views.mean(axis=1)
  within = (views - means[:, None]).reshape(-1, dim)
  centred = means - means.mean(axis=0)
  strength, axes = np.linalg.eigh(within.T @ within / (num_images * num_views) + NOISE_FLOOR * np.eye(dim))
  # Sb = centred^T centred / N, so the eigenvalues are the squared singular values of the whitened means.
  whitened = centred @ axes / np.sqrt(strength)
  return effective_rank(_squared_singular_values(whitened))


def alignment(views: np.ndarray) -> float:
  """Returns the mean squared distance of two views of an image, in [0, 4], of unit vectors f[N, V, D]; 0 is the best.

  Args:
    views: V at least 2; all pairs of different views of an image count.
  """
  views = np.asarray(views, np.float64)
  num_views = views.shape[1]
  # The mean of ||a - b||^2 over all ordered pairs is 2 (mean ||a||^2 - ||mean||^2); pairs of a view with itself are 0.
  total = 2 * (np.sum(views**2, axis=2).mean(axis=1) - np.sum(views.mean(axis=1) ** 2, axis=1))
  return float(total.mean() * num_views / (num_views - 1))


def uniformity(embeddings: np.ndarray) -> float:
  """Returns log of the mean of exp(-2 ||zi - zj||^2) over all pairs of different unit vectors f[N, D], in [-8, 0].

  0 means that all vectors are equal. Vectors that fill the sphere of 128 dimensions have -3.94.

  Args:
    embeddings: N at least 2.
  """
  embeddings = np.asarray(embeddings, np.float64)
  num, total = len(embeddings), 0.0
  size = max(1, PAIRS_AT_A_TIME // num)
  for first in range(0, num, size):
    part = embeddings[first:first + size]
    distances = np.sum(part**2, axis=1)[:, None] + np.sum(embeddings**2, axis=1)[None] - 2 * part @ embeddings.T
    similar = np.exp(-2 * np.maximum(distances, 0))
    similar[np.arange(len(part)), np.arange(first, first + len(part))] = 0  # a vector and itself are no pair
    total += float(similar.sum())
  return float(np.log(total / (num * (num - 1))))


def nearest_is_own(queries: np.ndarray, gallery: np.ndarray) -> float:
  """Returns the share, in [0, 1], of the queries f[N, D] whose nearest entry of the gallery is their own.

  Nearest is the largest cosine. The own entry of query i is entry i of the gallery; the entries after the first N
  belong to other images. If another entry is exactly as near, the query does not count: a network that gives all images
  the same vector has 0.

  Args:
    queries: N at least 1.
    gallery: f[G, D], G >= N.
  """
  queries, gallery = (_unit(np.asarray(x, np.float64)) for x in (queries, gallery))
  num_right = 0
  size = max(1, PAIRS_AT_A_TIME // len(gallery))
  for first in range(0, len(queries), size):
    cosines = queries[first:first + size] @ gallery.T
    rows = np.arange(len(cosines))
    own = cosines[rows, first + rows].copy()
    cosines[rows, first + rows] = -np.inf
    num_right += int(np.count_nonzero(own > cosines.max(axis=1)))
  return num_right / len(queries)


def _squared_singular_values(x: np.ndarray) -> np.ndarray:
  """Returns the squared singular values f64[min(N, D)] of f64[N, D]."""
  return np.maximum(np.linalg.eigvalsh(x.T @ x if len(x) > x.shape[1] else x @ x.T), 0)


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(np.float64).tiny)
