"""Every operation x fault x moment ends in the same bits, or in a clear refusal with nothing lost, and goes on.

Each row starts a command, makes calls of its process fail (faults.py), looks how the process ends, ends the faults and
gives the same command again. The end is compared bit for bit with that of a command that met no fault.
"""

import dataclasses
import json
import re
import shutil
import signal
import time

import pytest
from faults import Faults
from launching import LIMIT, SMALL, Launch, assert_same, launch, over_folder, wait_for, write_images

from pirl_jax.data.sources import DataSettings, open_source
from pirl_jax.storage.rows import read_rows

STEPS = 24


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """Returns a folder of 32 images of two classes, and 8 to test."""
  root = tmp_path_factory.mktemp("images")
  write_images(root, train=16, test=4)
  return root


@pytest.fixture(scope="module")
def training(images):
  """Returns the flags of a run of 24 steps, with a checkpoint every 4 and a measurement every 8."""
  return (*over_folder(images), "--config.evaluate.every_epochs=2", "--config.checkpoint.every_steps=4",
          "--config.num_epochs=6", "--config.evaluate.views=0")


@pytest.fixture(scope="module")
def trained(training, tmp_path_factory):
  """Returns the folder of the run that met no fault."""
  folder = tmp_path_factory.mktemp("trained") / "run"
  launch(*training, f"--workdir={folder}")
  return folder


@dataclasses.dataclass(frozen=True)
class Row:
  """A fault of a run: from a step on, and what the process may do.

  Attributes:
    rules: see `Faults.begin`; RUN and IMAGES stand for the folders.
    at: number of rows of metrics.jsonl when the fault begins; 0: it is there from the start.
    goes_on: the process must train to its end in spite of the fault.
    lasts: seconds after which the fault passes; None: it lasts until the process has ended.
    signal: sent when the fault has begun.
    saves: the process must save the steps that it has done.
  """

  rules: tuple
  at: int = 6
  goes_on: bool = False
  lasts: float | None = None
  signal: int | None = None
  saves: bool = False


def steps_on_disk(folder):
  return [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]


def ends_clearly(code, output):
  """Returns whether a process has ended as asked, or with one line that says why."""
  shown = re.sub(r"\x1b\[\w", "", output).strip()  # without what moves the cursor for a progress bar
  last = shown.splitlines()[-1] if shown else ""
  return "Traceback" not in output and (code in (0, 130) or code == 2 and last.startswith("error: "))


def meet(command, folder, images, row):
  """Starts the command, lets it meet the faults of a row, and returns (exit code, output, steps on disk before)."""
  faults = Faults(folder.parent / "schedule", RUN=folder, IMAGES=images)
  if not row.at:
    faults.begin(*row.rules)
  with Launch(*command, f"--workdir={folder}", faults=faults) as running:
    end = time.monotonic() + LIMIT
    while len(read_rows(folder / "metrics.jsonl")) < row.at and not running.ended():
      assert time.monotonic() < end
      time.sleep(0.01)
    before = steps_on_disk(folder)
    faults.begin(*row.rules)
    if row.signal:
      running.signal(0, row.signal)
    if row.lasts is not None:
      time.sleep(row.lasts)
      faults.end()
    (code, output), = running.wait()
  faults.end()
  return code, output, before


def check(command, folder, images, expected, row):
  code, output, before = meet(command, folder, images, row)
  killed = any("kill" in rule for rule in row.rules)
  if killed:
    assert code in (-signal.SIGKILL, 0, 1), output[-3000:]
  else:
    assert ends_clearly(code, output), output[-3000:]
  if row.goes_on:
    assert code == 0, output[-3000:]
  if row.saves:
    assert max(steps_on_disk(folder), default=0) >= row.at, output[-3000:]
  if before and not killed:
    assert max(steps_on_disk(folder)) >= max(before), "a checkpoint is lost"
  resumes, = launch(*command, f"--workdir={folder}")
  if before and max(before) < STEPS and not row.goes_on:
    resumed = re.search(r"resumes from step (\d+)", resumes)
    assert resumed and int(resumed[1]) >= max(before) or max(steps_on_disk(folder)) == STEPS, resumes[-2000:]
  assert_same(folder, expected, STEPS)


