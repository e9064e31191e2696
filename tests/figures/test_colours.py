import pytest
from matplotlib.axes import Axes

from pirl_jax.configs.study import systems
from pirl_jax.figures.colours import ALIASES, CYCLE, SYSTEMS, colours_of, system_of
from pirl_jax.figures.curves import Curve, save_plot
from pirl_jax.studies.figures import PAPER, Line, Panel, save_panels


def drawn_in(monkeypatch, draw):
  """The colour of each line or bar that `draw` draws, by its label or place."""
  found = {}
  for kind in ("plot", "errorbar", "bar"):
    original = getattr(Axes, kind)

    def noted(self, *args, kind=kind, original=original, **kwargs):
      found[kwargs.get("label", (kind, str(args[0])))] = kwargs["color"]
      return original(self, *args, **kwargs)

    monkeypatch.setattr(Axes, kind, noted)
  draw()
  monkeypatch.undo()
  return found


def test_a_system_has_one_colour_in_a_study_in_the_papers_panel_and_in_the_plot_of_its_runs(monkeypatch, tmp_path):
  found = [drawn_in(monkeypatch, lambda panels=panels: save_panels(tmp_path / "figure.png", "", panels)) for panels in (
    [Panel("here", "", "lines", {"NPID++": Line([1, 2], [1, 2]), "PIRL": Line([1, 2], [1, 2])})],
    [PAPER["layers"]], [Panel("here", "", "bands", {"Random": Line([1, 2], [1, 2])}), PAPER["lambda"]])]
  curve = Curve("k", "top-1", [1, 2], [0.1, 0.2])
  runs = drawn_in(monkeypatch, lambda: save_plot(tmp_path / "plot.png", "", {
    "random_init": curve, "npid-b7871ef5-10": curve, "runs/pirl": curve}))
  assert {each["PIRL"] for each in found[:2]} == {found[2]["PIRL (derived)"], runs["runs/pirl"]} == {SYSTEMS["PIRL"]}
  assert {found[0]["NPID++"], found[1]["NPID++"], runs["npid-b7871ef5-10"]} == {SYSTEMS["NPID++"]}
  assert {found[1]["Random"], found[2]["Random"], runs["random_init"]} == {SYSTEMS["Random"]}


def test_no_two_systems_and_no_two_series_of_a_figure_share_a_colour():
  assert len(set(SYSTEMS.values())) == len(SYSTEMS) and set(SYSTEMS.values()) < set(CYCLE)
  names = ["a", "PIRL", "b", "pirl-2", "NPID++", "pirl_3", "a"]
  found = colours_of(names)
  assert list(found) == ["a", "PIRL", "b", "pirl-2", "NPID++", "pirl_3"] and len(set(found.values())) == 6
  assert found["PIRL"] == SYSTEMS["PIRL"] and found["NPID++"] == SYSTEMS["NPID++"]
  assert colours_of(["A", "B"]) == {"A": "C0", "B": "C1"}
  assert len(colours_of(map(str, range(12)))) == 12


@pytest.mark.parametrize("name, system", [
  ("PIRL", "PIRL"), ("PIRL (Jigsaw)", "PIRL"), ("PIRL (Rotation)", "PIRL (Rotation)"), ("pirl", "PIRL"),
  ("random_init-4edb34c4-10", "Random"), ("jigsaw_2", "Jigsaw"), ("pirlish", ""), ("PIRL, no crop", ""), ("", "")])
def test_the_system_that_a_name_stands_for(name, system):
  assert system_of(name) == system


def test_every_system_of_the_configs_has_a_colour():
  assert {system for system in systems() if not system_of(system)} == set()
  assert set(ALIASES.values()) <= set(SYSTEMS)
