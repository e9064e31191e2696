"""The figures of docs/results.md: what is kept, what the tables say of it, and that a repeated run is compared."""

import json

import pytest
from scipy import stats

from benchmarks import results
from pirl_jax.configs import study
from pirl_jax.storage.settings import flatten
from pirl_jax.studies.points import create_trial, read_points


def line(series, seed, *values, row="tiny-24"):
  return {"row": row, "series": series, "seed": seed, "figures": dict(zip(results.FIGURES, values, strict=True)),
          "seconds": 10.0 + seed, "run": f"{series}-1", "machine": "a machine"}


def test_a_line_takes_the_place_of_an_older_one_of_the_same_run(tmp_path):
  kept = tmp_path / "results.jsonl"
  results.keep([line("PIRL", 1, 0.1, 0.1, 0.1), line("PIRL", 0, 0.2, 0.2, 0.2)], kept)
  results.keep([line("PIRL", 1, 0.3, 0.3, 0.3), line("NPID++", 1, 0.4, 0.4, 0.4)], kept)
  assert [(found["series"], found["seed"], found["figures"]["kNN top-1"]) for found in results.read(kept)] == [
    ("NPID++", 1, 0.4), ("PIRL", 0, 0.2), ("PIRL", 1, 0.3)]


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
  page.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
  results.keep([*ours, *theirs], kept)
  results.write(page, kept)
  assert page.read_text() == f"before\n{results.BEGIN}\n\n{text}\n{results.END}\nafter\n"


@pytest.mark.parametrize("name", results.ROWS)
def test_each_row_is_a_study_that_can_be_run(name, tmp_path):
  row = results.ROWS[name]
  for evaluation in results.EVALUATIONS:
    command = row.command(name, evaluation, series=row.points, seeds=[3], workdir="runs", images=str(tmp_path))
    config, types = study.get_config("own"), flatten(study.get_config("own").to_dict())
    fields = {}
    for flag in command:
      field, _, value = flag.removeprefix("--config.").partition("=")
      if flag.startswith("--config."):
        assert field in types, flag
        fields[field] = value if field.endswith(("root", "split", "labels", "variant", "name", "plot", "evaluation")) \
          else eval(value)
    config.update_from_flattened_dict(fields)
    trials = [create_trial(config, point, 3, tmp_path) for point in read_points(config)]
    assert [trial.point.series for trial in trials] == list(row.points)
    assert all(trial.config.seed == 3 for trial in trials)


def test_the_page_and_the_kept_lines_belong_together(tmp_path):
  page = tmp_path / "results.md"
  page.write_text(results.PAGE.read_text())
  results.write(page)
  assert page.read_text() == results.PAGE.read_text()
  assert {line["row"] for line in results.read()} <= set(results.ROWS)


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
