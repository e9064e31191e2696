"""Plots of a run: a batch as the network sees it, the curves of its metrics, images and their neighbours."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from pirl_jax.storage.files import replacing

SIDE = 192
"""Small images are enlarged by a whole factor to a side of at most this many pixels; larger images stay as they are."""

GAP = 4
MARGIN = 16
TEXT_HEIGHT = 20
COLUMNS = 2
NEIGHBOUR_SIDE = 160
"""Longest side in pixels of an image in a plot of neighbours."""

FRAME = 3
RIGHT, WRONG = (0, 140, 60), (205, 40, 40)


def save_views_plot(path: str | os.PathLike, image: np.ndarray | None, pretext: np.ndarray | None, *,
                    num_images: int = 8) -> None:
  """Writes a PNG with the first examples of a batch: the image view on the left, the pretext views on the right.

  Letters: B batch, P pretext views of an image, H W and h w sides in pixels.

  Patches are shown in the order in which the network gets them, row by row in a square grid with gaps. For rotation
  there is a single pretext view.

  Args:
    path: the file; its folder is created.
    image: u8[B, H, W, 3], or None if the loss does not use the image view.
    pretext: u8[B, P, h, w, 3], or None if the loss does not use pretext views. At most one of the two is None.
    num_images: largest number of examples to show.
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
  """Writes a figure of loss, learning rate and, if it was measured, kNN accuracy over epochs.

  Args:
    path: the file; its ending says the format, and its folder is created.
    rows: the metrics of a run, see `Logbook.rows`.
  """
  panels = [("loss", {"loss": "loss", "loss_image": "image", "loss_pretext": "pretext", "loss_angle": "angle"}),
            ("learning rate", {"learning_rate": "learning rate"}), ("kNN top-1", {"knn_top1": "kNN top-1"})]
  panels = [(title, curves) for title, curves in panels
            if title == "loss" or any(name in row for name in curves for row in rows)]
  figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
  FigureCanvasAgg(figure)  # needs no display, and the figure does not stay in pyplot's list of open figures
  for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
    for name, label in curves.items():
      # None stands for a value that was not finite; such a value is not drawn.
      points = [(row["epoch"], row[name]) for row in rows if None not in (row.get("epoch"), row.get(name))]
      if points:
        axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
    axes.set(title=title, xlabel="epoch")
    axes.grid(alpha=0.3)
    if len(axes.lines) > 1:
      axes.legend()
  with replacing(path) as file:
    figure.savefig(file, dpi=120, format=Path(path).suffix[1:])


class Shown(NamedTuple):
  """An image in a plot of neighbours.

  Attributes:
    image: u8[H, W, 3], of any size.
    name: of the image.
    class_name: or None for an image without a class.
    similarity: with the query; None for a query.
  """

  image: np.ndarray
  name: str
  class_name: str | None
  similarity: float | None = None


def save_neighbours(path: str | os.PathLike, rows: Sequence[Sequence[Shown]], *, title: str) -> None:
  """Writes a PNG with a row for each query and its neighbours; below each image its similarity, class and name.

  Images keep their shape. Small ones are enlarged by a whole factor, and large ones shrunk, to `NEIGHBOUR_SIDE` pixels.
  A neighbour has a green frame if it has the class of the query, and a red frame if it has another class.

  Args:
    path: the file; its folder is created.
    rows: the query and its neighbours, the nearest first; all rows have the same length.
    title: above the rows.
  """
  fitted = [[_fitted(shown.image) for shown in row] for row in rows]
  cell = max(max(image.size) for row in fitted for image in row)
  font = ImageFont.load_default()
  top = MARGIN + 2 * TEXT_HEIGHT
  step_x, step_y = cell + MARGIN, cell + 3 * TEXT_HEIGHT + MARGIN
  lefts = [MARGIN, *(3 * MARGIN + step_x * (1 + i) for i in range(len(rows[0]) - 1))]
  canvas = Image.new("RGB", (max(lefts[-1] + step_x, 2 * MARGIN + math.ceil(font.getlength(title))),
                             top + step_y * len(rows)), "white")
  draw = ImageDraw.Draw(canvas)
  draw.text((MARGIN, MARGIN), title, fill="black", font=font)
  draw.text((MARGIN, MARGIN + TEXT_HEIGHT), "query", fill="black", font=font)
  draw.text((lefts[1], MARGIN + TEXT_HEIGHT), "nearest first", fill="black", font=font)
  for number, (row, images) in enumerate(zip(rows, fitted, strict=True)):
    y, wanted = top + number * step_y, row[0].class_name
    for i, (left, shown, image) in enumerate(zip(lefts, row, images, strict=True)):
      place = (left + (cell - image.width) // 2, y + (cell - image.height) // 2)
      if i and wanted and shown.class_name:
        draw.rectangle((place[0] - FRAME, place[1] - FRAME, place[0] + image.width + FRAME - 1,
                        place[1] + image.height + FRAME - 1), fill=RIGHT if wanted == shown.class_name else WRONG)
      canvas.paste(image, place)
      lines = ["" if shown.similarity is None else f"{shown.similarity:.3f}",
               _fitting(shown.class_name or "", font, cell), _fitting(shown.name[::-1], font, cell)[::-1]]
      for line, text in enumerate(filter(None, lines)):
        draw.text((left, y + cell + FRAME + line * (TEXT_HEIGHT - GAP)), text, fill="black", font=font)
  with replacing(path) as file:
    canvas.save(file, format="PNG")


def _fitted(image: np.ndarray) -> Image.Image:
  """Returns the image with a longer side of `NEIGHBOUR_SIDE` pixels, or a little less if it is enlarged."""
  longer = max(image.shape[:2])
  if longer <= NEIGHBOUR_SIDE:
    return Image.fromarray(_enlarge(image, NEIGHBOUR_SIDE))
  height, width = (max(1, round(NEIGHBOUR_SIDE * side / longer)) for side in image.shape[:2])
  return Image.fromarray(image).resize((width, height), Image.Resampling.BOX)


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
  """Returns the text, or its beginning and three dots if it is wider than `width` pixels."""
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
