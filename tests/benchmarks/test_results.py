"""The figures of docs/results.md: what is kept, what the tables say of it, and that a repeated run is compared."""

import functools
import json
import re
import sys

import pytest
from scipy import stats

from benchmarks import results
from pirl_jax.configs import study
from pirl_jax.storage.settings import flatten
from pirl_jax.studies.points import create_trial, read_points


def line(series, seed, *values, row="tiny-24"):
  return {"row": row, "series": series, "seed": seed, "figures": dict(zip(results.FIGURES, values, strict=True)),
          "seconds": 10.0 + seed, "run": f"{series}-1", "machine": "a machine"}


def study_of(flags):
  """Returns the config of a study with these flags, --config.FIELD=VALUE each."""
  config = study.get_config("own")
  fields = flatten(config.to_dict())
  for flag in flags:
    field, _, value = flag.removeprefix("--config.").partition("=")
    assert field in fields, flag
    *groups, name = field.split(".")
    group = functools.reduce(lambda group, name: group[name], groups, config)
    group[name] = value if group.get_type(name) is str else eval(value)
  return config


def test_a_line_takes_the_place_of_an_older_one_of_the_same_run(tmp_path):
  kept = tmp_path / "results.jsonl"
  results.keep([line("PIRL", 1, 0.1, 0.1, 0.1), line("PIRL", 0, 0.2, 0.2, 0.2)], kept)
  results.keep([line("PIRL", 1, 0.3, 0.3, 0.3), line("NPID++", 1, 0.4, 0.4, 0.4)], kept)
  assert [(found["series"], found["seed"], found["figures"]["kNN top-1"]) for found in results.read(kept)] == [
    ("NPID++", 1, 0.4), ("PIRL", 0, 0.2), ("PIRL", 1, 0.3)]


def test_a_run_keeps_the_machine_that_trained_it(monkeypatch, tmp_path):
  monkeypatch.setattr(results, "KEPT", tmp_path / "kept")
  monkeypatch.setattr(results, "TRACES", tmp_path / "traces")
  monkeypatch.setattr(results, "first_lines", lambda lines: {("tiny-24", "PIRL"): {"seed": 99}})
  results.keep([line("PIRL", 0, 0.1, 0.1, 0.1), line("PIRL", 1, 0.1, 0.1, 0.1)], results.KEPT)
  elsewhere = {"machine": "another machine", "layers": {}}
  results.keep_all([{**line("PIRL", 0, 0.2, 0.2, 0.2), **elsewhere},  # evaluated again
                    {**line("PIRL", 1, 0.2, 0.2, 0.2), **elsewhere, "seconds": 99.0}], "work")  # trained again
  assert [(found["machine"], found["figures"]["kNN top-1"]) for found in results.read(results.KEPT)] == [
    ("a machine", 0.2), ("another machine", 0.2)]


def test_only_seeds_of_both_systems_are_compared_and_the_interval_decides(tmp_path):
  ours = [line("PIRL", seed, 0.30 + 0.01 * seed, 0.300, 0.30) for seed in range(4)]
  theirs = [line("NPID++", seed, 0.20 + 0.001 * seed, 0.299 + 0.001 * (seed % 2), 0.2 * seed) for seed in range(3)]
  text = results.table("tiny-24", [*ours, *theirs, line("PIRL", 0, 0.9, 0.9, 0.9, row="tiny-6")])
  assert "Seeds 0, 1, 2." in text
  assert "| PIRL | 31.0 +- 1.0 | 30.0 +- 0.0 | 30.0 +- 0.0 | 11 |" in text
  differences = [10.0, 10.9, 11.8]
  half = stats.t.ppf(0.975, 2) * 0.9 / 3**0.5
  assert sum(differences) / 3 == pytest.approx(10.9)
  assert f"| PIRL - NPID++ | +10.9 [+{10.9 - half:.1f}, +{10.9 + half:.1f}] shown " in text
  assert "+0.1 [-0.1, +0.2] no difference of a point" in text and "not decided" in text
  assert results.table("tiny-6", ours) == ""  # no run of it
  page, kept = tmp_path / "page.md", tmp_path / "results.jsonl"
  sections = "before\n" + "\nmore\n".join(f"{begin}\nold\n{end}" for begin, end in results.MARKS.values()) + "\nafter\n"
  page.write_text(sections)
  results.keep([*ours, *theirs], kept)
  results.write(page, kept)
  assert page.read_text() == sections.replace("\nold\n", f"\n\n{text}\n", 1).replace("\nold\n", "\n\n\n")


