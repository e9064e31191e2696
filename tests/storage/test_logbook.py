"""The notes of a run: rows, resume, TensorBoard, progress on a terminal and without one."""

import io
import json
import struct
import tracemalloc

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from pirl_jax.figures import plots
from pirl_jax.storage import logbook
from pirl_jax.storage.logbook import Logbook
from pirl_jax.storage.rows import read_rows, training_seconds


class Clock:
  """Time that moves when the test says so."""

  def __init__(self, monkeypatch):
    self.now = 100.0
    monkeypatch.setattr(logbook, "perf_counter", lambda: self.now)


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  return Clock(monkeypatch)


def open_logbook(workdir, **changes):
  settings = {"start_step": 0, "total_steps": 100, "steps_per_epoch": 10, "batch_size": 32,
              "stream": io.StringIO()}
  return Logbook(workdir, **settings | changes)


def lines(workdir):
  """The rows by a strict parser: a NaN is an error, and every line ends."""
  text = (workdir / "metrics.jsonl").read_text()
  assert not text or text.endswith("\n")

  def refuse(name):
    raise AssertionError(f"{name} is no JSON")
  return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def events(workdir):
  """All scalars (file by file, in the order written) as (tag, step, value), and the purge steps."""
  scalars, purges = [], []
  for path in sorted(workdir.glob("events.out.tfevents.*"), key=lambda p: (p.stat().st_mtime_ns, p.name)):
    data = path.read_bytes()
    while data:
      length, = struct.unpack("<Q", data[:8])
      event = Event.FromString(data[12:12 + length])
      data = data[16 + length:]
      if event.session_log.status:
        purges.append(event.step)
      scalars += [(value.tag, event.step, round(value.simple_value, 5)) for value in event.summary.value]
  return scalars, purges


def test_a_row_holds_metrics_speed_and_waiting(tmp_path, clock):
  with open_logbook(tmp_path) as book:
    clock.now += 4
    book.log(5, {"loss": np.float32(2.5), "learning_rate": 0.1}, data_wait_seconds=1.0)
    clock.now += 2
    with book.paused():
      clock.now += 50
      with book.paused():  # a checkpoint within an evaluation
        clock.now += 7
    book.log(10, {"loss": 2.0}, data_wait_seconds=0.0)
    assert lines(tmp_path) == [  # readable before the end
      {"step": 5, "epoch": 0.5, "loss": 2.5, "learning_rate": 0.1, "images_per_second": 40.0,
       "data_wait": 0.25},
      {"step": 10, "epoch": 1.0, "loss": 2.0, "images_per_second": 80.0, "data_wait": 0.0}]


def test_the_time_of_a_run_is_that_of_all_its_pieces_without_pauses(tmp_path, clock):
  for start, end, seconds in ((0, 10, 3), (10, 20, 5), (20, 40, 20)):  # each piece is a process
    with open_logbook(tmp_path, start_step=start) as book:
      for step in range(start + 5, end + 1, 5):
        clock.now += seconds
        book.log(step, {"loss": 1.0}, data_wait_seconds=0.0)
      with book.paused():
        clock.now += 1_000
    if start == 0:
      with open_logbook(tmp_path, start_step=10) as book:  # lost: its steps come again
        clock.now += 700
        book.log(15, {"loss": 1.0}, data_wait_seconds=0.0)
  assert training_seconds(read_rows(tmp_path / "metrics.jsonl"), 32) == pytest.approx(2 * 3 + 2 * 5 + 4 * 20)
  assert training_seconds([], 32) == 0.0


def test_the_clock_runs_on_after_an_error_in_a_pause(tmp_path, clock):
  with open_logbook(tmp_path) as book:
    with pytest.raises(KeyError), book.paused():
      clock.now += 5
      raise KeyError
    clock.now += 1
    book.log(1, {}, data_wait_seconds=0)
    assert lines(tmp_path)[0]["images_per_second"] == 32


def test_record_joins_the_row_of_its_step(tmp_path, clock):
  with open_logbook(tmp_path) as book:
    book.record(0, {"knn_top1": 0.25})
    for step in (10, 20):
      clock.now += 1
      book.log(step, {"loss": 1.0}, data_wait_seconds=0)
      book.record(step, {"knn_top1": 0.125 + step / 100, "knn_top5": 1})
    book.record(20, {"knn_top1": 0.5})
    assert lines(tmp_path)[-1]["knn_top1"] == 0.5  # nothing is left of the longer row before
    book.record(25, {"knn_top1": 0.75})
    clock.now += 1
    book.log(25, {"loss": 3.0}, data_wait_seconds=0)
    with pytest.raises(ValueError, match="step 24 come after those of step 25"):
      book.record(24, {"knn_top1": 0.5})
    with pytest.raises(ValueError, match="step 25 is logged after step 25"):
      book.log(25, {}, data_wait_seconds=0)
  rows = lines(tmp_path)
  assert [(row["step"], row.get("loss"), row["knn_top1"]) for row in rows] == [
    (0, None, 0.25), (10, 1.0, 0.225), (20, 1.0, 0.5), (25, 3.0, 0.75)]


