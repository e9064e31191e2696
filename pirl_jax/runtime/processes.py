"""The start of several processes, and what they agree on.

The processes are those of JAX's own engine, `jax.distributed`: every one runs the same program, and all of their
devices make one mesh.
"""

import contextlib
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pirl_jax.errors import UserError

START_SECONDS = 300
"""How long the processes wait for one another at the start."""

HEARTBEAT_SECONDS = 60
"""How long a process may be silent before the others take it for lost."""

SHUTDOWN_SECONDS = 30
"""How long a process that has come to its end waits for the others."""


@contextlib.contextmanager
def processes(coordinator: str = "", num_processes: int | None = None, process_id: int | None = None) -> Iterator[None]:
  """Joins the processes of a run, before anything else of JAX is used; a process by itself has nothing to join.

  Without arguments, JAX looks for what has started the program: a TPU pod slice, SLURM's srun, Open MPI's mpirun.
  Inside, process 0 alone prints, and one that fails ends at once, so that the others do not wait for it.

  Args:
    coordinator: HOST:PORT at which process 0 listens; "": to be found.
    num_processes: how many there are; 1: this one alone, wherever it was started.
    process_id: which of them this is, from 0 on.

  Raises:
    UserError: the three do not fit together, or the other processes did not come.
  """
  _join(coordinator, num_processes, process_id)
  if alone():
    yield
    return
  try:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(
        nowhere if jax.process_index() else sys.stdout):
      yield
  except UserError:  # raised in all of them
    raise
  except Exception as error:
    traceback.print_exc()
    print(f"error: process {jax.process_index()} of {jax.process_count()} ends here. {_reason(error)} The same command "
          "in all processes goes on from the newest checkpoint.", file=sys.stderr, flush=True)
    os._exit(1)  # the way out that Python knows waits for the others, which may be gone


def alone() -> bool:
  """Returns whether this process is the only one of the run, without starting the devices to find out."""
  # Asked first: to count processes starts the devices, and a mistake in the config is to be answered before.
  return not jax.distributed.is_initialized() or jax.process_count() == 1


def _reason(error: BaseException) -> str:
  lost = re.search("gloo|NCCL|connect|UNAVAILABLE|ABORTED", str(error), re.IGNORECASE)
  if isinstance(error, jax.errors.JaxRuntimeError) and lost:
    return "It has lost another process, or the connection to it; see what that one has said last."
  return "The others will say that they have lost it."


def _join(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
  if num_processes == 1 and not coordinator:
    return
  if not coordinator and os.environ.get("SLURM_NTASKS") == "1":
    return  # JAX would give it the first of the GPUs alone
  by_hand = coordinator, num_processes, process_id
  if any(by_hand) or process_id == 0:
    if not coordinator or num_processes is None or process_id is None:
      raise UserError("--coordinator=HOST:PORT, --num_processes=N and --process_id=I belong together, the same but for "
                      "the last in every process")
    if not re.fullmatch(r".+:\d+", coordinator):
      raise UserError(f"--coordinator={coordinator} is not HOST:PORT, like 10.0.0.1:1234")
    if not 0 <= process_id < num_processes:
      raise UserError(f"--process_id={process_id} of --num_processes={num_processes}: it is one of 0 to N - 1")
  options = dict(initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                 shutdown_timeout_seconds=SHUTDOWN_SECONDS)
  try:
    if coordinator:
      # Every device that this process sees is its own, whatever SLURM may think of it.
      jax.distributed.initialize(*by_hand, local_device_ids=[], cluster_detection_method="deactivate", **options)
    else:
      with warnings.catch_warnings():  # on a Kubernetes pod without the package for it there is nothing to find
        warnings.simplefilter("ignore")
        jax.distributed.initialize(**options)
  except ValueError as error:
    if "coordinator_address" not in str(error):  # none found: a process by itself
      raise
  except RuntimeError as error:
    reason = " ".join(str(error).split())[:300]
    raise UserError(f"the processes of this run did not find each other ({reason}); "
                    "for a process by itself: --num_processes=1") from error


def check_alike(facts: Mapping[str, Any]) -> None:
  """Compares what must be the same in every process, JSON values; all processes call this together.

  Raises:
    UserError: in every process, with the first difference and who has it.
  """
  everyone = _gather_text(json.dumps(facts, sort_keys=True))
  for process, other in enumerate(map(json.loads, everyone)):
    for name, value in json.loads(everyone[0]).items():
      if other.get(name) != value:
        raise UserError(f"the processes of this run are not alike: {name} is {value!r} in process 0 and "
                        f"{other.get(name)!r} in process {process}; start all with the same command on the same data")


def together(fn: Callable, *args: Any) -> Any:
  """Returns fn(*args), called in every process; all processes call this together.

  Raises:
    UserError: in every process where `fn` raised one in any, so that none waits for one that has given up.
  """
  failure, result = "", None
  try:
    result = fn(*args)
  except UserError as error:
    failure = str(error)
  if failure := first_failure(failure):
    raise UserError(failure)
  return result


def first_failure(failure: str) -> str:
  """Returns what went wrong in the first process in which something did, "" if in none; all call this together.

  Args:
    failure: what went wrong in this one; "": nothing.
  """
  for process, other in enumerate(_gather_text(failure)):
    if other:
      return other if jax.process_count() == 1 else f"in process {process}: {other}"
  return ""


def wait_for_all(what: str) -> None:
  """Returns once all processes have called this; `what` they wait for is named in the error of one that is lost."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def _gather_text(text: str) -> list[str]:
  """Returns the texts of all processes, in their order."""
  if jax.process_count() == 1:
    return [text]
  content = np.frombuffer(text.encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(len(content)))
  padded = np.zeros(max(1, lengths.max()), np.uint8)
  padded[:len(content)] = content
  return [bytes(row[:length]).decode() for row, length in
          zip(multihost_utils.process_allgather(padded), lengths, strict=True)]
