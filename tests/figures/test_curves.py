import cv2

from pirl_jax.figures.curves import Curve, save_plot

FIRST = Curve("k", "top-1", [1, 5], [0.4, 0.5], [0.3, 0.4], [0.5, 0.6], log_x=True)
SECOND = Curve("k", "top-1", [1, 5], [0.2, 0.25])


def test_plot_has_a_line_and_a_band_for_each_run(tmp_path):
  save_plot(tmp_path / "deep" / "one.png", "knn", {"a": FIRST})
  save_plot(tmp_path / "deep" / "both.png", "knn", {"a": FIRST, "b": SECOND})
  one, both = (cv2.imread(str(tmp_path / "deep" / f"{name}.png")) for name in ("one", "both"))
  orange = (both[..., 2] > 200) & (both[..., 1] < 160) & (both[..., 0] < 60)  # matplotlib's second colour
  assert orange.sum() > 100
  assert not ((one[..., 2] > 200) & (one[..., 1] < 160) & (one[..., 0] < 60)).any()


def test_names_with_dollars_are_no_formulas(tmp_path):
  save_plot(tmp_path / "plot.png", "$x_{$", {"$y_{$": FIRST, "$": SECOND})
  assert (tmp_path / "plot.png").stat().st_size > 1_000


def test_plot_over_names(tmp_path):
  save_plot(tmp_path / "layers.png", "linear", {"a": Curve("layer", "top-1", ["conv1", "res2"], [0.1, 0.2])})
  save_plot(tmp_path / "numbers.png", "linear", {"a": Curve("layer", "top-1", [0, 1], [0.1, 0.2])})
  layers, numbers = (cv2.imread(str(tmp_path / f"{name}.png")) for name in ("layers", "numbers"))
  assert (layers != numbers).any()  # the names stand below the axis, not their numbers