def test_numbers_that_are_not_finite_become_null(tmp_path, clock):
  with open_logbook(tmp_path) as book:
    book.log(10, {"loss": float("nan"), "a": np.float32("inf"), "b": 1.0}, data_wait_seconds=0)
  row, = lines(tmp_path)
  assert (row["loss"], row["a"], row["b"]) == (None, None, 1.0)
  assert "loss" not in {tag for tag, _, _ in events(tmp_path)[0]}


def test_resume_cuts_what_comes_after_the_checkpoint(tmp_path, clock):
  with open_logbook(tmp_path) as book:
    for step in (10, 20, 30):
      clock.now += 1
      book.log(step, {"loss": step}, data_wait_seconds=0)
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 40, "lo')  # torn by a crash
  assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [10, 20, 30]
  with open_logbook(tmp_path, start_step=20) as book:
    assert [row["loss"] for row in lines(tmp_path)] == [10, 20]
    book.record(20, {"knn_top1": 0.5})  # the evaluation that the crash cut off
    clock.now += 2
    book.log(30, {"loss": 31}, data_wait_seconds=0)
  rows = lines(tmp_path)
  assert [(row["step"], row["loss"], row.get("knn_top1")) for row in rows] == [
    (10, 10, None), (20, 20, 0.5), (30, 31, None)]
  assert rows[2]["images_per_second"] == 160.0  # of the ten steps since the start
  scalars, purges = events(tmp_path)
  assert sorted((step, value) for tag, step, value in scalars if tag == "loss") == [
    (10, 10), (20, 20), (30, 30), (30, 31)]
  # TensorBoard hides earlier events at the purge step and after it: step 20 stays, as in the rows.
  assert sorted(purges) == [1, 21]


def test_only_an_enabled_logbook_writes(tmp_path, clock, capsys):
  stream = Terminal()
  with open_logbook(tmp_path / "run", enabled=False, stream=stream) as book:
    clock.now += 1
    book.log(10, {"loss": 1.0}, data_wait_seconds=0)
    book.record(10, {"knn_top1": 0.5})
    book.say("hello")
    assert "loss 1 at step 10" in book.summary()
  assert not (tmp_path / "run").exists()
  assert stream.getvalue() == ""


def test_without_a_terminal_there_are_plain_lines_now_and_then(tmp_path, clock):
  stream = io.StringIO()
  with open_logbook(tmp_path, stream=stream) as book:
    book.say("found 3 images")
    for step in range(5, 101, 5):
      clock.now += 4
      book.log(step, {"loss": 5 - step / 100}, data_wait_seconds=1)
      if step == 50:
        book.record(step, {"knn_top1": 0.345})
  printed = stream.getvalue()
  assert "\r" not in printed and "\x1b" not in printed
  first, *progress = printed.splitlines()
  assert first == "found 3 images"
  assert [line.split("/")[0] for line in progress] == [
    f"step {step:>3}" for step in (5, 20, 35, 50, 65, 80, 95, 100)]
  rate = "40 images/s  data wait 25%"
  assert progress[1] == f"step  20/100  epoch 2.0/10  loss 4.800  1:04 left  {rate}"
  assert progress[4] == f"step  65/100  epoch 6.5/10  loss 4.350  kNN 34.5%  0:28 left  {rate}"


def screen(printed):
  """What a terminal shows in the end: a carriage return goes to the start of the line and writes over it."""
  shown = []
  for line in printed.split("\n"):
    cells = ""
    for part in line.split("\r"):
      cells = part + cells[len(part):]
    shown.append(cells.rstrip())
  return shown


