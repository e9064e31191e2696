import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pirl_jax import memory_bank
from pirl_jax import mesh as mesh_lib
from pirl_jax.checkpoints import Checkpoints
from pirl_jax.errors import UserError
from pirl_jax.models.heads import ImageHead, PatchesHead
from pirl_jax.models.network import Network
from pirl_jax.models.resnet import create_resnet
from pirl_jax.optimizer import create_optimizer
from pirl_jax.state import create_state


def make_state(num_devices, num_images=103):
  layout = memory_bank.create_layout(num_images, num_devices=num_devices, num_negatives=32)
  network = Network(create_resnet("resnet8", stem="3x3s2"), ImageHead(8), PatchesHead(8))
  optimizer = create_optimizer(optax.constant_schedule(0.1), momentum=0.9, weight_decay=0)
  return create_state(0, network, optimizer, layout, mesh=mesh_lib.create_mesh(num_devices), dim=8,
                      bank_dtype=jnp.float32, image_shape=(12, 12, 3), pretext_shape=(4, 6, 6, 3))


@pytest.fixture(scope="module")
def state():
  return make_state(4).replace(step=jnp.int32(7), normaliser=jnp.float32(123.5))


def nothing(_):
  pass


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_restores_on_another_number_of_devices(tmp_path, state, num_devices):
  with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
    checkpoints.save(7, state, {"note": "x"}, knn_top1=None)
  mesh = mesh_lib.create_mesh(num_devices)
  with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
    like = jax.eval_shape(partial(make_state, num_devices))
    restored = checkpoints.restore_newest(nothing, like, mesh, say=print)
    assert checkpoints.read_meta(7) == {"note": "x", "format": 1}
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
  assert restored.bank.sharding.is_equivalent_to(mesh_lib.split(mesh), 2)
  assert restored.bank.addressable_shards[0].data.shape[0] == state.bank.shape[0] // num_devices
  assert (tmp_path / "checkpoints" / "7" / "model").is_dir()


def test_keeps_the_last_ones_and_the_best_also_after_a_restart(tmp_path, state):
  folder = tmp_path / "checkpoints"
  for knn_by_step in ({1: 0.3, 2: 0.9, 3: None}, {4: 0.5, 5: None, 6: 0.6}):
    with Checkpoints(folder, keep=2) as checkpoints:
      for step, knn_top1 in knn_by_step.items():
        checkpoints.save(step, state, {}, knn_top1=knn_top1)
  with Checkpoints(folder, keep=2) as checkpoints:
    assert checkpoints.steps() == [2, 5, 6]


@pytest.mark.parametrize("damage", ["emptied", "item", "truncated"])
def test_falls_back_to_the_newest_whole_one_and_can_save_again(tmp_path, state, damage):
  folder = tmp_path / "checkpoints"
  with Checkpoints(folder, keep=3) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state.replace(step=jnp.int32(step)), {}, knn_top1=None)
  if damage == "emptied":
    shutil.rmtree(folder / "2")
    (folder / "2").mkdir()
  elif damage == "item":
    shutil.rmtree(folder / "2" / "bank")
  else:
    for path in (folder / "2" / "bank").rglob("*"):
      if path.is_file() and path.stat().st_size > 500:
        path.write_bytes(path.read_bytes()[:100])
  said = []
  with Checkpoints(folder, keep=3) as checkpoints:
    restored = checkpoints.restore_newest(nothing, jax.eval_shape(partial(make_state, 1)), mesh_lib.create_mesh(1),
                                          say=said.append)
    assert restored.step == 1
    assert len(said) == 1 and "unreadable-2" in said[0]
    assert (folder / "unreadable-2").is_dir()
    checkpoints.save(2, state, {}, knn_top1=None)
  with Checkpoints(folder, keep=3) as checkpoints:
    assert checkpoints.steps() == [1, 2]


def test_says_so_when_none_can_be_read_and_leaves_them(tmp_path, state):
  folder = tmp_path / "checkpoints"
  with Checkpoints(folder, keep=3) as checkpoints:
    checkpoints.save(1, state, {}, knn_top1=None)
  shutil.rmtree(folder / "1" / "model")
  before = sorted(folder.rglob("*"))
  with Checkpoints(folder, keep=3) as checkpoints, pytest.raises(UserError, match="none of the checkpoints"):
    checkpoints.restore_newest(nothing, jax.eval_shape(partial(make_state, 1)), mesh_lib.create_mesh(1), say=print)
  assert sorted(folder.rglob("*")) == before


def test_opening_makes_no_folder(tmp_path):
  with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
    assert checkpoints.steps() == []
  assert not (tmp_path / "checkpoints").exists()


def test_what_a_killed_run_left_goes_with_the_next_save_and_not_before(tmp_path, state):
  folder = tmp_path / "checkpoints"
  with Checkpoints(folder, keep=3) as checkpoints:
    checkpoints.save(1, state, {}, knn_top1=None)
  half = folder / "2.orbax-checkpoint-tmp"
  shutil.copytree(folder / "1", half)
  with Checkpoints(folder, keep=3) as checkpoints:
    assert checkpoints.steps() == [1] and checkpoints.read_meta(1)["format"] == 1
    assert half.is_dir()
    checkpoints.save(2, state, {}, knn_top1=None)
  assert not half.exists() and (folder / "2").is_dir()
