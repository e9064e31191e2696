"""Nothing that becomes of standard output or standard error ends a program or changes its exit code."""

import io
import os
import subprocess
import sys
import time

import pytest
from launching import ROOT

from pirl_jax.runtime.speaking import Voice

PROGRAM = """
import sys, warnings
from pirl_jax.runtime import speaking
speaking.never_fail()
opened = open(sys.argv[1], "wb")
assert opened.fileno() > 2
for i in range(3000):
  print("line", i, "\\udcff \\u2192")
  print("line", i, file=sys.stderr, flush=True)
warnings.warn("a warning")
sys.stdout.writelines(["a", "b"])
sys.stdout.isatty(), sys.stderr.isatty(), sys.stdout.encoding
opened.write(b"reached")
opened.close()
raise SystemExit(7)
"""


@pytest.mark.parametrize("redirection", [
  "", "> /dev/full 2>&1", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>&1 | true", "2>&1 | head -1"])
def test_a_program_reaches_its_end_whatever_happens_to_what_it_says(tmp_path, redirection):
  command = f'"$0" -c "$1" "$2" {redirection}; exit ${{PIPESTATUS[0]}}'
  ended = subprocess.run(["bash", "-c", command, sys.executable, PROGRAM, tmp_path / "file"], cwd=ROOT, timeout=60,
                         capture_output=True, env=os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C"})
  assert ended.returncode == 7 and (tmp_path / "file").read_bytes() == b"reached", ended.stderr
  if not redirection:
    assert ended.stdout.count(b"\n") == 3000 and ended.stdout.startswith(b"line 0 \\udcff ")


def test_a_reader_that_stalls_does_not_keep_a_program_from_its_end_once_it_is_to_end():
  program = ("from pirl_jax.runtime import speaking; import signal, sys; speaking.never_fail()\n"
             "signal.signal(signal.SIGTERM, lambda *_: speaking.hurry())\n"
             "print('x' * 300_000); sys.exit(5)")
  with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as running:
    time.sleep(2)
    assert running.poll() is None
    running.terminate()
    assert running.wait(30) == 5


def test_a_stream_that_is_no_file_is_used_as_it_is():
  stream = io.StringIO()
  voice = Voice(stream)
  print("a", 1, file=voice, flush=True)
  assert stream.getvalue() == "a 1\n" and not voice.isatty()
  stream.close()
  print("b", file=voice, flush=True)
  assert not voice.isatty()