def test_on_a_terminal_one_line_refreshes_and_messages_stand_above_it(tmp_path, clock):
  stream = Terminal()
  with open_logbook(tmp_path, stream=stream) as book:
    book.say("before")
    for step in (10, 20, 30):
      clock.now += 2
      book.log(step, {"loss": 1.0 if step < 30 else float("nan")}, data_wait_seconds=0)
      book.say(f"checkpoint {step}")
    book.record(30, {"knn_top1": 0.5})
  shown = screen(stream.getvalue())
  assert shown[:4] == ["before", "checkpoint 10", "checkpoint 20", "checkpoint 30"]
  assert shown[4].startswith(" 30% |")
  assert shown[4].endswith(
    "| step  30/100  epoch 3.0/10  loss not finite  kNN 50.0%  0:14 left  160 images/s  data wait 0%")
  assert shown[5:] == [""]


def test_time_left_counts_evaluations_but_not_the_first_interval(tmp_path, clock):
  stream = io.StringIO()
  with open_logbook(tmp_path, stream=stream) as book:
    clock.now += 600  # compilation
    book.log(10, {}, data_wait_seconds=0)
    for step in (20, 30):
      clock.now += 20
      book.log(step, {}, data_wait_seconds=0)
      with book.paused():
        clock.now += 60
    clock.now += 20
    book.log(40, {}, data_wait_seconds=0)
  # 180 s for 30 steps; 60 to go.
  assert "  6:00 left  16 images/s" in stream.getvalue().splitlines()[-1]


def test_summary(tmp_path, clock):
  with open_logbook(tmp_path) as book:
    assert book.summary() == "0 steps in 0:00, now at step 0 (epoch 0)"
    clock.now += 30
    book.log(5, {"loss": 9.0}, data_wait_seconds=0)
    for step, loss, knn in ((10, 4.0, 0.25), (15, 3.0, 0.5), (20, 2.0, 0.375)):
      clock.now += 2
      book.log(step, {"loss": loss}, data_wait_seconds=0.5)
      with book.paused():
        clock.now += 20
        book.record(step, {"knn_top1": knn})
    assert book.summary().splitlines() == [
      "20 steps in 1:36, 1:00 of it in pauses (evaluation, checkpoints), now at step 20 (epoch 2)",
      "loss 2 at step 20, 2.5 in the mean of the last epoch",
      "80 images/s in the mean, 25% of the time waiting for data",
      "kNN 37.5% at step 20, at best 50.0% at step 15"]


def test_long_times_are_shown_with_hours():
  assert [logbook._clock(seconds) for seconds in (0, 59.6, 3599, 3600, 360_000)] == [
    "0:00", "1:00", "59:59", "1:00:00", "100:00:00"]


DAMAGED = b"""{"step": 1, "epoch": 0.5, "loss": 1.5, "knn_top1": null}
{"step": 2, "loss": NaN, "note": "text", "flag": true}
{"step": true, "loss": 0}
{"step": -1}
{"step": 1e3}
{"step": 3, "loss": 1e999, "other": %s}
[%s
\xff\xfe
{"step": 4, "epoch": 2.0, "lo""" % (b"9" * 400, b"[" * 100_000)


def test_rows_are_read_whatever_is_between_them(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(DAMAGED)
  assert list(read_rows(path)) == [{"step": 1, "epoch": 0.5, "loss": 1.5, "knn_top1": None}, {"step": 2, "loss": None},
                                   {"step": 3, "loss": None, "other": None}]
  with Logbook(tmp_path, start_step=3, total_steps=9, steps_per_epoch=2, batch_size=1, stream=io.StringIO()) as book:
    book.log(4, {"loss": 2.0}, data_wait_seconds=0)
    assert book.rows.last("loss") == 2 and book.rows.last("none") is None and book.rows[0]["epoch"] == 0.5
    book.summary()
  plots.save_curves(tmp_path / "curves.png", read_rows(path))
  assert [row["step"] for row in map(json.loads, path.read_bytes().splitlines())] == [1, 2, 3, 4]


def test_a_file_that_is_deleted_meanwhile_is_written_again_with_all_rows(tmp_path):
  with Logbook(tmp_path, start_step=0, total_steps=9, steps_per_epoch=2, batch_size=1, stream=io.StringIO()) as book:
    book.log(1, {"loss": 2.0}, data_wait_seconds=0)
    (tmp_path / "metrics.jsonl").unlink()
    book.log(2, {"loss": 2.0}, data_wait_seconds=0)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_row_takes_little_memory(tmp_path):
  row = json.dumps({"step": 7, "epoch": 0.1, **{f"figure_{i}": i / 7 for i in range(12)}}).encode() + b"\n"
  (tmp_path / "metrics.jsonl").write_bytes(row * 20_000)
  tracemalloc.start()
  found = read_rows(tmp_path / "metrics.jsonl")
  size, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert len(found) == 20_000 and peak < 6e6 and size < 5e6
