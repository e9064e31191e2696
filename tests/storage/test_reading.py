"""What cannot be read now is tried again and never condemned; what was read and is wrong is, after a second attempt."""

import errno
import json
import os
import shutil

import jax.numpy as jnp
import pytest
from test_checkpoints import make_state, shapes_of

from pirl_jax.errors import UserError
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage import reading
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.storage.checksums import json_checksum
from pirl_jax.storage.reading import may_pass, try_reading


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
  monkeypatch.setattr(reading, "PAUSES", (0.01, 0.01))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("saved") / "checkpoints"
  with Checkpoints(folder, keep=3) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, make_state(1).replace(step=jnp.int32(step)), {}, knn_top1=None)
  return folder


def listing(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def restore(folder):
  said = []
  with Checkpoints(folder, keep=3) as checkpoints:
    return checkpoints.restore_newest(shapes_of(1), mesh_lib.create_mesh(1), say=said.append), said


def of_tensorstore(code):
  return ValueError(f"INTERNAL: Error reading local file \"x\" [os_error_code='{code}' tensorstore_spec='...']")


TRANSIENT = [OSError(code, os.strerror(code)) for code in (
  errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.ENOMEM, errno.EACCES,
  errno.EPERM, errno.ENOTCONN, errno.EHOSTDOWN, errno.EREMOTEIO)] + [MemoryError(), of_tensorstore(errno.EIO)]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_an_error_that_says_nothing_about_the_content_may_pass_also_behind_another_one(error):
  assert may_pass(error)
  try:
    try:
      raise error
    except Exception as first:
      raise KeyError("no such array") from first
  except KeyError as outer:
    assert may_pass(outer)


@pytest.mark.parametrize("error", [
  FileNotFoundError(errno.ENOENT, "x"), IsADirectoryError(errno.EISDIR, "x"), ValueError("OUT_OF_RANGE"),
  of_tensorstore(errno.ENOENT)], ids=repr)
def test_a_missing_file_and_wrong_content_do_not_pass(error):
  assert not may_pass(error)


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize("method", ["restore", "_read_meta"])
@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), of_tensorstore(errno.EIO)], ids=repr)
def test_a_read_that_fails_for_a_while_costs_nothing(saved, monkeypatch, error, method, failures):
  real, calls, before = getattr(Checkpoints, method), [], listing(saved)

  def failing(*args):
    calls.append(args)
    if len(calls) <= failures:
      raise error
    return real(*args)

  monkeypatch.setattr(Checkpoints, method, failing)
  state, said = restore(saved)
  assert state.step == 2 and len(said) == failures and "checkpoint 2 cannot be read at the moment" in said[0]
  assert listing(saved) == before


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), OSError(errno.EACCES, "No permission")])
def test_a_read_that_fails_for_good_ends_the_run_by_name_and_moves_nothing(saved, monkeypatch, error):
  def failing(*_):
    raise error

  before = listing(saved)
  monkeypatch.setattr(Checkpoints, "restore", failing)
  with pytest.raises(UserError, match=f"checkpoint 2 cannot be read .*{error.strerror}.*nothing has been changed"):
    restore(saved)
  assert listing(saved) == before


def test_an_error_that_a_library_has_hidden_is_found(tmp_path, monkeypatch):
  """As a folder for which `os.path.exists` says no, because of its permissions."""
  (tmp_path / "file").write_bytes(b"x")

  def read():
    raise ValueError("there is no such array")

  assert try_reading("it", read, folder=tmp_path) == (None, "there is no such array")

  def opened(*_):
    raise OSError(errno.ESTALE, "Stale file handle")

  monkeypatch.setattr(reading, "open", opened, raising=False)
  with pytest.raises(UserError, match="Stale file handle"):
    try_reading("it", read, folder=tmp_path, say=lambda _: None)


def test_content_that_is_wrong_once_is_read_again(tmp_path):
  found = iter([ValueError("a bit has flipped on the way"), None])

  def read():
    if error := next(found):
      raise error
    return "content"

  assert try_reading("it", read, folder=tmp_path) == ("content", "")


def resealed(folder, step, change):
  """Changes the meta of a checkpoint and gives it the checksum of the changed one."""
  path = folder / str(step) / "meta" / "metadata"
  meta = json.loads(path.read_text())
  meta.pop("checksum")
  change(meta)
  path.write_text(json.dumps({**meta, "checksum": json_checksum(meta)}))


@pytest.mark.parametrize("change", [
  lambda meta: meta.update(checksums={}), lambda meta: meta["checksums"].pop("bank"),
  lambda meta: meta.pop("checksums"),
  lambda meta: meta.update(format="5"), lambda meta: meta.update(format=True), lambda meta: meta.pop("format"),
  lambda meta: meta.update(format=0), lambda meta: meta.update(step=None), lambda meta: meta.update(step=100),
  lambda meta: meta.update(config={})])
def test_a_meta_that_is_not_one_of_this_step_condemns_its_checkpoint(saved, tmp_path, change):
  folder = tmp_path / "checkpoints"
  shutil.copytree(saved, folder)
  resealed(folder, 2, change)
  with Checkpoints(folder, keep=3) as checkpoints:
    assert checkpoints.check(2, mesh_lib.create_mesh(1)) and not checkpoints.check(1, mesh_lib.create_mesh(1))
  state, said = restore(folder)
  assert state.step == 1 and len(said) == 1 and (folder / "unreadable-2").is_dir()


def test_a_checkpoint_copied_to_another_step_is_set_aside_and_what_is_saved_later_is_saved(saved, tmp_path):
  folder = tmp_path / "checkpoints"
  shutil.copytree(saved, folder)
  shutil.copytree(folder / "1", folder / "100")
  state, said = restore(folder)
  assert state.step == 2 and "the folder holds a checkpoint of step 1" in said[0]
  assert (folder / "unreadable-100").is_dir()
  with Checkpoints(folder, keep=2) as checkpoints:
    for step in (3, 200, 201, 202):  # while the run goes on
      shutil.copytree(folder / "1", folder / str(step))
    checkpoints.save(3, state, {}, knn_top1=None, surely=True, say=said.append)
    assert not checkpoints.check(3, mesh_lib.create_mesh(1)) and checkpoints.steps() == [2, 3, 200, 201, 202]
  assert (folder / "unreadable-3").is_dir() and "checkpoint 3 is not of this run" in said[-1]
