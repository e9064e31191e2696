"""Hours of random faults over a small run: PYTHONPATH=. python tests/soak.py --minutes=120

Each session starts the same command, lets random system calls fail at a random moment (faults.py), or kills or signals
the process, and looks how it ends. Sessions follow each other until the run is over. Then all arrays and rows are
compared with those of a run that met no fault, and the next run starts. The figures are printed as JSON.
"""

import argparse
import collections
import json
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
from faults import OPERATIONS, Faults
from launching import Launch, assert_same, launch, over_folder, write_images
from test_faults import ends_clearly, steps_on_disk

from pirl_jax.storage.rows import read_rows

STEPS = 96
ERRNOS = "EIO", "ENOSPC", "EACCES", "ESTALE", "EMFILE", "ENOMEM", "EROFS", "EDQUOT", "ETIMEDOUT", "EINTR", "EAGAIN"
PLACES = "RUN/*", "RUN/checkpoints/*", "RUN/metrics.jsonl", "RUN/*.json", "IMAGES/train/*", "IMAGES/test/*"
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL
SESSION_SECONDS = 300  # a session that takes longer has hung


def draw(rng):
  """Returns (rules, signal or None): what a session meets."""
  kind = rng.choice(["errno", "errno", "errno", "kill", "stall", "short", "clock", "signal"])
  number = None if kind != "signal" else int(rng.choice(SIGNALS))
  rules = []
  for _ in range(0 if kind == "signal" else rng.integers(1, 4)):
    place = str(rng.choice(PLACES))
    operation, fault = str(rng.choice(OPERATIONS)), {"errno": str(rng.choice(ERRNOS))}.get(kind, kind)
    if kind == "clock":
      operation, fault, place = "clock", int(rng.integers(-10**6, 10**6)), "*"
    if kind == "short":
      operation = "write"
    count = 1 if kind == "kill" else int(rng.choice([1, 2, 5, 50, -1]))
    rules.append((operation, fault, place, int(rng.integers(0, 30)), count))
  if kind == "stall":
    number = int(rng.choice(SIGNALS))
  return str(kind), rules, number


def session(command, run, rng, faults):
  """Returns (kind of the fault, how the session ended); raises AssertionError if it broke a promise."""
  kind, rules, number = draw(rng)
  before, reached = steps_on_disk(run), len(read_rows(run / "metrics.jsonl"))
  progress, at_start = int(rng.integers(0, 40)), rng.random() < 0.2
  if at_start:
    faults.begin(*rules)
  started = time.monotonic()
  with Launch(*command, f"--workdir={run}", faults=faults) as running:
    while not running.ended() and len(read_rows(run / "metrics.jsonl")) < reached + progress:
      if time.monotonic() - started > (20 if at_start else SESSION_SECONDS):
        break
      time.sleep(0.02)
    faults.begin(*rules)
    if number is not None:
      running.signal(0, number)
    time.sleep(rng.uniform(0, 6))
    # Images that never come must not keep the process; for its own folder it waits, until the stall is over.
    if kind != "stall" or any("IMAGES" not in place for _, _, place, *_ in rules):
      faults.end()
    while not running.ended() and time.monotonic() - started < SESSION_SECONDS:
      time.sleep(0.05)
    hung = not running.ended()
    if hung:
      running.kill(0)
    (code, output), = running.wait()
  faults.end()
  said = f"{kind} {rules} {number}: exit code {code}\n{output[-3000:]}"
  assert not hung, f"hangs: {said}"
  killed = kind == "kill" or number == signal.SIGKILL
  assert code == -signal.SIGKILL and killed or ends_clearly(code, output), said
  assert not before or max(steps_on_disk(run), default=0) >= max(before), f"a checkpoint is lost: {said}"
  ended = "killed" if code == -signal.SIGKILL else "refused" if code == 2 else "stopped" if number else "went on"
  return kind, ended


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--minutes", type=float, default=120)
  parser.add_argument("--seed", type=int, default=0)
  given = parser.parse_args()
  rng, end = np.random.default_rng(given.seed), time.monotonic() + 60 * given.minutes
  found, broken, runs = collections.Counter(), [], 0
  with tempfile.TemporaryDirectory() as temporary:
    root = Path(temporary)
    write_images(root / "images", train=16, test=4)
    command = (*over_folder(root / "images"), "--config.evaluate.every_epochs=4", "--config.checkpoint.every_steps=7",
               "--config.num_epochs=24", "--config.evaluate.views=0")
    launch(*command, f"--workdir={root / 'expected'}")
    while time.monotonic() < end:
      run = root / f"run{runs}"
      faults = Faults(root / "schedule", RUN=run, IMAGES=root / "images")
      while STEPS not in steps_on_disk(run) and time.monotonic() < end:
        try:
          found[session(command, run, rng, faults)] += 1
        except AssertionError as error:
          broken.append(str(error))
          print(f"BROKEN: {error}", file=sys.stderr, flush=True)
        print(f"{sum(found.values())} sessions, {runs} runs, {len(broken)} broken", file=sys.stderr, flush=True)
      try:
        launch(*command, f"--workdir={run}")
        assert_same(run, root / "expected", STEPS)
        runs += 1
      except Exception:
        broken.append(traceback.format_exc())
        print(f"BROKEN: {broken[-1]}", file=sys.stderr, flush=True)
        break
  kinds = {f"{kind}: {ended}": count for (kind, ended), count in sorted(found.items())}
  print(json.dumps({"minutes": given.minutes, "seed": given.seed, "sessions": sum(found.values()), "runs": runs,
                    "broken": len(broken), **kinds}, indent=1))
  sys.exit(bool(broken))


if __name__ == "__main__":
  main()