ROWS = {
  # a disk that takes nothing, or not for a while
  "full from the start": Row((("create", "ENOSPC", "RUN/*"), ("write", "ENOSPC", "RUN/*")), at=0),
  "full for a while": Row((("create", "ENOSPC", "RUN/*"), ("write", "ENOSPC", "RUN/*")), lasts=4, goes_on=True),
  "half of a write": Row((("write", "short", "RUN/checkpoints/*", 2, 3), ("write", "ENOSPC", "RUN/*", 5, 3)),
                         goes_on=True),
  "errors of the disk in rows": Row((("write", "EIO", "RUN/metrics.jsonl", 0, 3),), goes_on=True),
  "a file cannot be renamed": Row((("rename", "EACCES", "RUN/*", 0, 2),), goes_on=True),
  "nothing can be synchronised": Row((("sync", "EIO", "RUN/*", 0, 3),), goes_on=True),
  "read-only": Row((("create", "EROFS", "RUN/*"), ("rename", "EROFS", "RUN/*"), ("remove", "EROFS", "RUN/*")), lasts=4,
                   goes_on=True),
  "nothing can be looked at for a moment": Row((("stat", "EDQUOT", "RUN/checkpoints/*"),), lasts=2, goes_on=True),
  "nothing can be listed for a moment": Row((("list", "EIO", "RUN*"),), lasts=2, goes_on=True),
  "nothing can be removed": Row((("remove", "EPERM", "RUN/*"),), goes_on=True),
  # images
  "an image is unreadable for a moment": Row((("open", "EIO", "IMAGES/train/*", 0, 3),), goes_on=True),
  "a folder of images is away for a moment": Row((("open", "ESTALE", "IMAGES/train/cats/*"),
                                                  ("stat", "ESTALE", "IMAGES/train/cats*")), lasts=2, goes_on=True),
  "no more files can be opened": Row((("open", "EMFILE", "IMAGES/*", 0, 5),), goes_on=True),
  "images stay away": Row((("open", "EIO", "IMAGES/train/*"),), saves=True),
  "a read that never returns, and SIGTERM": Row((("open", "stall", "IMAGES/train/*"),), signal=signal.SIGTERM,
                                                saves=True),
  "a read that never returns, and a closed terminal": Row((("open", "stall", "IMAGES/train/*"),), signal=signal.SIGHUP,
                                                         saves=True),
  # a restart
  "killed in a write of a checkpoint": Row((("write", "kill", "RUN/checkpoints/*", 3, 1),)),
  "killed in a rename of a checkpoint": Row((("rename", "kill", "RUN/checkpoints/*", 0, 1),)),
  "killed in the write of a row": Row((("write", "kill", "RUN/metrics.jsonl", 1, 1),)),
  "killed while an old checkpoint is removed": Row((("remove", "kill", "RUN/checkpoints/*", 2, 1),)),
  "no locks, which Orbax needs": Row((("lock", "ENOLCK", "RUN*"),), at=0),
  "no lock of a folder, as on NFS": Row((("lock", "EBADF", "RUN"),), at=0, goes_on=True),
  "the clock jumps back": Row((("clock", -86_400, "*"),), goes_on=True),
}
QUICK_ROWS = ("an image is unreadable for a moment", "a read that never returns, and SIGTERM",
              "killed in a write of a checkpoint")


