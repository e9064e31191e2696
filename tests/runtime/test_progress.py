import io

import pytest

from pirl_jax.runtime import progress
from pirl_jax.runtime.progress import Progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(progress, "perf_counter", lambda: now[0])
  return now


def test_plain_lines_now_and_then_and_one_at_the_end(clock):
  out = io.StringIO()
  with Progress("reading", 2_000, stream=out) as line:
    for _ in range(20):
      clock[0] += 1
      line.update(100, note="loss 1")
  assert out.getvalue().splitlines() == [
    "reading: 1,000 of 2,000 images  10 s  100 a second  loss 1",
    "reading: 2,000 of 2,000 images  20 s  100 a second  loss 1"]


def test_nothing_is_said_of_an_end_that_was_none(clock):
  out = io.StringIO()
  with pytest.raises(RuntimeError), Progress("reading", 10, unit="fits", stream=out) as line:
    line.update(5)
    raise RuntimeError
  assert out.getvalue() == ""


def test_a_terminal_gets_one_line_that_refreshes():
  out = Terminal()
  with Progress("reading", 10, stream=out) as line:
    line.update(10, note="loss 1")
  assert "\r" in out.getvalue() and "10/10" in out.getvalue() and "reading" in out.getvalue()
