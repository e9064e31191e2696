"""Files that are there whole or not at all."""

import errno
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from launching import ROOT

from pirl_jax.figures.curves import Curve, save_plot
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


def test_what_a_killed_program_left_is_written_over(tmp_path):
  (tmp_path / ".name.unfinished").write_bytes(b"a long beginning of something that was never finished")
  write_file(tmp_path / "name", b"new")
  assert (tmp_path / "name").read_bytes() == b"new" and [path.name for path in tmp_path.iterdir()] == ["name"]


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
