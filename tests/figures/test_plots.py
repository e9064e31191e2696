"""Plots of a run: what was put in is found in the PNG."""


import numpy as np
import pytest
from PIL import Image

from pirl_jax.figures import plots


def find(canvas, image, factor):
  """The top left corner at which the image, scaled by a whole factor, stands in the canvas, or None."""
  large = np.kron(image, np.ones((factor, factor, 1), np.uint8))
  height, width = large.shape[:2]
  corners = canvas[:canvas.shape[0] - height + 1, :canvas.shape[1] - width + 1]
  candidates = np.argwhere((corners == large[0, 0]).all(-1))
  for y, x in candidates:
    if np.array_equal(canvas[y:y + height, x:x + width], large):
      return int(y), int(x)
  return None


@pytest.mark.parametrize(("side", "patch", "num_patches", "factor", "patch_factor"), [
  (32, 10, 9, 6, 6),
  (224, 64, 9, 1, 1),
  (32, 32, 1, 6, 6),  # rotation: one view
])
def test_every_view_and_patch_is_in_the_plot(tmp_path, side, patch, num_patches, factor, patch_factor):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (5, side, side, 3), np.uint8)
  pretext = rng.integers(0, 256, (5, num_patches, patch, patch, 3), np.uint8)
  path = tmp_path / "plots" / "views.png"
  plots.save_views_plot(path, image, pretext, num_images=3)
  canvas = np.asarray(Image.open(path))
  corners = [find(canvas, image[i], factor) for i in range(3)]
  assert corners[0][0] == corners[1][0] < corners[2][0] and corners[0][1] == corners[2][1] < corners[1][1]
  for i in range(3):
    places = [find(canvas, patch_pixels, patch_factor) for patch_pixels in pretext[i]]
    assert all(x > corners[i][1] + side * factor for _, x in places)
    assert places == sorted(places)  # row by row in the order of the patches
    if num_patches == 9:
      step = patch * patch_factor + plots.GAP
      assert places == [(places[0][0] + step * (p // 3), places[0][1] + step * (p % 3)) for p in range(9)]
  assert find(canvas, image[3], factor) is None
  assert canvas.shape[0] < 1000 and canvas.shape[1] < 1200


def test_fewer_examples_than_asked_for(tmp_path):
  plots.save_views_plot(tmp_path / "views.png", np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 9, 2, 2, 3), np.uint8))
  assert Image.open(tmp_path / "views.png").width > 2 * plots.SIDE


@pytest.mark.parametrize("knn", [None, 0.5])
def test_curves(tmp_path, knn, monkeypatch):
  rows = [{"step": i, "epoch": i / 10, "loss": None if i == 3 else 1 / i, "loss_image": 0.5,
           "loss_pretext": 0.75, "learning_rate": 0.1} for i in range(1, 8)]
  if knn is not None:
    rows.append({"step": 8, "epoch": 0.8, "knn_top1": knn})
  drawn = []
  monkeypatch.setattr(plots.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
  plots.save_curves(tmp_path / "curves.png", rows)
  axes = {ax.get_title(): ax for ax in drawn[0].axes}
  assert list(axes) == ["loss", "learning rate"] + ["kNN top-1"] * (knn is not None)
  loss = {line.get_label(): line.get_xydata() for line in axes["loss"].lines}
  np.testing.assert_allclose(loss["loss"], [(i / 10, 1 / i) for i in (1, 2, 4, 5, 6, 7)])
  assert set(loss) == {"loss", "image", "pretext"}
  if knn is not None:
    np.testing.assert_allclose(axes["kNN top-1"].lines[0].get_xydata(), [(0.8, 0.5)])


def test_curves_of_a_run_without_rows_are_a_plot_too(tmp_path):
  plots.save_curves(tmp_path / "plots" / "curves.png", [])
  assert Image.open(tmp_path / "plots" / "curves.png").width > 300


@pytest.mark.parametrize(("side", "factor"), [(16, 10), (32, 5), (150, 1)])
def test_neighbours_stand_beside_their_query(tmp_path, side, factor):
  rng = np.random.default_rng(1)
  queries = rng.integers(0, 256, (2, side, side, 3), np.uint8)
  neighbours = rng.integers(0, 256, (2, 3, side, side, 3), np.uint8)
  path = tmp_path / "plots" / "neighbours.png"
  classes = [["dots", "dots", "a class with a very long name indeed", None], [None, "dots", "rings", None]]
  plots.save_neighbours(path, [
    [plots.Shown(image, "a folder with a very long name/1.png", name, value) for image, name, value in
     zip((queries[row], *neighbours[row]), classes[row], (None, 0.9, 0.8, 0.7), strict=True)] for row in range(2)],
    title="2 queries")
  canvas = np.asarray(Image.open(path))
  shown = side * factor
  corners = []
  for row in range(2):
    corners.append([find(canvas, image, factor) for image in (queries[row], *neighbours[row])])
    (y, *_), lefts = zip(*corners[-1], strict=True)
    assert {corner[0] for corner in corners[-1]} == {y}
    gaps = np.diff(lefts) - shown
    assert gaps[0] > gaps[1] == gaps[2] > 0
  assert corners[1][0][0] > corners[0][0][0] + shown

  def frame(row, column):
    """The colour around an image, None where it is not one."""
    y, x = corners[row][column]
    around = {tuple(canvas[y + dy, x + dx].tolist()) for dy, dx in
              [(-1, 0), (-1, shown - 1), (0, -1), (shown - 1, -1), (shown, 0), (0, shown), (shown, shown), (-1, -1)]}
    return around.pop() if len(around) == 1 else None

  white = (255, 255, 255)
  assert [frame(0, i) for i in range(4)] == [white, plots.RIGHT, plots.WRONG, white]
  assert [frame(1, i) for i in range(4)] == [white] * 4  # nothing to compare with
  # The long name is cut short: it leaves the margin before the next image white.
  y, x = corners[0][2]
  assert (canvas[y + shown + plots.FRAME:corners[1][0][0] - plots.FRAME, x + shown + 1:corners[0][3][1] - 1]
          == 255).all()


def test_large_and_long_images_are_shrunk_whole(tmp_path):
  wide, tall = np.zeros((300, 1200, 3), np.uint8), np.zeros((900, 90, 3), np.uint8)
  wide[:, 600:], tall[450:] = 255, (255, 0, 0)
  plots.save_neighbours(tmp_path / "neighbours.png", [[plots.Shown(wide, "", None), plots.Shown(tall, "", None, 1.0)]],
                        title="")
  canvas = np.asarray(Image.open(tmp_path / "neighbours.png"))
  left, right = canvas[60:, :200], canvas[60:, 200:]
  assert np.count_nonzero((left[:160] == 0).all(-1)) == 40 * 80
  assert np.count_nonzero((right[:160] == (255, 0, 0)).all(-1)) == 80 * 16
