"""Studies: points and settings as a user writes them, what is trained and judged and what is not, and what comes out.

Training and evaluation are stood in for by functions that write the files alone; the last test runs the real ones.
"""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT
from matplotlib.axes import Axes
from PIL import Image

import pirl_jax.configs.evaluate
from pirl_jax.configs import pirl
from pirl_jax.configs import study as studies
from pirl_jax.errors import UserError
from pirl_jax.evaluation import evaluate
from pirl_jax.evaluation.protocols import PROTOCOLS, protocol_of
from pirl_jax.studies import report, study
from pirl_jax.studies.figures import PAPER, Line, Panel, bars_panels, lines_panel, save_panels
from pirl_jax.studies.points import Point, Trial, create_trial, digest, read_points, set_fields
from pirl_jax.studies.statistics import Cell, Difference, format_cells, paired_difference
from pirl_jax.training import parts as parts_lib
from pirl_jax.training import pretrain


def config_of(name="lambda", **fields):
  config = studies.get_config(name)
  config.update(fields)
  return config


PAPERS = [name for name in studies.VARIANTS if name != "own"]
SMALL = tuple(studies.sweep("PIRL", "pirl", "pretext_weight", (0, 0.5)))


class Fakes:
  """In the place of training and evaluation: `calls` says what was asked, `fail_at` breaks off in that call."""

  def __init__(self, monkeypatch):
    self.calls, self.fail_at = [], None
    monkeypatch.setattr(pretrain, "run", self.pretrain)
    monkeypatch.setattr(evaluate, "run", self.evaluate)

  def note(self, what, folder):
    self.calls.append((what, folder.name))
    if len(self.calls) == self.fail_at:
      raise KeyboardInterrupt

  def pretrain(self, config, workdir):
    self.note("train", Path(workdir))
    assert config.name == Path(workdir).name
    (Path(workdir) / "checkpoints" / "8").mkdir(parents=True, exist_ok=True)

  def evaluate(self, config, workdir):
    folder = Path(config.checkpoint)
    self.note("judge", folder)
    assert workdir == ""
    weight, seed = 0.5 if "8b" in folder.name else 0.0, int(folder.name[-1])
    write_result(folder, config, {"top1": 0.2 + weight + 0.01 * seed})


@pytest.fixture
def fakes(monkeypatch):
  return Fakes(monkeypatch)


def write_result(folder, evaluation, figures):
  path = folder / "results" / f"{evaluation.name}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps({
    "step": 8, "figures": figures,
    "settings": {"seed": evaluation.seed, evaluation.protocol: evaluation[evaluation.protocol].to_dict()}}))


def kinds(fakes):
  return [what for what, _ in fakes.calls]


@pytest.mark.parametrize("variant", PAPERS)
def test_every_study_is_possible_and_its_points_are_read(variant, tmp_path):
  config = studies.get_config(variant)
  study.check_study(config, tmp_path)
  points = read_points(config)
  assert config.reference in [point.label for point in points] and len(points) > 1
  assert config.job == "study" and config.name == config.study == variant
  if variant in PAPER and PAPER[variant].kind == "bars":
    assert list(PAPER[variant].lines) == [point.label for point in points]
  if variant == "layers":
    assert list(PAPER[variant].lines) == [point.label for point in points]


def test_the_points_of_the_permutations():
  points = read_points(studies.get_config("permutations"))
  assert [point.x for point in points if point.series == "PIRL"] == [1, 10, 100, 1_000, 10_000, 362_880]
  assert points[5] == Point("PIRL", 362_880, "pirl", {"jigsaw.num_permutations": 0})
  assert [point.x for point in points if point.system == "jigsaw"] == [10, 100, 1_000]


def test_no_study():
  with pytest.raises(UserError, match="needs a study.*lambda, permutations"):
    studies.get_config("lamda")


