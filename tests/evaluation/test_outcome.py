import json

from pirl_jax.evaluation.outcome import Outcome, format_table
from pirl_jax.figures.curves import Curve

FIRST = Outcome({"top1": 0.5}, {"top-1": 0.5, "top-5": 0.9}, Curve("k", "top-1", [1, 5], [0.4, 0.5], [0.3, 0.4],
                                                                   [0.5, 0.6], log_x=True))
SECOND = Outcome({"top1": 0.25}, {"top-1": 0.25}, Curve("k", "top-1", [1, 5], [0.2, 0.25]))


def test_one_run_is_one_column_without_a_header():
  assert format_table("knn", {"run": FIRST}).splitlines() == ["knn", "  top-1     50.0%", "  top-5     90.0%"]


def test_several_runs_stand_side_by_side_and_what_one_lacks_is_a_dash():
  lines = format_table("knn", {"a": FIRST, "longer name": SECOND}).splitlines()
  assert lines[1].split("  ")[-1] == "longer name" and len(set(map(len, lines[1:]))) == 1
  assert lines[2].split() == ["top-1", "50.0%", "25.0%"]
  assert lines[3].split() == ["top-5", "90.0%", "-"]


def test_plain_numbers():
  outcome = Outcome({}, {"mean distance": 0.123456, "images": 12345})
  assert [line.split()[-1] for line in format_table("x", {"a": outcome}, share=False).splitlines()[1:]] == [
    "0.1235", "12,345"]


def test_json_and_back():
  for outcome in (FIRST, SECOND, Outcome({}, {})):
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome
