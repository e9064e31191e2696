"""Starts the processes of a run and lets them exchange results and errors.

The processes are those of `jax.distributed`: every process runs the same program, and the devices of all processes form
one mesh.
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

from pirl_jax.errors import Unreadable, UserError
from pirl_jax.runtime.roll_call import call_roll

START_SECONDS = 300
"""How long the processes wait for each other at the start."""

HEARTBEAT_SECONDS = 60
"""If a process is silent for this time, the others treat it as lost."""

SHUTDOWN_SECONDS = 30
"""How long a process that has finished waits for the others."""


@contextlib.contextmanager
def processes(coordinator: str = "", num_processes: int | None = None, process_id: int | None = None) -> Iterator[None]:
  """A context in which the processes of a run are connected; enter it before anything else of JAX is used.

  Without arguments JAX detects how the program was started: on a TPU pod slice, by SLURM's srun or by Open MPI's
  mpirun. If none of these is found, the process runs alone. Within the context only process 0 prints. A process that
  fails ends at once, so that the others do not wait for it.

  Args:
    coordinator: HOST:PORT at which process 0 listens; "" lets JAX find it.
    num_processes: number of processes; 1 means that this process runs alone, however it was started.
    process_id: number of this process, from 0 on.

  Raises:
    UserError: the three arguments do not fit together, or the other processes did not connect in time.
  """
  _join(coordinator, num_processes, process_id)
  if alone():
    yield
    return
  try:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(
        nowhere if jax.process_index() else sys.stdout):
      yield
  except Unreadable as error:  # the others wait for this process
    print(f"error: process {jax.process_index()} of {jax.process_count()} ends here: {error}", file=sys.stderr,
          flush=True)
    os._exit(2)
  except UserError:  # raised in all processes
    raise
  except Exception as error:
    traceback.print_exc()
    print(f"error: process {jax.process_index()} of {jax.process_count()} ends here. {_reason(error)} The same command "
          "in all processes resumes from the newest checkpoint.", file=sys.stderr, flush=True)
    os._exit(1)  # a normal exit would wait for the other processes, which may be gone


def alone() -> bool:
  """Returns whether this process is the only one of the run; a process that runs alone does not start the devices."""
  # `is_initialized` comes first: `process_count` starts the devices, and errors in the config must be reported before.
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
    return  # JAX would use only the first of the GPUs
  by_hand = coordinator, num_processes, process_id
  if any(by_hand) or process_id == 0:
    if not coordinator or num_processes is None or process_id is None:
      raise UserError("--coordinator=HOST:PORT, --num_processes=N and --process_id=I belong together: give all three "
                      "to every process; only --process_id differs")
    if not re.fullmatch(r".+:\d+", coordinator) or not 0 < int(coordinator.rpartition(":")[2]) < 65_536:
      raise UserError(f"--coordinator={coordinator} is not HOST:PORT, like 10.0.0.1:1234")
    if not 0 <= process_id < num_processes:
      raise UserError(f"--process_id={process_id} of --num_processes={num_processes}: it is one of 0 to N - 1")
  options = dict(initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                 shutdown_timeout_seconds=SHUTDOWN_SECONDS)
  try:
    if coordinator:
      assert num_processes is not None and process_id is not None
      call_roll(coordinator, num_processes, process_id, seconds=START_SECONDS)
      # The process uses every device that it sees, whatever SLURM's variables say.
      jax.distributed.initialize(*by_hand, local_device_ids=[], cluster_detection_method="deactivate", **options)
    else:
      with warnings.catch_warnings():  # JAX warns on a Kubernetes pod if the package kubernetes is missing
        warnings.simplefilter("ignore")
        jax.distributed.initialize(**options)
  except ValueError as error:
    if "coordinator_address" not in str(error):  # if JAX has found no coordinator, the process runs alone
      raise
  except RuntimeError as error:
    reason = " ".join(str(error).split())[:300]
    raise UserError(f"the processes of this run did not find each other ({reason}); "
                    "to run a single process: --num_processes=1") from error


def check_alike(facts: Mapping[str, Any]) -> None:
  """Checks that `facts`, JSON values by name, are the same in every process; all processes call this together.

  Raises:
    UserError: in every process, if a fact differs; the message names the first difference and its process.
  """
  everyone = _gather_text(json.dumps(facts, sort_keys=True))
  for process, other in enumerate(map(json.loads, everyone)):
    for name, value in json.loads(everyone[0]).items():
      if other.get(name) != value:
        raise UserError(f"the processes of this run are not alike: {name} is {value!r} in process 0 and "
                        f"{other.get(name)!r} in process {process}; start all with the same command on the same data")


def together(fn: Callable, *args: Any) -> Any:
  """Returns fn(*args), which is called in every process; all processes call this together.

  Raises:
    UserError: in every process, if `fn` raised one in any process; so no process waits for one that has failed.
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
  """Returns the failure of the first process that has one, or "" if none has; all processes call this together.

  Args:
    failure: what went wrong in this process, or "".
  """
  for process, other in enumerate(_gather_text(failure)):
    if other:
      return other if jax.process_count() == 1 else f"in process {process}: {other}"
  return ""


def wait_for_all(what: str) -> None:
  """Returns when all processes have called this; if a process is lost, the error message names `what`."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def _gather_text(text: str) -> list[str]:
  """Returns the texts of all processes, in the order of the processes."""
  if jax.process_count() == 1:
    return [text]
  content = np.frombuffer(text.encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(len(content)))
  padded = np.zeros(max(1, lengths.max()), np.uint8)
  padded[:len(content)] = content
  return [bytes(row[:length]).decode() for row, length in
          zip(multihost_utils.process_allgather(padded), lengths, strict=True)]