def test_the_kinds_of_values():
  config = pirl.get_config()
  set_fields(config, {"num_epochs": 1_000, "pretext_weight": 1, "evaluate.learning": False, "data.root": "my images",
                      "data.image_scale": [0.5, 1.0], "data.split": ""}, where="here", fixed=())
  assert config.num_epochs == 1_000 and type(config.pretext_weight) is float and config.evaluate.learning is False
  assert config.data.image_scale == (0.5, 1.0) and config.data.root == "my images" and config.data.split == ""
  evaluation = pirl_jax.configs.evaluate.get_config("knn")
  set_fields(evaluation, {"data.image_size": 16, "knn.temperature": 1e-1}, where="here", fixed=())
  assert evaluation.data.image_size == 16 and evaluation.knn.temperature == 0.1


@pytest.mark.parametrize("field, value, said", [
  ("epochs", 3, "there is no config field epochs"),
  ("optimizer.rate", 3, "there is no config field optimizer.rate"),
  ("seeds.first", 3, "there is no config field seeds.first"),
  ("num_epochs.first", 3, "there is no config field num_epochs.first"),
  ("data", 3, "there is no config field data"),
  ("", 3, "there is no config field "),
  (0, 3, "there is no config field 0"),
  ("num_epochs", 2.0, "num_epochs=2.0 is not possible: it is of type int"),
  ("num_epochs", True, "of type int"),
  ("num_epochs", None, "num_epochs=None is not possible"),
  ("pretext_weight", "half", "of type float"),
  ("pretext_weight", True, "of type float"),
  ("evaluate.learning", 1, "of type bool"),
  ("data.image_scale", 0.5, "of type tuple"),
  ("seed", 3, "seed cannot be set here"),
])
def test_settings_that_are_not_possible(field, value, said):
  before = pirl.get_config()
  config = pirl.get_config()
  with pytest.raises(UserError, match="^here: ") as raised:
    set_fields(config, {field: value}, where="here", fixed=("seed",))
  assert said in str(raised.value) and config == before


@pytest.mark.parametrize("fields, said", [
  ({"points": ()}, "no points; --config.points="),
  ({"points": SMALL[0]}, r"the point 'PIRL' is not .SERIES, X, SYSTEM"),
  ({"points": [("PIRL", 0.5, {})]}, "is not .SERIES, X, SYSTEM"),
  ({"points": [("", 0.5, "pirl", {})]}, "is not .SERIES, X, SYSTEM"),
  ({"points": [("PIRL", None, "pirl", {})]}, "X is a number or a text"),
  ({"points": [("PIRL", True, "pirl", {})]}, "X is a number or a text"),
  ({"points": [("PIRL", 0.5, "pirl", "pretext_weight=0.5")]}, "is not .SERIES, X, SYSTEM"),
  ({"points": [("PIRL", "half", "pirl", {})]}, "x='half'"),
  ({"points": [("PIRL", math.inf, "pirl", {})]}, "x=inf; plot=lines needs a number there"),
  ({"points": [("PIRL", 0, "pirl", {})], "log_x": True}, "above 0"),
  ({"more_points": [("PIRL", 0.5, "pirl", {})]}, "two points are called 'PIRL 0.5'"),
  ({"reference": "PIRL 0.4"}, "choose from PIRL 0, PIRL 0.25"),
  ({"points": [("PIRL", 0.5, "pirll", {})]}, "no system 'pirll'; choose from .*pirl"),
  ({"points": [("PIRL", 0.5, "evaluate", {})]}, "no system 'evaluate'"),
  ({"points": [("PIRL", 0.5, "pirl", {"epochs": 3})]}, "the point 'PIRL 0.5': there is no config field epochs"),
  ({"points": [("PIRL", 0.5, "pirl", {"loss": 3.5})]}, "the point 'PIRL 0.5': loss=3.5 is not possible"),
  ({"settings": {"epochs": 3}}, "^settings: there is no config field epochs"),
  ({"settings": {"seed": 3}}, "^settings: seed cannot be set here"),
  ({"system_settings": {"pirl": {"epochs": 3}}}, "^system_settings.pirl: there is no config field epochs"),
  ({"system_settings": {"rotnt": {"num_epochs": 3}}}, "system_settings: configs/ has no system 'rotnt'"),
  ({"evaluation_settings": {"linear": {"num_epochs": 3}}},
   "evaluation_settings: there is no config field linear.num_epochs"),
  ({"evaluation_settings": {"checkpoint": "runs/pirl"}}, "checkpoint cannot be set here"),
  ({"variant": "cifar100"}, "no variant 'cifar100'"),
  ({"settings": {"num_negatives": 1000}}, "PIRL 0, seed 0: num_negatives=1000 is not 0 .all. or a positive multiple"),
  ({"more_points": [("PIRL", 2, "pirl", {"pretext_weight": 2})]}, "PIRL 2, seed 0: pretext_weight=2.0 is not possible"),
  ({"settings": {"evaluate": {"split": ""}}}, "knn needs held-out images.*--config.settings.evaluate.split="),
  ({"seeds": ()}, "seeds"),
  ({"seeds": (1, 1)}, "each once"),
  ({"seeds": (0.5,)}, "whole numbers"),
  ({"plot": "pie"}, "choose from lines, bars"),
  ({"plot": "layers"}, "knn has no figure for each layer"),
  ({"plot": "distances"}, "knn has no distances"),
  ({"evaluation": "nearest"}, "choose from knn, linear"),
  ({"evaluation": "features"}, "no figure to compare"),
])
def test_what_is_wrong_is_said_before_anything_is_trained(fakes, tmp_path, fields, said):
  with pytest.raises(UserError, match=said):
    study.run(config_of(**fields), str(tmp_path / "study"))
  assert not fakes.calls and not (tmp_path / "study").exists()


