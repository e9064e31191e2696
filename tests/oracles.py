"""Each formula once more, in float64 numpy with plain loops and no cleverness."""

import math

import numpy as np

EPS = 2.0**-23


def nce_normaliser(positive, negative, weight, valid, *, num_images):
  terms = []
  for i in range(len(positive)):
    if valid[i]:
      terms.append(math.exp(positive[i]))
      terms += [math.exp(negative[i][k]) for k in range(len(negative[i])) if weight[i][k]]
  return num_images * sum(terms) / len(terms)


def nce(positive, negative, weight, *, normaliser, num_images, num_negatives):
  losses = []
  noise = num_negatives * (1 / num_images)
  for i in range(len(positive)):
    p = math.exp(positive[i]) / normaliser
    loss = -math.log(p / (p + noise + EPS))
    for k in range(len(negative[i])):
      if weight[i][k]:
        p = math.exp(negative[i][k]) / normaliser
        loss -= math.log(noise / (p + noise + EPS))
    losses.append(loss)
  return np.array(losses)


def infonce(positive, negative, weight):
  losses = []
  for i in range(len(positive)):
    others = sum(math.exp(negative[i][k]) for k in range(len(negative[i])) if weight[i][k])
    losses.append(-math.log(math.exp(positive[i]) / (math.exp(positive[i]) + others)))
  return np.array(losses)


def eq4(positive, negative, weight):
  losses = []
  for i in range(len(positive)):
    kept = [k for k in range(len(negative[i])) if weight[i][k]]
    denominator = math.exp(positive[i]) + sum(math.exp(negative[i][k]) for k in kept)
    loss = -math.log(math.exp(positive[i]) / denominator)
    for k in kept:
      others = math.exp(positive[i]) + sum(math.exp(negative[i][j]) for j in kept if j != k)
      loss -= math.log(others / denominator)  # 1 - h, where the difference would be 0 in float64 too
    losses.append(loss)
  return np.array(losses)


def bank_update(bank, rows, embeddings, valid, *, momentum):
  bank = np.array(bank, np.float64)
  for row, embedding, ok in zip(rows, embeddings, valid, strict=True):
    if ok:
      mixed = momentum * bank[row] + (1 - momentum) * np.asarray(embedding, np.float64)
      bank[row] = mixed / math.sqrt(sum(mixed * mixed))
  return bank


def grouped_batch_norm(x, scale, bias, slope, *, group):
  """Returns (result, mean of the groups' means, of their variances, gradients by x[N, ..., C], scale and bias)."""
  x, slope = np.array(x, np.float64), np.array(slope, np.float64)
  out, x_slope, scale_slope, bias_slope = np.zeros_like(x), np.zeros_like(x), np.zeros(len(scale)), np.zeros(len(scale))
  means, variances = np.zeros(len(scale)), np.zeros(len(scale))
  num_groups = len(x) // group
  for g in range(num_groups):
    rows = slice(g * group, (g + 1) * group)
    for c in range(len(scale)):
      values, slopes = x[rows, ..., c], slope[rows, ..., c]
      mean = sum(values.flat) / values.size
      variance = sum((value - mean) ** 2 for value in values.flat) / values.size
      deviation = math.sqrt(variance + 1e-5)
      unit = (values - mean) / deviation
      out[rows, ..., c] = unit * scale[c] + bias[c]
      x_slope[rows, ..., c] = scale[c] / deviation * (slopes - np.mean(slopes) - unit * np.mean(slopes * unit))
      scale_slope[c] += sum((slopes * unit).flat)
      bias_slope[c] += sum(slopes.flat)
      means[c] += mean / num_groups
      variances[c] += variance / num_groups
  return out, means, variances, x_slope, scale_slope, bias_slope


def entropy_rank(strengths):
  p = np.asarray(strengths, np.float64) / sum(strengths)
  return math.exp(-sum(x * math.log(x) for x in p if x > 0))


def rank_me(features):
  return entropy_rank(np.linalg.svd(np.asarray(features, np.float64), compute_uv=False))


def lidar(views, *, floor):
  views = np.asarray(views, np.float64)
  num_images, num_views, dim = views.shape
  means = [sum(image) / num_views for image in views]
  middle = sum(means) / num_images
  between, within = np.zeros((dim, dim)), floor * np.eye(dim)
  for image, mean in zip(views, means, strict=True):
    between += np.outer(mean - middle, mean - middle) / num_images
    for view in image:
      within += np.outer(view - mean, view - mean) / (num_images * num_views)
  # The eigenvalues of Sw^-1/2 Sb Sw^-1/2 are those of Sw^-1 Sb.
  return entropy_rank(np.maximum(np.linalg.eigvals(np.linalg.solve(within, between)).real, 0))


def alignment(views):
  distances = []
  for image in np.asarray(views, np.float64):
    for i in range(len(image)):
      distances += [sum((image[i] - image[j]) ** 2) for j in range(len(image)) if j != i]
  return sum(distances) / len(distances)


def uniformity(embeddings):
  embeddings, terms = np.asarray(embeddings, np.float64), []
  for i in range(len(embeddings)):
    terms += [math.exp(-2 * sum((embeddings[i] - embeddings[j]) ** 2)) for j in range(len(embeddings)) if j != i]
  return math.log(sum(terms) / len(terms))


def nearest_is_own(queries, gallery):
  right = 0
  for i, query in enumerate(np.asarray(queries, np.float64)):
    cosines = [query @ entry / math.sqrt(query @ query * (entry @ entry)) for entry in np.asarray(gallery, np.float64)]
    right += all(cosines[i] > cosine for j, cosine in enumerate(cosines) if j != i)
  return right / len(queries)


def shadows(x, num=8):
  """Returns f64[num]: sums of an array with fixed weights; if one number of it is another, they are, too."""
  x = np.asarray(x, np.float64).ravel()
  return np.sin(np.outer(np.arange(1, num + 1), np.arange(1, x.size + 1))) @ x / max(1, x.size)**0.5