def test_distances_are_no_shares_and_a_system_without_a_run_is_left_out():
  def lines(series, *values):
    return [{**line("PIRL", seed, 0, 0, 0, row="tiny-invariance"), "series": series,
             "figures": dict.fromkeys(results.INVARIANCE, value)} for seed, value in enumerate(values)]

  found = [*lines("PIRL", 0.70, 0.71, 0.75), *lines("Random", 0.90, 0.94, 0.92, 0.99)]
  text = results.table("tiny-invariance", found)
  assert "Seeds 0, 1, 2." in text and "Jigsaw" not in text and "NPID++" not in text
  assert "| PIRL | 0.720 +- 0.026 | 0.720 +- 0.026 | 0.720 +- 0.026 | 0.720 +- 0.026 | 11 |" in text
  half = stats.t.ppf(0.975, 2) * 0.03 / 3**0.5  # of the differences -0.20, -0.23, -0.17
  assert f"| PIRL - Random | -0.200 [{-0.2 - half:.3f}, {-0.2 + half:.3f}] shown |" in text
  assert results.table("tiny-invariance", lines("Random", 0.9)) == ""


def test_an_option_is_compared_by_what_it_gains():
  reference, option = ("PIRL", "tiny-6"), ("temperature=0.2", "tiny-options")
  found = [{**line(series, seed, 0, 0, 0, row=row), "figures": {"kNN top-1": value}}
           for (series, row), values in ((reference, (0.20, 0.21)), (option, (0.22, 0.24)))
           for seed, value in enumerate(values)]
  half = 100 * stats.t.ppf(0.975, 1) * 0.005  # of the gains 0.02 and 0.03
  assert f"| temperature=0.2 - PIRL | +2.5 [{2.5 - half:.1f}, +{2.5 + half:.1f}] not decided | |" in results.table(
    "tiny-options", found)


def test_a_row_shows_runs_that_another_row_keeps_and_trains_none_of_them(monkeypatch, capsys):
  name, other = "tiny-options-24", "tiny-24"
  assert results.ROWS[name].shared == {"PIRL": other}
  reference = [line("PIRL", seed, 0.2 + seed / 100, 0.3, 0.3, row=other) for seed in range(3)]
  option = [line("angle_weight=0.4", seed, 0.5, 0.3, 0.3, row=name) for seed in (1, 2, 7)]
  theirs = [line("PIRL", 1, 0.9, 0.9, 0.9, row="tiny-6"), line("NPID++", 1, 0.9, 0.9, 0.9, row=other)]
  found = results.shown(name, [*theirs, *reference, *option])
  assert found == {"PIRL": {1: reference[1], 2: reference[2]}, "angle_weight=0.4": {1: option[0], 2: option[1]}}
  assert results.shown(name, reference) == {} and results.shown(name, option) == {}
  assert results.shown(name, [*reference, option[2]]) == {}  # no seed of both
  monkeypatch.setattr(sys, "argv", ["results", "run", name, "--seeds=1", "--series=PIRL"])
  with pytest.raises(SystemExit):
    results.main()
  assert f"{name} trains no PIRL; its points are nearest_positive=0.5, angle_weight=0.4" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, row in results.ROWS.items() if row.shared])
def test_shared_runs_are_the_same_study_in_both_rows(name, tmp_path):
  row = results.ROWS[name]
  for series, other in row.shared.items():
    ours, theirs = (results.ROWS[one].command("a", "knn", series=[series], seeds=[3], workdir="runs", images="b")
                    for one in (name, other))
    assert ours == theirs and series not in results.ROWS[other].shared


