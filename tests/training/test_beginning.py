"""A run that ever had a checkpoint is never begun anew, whatever of it is lost."""

import contextlib
import json
import os
import shutil

import pytest

from pirl_jax.errors import UserError
from pirl_jax.training.beginning import check_new, note_saved, saved_step


def write_rows(workdir, last, every=1):
  lines = [json.dumps({"step": step, "epoch": step / 100}) for step in range(every, last + 1, every)]
  (workdir / "metrics.jsonl").write_text("\n".join(lines))


def a_checkpoint(folder, files=("meta/metadata", "_CHECKPOINT_METADATA")):
  for name in files:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"{}")


def finished(workdir, noted=True):
  """As README's first run leaves it, but for its checkpoints; an older version notes nothing."""
  write_rows(workdir, 800, 50)
  a_checkpoint(workdir / "checkpoints" / "800")
  if noted:
    note_saved(workdir, 800)


LOSSES = {
  "deleted": lambda folder: shutil.rmtree(folder),
  "emptied": lambda folder: shutil.rmtree(folder / "800"),
  "renamed steps": lambda folder: (folder / "800").rename(folder / "800.bak"),
  "moved down": lambda folder: ((folder / "old").mkdir(), (folder / "800").rename(folder / "old" / "800")),
  "set aside": lambda folder: (folder / "800").rename(folder / "unreadable-800"),
  "renamed": lambda folder: folder.rename(folder.with_name("checkpoints-old")),
  "a link to nothing": lambda folder: (shutil.rmtree(folder), folder.symlink_to("/no/such/disk")),
  "a file": lambda folder: (shutil.rmtree(folder), folder.write_bytes(b""))}


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_checkpoints_that_are_lost_are_missed(tmp_path, loss, noted):
  finished(tmp_path, noted)
  LOSSES[loss](tmp_path / "checkpoints")
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(UserError, match="bring the checkpoints back, or choose another --workdir, or move "):
    check_new(tmp_path, every_steps=500, total_steps=800)
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["curves.png", "results/verdict.json", "export/model.safetensors", "trained.json",
                                  "report.html", "saved.json", "metrics.jsonl"])
def test_a_single_trace_is_enough(tmp_path, name):
  finished(tmp_path)
  for path in ("curves.png", "results/verdict.json", "export/model.safetensors", "trained.json", "report.html"):
    a_checkpoint(tmp_path, [path])
  for path in tmp_path.iterdir():
    if path.name != name.partition("/")[0]:
      path.unlink() if path.is_file() else shutil.rmtree(path)
  with pytest.raises(UserError, match=name.partition("/")[0]):
    check_new(tmp_path, every_steps=500, total_steps=800)


@pytest.mark.parametrize("last, noted, lost", [
  (500, True, False),  # the first checkpoint was being written
  (1000, True, False), (1001, True, True),  # the second one
  (499, False, False), (500, False, True)])
def test_rows_alone_show_a_checkpoint_from_that_step_on(tmp_path, last, noted, lost):
  write_rows(tmp_path, last)
  if noted:
    note_saved(tmp_path, None)
  with pytest.raises(UserError, match=f"metrics.jsonl reaches step {last}") if lost else contextlib.nullcontext():
    check_new(tmp_path, every_steps=500, total_steps=800_000)


def test_what_was_killed_in_its_first_save_begins_anew(tmp_path):
  """All that is written before that, and an evaluation that was going on."""
  write_rows(tmp_path, 500)
  note_saved(tmp_path, None)
  for name in ("config.json", "parameters.txt", "views.png", "chosen.json", "pictures.txt.gz", "broken_images.json",
               "results/unfinished/5/snapshot", "events.out.tfevents.1",
               "checkpoints/500.orbax-checkpoint-tmp/meta/metadata", "checkpoints/.DS_Store",
               "checkpoints/notes/a.txt"):
    a_checkpoint(tmp_path, [name])
  check_new(tmp_path, every_steps=500, total_steps=800)


@pytest.mark.parametrize("content, step", [(b'{"step": 7}', 7), (b'{"step": null}', None), (b'{"step": "x"}', None),
                                           (b"", None), (b"[" * 100_000, None)])
def test_the_note_is_read_whatever_has_become_of_it(tmp_path, content, step):
  (tmp_path / "saved.json").write_bytes(content)
  assert saved_step(tmp_path) == step


def test_a_note_that_the_disk_does_not_take_is_no_error(tmp_path):
  (tmp_path / "file").write_bytes(b"")
  note_saved(tmp_path / "file", 7)


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
  def failing(*_):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(os, "scandir", failing)
  write_rows(tmp_path, 10)
  (tmp_path / "metrics.jsonl").unlink()
  (tmp_path / "metrics.jsonl").mkdir()
  with pytest.raises(UserError, match=f"{tmp_path}.* cannot be read"):
    check_new(tmp_path, every_steps=500, total_steps=800)
