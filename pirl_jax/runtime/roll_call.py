"""Finds out whether processes of a run that were started by hand are all there, each once, before JAX connects them.

JAX itself waits minutes for a process that is missing and then aborts, crashes if the port is in use, and aborts all
processes if two of them have the same number. Here each of these mistakes is one line.
"""

import contextlib
import socket
import time

from pirl_jax.errors import UserError

GREETING = "pirl_jax"
ALL_HERE = "all here"

_PAUSE = 0.2  # seconds between two attempts
_PATIENCE = 5  # seconds for a process that has connected to say its number


def call_roll(coordinator: str, num_processes: int, process_id: int, *, seconds: float) -> None:
  """Returns when all processes of the run have said their numbers; all processes call this.

  Process 0 listens at the coordinator's port and leaves it free again.

  Args:
    coordinator: HOST:PORT of process 0.
    num_processes: number of processes.
    process_id: number of this process, from 0 on.
    seconds: how long the processes wait for each other.

  Raises:
    UserError: the port is in use, the host is unknown, a number was given twice, the processes disagree about how many
      they are, or a process is missing after `seconds`.
  """
  host, _, port = coordinator.rpartition(":")
  end = time.monotonic() + seconds
  if process_id:
    _answer(host.strip("[]"), int(port), f"{GREETING} {process_id} {num_processes}", end)
    return
  try:
    dual = socket.has_dualstack_ipv6()
    server = socket.create_server(("", int(port)), family=socket.AF_INET6 if dual else socket.AF_INET,
                                  dualstack_ipv6=dual)
  except (OSError, OverflowError) as error:
    raise UserError(f"--coordinator={coordinator}: process 0 cannot listen at port {port} "
                    f"({getattr(error, 'strerror', None) or error}); choose another port, the same for all "
                    "processes") from error
  with contextlib.ExitStack() as stack:
    stack.enter_context(server)
    present: dict[int, socket.socket] = {}
    problem = _gather(server, present, num_processes, end, stack)
    for connection in present.values():
      with contextlib.suppress(OSError):
        connection.sendall(f"{problem or ALL_HERE}\n".encode())
  if problem:
    raise UserError(problem)


def _gather(server: socket.socket, present: dict[int, socket.socket], num_processes: int, end: float,
            stack: contextlib.ExitStack) -> str:
  """Fills `present` with the connections of the other processes, by number. Returns what is wrong, or ""."""
  while len(present) < num_processes - 1:
    left = end - time.monotonic()
    if left <= 0:
      missing = ", ".join(str(number) for number in range(1, num_processes) if number not in present)
      return (f"the processes of this run did not find each other: process 0 waited for process {missing} of "
              f"{num_processes}; start every process with the same --coordinator and --num_processes")
    server.settimeout(left)
    with contextlib.suppress(TimeoutError):
      connection = stack.enter_context(server.accept()[0])
      words = _line(connection).split()
      if len(words) != 3 or words[0] != GREETING or not all(word.isdecimal() for word in words[1:]):
        connection.close()  # of another program
        continue
      number, others = int(words[1]), int(words[2])
      if others != num_processes:
        problem = (f"process {number} was started with --num_processes={others}, and process 0 with "
                   f"--num_processes={num_processes}")
      elif number in present and not _has_left(present[number]) or not 0 < number < num_processes:
        problem = f"--process_id={number} was given to two processes; each needs a number of its own"
      else:
        present[number] = connection
        continue
      with contextlib.suppress(OSError):
        connection.sendall(f"{problem}\n".encode())
      return problem
  return ""


def _has_left(connection: socket.socket) -> bool:
  """Returns whether the process at the other end has ended; one that was started again may take its place."""
  try:
    connection.settimeout(0)
    return not connection.recv(1, socket.MSG_PEEK)
  except BlockingIOError:
    return False
  except OSError:
    return True


def _answer(host: str, port: int, greeting: str, end: float) -> None:
  """Says the number of this process to process 0 and waits for its answer."""
  reason = "it does not answer"
  while (left := end - time.monotonic()) > 0:
    try:
      with socket.create_connection((host, port), timeout=left) as connection:
        connection.sendall(f"{greeting}\n".encode())
        said = _line(connection, left)
      if said == ALL_HERE:
        return
      if said:
        raise UserError(said)
      reason = "it has ended"
    except socket.gaierror as error:
      raise UserError(f"--coordinator={host}:{port}: there is no host {host!r} ({error.strerror})") from error
    except OSError as error:
      reason = error.strerror or str(error)
    time.sleep(_PAUSE)
  raise UserError(f"process 0 was not found at {host}:{port} ({reason}); start it with --process_id=0, and every "
                  "process with the same --coordinator; to run a single process: --num_processes=1")


def _line(connection: socket.socket, seconds: float = _PATIENCE) -> str:
  """Returns the first line that comes, without its end; "" if none comes."""
  connection.settimeout(seconds)
  text = b""
  with contextlib.suppress(OSError):
    while not text.endswith(b"\n") and len(text) < 10_000 and (more := connection.recv(1_024)):
      text += more
  return text.decode(errors="replace").removesuffix("\n")
