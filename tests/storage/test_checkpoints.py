import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pirl_jax.errors import UserError
from pirl_jax.method import memory_bank
from pirl_jax.method.optimizer import create_optimizer
from pirl_jax.method.state import Keeps, create_state
from pirl_jax.models.heads import ImageHead, PatchesHead
from pirl_jax.models.network import Network
from pirl_jax.models.resnet import create_resnet
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.storage.checksums import json_checksum
from pirl_jax.storage.files import write_json
from pirl_jax.storage.formats import FORMAT
from pirl_jax.storage.snapshots import Snapshots


def make_state(num_devices, num_images=103):
  layout = memory_bank.create_layout(num_images, num_devices=num_devices, num_negatives=32)
  network = Network(create_resnet("resnet8", stem="3x3s2"), ImageHead(8), PatchesHead(8))
  optimizer = create_optimizer(optax.constant_schedule(0.1), momentum=0.9, weight_decay=0)
  return create_state(0, network, optimizer, layout, mesh=mesh_lib.create_mesh(num_devices),
                      create_bank=partial(memory_bank.create, dim=8),
                      inputs=(jnp.zeros((1, 12, 12, 3)), jnp.zeros((1, 4, 6, 6, 3))),
                      keeps=Keeps(ages=True, momentum_encoder=True))


@pytest.fixture(scope="module")
def state():
  return make_state(4).replace(step=jnp.int32(7), normaliser=jnp.float32(123.5))


def shapes_of(seed):
  """Returns expect(meta), which gives the shapes of a state."""
  return lambda meta: jax.eval_shape(partial(make_state, seed))


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_restores_on_another_number_of_devices(tmp_path, state, num_devices):
  with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
    checkpoints.save(7, state, {"note": "x"}, knn_top1=None)
  mesh = mesh_lib.create_mesh(num_devices)
  with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
    like = jax.eval_shape(partial(make_state, num_devices))
    restored = checkpoints.restore_newest(lambda meta: like, mesh, say=print)
    meta = checkpoints.read_meta(7)
    assert meta["note"] == "x" and meta["format"] == FORMAT and set(meta["checksums"]) == {"model", "train", "bank"}
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


def as_of_format_4(folder, step, knn_top1):
  """The kNN stood in a file of Orbax's own, which no checksum guarded."""
  path = folder / str(step) / "meta" / "metadata"
  meta = json.loads(path.read_text())
  meta.pop("checksum")
  meta.pop("knn_top1")
  meta["format"] = 4
  path.write_text(json.dumps({**meta, "checksum": json_checksum(meta)}))
  write_json(folder / str(step) / "metrics" / "metrics", {"knn_top1": knn_top1})


def test_the_best_is_known_in_all_formats_and_is_not_believed_where_it_was_changed(tmp_path, state):
  with Checkpoints(tmp_path, keep=5) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, state, {}, knn_top1=step / 10)
  as_of_format_4(tmp_path, 1, 0.75)
  path = tmp_path / "3" / "meta" / "metadata"
  path.write_text(path.read_text().replace('"knn_top1": 0.3', '"knn_top1": 0.9'))
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    assert [checkpoints.best_metric(step) for step in (1, 2, 3, 4)] == [0.75, 0.2, None, None]
    assert checkpoints.read_meta(1)["format"] == 4
    checkpoints.save(4, state, {}, knn_top1=0.74)
    checkpoints.save(5, state, {}, knn_top1=None)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    assert checkpoints.steps() == [1, 3, 5]  # what cannot be judged is not removed
    (tmp_path / "1" / "metrics" / "metrics").write_text("")
    assert checkpoints.best_metric(1) is None
    checkpoints.save(6, state, {}, knn_top1=0.1)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    assert checkpoints.steps() == [1, 3, 6]


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
    restored = checkpoints.restore_newest(shapes_of(1), mesh_lib.create_mesh(1),
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
    checkpoints.restore_newest(shapes_of(1), mesh_lib.create_mesh(1), say=print)
  assert sorted(folder.rglob("*")) == before


def test_opening_makes_no_folder(tmp_path):
  with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
    assert checkpoints.steps() == []
  assert not (tmp_path / "checkpoints").exists()


def test_what_a_killed_run_left_goes_with_the_next_save_and_not_before(tmp_path, state):
  folder = tmp_path / "checkpoints"
  with Checkpoints(folder, keep=3) as checkpoints:
    checkpoints.save(1, state, {}, knn_top1=None)
  half = folder / "5.orbax-checkpoint-tmp"  # of another step than the next save
  shutil.copytree(folder / "1", half)
  with Checkpoints(folder, keep=3) as checkpoints:
    assert checkpoints.steps() == [1] and checkpoints.read_meta(1)["format"] == FORMAT
    assert half.is_dir()
    checkpoints.save(2, state, {}, knn_top1=None)
  assert not half.exists() and (folder / "2").is_dir()


@pytest.mark.parametrize("num_devices", [1, 8])
def test_the_model_alone_comes_back_whole_on_every_device(tmp_path, state, num_devices):
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(7, state, {}, knn_top1=None)
  for item in ("train", "bank"):
    shutil.rmtree(tmp_path / "7" / item)
  mesh = mesh_lib.create_mesh(num_devices)
  like = {"params": state.params, "batch_stats": state.batch_stats}
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    restored = checkpoints.restore_model(7, jax.eval_shape(lambda: like), mesh)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(like))
  assert all(x.sharding.is_equivalent_to(mesh_lib.whole(mesh), x.ndim) for x in jax.tree.leaves(restored))


