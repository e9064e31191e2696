"""Checkpoints whose files were damaged: found out, set aside, and the newest whole one taken in their place."""

import contextlib
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoints import make_state, shapes_of

from pirl_jax.errors import UserError
from pirl_jax.method import memory_bank
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.storage.checksums import json_checksum
from pirl_jax.storage.snapshots import Snapshots

KINDS = ("deleted", "emptied", "cut", "flipped", "overwritten")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Returns a folder with the checkpoints of steps 1 and 2, and their states."""
  folder = tmp_path_factory.mktemp("saved") / "checkpoints"
  states = {}
  with Checkpoints(folder, keep=3) as checkpoints:
    for step in (1, 2):
      state = make_state(4).replace(step=jnp.int32(step), normaliser=jnp.float32(step / 7))
      states[step] = jax.device_get(state)
      checkpoints.save(step, state, {"step": step}, knn_top1=step / 10)
  return folder, states


def damage(path, kind, rng):
  content = bytearray(path.read_bytes())
  if kind == "deleted":
    path.unlink()
    return
  if kind == "emptied":
    content = b""
  elif kind == "cut":
    content = content[:rng.integers(len(content))]
  elif kind == "flipped":
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
  else:
    start = rng.integers(len(content))
    content[start:start + 60] = rng.bytes(len(content[start:start + 60]))
  path.write_bytes(content)


def files(folder):
  return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def restore(folder):
  """Returns the state that a run would go on with, and what it says."""
  said = []
  with Checkpoints(folder, keep=3) as checkpoints:
    state = checkpoints.restore_newest(shapes_of(2), mesh_lib.create_mesh(2),
                                       say=said.append)
  return jax.device_get(state), said


def check_one(tmp_path, saved, damaged, kind, rng):
  """Returns whether the damage was of any consequence, after checking that what is restored is what was saved."""
  folder, states = saved
  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  for file in damaged:
    damage(copy / "2" / file, kind, rng)
  with Checkpoints(copy, keep=3) as checkpoints:
    reason = checkpoints.check(2, mesh_lib.create_mesh(2))
  state, said = restore(copy)
  found = int(state.step)
  jax.tree.map(np.testing.assert_array_equal, state, states[found])
  assert (found == 1) == (copy / "unreadable-2").is_dir() == bool(said)
  assert bool(reason) or found == 2, said  # what is set aside, the list of checkpoints has called damaged
  with Checkpoints(copy, keep=3) as checkpoints:
    checkpoints.save(3 if found == 2 else 2, make_state(2), {"step": 3}, knn_top1=None)
  shutil.rmtree(copy)
  return found == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_to_any_file_passes(tmp_path, saved, kind, seed):
  rng = np.random.default_rng(seed)
  found = [check_one(tmp_path, saved, [file], kind, rng) for file in files(saved[0] / "2")]
  print(f"{kind}: {len(found)} files, {sum(found)} of any use to Orbax, all of these found")
  assert sum(found) >= 3


@pytest.mark.parametrize("item, kind", [("bank", "flipped"), ("train", "deleted"), ("model", "cut")])
def test_damage_to_the_data_is_found(tmp_path, saved, item, kind):
  """All files of the item that may hold arrays: which of them Orbax has no more use for differs from save to save."""
  data = [file for file in files(saved[0] / "2") if file.parts[0] == item and file.parent.name == "d"]
  assert check_one(tmp_path, saved, data, kind, np.random.default_rng(0))


def with_another_checksum(folder, step, item):
  """The arrays of an item are no longer those of the checksums; Orbax finds no fault with any file."""
  path = folder / str(step) / "meta" / "metadata"
  meta = json.loads(path.read_text())
  meta.pop("checksum")
  name = sorted(meta["checksums"][item])[0]
  meta["checksums"][item][name] = "0" * 16
  path.write_text(json.dumps({**meta, "checksum": json_checksum(meta)}))
  return f"not as it was saved: {item}/{name}"


@pytest.mark.parametrize("item", ["model", "train", "bank"])
def test_every_way_to_read_arrays_compares_their_checksums(tmp_path, saved, item):
  folder, states = saved
  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  said_of_it = with_another_checksum(copy, 2, item)
  mesh = mesh_lib.create_mesh(2)
  like = {"params": states[2].params, "batch_stats": states[2].batch_stats}
  layout = memory_bank.create_layout(103, num_devices=4, num_negatives=32)
  with Checkpoints(copy, keep=3) as checkpoints:
    assert checkpoints.check(1, mesh) == "" and checkpoints.check(2, mesh) == said_of_it
    for read, own in ((lambda: checkpoints.restore_model(2, like, mesh), "model"),
                      (lambda: checkpoints.restore_bank(2, layout), "bank")):
      with pytest.raises(UserError, match=re.escape(said_of_it)) if own == item else contextlib.nullcontext():
        read()
  state, said = restore(copy)
  assert state.step == 1 and len(said) == 1 and said_of_it in said[0]


def test_a_flipped_bit_of_the_meta_is_found(tmp_path, saved):
  rng = np.random.default_rng(1)
  for _ in range(5):
    assert check_one(tmp_path, saved, ["meta/metadata"], "flipped", rng)


def test_a_snapshot_with_other_values_is_not_taken(tmp_path):
  mesh = mesh_lib.create_mesh(1)
  tree = {"weights": jax.device_put(np.arange(4_000, dtype=np.float32), mesh_lib.whole(mesh))}
  with Snapshots(tmp_path) as snapshots:
    snapshots.save(5, tree)
  largest = max(tmp_path.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
  damage(largest, "overwritten", np.random.default_rng(0))
  with Snapshots(tmp_path) as snapshots:
    assert snapshots.restore(tree, mesh)[0] == 0