@pytest.mark.parametrize("name", ["../lambda", "", "..", "runs"])
def test_names_that_are_no_folder_of_a_study(name, tmp_path):
  config = config_of()
  config.name = name
  with pytest.raises(UserError, match="name=.* is not possible"):
    study.check_study(config, tmp_path)


def test_the_command_takes_points_from_the_command_line(tmp_path):
  points = '[("PIRL", 0.3, "pirl", {"pretext_weight": 0.3}), ("A", 1, "nothing", {})]'
  command = ["--config=configs/study.py:lambda", f"--config.points={points}", "--config.reference=A 1",
             f"--workdir={tmp_path / 'study'}"]
  result = subprocess.run([sys.executable, "launch.py", *command], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
  assert result.returncode == 2 and not (tmp_path / "study").exists()
  assert result.stderr.startswith("error: configs/ has no system 'nothing'") and result.stderr.count("\n") == 1


def test_a_run_belongs_to_its_config(tmp_path):
  def trial_of(seed=0, label="PIRL", own=None, **fields):
    return create_trial(config_of(**fields), Point(label, "", "pirl", own or {}), seed, tmp_path)

  trial = trial_of()
  same = [trial_of(label="Other"), trial_of(reference=""), trial_of(own={"pretext_weight": 0.5}),
          trial_of(evaluation="svm"), trial_of(own={"num_epochs": 24})]
  assert {other.folder for other in same} == {trial.folder}
  others = [trial_of(seed=1), trial_of(own={"pretext_weight": 0.4}), trial_of(own={"num_epochs": 9}),
            trial_of(variant="cifar10")]
  assert len({other.folder for other in [trial, *others]}) == 5
  assert trial.folder.parent == tmp_path / "runs" and trial.folder.name.startswith("pirl-")
  assert trial_of(seed=12).folder.name == trial.folder.name[:-1] + "12"
  assert trial.config.name == trial.folder.name and trial.config.seed == 0
  assert trial.evaluation.checkpoint == str(trial.folder)
  assert len({trial_of(evaluation="svm").evaluation.name, trial.evaluation.name,
              trial_of(evaluation_settings={"knn": {"k": 5}}).evaluation.name}) == 3


def test_what_comes_later_wins_and_the_quick_settings_are_for_the_embedded_images_alone(tmp_path):
  config = config_of()

  def trial_of(own=None):
    return create_trial(config, Point("A", "", "pirl", own or {}), 0, tmp_path)

  config.embedded.settings.num_epochs = 8
  config.embedded.evaluation_settings.knn.update(k=5, temperature=0.5)
  assert trial_of().config.num_epochs == 8 and trial_of({"num_epochs": 0}).config.num_epochs == 0
  config.settings.num_epochs = 3
  config.evaluation_settings.knn.k = 9
  assert trial_of().config.num_epochs == 3 and trial_of({"num_epochs": 0}).config.num_epochs == 0
  assert (trial_of().evaluation.knn.k, trial_of().evaluation.knn.temperature) == (9, 0.5)
  config.settings.num_epochs = config.evaluation_settings.knn.k = None
  config.variant = "cifar10"
  assert digest(trial_of().config, ("name",), {}) == digest(pirl.get_config("cifar10"), ("name",), {})
  assert (trial_of().evaluation.knn.k, trial_of().evaluation.knn.temperature) == (200, 0.07)


def test_a_study_goes_on_where_it_stopped_and_does_nothing_twice(fakes, tmp_path, capsys):
  config = config_of(points=SMALL, seeds=(0, 1))
  fakes.fail_at = 6  # while the third run is judged
  with pytest.raises(KeyboardInterrupt):
    study.run(config, str(tmp_path))
  assert kinds(fakes) == ["train", "judge"] * 3 and not (tmp_path / "lambda").exists()
  fakes.fail_at = None
  capsys.readouterr()
  study.run(config, str(tmp_path))
  assert kinds(fakes)[6:] == ["judge", "train", "judge"]
  said = capsys.readouterr().out
  assert "2 points, 4 runs, 2 of them done" in said and "PIRL 0    done: seeds 0, 1\n" in said
  assert "run 1 of 2: PIRL 0.5, seed 0" in said and "run 2 of 2: PIRL 0.5, seed 1" in said
  first = {path.name: path.read_bytes() for path in (tmp_path / "lambda").iterdir()}
  assert set(first) == {"study.csv", "study.json", "study.png"}
  fakes.calls.clear()
  study.run(config, str(tmp_path))
  assert not fakes.calls
  assert {path.name: path.read_bytes() for path in (tmp_path / "lambda").iterdir()} == first


def test_a_training_that_broke_off_is_called_again(fakes, tmp_path):
  config = config_of(points=SMALL, reference="", seeds=(0,))
  fakes.fail_at = 1
  with pytest.raises(KeyboardInterrupt):
    study.run(config, str(tmp_path))
  fakes.fail_at = None
  study.run(config, str(tmp_path))
  assert fakes.calls[0] == fakes.calls[1] and kinds(fakes) == ["train", "train", "judge", "train", "judge"]


def test_runs_are_shared_and_more_seeds_points_and_evaluations_add_to_them(fakes, tmp_path):
  config = config_of(points=SMALL, seeds=(0,))
  study.run(config, str(tmp_path))
  fakes.calls.clear()
  again = [("NPID++", "", "pirl", {"pretext_weight": 0}), ("Again", "", "pirl", {"pretext_weight": 0.0})]
  other = config_of("pretext", points=again, reference="Again", seeds=(0, 1))
  study.run(other, str(tmp_path))
  assert kinds(fakes) == ["train", "judge"]  # the new seed, once for both points
  assert (tmp_path / "pretext" / "study.csv").exists() and (tmp_path / "lambda" / "study.csv").exists()
  fakes.calls.clear()
  study.run(config_of(points=SMALL, seeds=(0,), evaluation_settings={"knn": {"k": 5}}), str(tmp_path))
  assert kinds(fakes) == ["judge"] * 2
  fakes.calls.clear()
  more = [("PIRL", 1, "pirl", {"pretext_weight": 1})]
  study.run(config_of(points=SMALL, more_points=more, seeds=(0,)), str(tmp_path))
  assert kinds(fakes) == ["train", "judge"]


def test_a_run_counts_only_with_its_last_checkpoint_and_a_result_of_it(fakes, tmp_path):
  config = config_of(points=[("PIRL", 0, "pirl", {})], reference="", seeds=(0,))
  study.run(config, str(tmp_path))
  (folder,) = (tmp_path / "runs").iterdir()
  (result,) = (folder / "results").iterdir()

  def calls_after(change):
    fakes.calls.clear()
    change()
    study.run(config, str(tmp_path))
    return kinds(fakes)

  assert calls_after(lambda: (folder / "checkpoints" / "8").rmdir()) == []  # it is judged already
  assert calls_after(result.unlink) == ["train", "judge"]
  assert calls_after(lambda: (folder / "trained.json").write_text("")) == ["train", "judge"]
  assert calls_after(lambda: result.write_text(result.read_text().replace('"step": 8', '"step": 4'))) == ["judge"]
  renamed = result.with_name(result.stem + "-embedded-8.json")  # as of other images than the run's own
  assert calls_after(lambda: result.rename(renamed)) == []


def test_a_run_that_fails_is_named(monkeypatch, fakes, tmp_path):
  def fail(config, workdir):
    raise UserError("the loss is nan")

  monkeypatch.setattr(pretrain, "run", fail)
  with pytest.raises(UserError, match="^PIRL 0, seed 0: the loss is nan"):
    study.run(config_of(points=SMALL), str(tmp_path))


def test_table_files_and_what_is_printed(monkeypatch, fakes, tmp_path, capsys):
  config = config_of(points=SMALL, more_points=[("PIRL", 1, "pirl", {"pretext_weight": 1})], seeds=(0, 1, 2))
  accuracy = {0.0: (0.30, 0.32, 0.31), 0.5: (0.40, 0.44, 0.42), 1.0: (0.41, 0.43, 0.42)}

  def judge(evaluation, workdir):
    trial = next(trial for trial in trials if str(trial.folder) == evaluation.checkpoint)
    write_result(trial.folder, evaluation, {"top1": accuracy[trial.config.pretext_weight][trial.config.seed]})

  trials = [create_trial(config, point, seed, tmp_path) for point in read_points(config) for seed in (0, 1, 2)]
  monkeypatch.setattr(evaluate, "run", judge)
  study.run(config, str(tmp_path))

  with open(tmp_path / "lambda" / "study.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert [(row["x"], row["seed"], float(row["value"])) for row in rows] == [
    (f"{x:g}", str(seed), value) for x, values in accuracy.items() for seed, value in enumerate(values)]
  assert rows[4] == {"study": "lambda", "series": "PIRL", "x": "0.5", "seed": "1", "figure": "kNN top-1", "layer": "",
                     "value": "0.44", "run": str(trials[4].folder)}

  stored = json.loads((tmp_path / "lambda" / "study.json").read_text())
  zero, half, one = stored["cells"]
  assert zero["num_seeds"] == 3 and zero["mean"] == pytest.approx(0.31) and zero["std"] == pytest.approx(0.01)
  assert half["difference"] is None
  # Differences of -0.10, -0.12, -0.11: mean -0.11, standard deviation 0.01, half width 4.302653 * 0.01 / sqrt(3).
  assert zero["difference"]["mean"] == pytest.approx(-0.11)
  assert zero["difference"]["high"] == pytest.approx(-0.11 + 0.024841, abs=1e-6)
  assert zero["difference"]["verdict"] == "difference shown"
  assert one["difference"]["mean"] == pytest.approx(0, abs=1e-9)
  assert one["difference"]["verdict"] == "no difference shown"
  assert stored["config"]["points"] == [list(point) for point in SMALL] and stored["seeds"] == [0, 1, 2]
  assert stored["config"]["embedded.settings.num_epochs"] == 24 and None not in stored["config"].values()
  said = capsys.readouterr().out
  assert "PIRL 0      31.0 +- 1.0    -11.0 [-13.5, -8.5]\n" in said
  assert "PIRL 0.5    42.0 +- 2.0    reference\n" in said and "no difference shown" in said.split("PIRL 1 ")[-1]


def test_paired_differences():
  # Differences 1, 2, 3: mean 2, standard deviation 1; Student's t of two degrees of freedom at 0.975 is 4.302653.
  found = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
  assert found.mean == 2
  assert (found.low, found.high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-5)
  assert found.verdict == "no difference shown"
  # Differences 1, 2: standard deviation sqrt(1/2), over sqrt(2) seeds 1/2; t of one degree is 12.706205.
  assert paired_difference([1.0, 2.0], [0.0, 0.0]).high == pytest.approx(1.5 + 12.706205 / 2, abs=1e-5)
  assert paired_difference([0.5], [0.25]) == Difference(0.25, None, None)
  assert paired_difference([0.5], [0.25]).verdict == "one seed, no interval"
  assert Difference(0.1, 0.01, 0.2).verdict == "difference shown" == Difference(-0.1, -0.2, -0.01).verdict
  assert Difference(0.1, 0.0, 0.2).verdict == "no difference shown"


def test_the_table_of_one_seed_and_of_plain_numbers():
  cells = [Cell("A", "", "mean distance", "", (1.25,)),
           Cell("B", "2", "mean distance", "", (1.5,), Difference(0.25, None, None))]
  assert format_cells("title", cells, reference="A", share=False).splitlines() == [
    "title", "one seed", "against A: mean difference seed by seed [95% interval, each for itself]", "  mean distance",
    "    A     1.250  reference", "    B 2   1.500  +0.250  one seed, no interval"]


BY_LAYER = {layer: {"top1": 0.1 * i, "mean_average_precision": 0.1 * i} for i, layer in enumerate(("conv1", "res2"), 1)}
FOUND = {
  "knn": {"top1": 0.4},
  "linear": {"top1": 0.3, "layers": BY_LAYER},
  "svm": {"mean_average_precision": 0.3, "layers": BY_LAYER},
  "low_shot": {"shots": {"1": {"mean": 0.1}, "2": {"mean": 0.2}}},
  "semi_supervised": {"fractions": {"0.01": {"top1": 0.1}, "0.1": {"top1": 0.2}}},
  "retrieval": {"mean_average_precision": 0.3},
  "invariance": {"matched": {"mean": 0.8, "std": 0.1, "counts": [1, 3], "edges": [0, 1, 2]},
                 "mismatched": {"mean": 1.6}, "separation": 0.9},
}


@pytest.mark.parametrize("protocol", [name for name in PROTOCOLS if protocol_of(name).reading])
def test_which_figures_are_taken(protocol):
  found = report.read_figures(protocol, FOUND[protocol])
  assert {
    "knn": {("kNN top-1", ""): 0.4},
    "linear": {("linear top-1 of the best layer", ""): 0.3, ("linear top-1 of conv1", "conv1"): 0.1,
               ("linear top-1 of res2", "res2"): 0.2},
    "svm": {("SVM mAP of the best layer", ""): 0.3, ("SVM mAP of conv1", "conv1"): 0.1,
            ("SVM mAP of res2", "res2"): 0.2},
    "low_shot": {("low-shot mAP at 1", ""): 0.1, ("low-shot mAP at 2", ""): 0.2},
    "semi_supervised": {("fine-tuned top-1 at 0.01", ""): 0.1, ("fine-tuned top-1 at 0.1", ""): 0.2},
    "retrieval": {("retrieval mAP", ""): 0.3},
    "invariance": {("mean distance", ""): 0.8, ("standard deviation of the distance", ""): 0.1,
                   ("distance over that to another image", ""): 0.5, ("separation", ""): 0.9},
  }[protocol] == found
  with pytest.raises(UserError, match=f"the result of {protocol} has no"):
    report.read_figures(protocol, {})


@pytest.mark.parametrize("num_seeds", [1, 2])
@pytest.mark.parametrize("variant, num_panels", [
  ("lambda", 2), ("permutations", 2), ("negatives", 2), ("pretext", 3), ("layers", 2), ("invariance", 1), ("draw", 2)])
def test_every_study_has_its_figure(tmp_path, variant, num_panels, num_seeds):
  config = config_of(variant, seeds=tuple(range(num_seeds)))
  evaluation = pirl_jax.configs.evaluate.get_config(config.evaluation)
  trials = []
  for point in read_points(config):
    for seed in config.seeds:
      run_config = pirl.get_config()
      run_config.seed = seed
      trials.append(Trial(point, run_config, evaluation, tmp_path / point.label / str(seed)))
      write_result(trials[-1].folder, evaluation, FOUND[evaluation.protocol])
      (trials[-1].folder / "trained.json").write_text('{"step": 8}')
  report.report(config, trials, tmp_path / "out")
  with Image.open(tmp_path / "out" / "study.png") as plot:
    # The differences have a panel of their own beside bars, where there are seeds to compare.
    assert plot.width == round(5.6 * 120) * (num_panels - (config.plot == "bars" and num_seeds == 1))
    assert len(plot.convert("L").getcolors()) > 10
  with open(tmp_path / "out" / "study.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  figures = {"layers": 3, "invariance": 4}.get(variant, 1)  # both layers and the best one
  assert len(rows) == len(trials) * figures

  results = {trial.folder: trial.result() for trial in trials}
  cells = report.create_cells(trials, results, config.reference)
  shown = [cell for cell in cells if bool(cell.layer) == (config.plot == "layers")]
  first = report.create_panels(config, trials, results, shown, share=variant != "invariance")[0]
  name, line = next(iter(first.lines.items()))
  assert {
    "layers": ("PIRL", ["conv1", "res2"], [10, 20]), "pretext": ("PIRL (Jigsaw)", [""], [40]),
    "draw": ("PIRL shared", [""], [40]), "lambda": ("PIRL", [0, 0.25, 0.5, 0.75, 1], [40] * 5),
    "permutations": ("PIRL", [1, 10, 100, 1_000, 10_000, 362_880], [40] * 6),
    "negatives": ("PIRL", [256, 512, 768, 1_024], [40] * 4),
    "invariance": ("PIRL", [0.5, 1.5], [0.25, 0.75])}[variant] == (name, list(line.x), pytest.approx(list(line.y)))
  assert (line.error is None) == (num_seeds == 1)
  assert f"over {num_seeds} seeds" in first.y_label or num_seeds == 1


def test_points_that_were_added_stand_in_the_line_where_they_belong():
  cells = [Cell("A", x, "top-1", "", (float(x), float(x))) for x in ("1", "0.5", "10")]
  panel = lines_panel(cells, title="", figure="top-1", x_label="", log_x=False, share=True)
  assert panel.lines["A"].x == [0.5, 1, 10] and panel.lines["A"].y == [50, 100, 1_000]


def test_every_point_has_a_line_over_the_layers():
  cells = [Cell("A", x, f"top-1 of {layer}", layer, (0.1,)) for x in ("1", "2") for layer in ("res2", "res3")]
  panel = lines_panel(cells, title="", figure="top-1", x_label="", log_x=False, share=True)
  assert {name: line.x for name, line in panel.lines.items()} == {"A 1": ["res2", "res3"], "A 2": ["res2", "res3"]}


def test_a_series_has_one_colour_in_every_panel(monkeypatch, tmp_path):
  cells = [Cell(series, x, "top-1", "", (0.1, 0.2), Difference(0.1, 0, 0.2))
           for series, x in (("A", "1"), ("A", "2"), ("B", ""))]
  panels = bars_panels(cells, title="", figure="top-1", x_label="", reference="B", share=True)
  panels.append(Panel("elsewhere", "", "bars", {"C": Line([""], [1]), "B": Line([""], [2])}))
  panels.append(Panel("elsewhere", "", "lines", {"B": Line([1, 2], [1, 2]), "A (derived)": Line([1], [2], series="A")}))
  panels.append(Panel("elsewhere", "", "bands", {"C": Line([1, 2], [1, 2], [1, 1])}))
  drawn = []

  def noted(kind, draw):
    return lambda *args, **kwargs: drawn.append((kind, kwargs.get("color"))) or draw(*args, **kwargs)

  for kind in ("bar", "errorbar", "plot", "fill_between"):
    monkeypatch.setattr(Axes, kind, noted(kind, getattr(Axes, kind)))
  save_panels(tmp_path / "figure.png", "", panels)
  assert [color for kind, color in drawn if kind == "bar"] == ["C0", "C0", "C1", "C2", "C1"]
  assert [color for kind, color in drawn if kind == "errorbar" and color in ("C0", "C1")] == [
    "C0", "C0", "C1", "C1", "C0"]
  assert ("plot", "C2") in drawn and ("fill_between", "C2") in drawn


@pytest.mark.parametrize("plot, evaluation", [
  ("bars", "knn"), ("lines", "knn"), ("layers", "linear_small"), ("distances", "invariance")])
def test_a_study_names_its_panel_and_its_axes(tmp_path, plot, evaluation):
  config = config_of("own", points=[("A", 1, "pirl", {})], seeds=(0, 1), plot=plot, evaluation=evaluation,
                     panel_title="here", x_label="across", y_label="upwards")
  trials = [create_trial(config, point, seed, tmp_path) for point in read_points(config) for seed in config.seeds]
  results = {trial.folder: {"figures": FOUND[trials[0].evaluation.protocol]} for trial in trials}
  cells = report.create_cells(trials, results, "")
  shown = [cell for cell in cells if bool(cell.layer) == (plot == "layers")]
  (panel,) = report.create_panels(config, trials, results, shown, share=False)
  assert (panel.title, panel.x_label) == ("here", "across")
  assert panel.y_label == "upwards\n(mean and standard deviation over 2 seeds)"


# The runs of test_evaluate.py, whose compiled programs are found again.
TINY = {
  "num_epochs": 2, "batch_size": 32, "num_negatives": 32, "data": {"num_images": 128, "image_size": 16},
  "jigsaw": {"crop_size": 18, "patch_size": 5}, "model": {"dim": 16}, "optimizer": {"learning_rate": 0.1},
  "evaluate": {"num_images": 48, "batch_size": 32}}


def test_a_study_of_real_runs(tmp_path):
  config = config_of(points=[("PIRL", 0.5, "pirl", {})], seeds=(0, 1), settings=TINY,
                     evaluation_settings={"knn": {"k": 20}})
  study.run(config, str(tmp_path))
  stored = json.loads((tmp_path / "lambda" / "study.json").read_text())
  (cell,) = stored["cells"]
  assert len(stored["runs"]) == cell["num_seeds"] == 2 and all(0 <= value <= 1 for value in cell["values"])
  for run in stored["runs"]:
    folder = Path(run["folder"])
    trained = json.loads((folder / "trained.json").read_text())
    assert trained["step"] == 8 and 0 < trained["seconds"] < 600
    (result,) = (json.loads(path.read_text()) for path in (folder / "results").glob("*.json"))
    assert result["settings"]["run_config"]["seed"] == run["seed"] and result["settings"]["knn"]["k"] == 20
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
  study.run(config, str(tmp_path))
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")} == before


@pytest.mark.parametrize("name", PAPERS)
def test_every_run_of_every_study_is_possible_as_far_as_its_config_tells(name, tmp_path):
  config = studies.get_config(name)
  points = read_points(config)
  trials = [create_trial(config, point, seed, tmp_path) for point in points for seed in config.seeds]
  for trial in trials:
    parts_lib.check_config(trial.config)
  assert len({trial.folder for trial in trials}) == len(points) * len(config.seeds)


def test_settings_of_one_system_leave_the_others_alone(tmp_path):
  def rate(system, **fields):
    point = Point("A", "", system, {})
    return create_trial(config_of(**fields), point, 0, tmp_path).config.optimizer.learning_rate

  assert (rate("pirl"), rate("jigsaw"), rate("rotnet")) == (0.2, 0.1, 0.4)
  fields = {"settings": {"optimizer": {"learning_rate": 0.3}},
            "system_settings": {"rotnet": {"optimizer": {"learning_rate": 0.7}}}}
  assert (rate("pirl", **fields), rate("jigsaw", **fields), rate("rotnet", **fields)) == (0.3, 0.3, 0.7)
