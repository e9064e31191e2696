"""Processes started by hand find each other, or each of them is told what is wrong."""

import socket
import threading
import time

import pytest

from pirl_jax.errors import UserError
from pirl_jax.runtime.roll_call import call_roll


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def call(processes, port, *, seconds=20, pause=0.1):
  """Returns what each of (process_id, num_processes) was told, "" if all is well; they start one after the other."""
  said = [None] * len(processes)

  def run(place, process_id, num_processes):
    try:
      call_roll(f"localhost:{port}", num_processes, process_id, seconds=seconds)
      said[place] = ""
    except UserError as error:
      said[place] = str(error)

  threads = [threading.Thread(target=run, args=(place, *process)) for place, process in enumerate(processes)]
  for thread in threads:
    thread.start()
    time.sleep(pause)
  for thread in threads:
    thread.join()
  return said


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_processes_find_each_other_and_leave_the_port_free(order):
  port = free_port()
  for _ in range(2):  # at once again, as for a restart
    assert call([(number, 4) for number in order], port) == [""] * 4


@pytest.mark.parametrize("processes, said", [
  ([(0, 3), (1, 3), (1, 3)], "--process_id=1 was given to two processes"),
  ([(0, 2), (1, 3)], "--num_processes=3, and process 0 with --num_processes=2"),
  ([(0, 3), (3, 4)], "--num_processes=4")])
def test_all_are_told_what_is_wrong(processes, said):
  assert all(said in found for found in call(processes, free_port()))


def test_two_processes_with_the_number_0():
  port = free_port()
  first, second = call([(0, 2), (0, 2)], port, seconds=2)
  assert f"cannot listen at port {port}" in second and "Address already in use" in second
  assert "waited for process 1 of 2" in first


def test_missing_processes_are_named():
  assert "process 0 waited for process 2, 3 of 4" in call([(0, 4), (1, 4)], free_port(), seconds=2)[0]
  found, = call([(1, 2)], port := free_port(), seconds=1)
  assert f"process 0 was not found at localhost:{port} (Connection refused)" in found
  with pytest.raises(UserError, match="there is no host 'no.such.host.invalid'"):
    call_roll("no.such.host.invalid:1234", 2, 1, seconds=5)


def test_a_port_that_another_program_uses():
  with socket.create_server(("", 0)) as server, pytest.raises(UserError, match="choose another port"):
    call_roll(f"localhost:{server.getsockname()[1]}", 2, 0, seconds=5)


def test_another_program_and_a_process_that_was_started_again_do_no_harm():
  port, told = free_port(), []
  root = threading.Thread(target=lambda: told.append(call_roll(f"localhost:{port}", 3, 0, seconds=20)))
  root.start()
  time.sleep(0.2)
  with socket.create_connection(("localhost", port)) as other:
    other.sendall(b"GET / HTTP/1.1\r\n\r\n")
  with socket.create_connection(("localhost", port)) as killed:
    killed.sendall(b"pirl_jax 1 3\n")
    time.sleep(0.2)
  assert call([(1, 3), (2, 3)], port) == ["", ""]
  root.join()
  assert told == [None]