def rows_of(names):
  return [pytest.param(name, marks=() if name in QUICK_ROWS else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", rows_of(ROWS))
def test_training_ends_in_the_same_bits(name, training, trained, images, tmp_path):
  check(training, tmp_path / "run", images, trained, ROWS[name])


RESTORING = {
  "an error of the disk passes": (("read", "EIO", "RUN/checkpoints/*", 3, 1),),
  "no more files can be opened": (("open", "EMFILE", "RUN/checkpoints/*", 3, 2),),
  "no memory": (("read", "ENOMEM", "RUN/checkpoints/*", 2, 1),),
  "errors of the disk stay": (("read", "EIO", "RUN/checkpoints/*"),),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESTORING)
def test_a_fault_while_restoring_condemns_no_checkpoint(name, training, trained, images, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(trained, folder)
  shutil.rmtree(folder / "checkpoints" / str(STEPS))
  before = sorted(path.name for path in (folder / "checkpoints").iterdir())
  code, output, _ = meet(training, folder, images, Row(RESTORING[name], at=0))
  assert ends_clearly(code, output), output[-3000:]
  left = sorted(path.name for path in (folder / "checkpoints").iterdir())
  assert not any("unreadable" in other for other in left) and set(before) <= set(left) | {str(STEPS)}
  launch(*training, f"--workdir={folder}")
  assert_same(folder, trained, STEPS)


EVALUATING = {
  "results cannot be written for a moment": (("create", "ENOSPC", "RUN/results/*", 0, 1),),
  "an image is unreadable for a moment": (("open", "EIO", "IMAGES/*", 2, 3),),
  "images stay away": (("open", "ESTALE", "IMAGES/*", 5, -1),),
  "the checkpoint is unreadable for a moment": (("read", "EIO", "RUN/checkpoints/*", 2, 1),),
  "killed while the result is written": (("rename", "kill", "RUN/results/*", 0, 1),),
}


def figures(folder):
  found = json.loads((folder / "results" / "linear.json").read_text())
  return {layer: values for layer, values in found["figures"]["layers"].items()} | {"settings": found["settings"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATING)
def test_an_evaluation_gives_the_same_figures(name, trained, images, tmp_path):
  expected, folder = tmp_path / "expected" / "run", tmp_path / "met" / "run"
  faults = Faults(tmp_path / "schedule", RUN=folder, IMAGES=images)
  def command(run):
    return ("--config=configs/evaluate.py:linear", f"--config.checkpoint={run}", "--config.linear.num_epochs=3",
            "--config.linear.batch_size=8")
  for run in (expected, folder):
    shutil.copytree(trained, run)
  launch(*command(expected))
  faults.begin(*EVALUATING[name])
  with Launch(*command(folder), faults=faults) as running:
    (code, output), = running.wait()
  assert code == -signal.SIGKILL or ends_clearly(code, output), output[-3000:]
  launch(*command(folder))
  assert figures(folder) == figures(expected)


# Several commands of other kinds: a study, a preparation of images, two processes.

def end_of(command, faults, rules, *, processes=1):
  """Gives a command with the faults, which must end clearly, and again without them if it has not ended well."""
  faults.begin(*rules)
  with Launch(*command, processes=processes, faults=faults) as running:
    ended = running.wait()
  faults.end()
  for code, output in ended:
    assert processes > 1 or code == -signal.SIGKILL or ends_clearly(code, output), output[-3000:]
  if any(code for code, _ in ended):
    launch(*command, processes=processes)


OTHERS = {
  "the first write fails": (("write", "ENOSPC", "OUT/*", 0, 1),),
  "the disk is full for a moment": (("create", "ENOSPC", "OUT/*", 3, 2), ("write", "ENOSPC", "OUT/*", 5, 2)),
  "an image is unreadable for a moment": (("open", "EIO", "IMAGES/*", 2, 3),),
  "killed while something gets its name": (("rename", "kill", "OUT/*", 0, 1),),
  "killed in a write": (("write", "kill", "OUT/*", 4, 1),),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_study_has_the_same_figures(name, images, tmp_path):
  def command(out):
    points = [("PIRL", "", "pirl", {}), ("NPID", "", "npid", {})]
    return ("--config=configs/study.py:own", f"--workdir={out}", "--config.variant=folder_small",
            f"--config.more_points={points}", "--config.seeds=(0,)", f"--config.settings.data.root={images}",
            "--config.settings.data.split=train", "--config.settings.data.labels=folder",
            "--config.settings.evaluate.split=test", "--config.settings.num_epochs=2",
            "--config.settings.evaluate.views=0",
            *(flag.replace("--config.", "--config.settings.") for flag in SMALL))
  launch(*command(tmp_path / "expected"))
  end_of(command(tmp_path / "met"), Faults(tmp_path / "schedule", OUT=tmp_path / "met", IMAGES=images), OTHERS[name])
  found, expected = ((tmp_path / out / "own" / "study.csv").read_text().replace(str(tmp_path / out), "")
                     for out in ("met", "expected"))
  assert found == expected and len(found.splitlines()) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_preparation_writes_the_same_images(name, images, tmp_path):
  def command(out):
    return ("--config=configs/prepare.py", f"--config.data.root={images}", "--config.splits=('train','test')",
            "--config.data.labels=folder", "--config.name=small", f"--config.root={out}", "--config.shorter_side=16")
  launch(*command(tmp_path / "expected"))
  end_of(command(tmp_path / "met"), Faults(tmp_path / "schedule", OUT=tmp_path / "met", IMAGES=images), OTHERS[name])
  def records(out):
    # Bytes may differ: protobuf writes the fields of a record in an order of its own in each process.
    sets = {split: open_source(DataSettings("tfds", name="small", root=str(out), split=split))
            for split in ("train", "test")}
    return {(split, source.image_name(i)): (source[i].image, source[i].label)
            for split, source in sets.items() for i in range(len(source))}
  found, expected = records(tmp_path / "met"), records(tmp_path / "expected")
  assert found == expected and len(found) == 40


# Two processes of which one is struck. The other waits for it in the middle of a step.

@pytest.mark.slow  # by default tests/training/test_incoming.py and the void steps of tests/method stand for it
@pytest.mark.parametrize("told", [0, 1])
def test_one_of_two_processes_waits_for_its_disk_and_both_save(told, training, images, tmp_path):
  """`told` is the process that gets SIGTERM."""
  launch(*training, f"--workdir={tmp_path / 'expected'}", processes=2)
  met = tmp_path / "met"
  faults = Faults(tmp_path / "schedule", RUN=met, IMAGES=images)
  with Launch(*training, f"--workdir={met}", processes=2, faults=faults, struck=(1,)) as running:
    wait_for(lambda: len(read_rows(met / "metrics.jsonl")) >= 6)
    faults.begin(("open", "stall", "IMAGES/train/*"))
    time.sleep(2)
    reached = len(read_rows(met / "metrics.jsonl"))
    running.signal(told, signal.SIGTERM)
    ended = running.wait()
  faults.end()
  assert [code for code, _ in ended] == [0, 0], ended
  assert reached < STEPS and max(steps_on_disk(met)) >= reached, ended
  assert len(read_rows(met / "metrics.jsonl")) == max(steps_on_disk(met))
  resumes = launch(*training, f"--workdir={met}", processes=2)
  assert f"resumes from step {max(steps_on_disk(met))}" in resumes[0] or max(steps_on_disk(met)) == STEPS
  assert_same(met, tmp_path / "expected", STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("struck", [0, 1])
def test_the_images_of_one_of_two_processes_stay_away_and_both_save(struck, training, images, tmp_path):
  launch(*training, f"--workdir={tmp_path / 'expected'}", processes=2)
  met = tmp_path / "met"
  faults = Faults(tmp_path / "schedule", RUN=met, IMAGES=images)
  with Launch(*training, f"--workdir={met}", processes=2, faults=faults, struck=(struck,)) as running:
    wait_for(lambda: len(read_rows(met / "metrics.jsonl")) >= 6)
    faults.begin(("open", "EIO", "IMAGES/train/*"))
    ended = running.wait()
  faults.end()
  for code, output in ended:
    assert code == 2 and ends_clearly(code, output), output
    assert f"error: in process {struck}: " in output and "the disk or the network fails" in output
  assert max(steps_on_disk(met)) == len(read_rows(met / "metrics.jsonl")) >= 6
  launch(*training, f"--workdir={met}", processes=2)
  assert_same(met, tmp_path / "expected", STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_two_processes_end_in_the_same_bits(name, training, images, tmp_path):
  launch(*training, f"--workdir={tmp_path / 'expected'}", processes=2)
  met = tmp_path / "met"
  end_of((*training, f"--workdir={met}"), Faults(tmp_path / "schedule", OUT=met, IMAGES=images), OTHERS[name],
         processes=2)
  assert_same(met, tmp_path / "expected", STEPS)
