"""Plots of a run: a batch as the network sees it, the curves of its metrics, images and their neighbours."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from pirl_jax.storage.files import replacing

SIDE = 192
"""Pixels to which the side of a small image is scaled up (by a whole factor); larger ones stay."""

GAP = 4
MARGIN = 16
TEXT_HEIGHT = 20
COLUMNS = 2
NEIGHBOUR_SIDE = 128
"""As `SIDE`, where many images stand in a row."""

FRAME = 3
RIGHT, WRONG = (0, 140, 60), (205, 40, 40)


def save_views_plot(path: str | os.PathLike, image: np.ndarray | None, pretext: np.ndarray | None, *,
                    num_images: int = 8) -> None:
  """Writes a PNG with the first examples of a batch: image view at the left, pretext views at the right.

  Letters: B batch, P pretext views of an image, H W and h w sides. Patches stand in the order in which the network gets
  them, row by row in a square grid with gaps (one alone for rotation).

  Args:
    path: the file; its folder is created.
    image: u8[B, H, W, 3], or None where the loss does not look at it.
    pretext: u8[B, P, h, w, 3], or None likewise; one of the two is there.
    num_images: examples shown, at most B.
  """
  batch = min(len(views) for views in (image, pretext) if views is not None)
  shown = min(num_images, batch)
  parts, labels = [], []
  if image is not None:
    parts.append([_enlarge(view, SIDE) for view in image[:shown]])
    labels.append(f"image {image.shape[2]} x {image.shape[1]}")
  if pretext is not None:
    num_patches, height, width = pretext.shape[1:4]
    parts.append([_grid(patches) for patches in pretext[:shown]])
    labels.append(f"{num_patches} patches {width} x {height}, shuffled" if num_patches > 1
                  else f"pretext view {width} x {height}")
  examples = [_beside(*pieces) for pieces in zip(*parts, strict=True)]
  example_height, example_width = examples[0].shape[:2]
  rows = math.ceil(shown / COLUMNS)
  columns = min(COLUMNS, shown)

  font = ImageFont.load_default()
  top = MARGIN + 2 * TEXT_HEIGHT
  title = f"{shown} of {batch} examples as the network sees them"
  canvas_width = MARGIN + columns * (example_width + 2 * MARGIN) - MARGIN
  canvas = Image.new("RGB", (max(canvas_width, 2 * MARGIN + math.ceil(font.getlength(title))),
                             top + rows * (example_height + MARGIN)), "white")
  draw = ImageDraw.Draw(canvas)
  draw.text((MARGIN, MARGIN), title, fill="black", font=font)
  for column in range(columns):
    left = MARGIN + column * (example_width + 2 * MARGIN)
    for pieces, label in zip(parts, labels, strict=True):
      draw.text((left, MARGIN + TEXT_HEIGHT), label, fill="black", font=font)
      left += pieces[0].shape[1] + MARGIN
  for i, example in enumerate(examples):
    row, column = divmod(i, columns)
    canvas.paste(Image.fromarray(example), (MARGIN + column * (example_width + 2 * MARGIN),
                                            top + row * (example_height + MARGIN)))
  with replacing(path) as file:
    canvas.save(file, format="PNG")


def save_curves(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes a figure of loss, learning rate and (where it was measured) kNN accuracy over epochs.

  Args:
    path: the file, its ending says the format; its folder is created.
    rows: of a run, see `Logbook.rows`.
  """
  panels = [("loss", {"loss": "loss", "loss_image": "image", "loss_pretext": "pretext"}),
            ("learning rate", {"learning_rate": "learning rate"}), ("kNN top-1", {"knn_top1": "kNN top-1"})]
  panels = [(title, curves) for title, curves in panels
            if title == "loss" or any(name in row for name in curves for row in rows)]
  figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
  FigureCanvasAgg(figure)  # draws without a display and without pyplot's list of open figures
  for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
    for name, label in curves.items():
      # None is a figure that was not finite: nothing is drawn there.
      points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
      if points:
        axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
    axes.set(title=title, xlabel="epoch")
    axes.grid(alpha=0.3)
    if len(axes.lines) > 1:
      axes.legend()
  with replacing(path) as file:
    figure.savefig(file, dpi=120, format=Path(path).suffix[1:])


