"""Files that are there whole or not at all."""

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from launching import ROOT

from pirl_jax.figures.curves import Curve, save_plot
from pirl_jax.storage import files
from pirl_jax.storage.files import locked, read_json, replacing, write_file, write_json


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
  path = tmp_path / "folder" / "name"
  with replacing(path) as file:
    file.write(b"new")
    assert not path.exists()
  assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


def test_a_disk_that_is_full_half_way_leaves_the_old_file_and_no_other(tmp_path):
  path = tmp_path / "name"
  write_file(path, b"old")
  with pytest.raises(OSError, match="No space"), replacing(path) as file:
    file.write(b"half of the ne")
    raise OSError(errno.ENOSPC, "No space left on device")
  assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_program_left_is_deleted_and_what_another_one_is_writing_is_not(tmp_path):
  old, older, young, other = (tmp_path / name for name in (
    ".name.7-ab.unfinished", ".name.unfinished", ".name.8-ab.unfinished", ".names.7-ab.unfinished"))
  for path in (old, older, young, other):
    path.write_bytes(b"a long beginning of something that was never finished")
    if path != young:
      os.utime(path, (0, time.time() - 2 * files.OLD_SECONDS))
  write_file(tmp_path / "name", b"new")
  assert (tmp_path / "name").read_bytes() == b"new"
  assert {path.name for path in tmp_path.iterdir()} == {"name", young.name, other.name}


def test_of_several_writers_of_one_file_the_last_one_wins_and_none_writes_into_that_of_another(tmp_path):
  path = tmp_path / "name"
  with contextlib.ExitStack() as first, replacing(path) as last:
    earlier = first.enter_context(replacing(path))
    earlier.write(b"first")
    last.write(b"la")
    first.close()
    assert path.read_bytes() == b"first"
    last.write(b"st")
  assert path.read_bytes() == b"last" and list(tmp_path.iterdir()) == [path]


def test_a_link_that_waits_under_the_name_of_the_temporary_file_is_not_written_through(tmp_path, monkeypatch):
  monkeypatch.setattr(files.secrets, "token_hex", lambda _: "ab")
  victim = tmp_path / "victim"
  victim.write_bytes(b"precious")
  (tmp_path / f".name.{os.getpid()}-ab.unfinished").symlink_to(victim)
  with pytest.raises(FileExistsError):
    write_file(tmp_path / "name", b"new")
  assert victim.read_bytes() == b"precious"


def test_a_name_of_the_largest_length_can_be_written(tmp_path):
  write_file(tmp_path / ("ä" * 120), b"new")


def test_a_figure_that_cannot_be_drawn_to_its_end_leaves_the_old_one(tmp_path):
  path = tmp_path / "plot.png"
  path.write_bytes(b"old")
  curve = Curve("x", "$y_{$", [1, 2], [1.0, 2.0])  # no formula
  with pytest.raises(ValueError):
    save_plot(path, "title", {"run": curve})
  assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_json_holds_numbers_of_all_types_and_null_for_those_that_are_not_finite(tmp_path):
  path = tmp_path / "x" / "y.json"
  write_json(path, {"a": [np.nan, np.int32(3), (1.5, None)], "b": np.array([1.0, -np.inf])})
  assert json.loads(path.read_text()) == {"a": [None, 3, [1.5, None]], "b": [1.0, None]} == read_json(path)
  assert list(path.parent.iterdir()) == [path]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
  path = tmp_path / "config.json"
  write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe", b"3"])
def test_what_is_no_object_is_read_as_none(tmp_path, content):
  if content is not None:
    (tmp_path / "x.json").write_bytes(content)
  assert read_json(tmp_path / "x.json") is None


def test_a_folder_is_held_by_one_and_let_go_by_one_that_is_killed(tmp_path):
  folder = tmp_path / "new" / "folder"
  holding = ("import sys, time; from pirl_jax.storage.files import locked\n"
             "with locked(sys.argv[1]): print(flush=True), time.sleep(99)")
  with subprocess.Popen([sys.executable, "-c", holding, folder], cwd=ROOT, stdout=subprocess.PIPE) as other:
    other.stdout.readline()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="folder is held by another process"), locked(folder, patience=0.5):
      pass
    assert 0.5 <= time.monotonic() - began < 5
    other.kill()
  with locked(folder, patience=0), pytest.raises(TimeoutError), locked(folder, patience=0):
    pass
  with locked(folder, patience=0):
    pass
  assert not list(folder.iterdir())


def test_an_older_version_that_locks_the_folder_itself_is_kept_out_and_keeps_out(tmp_path):
  handle = os.open(tmp_path, os.O_RDONLY)
  fcntl.flock(handle, fcntl.LOCK_EX)
  with pytest.raises(TimeoutError), locked(tmp_path, patience=0):
    pass
  fcntl.flock(handle, fcntl.LOCK_UN)
  with locked(tmp_path, patience=0), pytest.raises(BlockingIOError):
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  os.close(handle)


@pytest.mark.parametrize("files_too", [False, True])
def test_a_file_system_that_locks_only_files_or_nothing_at_all(tmp_path, monkeypatch, capsys, files_too):
  real = fcntl.flock

  def flock(handle, how):
    """As NFS: only what is open for writing; or as a file system without locks."""
    if files_too or not fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_RDWR:
      raise OSError(errno.ENOLCK if files_too else errno.EBADF, "no locks")
    real(handle, how)

  monkeypatch.setattr(files.fcntl, "flock", flock)
  with locked(tmp_path, patience=0):
    if not files_too:
      with pytest.raises(TimeoutError), locked(tmp_path, patience=0):
        pass
  assert ("WARNING: the file system of" in capsys.readouterr().out) == files_too
