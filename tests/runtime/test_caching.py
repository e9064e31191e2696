"""Programs that are compiled once and read at the next start: whatever is in the folder, the results are the same."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from launching import ROOT, TRAINING, Launch, launch, rows

from pirl_jax.runtime import caching

SETTINGS = "jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs"
GIVEN = np.float32(np.random.default_rng(0).normal(size=(16, 16)))


@pytest.fixture(autouse=True)
def start(monkeypatch):
  """Returns start(folder), after which JAX is as at the start of a program that keeps what it compiles there."""
  before = {name: jax.config.values[name] for name in SETTINGS}
  monkeypatch.setattr(caching, "COMPILED_SECONDS", 0.0)
  listens = False

  def stop():
    nonlocal listens
    if listens:
      jax.monitoring.unregister_event_duration_listener(caching._note_compiled)
      jax.monitoring.unregister_event_listener(caching._note_found)
    listens = False
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    caching.compile_report()

  def start(folder, chosen=None):
    nonlocal listens
    stop()
    jax.config.update("jax_compilation_cache_dir", chosen)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0 if chosen else 99.0)
    caching.keep_compiled(folder)
    listens = True

  yield start
  stop()


def result():
  """Returns what a program computes that is compiled anew, or read."""
  return np.asarray(jax.jit(lambda x: jnp.tanh(x @ x.T) + jnp.cos(x))(GIVEN))


def stored(folder):
  return sorted(Path(folder).glob("*-cache"))


def test_the_second_start_reads_what_the_first_has_compiled(start, tmp_path):
  start(str(tmp_path))
  first = result()
  assert caching.compile_report().startswith("compiled 1 programs in ") and len(stored(tmp_path)) == 1
  assert caching.compile_report() == ""  # of what came since
  start(str(tmp_path))
  np.testing.assert_array_equal(result(), first)
  said = caching.compile_report()
  assert said.startswith("compiled 0 programs") and said.endswith(f"; 1 more came from the cache in {tmp_path}")


def cut(content):
  return content[:len(content) // 2]


def empty(content):
  return b""


def flipped(content):
  return content[:len(content) // 2] + bytes([content[len(content) // 2] ^ 4]) + content[len(content) // 2 + 1:]


def other(content):
  return np.random.default_rng(0).bytes(len(content))


@pytest.mark.filterwarnings("ignore:Error reading persistent")
@pytest.mark.parametrize("damage", [cut, empty, flipped, other])
def test_a_damaged_program_is_compiled_again(start, tmp_path, damage):
  start(str(tmp_path))
  expected = result()
  (path,) = stored(tmp_path)
  whole = path.read_bytes()
  path.write_bytes(damage(whole))
  compilation_cache.reset_cache()  # it is damaged after it was looked at
  np.testing.assert_array_equal(result(), expected)
  start(str(tmp_path))
  assert stored(tmp_path) == []
  np.testing.assert_array_equal(result(), expected)
  assert len(path.read_bytes()) > 0.9 * len(whole)
  start(str(tmp_path))
  assert stored(tmp_path) == [path]


def test_what_was_not_used_for_longest_makes_room(start, tmp_path, monkeypatch):
  start(str(tmp_path))
  result()
  (path,) = stored(tmp_path)
  for age in (1, 3, 2):
    older = path.with_name(f"older{age}-cache")
    older.write_bytes(path.read_bytes())
    os.utime(older, (path.stat().st_atime - 1000 * age,) * 2)
  monkeypatch.setattr(caching, "LARGEST_BYTES", 2.5 * path.stat().st_size)
  start(str(tmp_path))
  assert {kept.name for kept in stored(tmp_path)} == {path.name, "older1-cache"}


def test_the_folder_of_the_user(start, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  start(None)
  result()
  assert len(stored(tmp_path / "pirl_jax" / "xla")) == 1


def test_a_folder_that_somebody_has_chosen_stays(start, tmp_path):
  start(str(tmp_path / "flag"), chosen=str(tmp_path / "chosen"))
  assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "chosen")
  assert not (tmp_path / "flag").exists()


def test_none_at_all(start, tmp_path):
  start("", chosen=str(tmp_path))
  result()
  assert list(tmp_path.iterdir()) == [] and caching.compile_report().startswith("compiled 1 programs in ")


def test_without_a_folder_to_write_to_there_is_a_line_and_the_program_goes_on(start, tmp_path, monkeypatch, capsys):
  (tmp_path / "file").touch()
  start(str(tmp_path / "file" / "folder"))
  result()
  monkeypatch.setattr(caching, "_has_checksums", lambda: False)
  start(str(tmp_path / "whole"))
  result()
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 2 and "(Not a directory); choose another --compilation_cache=DIR" in lines[0]
  assert "no checksum" in lines[1] and stored(tmp_path / "whole") == []


@pytest.mark.parametrize("flag, folder", [([], "xdg/pirl_jax/xla"), (["--compilation_cache=flag"], "flag")])
def test_every_job_has_it(tmp_path, flag, folder):
  (tmp_path / "probe.py").write_text(
    "import jax\ndef run(config, workdir):\n  print(jax.config.jax_compilation_cache_dir)\n")
  lines = ["import sys", f"sys.path.insert(0, {str(ROOT)!r})", "from pirl_jax.launching import command, jobs",
           "jobs.JOBS['probe'] = 'probe'", "command.start()"]
  environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
  ended = subprocess.run(
    [sys.executable, "-c", "; ".join(lines), f"--config={ROOT}/configs/pirl.py", "--config.job=probe", *flag],
    cwd=tmp_path, env=environment | {"XDG_CACHE_HOME": str(tmp_path / "xdg")}, text=True, capture_output=True)
  assert ended.stdout.strip() == str(tmp_path / folder), ended.stderr


@pytest.mark.slow
def test_runs_are_the_same_with_and_without_and_two_may_start_at_once(tmp_path, monkeypatch):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  command = *TRAINING, f"--compilation_cache={tmp_path / 'cache'}"
  with (Launch(*command, f"--workdir={tmp_path / 'a'}") as one, Launch(*command, f"--workdir={tmp_path / 'b'}") as two):
    assert [code for started in (one, two) for code, _ in started.wait()] == [0, 0]
  (warm,) = launch(*command, f"--workdir={tmp_path / 'c'}")
  (without,) = launch(*TRAINING, "--compilation_cache=", f"--workdir={tmp_path / 'd'}")
  assert f"more came from the cache in {tmp_path / 'cache'}" in warm and "came from" not in without
  losses = [[row["loss"] for row in rows(tmp_path / name)] for name in "abcd"]
  assert losses[0] == losses[1] == losses[2] == losses[3]