def save_neighbours(path: str | os.PathLike, queries: np.ndarray, neighbours: np.ndarray, *, title: str,
                    similarity: Sequence[Sequence[float]], query_classes: Sequence[str | None],
                    classes: Sequence[Sequence[str | None]]) -> None:
  """Writes a PNG with a row for each query: the query, a gap, and its neighbours with similarity and class beneath.

  A neighbour has a green frame if it has the class of the query, a red one if it has another.

  Letters: R rows, n neighbours, H W sides.

  Args:
    path: the file; its folder is created.
    queries: u8[R, H, W, 3].
    neighbours: u8[R, n, H, W, 3], nearest first.
    title: above the rows.
    similarity: R rows of n.
    query_classes: R names, None where there is none.
    classes: R rows of n.
  """
  height, width = _enlarge(queries[0], NEIGHBOUR_SIDE).shape[:2]
  font = ImageFont.load_default()
  top = MARGIN + 2 * TEXT_HEIGHT
  step_x, step_y = width + MARGIN, height + 2 * TEXT_HEIGHT + MARGIN
  lefts = [MARGIN, *(3 * MARGIN + step_x * (1 + i) for i in range(neighbours.shape[1]))]
  canvas = Image.new("RGB", (max(lefts[-1] + step_x, 2 * MARGIN + math.ceil(font.getlength(title))),
                             top + step_y * len(queries)), "white")
  draw = ImageDraw.Draw(canvas)
  draw.text((MARGIN, MARGIN), title, fill="black", font=font)
  draw.text((MARGIN, MARGIN + TEXT_HEIGHT), "query", fill="black", font=font)
  draw.text((lefts[1], MARGIN + TEXT_HEIGHT), "nearest first", fill="black", font=font)
  for row, name in enumerate(query_classes):
    y = top + row * step_y
    tiles = [(queries[row], name, ""), *(
      (image, other, f"{value:.3f}") for image, other, value in
      zip(neighbours[row], classes[row], similarity[row], strict=True))]
    for i, (x, (image, other, value)) in enumerate(zip(lefts, tiles, strict=True)):
      if i and name and other:
        draw.rectangle((x - FRAME, y - FRAME, x + width + FRAME - 1, y + height + FRAME - 1),
                       fill=RIGHT if name == other else WRONG)
      canvas.paste(Image.fromarray(_enlarge(image, NEIGHBOUR_SIDE)), (x, y))
      lines = [line for line in (value, other) if line]
      for line, text in enumerate(lines):
        draw.text((x, y + height + FRAME + line * (TEXT_HEIGHT - GAP)), _fitting(text, font, width), fill="black",
                  font=font)
  with replacing(path) as file:
    canvas.save(file, format="PNG")


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
  if font.getlength(text) <= width:
    return text
  while text and font.getlength(text + "...") > width:
    text = text[:-1]
  return text + "..."


def _enlarge(image: np.ndarray, side: int) -> np.ndarray:
  factor = max(1, side // max(image.shape[:2]))
  return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _grid(patches: np.ndarray) -> np.ndarray:
  columns = math.ceil(math.sqrt(len(patches)))
  rows = math.ceil(len(patches) / columns)
  tiles = [_enlarge(patch, (SIDE - GAP * (columns - 1)) // columns) for patch in patches]
  height, width = tiles[0].shape[:2]
  grid = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
  for i, tile in enumerate(tiles):
    row, column = divmod(i, columns)
    grid[row * (height + GAP):, column * (width + GAP):][:height, :width] = tile
  return grid


def _beside(left: np.ndarray, right: np.ndarray | None = None) -> np.ndarray:
  if right is None:
    return left
  height = max(left.shape[0], right.shape[0])
  both = np.full((height, left.shape[1] + MARGIN + right.shape[1], 3), 255, np.uint8)
  both[:left.shape[0], :left.shape[1]] = left
  both[:right.shape[0], left.shape[1] + MARGIN:] = right
  return both