def test_a_missing_a_spare_and_a_misshapen_parameter_are_named(tmp_path, state):
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(7, state, {}, knn_top1=None)
  like = jax.tree.map(lambda x: x, {"params": state.params, "batch_stats": state.batch_stats})
  del like["params"]["trunk"]["bn1"]["scale"]
  like["params"]["trunk"]["gate"] = jnp.zeros(3)
  like["batch_stats"]["trunk"]["bn1"]["mean"] = jnp.zeros(3)
  with Checkpoints(tmp_path, keep=1) as checkpoints, pytest.raises(UserError) as error:
    checkpoints.restore_model(7, like, mesh_lib.create_mesh(1))
  for said in ("params/trunk/gate is missing", "params/trunk/bn1/scale is one too many",
               "batch_stats/trunk/bn1/mean has shape (16,), not (3,)"):
    assert said in str(error.value)


def test_the_bank_comes_back_in_the_order_of_the_images_and_broken_ones_as_zeros(tmp_path, state):
  layout = memory_bank.create_layout(103, num_devices=4, num_negatives=32)
  broken = state.replace(usable=state.usable.at[int(layout.row_of(30))].set(False))
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(7, broken, {}, knn_top1=None)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    bank = checkpoints.restore_bank(7, layout)
    with pytest.raises(UserError, match="rows"):
      checkpoints.restore_bank(7, memory_bank.Layout(200, layout.num_strata))
  assert bank.shape == (103, 8) and not bank[30].any()
  for i in (0, 1, 25, 102):
    np.testing.assert_array_equal(bank[i], state.bank[int(layout.row_of(i))])


def snapshot_tree(mesh, value):
  return {"weights": jax.device_put(np.full(3, value, np.float32), mesh_lib.whole(mesh))}


def test_a_snapshot_comes_back_and_only_the_newest_is_kept(tmp_path):
  mesh = mesh_lib.create_mesh(2)
  with Snapshots(tmp_path / "snapshots") as snapshots:
    assert snapshots.restore(snapshot_tree(mesh, 0), mesh)[0] == 0
    assert not (tmp_path / "snapshots").exists()
    for step in (1, 5):
      snapshots.save(step, snapshot_tree(mesh, step))
  eight = mesh_lib.create_mesh(8)
  with Snapshots(tmp_path / "snapshots") as snapshots:
    step, tree = snapshots.restore(snapshot_tree(eight, 0), eight)
  assert step == 5 and (np.asarray(tree["weights"]) == 5).all()
  assert tree["weights"].sharding.is_equivalent_to(mesh_lib.whole(eight), 1)
  assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["5"]


def test_after_a_damaged_snapshot_the_evaluation_starts_anew_and_can_save(tmp_path, capsys):
  mesh = mesh_lib.create_mesh(1)
  with Snapshots(tmp_path) as snapshots:
    snapshots.save(5, snapshot_tree(mesh, 5))
  for path in tmp_path.rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  with Snapshots(tmp_path) as snapshots:
    step, tree = snapshots.restore(snapshot_tree(mesh, 0), mesh)
    assert step == 0 and (np.asarray(tree["weights"]) == 0).all()
    assert f"snapshot {tmp_path / '5'} cannot be read, deleted: " in capsys.readouterr().out
    snapshots.save(1, snapshot_tree(mesh, 1))
  with Snapshots(tmp_path) as snapshots:
    assert snapshots.restore(snapshot_tree(mesh, 0), mesh)[0] == 1


def test_an_evaluation_goes_on_without_a_snapshot_that_the_disk_did_not_take(tmp_path, capsys):
  mesh = mesh_lib.create_mesh(1)
  folder = tmp_path / "unfinished" / "snapshots"
  folder.parent.write_bytes(b"a file stands in the way of the folder")
  with Snapshots(folder) as snapshots:
    snapshots.save(3, snapshot_tree(mesh, 3))
    assert "WARNING: a snapshot could not be written" in capsys.readouterr().out
    folder.parent.unlink()
    snapshots.save(5, snapshot_tree(mesh, 5))
  with Snapshots(folder) as snapshots:
    assert snapshots.restore(snapshot_tree(mesh, 0), mesh)[0] == 5


def test_a_model_of_another_type_is_compared_as_it_was_saved_and_comes_back_as_asked_for(tmp_path, state):
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(7, state, {}, knn_top1=None)
  like = {"params": state.params, "batch_stats": state.batch_stats}
  other = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), like)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    restored = checkpoints.restore_model(7, other, mesh_lib.create_mesh(1))
  jax.tree.map(lambda x, saved: np.testing.assert_array_equal(x, saved.astype(jnp.bfloat16)), restored, like)