@pytest.mark.parametrize("name", results.ROWS)
def test_each_row_is_a_study_that_can_be_run(name, tmp_path):
  row = results.ROWS[name]
  for evaluation in row.evaluations:
    command = row.command(name, evaluation, series=row.points, seeds=[3], workdir="runs", images=str(tmp_path))
    config = study_of(flag for flag in command if flag.startswith("--config."))
    trials = [create_trial(config, point, 3, tmp_path) for point in read_points(config)]
    assert [trial.point.series for trial in trials] == list(row.points)
    assert all(trial.config.seed == 3 for trial in trials)
    rates = {trial.point.series: trial.config.optimizer.learning_rate for trial in trials}
    said = {one: float(one.partition(" at rate ")[2] or (0.05 if one == "Jigsaw" else 0.1)) for one in row.points}
    assert name == "textures" or rates == said


@pytest.mark.parametrize("series, expected", [
  ([], ["PIRL", "NPID++"]), (["--series=NPID++"], ["NPID++"]), (["--series=NPID++,PIRL"], ["NPID++", "PIRL"])])
def test_all_points_of_a_row_run_unless_some_are_named(monkeypatch, series, expected):
  asked = []
  monkeypatch.setattr(results, "run", lambda name, **given: asked.append((name, list(given["series"]))) or [])
  for name in ("keep_all", "write"):
    monkeypatch.setattr(results, name, lambda *given: None)
  monkeypatch.setattr(sys, "argv", ["results", "run", "tiny-6", "--seeds=1", *series])
  results.main()
  assert asked == [("tiny-6", expected)]


def test_an_unknown_point_of_a_row_is_named(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["results", "run", "tiny-6", "--seeds=1", "--series=PIRL,SimCLR"])
  with pytest.raises(SystemExit):
    results.main()
  assert "tiny-6 trains no SimCLR; its points are PIRL, NPID++" in capsys.readouterr().err


def test_each_figure_is_taken_from_the_evaluation_that_its_name_says(monkeypatch, tmp_path):
  asked, evaluated = [], ["mean distance", "separation", "distance over that to another image"]

  def run(command, **_):
    name = next(flag.split("=")[1] for flag in command if flag.startswith("--config.name="))
    asked.append(name)
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    value = 0.25 if name.endswith("plain") else 0.75
    (folder / "study.csv").write_text("series,seed,figure,layer,value,run\n" + "".join(
      f"PIRL,{seed},{figure},,{value},{tmp_path}/pirl-1-{seed}\n"
      for figure in evaluated for seed in (3, 4)))  # seed 4 is another command's

  (tmp_path / "pirl-1-3").mkdir()
  (tmp_path / "pirl-1-3" / "trained.json").write_text('{"seconds": 5.0}')
  monkeypatch.setattr(results.subprocess, "run", run)
  found, = results.run("tiny-invariance", series=["PIRL"], seeds=[3], workdir=str(tmp_path), images="")
  assert asked == ["tiny-invariance-plain", "tiny-invariance-corrected"]
  assert (found["run"], found["seed"], found["seconds"], found["layers"]) == ("pirl-1", 3, 5.0, {})
  assert found["figures"] == {"plain: mean distance": 0.25, "plain: separation": 0.25, "corrected: separation": 0.75,
                              "corrected: distance over that to another image": 0.75}
  evaluated.remove("separation")
  with pytest.raises(SystemExit, match=r"tiny-invariance has not all figures of PIRL, seed 3: .* goes on"):
    results.run("tiny-invariance", series=["PIRL"], seeds=[3], workdir=str(tmp_path), images="")


def test_a_row_whose_training_is_stopped_begins_no_other_evaluation(monkeypatch, tmp_path):
  asked = []
  monkeypatch.setattr(results.subprocess, "run", lambda command, **_: asked.append(command))
  with pytest.raises(SystemExit, match=r"tiny-6 has not all figures of NPID\+\+, seed 3; PIRL, seed 3: .* goes on"):
    results.run("tiny-6", series=["PIRL", "NPID++"], seeds=[3], workdir=str(tmp_path), images="")
  assert len(asked) == 1


