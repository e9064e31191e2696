"""Programs that take turns: each in a process of its own that stays alive, one running at a time."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def serve(run: Callable[[], float]) -> None:
  """Runs steps when asked to: reads how many from stdin, writes their seconds by the wall and of processor time.

  Args:
    run: does a step and returns its loss, when the step has ended.
  """
  run(), run()
  print("ready", flush=True)
  for line in sys.stdin:
    wall, processor, loss = time.perf_counter(), time.process_time(), 0.0
    for _ in range(int(line)):
      loss = run()
    assert abs(loss) < float("inf"), loss
    print(json.dumps([time.perf_counter() - wall, time.process_time() - processor]), flush=True)


def take_turns(commands: Mapping[str, Sequence[str]], *, rounds: int, steps: int) -> dict[str, dict[str, list[float]]]:
  """Returns {program: {"wall", "processor"}}: milliseconds of a step in each block, [rounds].

  Args:
    commands: the command of each program, which is to call `serve`. A program starts when those before it are ready.
    rounds: blocks of each program.
    steps: of a block.

  Raises:
    RuntimeError: a program has ended.
  """
  workers: dict[str, Any] = {}
  try:
    for program, command in commands.items():
      workers[program] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
      while (line := workers[program].stdout.readline()) != "ready\n":
        if not line:
          raise RuntimeError(f"{program} ended before it was ready")
        print(f"{program}: {line}", end="", flush=True)
    found = {program: {"wall": [], "processor": []} for program in workers}
    for _ in range(rounds):
      for program, worker in workers.items():
        worker.stdin.write(f"{steps}\n")
        worker.stdin.flush()
        if not (line := worker.stdout.readline()):
          raise RuntimeError(f"{program} ended")
        for clock, seconds in zip(("wall", "processor"), json.loads(line), strict=True):
          found[program][clock].append(1e3 * seconds / steps)
    return found
  finally:
    for worker in workers.values():
      worker.kill()
      worker.wait()
