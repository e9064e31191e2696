"""The command that compiles a run's programs for a chip that is not there."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("flags", "said"), [
  (["--config=pirl:imagenet", "--chip=a100"], "error: chip=a100: to compile for it: no compiler is known for a100"),
  (["--config=pirl:imagenet", "--part=everything"], "step|views|cut|pool|loss|evaluate")])
def test_bad_input_is_answered_in_one_line(flags, said):
  ended = subprocess.run([sys.executable, "-m", "benchmarks.compile_for", *flags], capture_output=True, text=True)
  assert ended.returncode == 2 and said in ended.stderr and ended.stderr.count("\n") == 1 and not ended.stdout