def test_two_commands_of_a_row_in_one_folder_do_not_take_each_others_figures(monkeypatch, tmp_path):
  """Both write the same study.csv; what another command writes after this one has ended is not read."""
  def study_csv(evaluation, seed):
    folder = tmp_path / f"tiny-6-{evaluation}"
    folder.mkdir(exist_ok=True)
    figures = [("kNN top-1", "")] if evaluation == "knn" else [
      (f"linear top-1 of {layer}", layer) for layer in ("res2", "res3", "res4")]
    (folder / "study.csv").write_text("series,seed,figure,layer,value,run\n" + "".join(
      f"PIRL,{seed},{figure},{layer},{seed / 10},{tmp_path}/pirl-1-{seed}\n" for figure, layer in figures))

  def run(command, **_):
    evaluation = next(flag for flag in command if flag.startswith("--config.name=")).rpartition("-")[2]
    study_csv(evaluation, 3)
    study_csv("linear" if evaluation == "knn" else "knn", 4)  # the other command is at the other evaluation

  (tmp_path / "pirl-1-3").mkdir()
  (tmp_path / "pirl-1-3" / "trained.json").write_text('{"seconds": 5.0}')
  monkeypatch.setattr(results.subprocess, "run", run)
  found, = results.run("tiny-6", series=["PIRL"], seeds=[3], workdir=str(tmp_path), images="")
  assert found["seed"] == 3 and found["figures"] == dict.fromkeys(results.FIGURES, 0.3)
  assert found["layers"] == {"res2": 0.3, "res3": 0.3, "res4": 0.3}


def test_curves_are_kept_of_every_run_and_the_card_of_the_first_seed_alone(monkeypatch, tmp_path):
  for name, value in (("KEPT", "kept"), ("TRACES", "traces")):
    monkeypatch.setattr(results, name, tmp_path / value)
  monkeypatch.setattr(results.pictures, "trace", lambda run, layers: {"folder": run.name, "layers": layers})
  exported = []
  monkeypatch.setattr(results.cards, "export", lambda run, folder: exported.append((run.name, folder.name)) or run.name)
  monkeypatch.setattr(results.cards, "keep", exported.append)
  results.keep([line("PIRL", 1, 0, 0, 0)], results.KEPT)
  layers = {"res2": 0.2, "res3": 0.3}
  results.keep_all([{**line("PIRL", 2, 0, 0, 0), "layers": layers}, {**line("NPID++", 2, 0, 0, 0), "layers": layers},
                    {**line("NPID++", 3, 0, 0, 0), "layers": {}}], "work")
  assert not any("layers" in found for found in results.read(results.KEPT))
  assert exported == [("NPID++-1-2", "NPID++-1-2"), "NPID++-1-2"]  # PIRL's first seed is 1, and is not run now
  assert [(found["series"], found["folder"], found["layers"]) for found in results.read(tmp_path / "traces")] == [
    ("NPID++", "NPID++-1-2", layers), ("PIRL", "PIRL-1-2", layers)]


def test_the_page_and_the_kept_lines_belong_together(tmp_path):
  page = tmp_path / "results.md"
  page.write_text(results.PAGE.read_text())
  results.write(page)
  assert page.read_text() == results.PAGE.read_text()
  assert {line["row"] for line in [*results.read(), *results.read(results.TRACES)]} <= set(results.ROWS)
  linked = re.findall(r"\]\((results/[^)]*)\)", page.read_text())
  kept = [path.relative_to(results.PAGE.parent).as_posix() for path in (results.PAGE.parent / "results").rglob("*.*")]
  assert {name for name in kept if not name.endswith("traces.jsonl")} == set(linked)


@pytest.mark.parametrize("moved, same", [(0.0, True), (0.02, True), (-0.04, False), (0.04, False)])
def test_a_repeated_run_is_compared_with_the_kept_one(monkeypatch, tmp_path, moved, same):
  name, series, seed = results.CHECKED
  kept = tmp_path / "results.jsonl"
  kept.write_text(json.dumps(line(series, seed, 0.4, 0.4, 0.4, row=name)))
  monkeypatch.setattr(results, "read", lambda: [json.loads(kept.read_text())])
  monkeypatch.setattr(results, "run", lambda *_, **__: [line(series, seed, 0.4 + moved, 0, 0, row=name)])
  assert results.check() == same


@pytest.mark.slow
def test_the_checked_run_gives_the_kept_figure_again():
  assert results.check()
