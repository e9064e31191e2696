"""Files of weights are read without PyTorch, and nothing in them runs."""

import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_files import WRITERS, Raw, planted, write_zip

from pirl_jax.errors import UserError
from pirl_jax.weights.containers import leaves_of, read_tree

TREE = {"state_dict": {"a.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "b": np.array(7, np.int64),
                       "turned": np.arange(6, dtype=np.float16).reshape(2, 3).T}, "epoch": 3, "arch": "resnet"}


@pytest.mark.parametrize("container", WRITERS)
def test_both_containers_are_read(container, tmp_path):
  WRITERS[container](tmp_path / "x.pth", TREE)
  tree = read_tree(tmp_path / "x.pth")
  assert tree["epoch"] == 3 and tree["arch"] == "resnet"
  found = dict(leaves_of(tree))
  assert found.keys() == {f"state_dict.{name}" for name in TREE["state_dict"]}
  for name, value in TREE["state_dict"].items():
    array = found[f"state_dict.{name}"]
    assert array.shape == value.shape and array.read().dtype == value.dtype
    np.testing.assert_array_equal(array.read(), value)


def test_safetensors_are_read(tmp_path):
  arrays = {"a": np.ones((2, 3), np.float32), "b.c": np.zeros((), np.int64)}
  save_file(arrays, tmp_path / "x.safetensors")
  found = dict(leaves_of(read_tree(tmp_path / "x.safetensors")))
  assert {name: array.shape for name, array in found.items()} == {"a": (2, 3), "b.c": ()}
  np.testing.assert_array_equal(found["a"].read(), arrays["a"])


@pytest.mark.parametrize("container", WRITERS)
def test_a_planted_call_does_not_run(container, tmp_path):
  trace = tmp_path / "trace"
  WRITERS[container](tmp_path / "x.pth", {"a": np.ones(2, np.float32), "call": planted(trace)})
  exec(compile(f"open({str(trace)!r}, 'w').close()", "", "exec"))  # what was planted does create the file
  trace.unlink()
  tree = read_tree(tmp_path / "x.pth")
  assert not trace.exists()
  assert tree["call"] is None
  np.testing.assert_array_equal(tree["a"].read(), 1)


def test_the_planted_call_runs_in_an_ordinary_unpickler(tmp_path):
  pickle.loads(b"\x80\x02" + planted(tmp_path / "trace").opcodes + b".")
  assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("opcodes", [
  b"cos\nsystem\n(X\x04\x00\x00\x00truetR", b"cbuiltins\ngetattr\n(cos\nsystem\nX\x01\x00\x00\x00atR",
  b"cnumpy\nndarray\n)\x81}X\x01\x00\x00\x00aK\x01sb",
  b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00)))tR"])
def test_nothing_that_a_pickle_names_is_called(opcodes, tmp_path, monkeypatch):
  monkeypatch.setattr("os.system", lambda *_: pytest.fail("called"))
  write_zip(tmp_path / "x.pth", {"a": np.ones(2, np.float32), "call": Raw(opcodes)})
  try:
    tree = read_tree(tmp_path / "x.pth")
  except UserError as error:
    assert "cannot be read" in str(error)
  else:
    assert tree["call"] is None


def test_detectron2_pickles_are_refused(tmp_path):
  path = tmp_path / "x.pkl"
  path.write_bytes(pickle.dumps({"model": {"stem.conv1.weight": np.ones(3)}, "__author__": "x"}, protocol=2))
  with pytest.raises(UserError, match="a pickle, and not one of PyTorch.*safetensors"):
    read_tree(path)


@pytest.mark.parametrize("container", WRITERS)
def test_a_file_that_was_cut_short_is_refused(container, tmp_path):
  path = tmp_path / "x.pth"
  WRITERS[container](path, TREE)
  content = path.read_bytes()
  for length in (len(content) - 5, len(content) // 2, 12):
    path.write_bytes(content[:length])
    with pytest.raises(UserError, match=r"x\.pth"):
      for _, array in leaves_of(read_tree(path)):
        array.read()


def test_what_is_no_file_of_weights_is_refused(tmp_path):
  write_zip(tmp_path / "squeezed.pth", TREE, zipfile.ZIP_DEFLATED)
  with pytest.raises(UserError, match="compressed"):
    read_tree(tmp_path / "squeezed.pth")
  (tmp_path / "text.pth").write_text("<html>404</html>")
  with pytest.raises(UserError, match="neither safetensors nor a file of PyTorch"):
    read_tree(tmp_path / "text.pth")
  with pytest.raises(UserError, match="cannot be read"):
    read_tree(tmp_path / "nothing.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_what_pytorch_itself_writes_is_read(legacy, tmp_path):
  torch = pytest.importorskip("torch")
  base = torch.arange(40, dtype=torch.float32)
  tensors = {"whole": base.reshape(8, 5), "view": base[7:31].reshape(4, 6).T, "half": base.half(),
             "brain": base.bfloat16(), "parameter": torch.nn.Parameter(base[:3]), "scalar": torch.tensor(3)}
  torch.save({"model": tensors, "other": np.float64(2), "array": np.ones(3)}, tmp_path / "x.pth",
             _use_new_zipfile_serialization=not legacy)
  found = dict(leaves_of(read_tree(tmp_path / "x.pth")))
  assert found.keys() == {f"model.{name}" for name in tensors}
  for name, tensor in tensors.items():
    array = found[f"model.{name}"].read()
    assert array.dtype == (ml_dtypes.bfloat16 if name == "brain" else tensor.detach().numpy().dtype)
    np.testing.assert_array_equal(array.astype(np.float64), tensor.detach().double().numpy())


@pytest.mark.parametrize("container", WRITERS)
def test_pytorch_reads_the_files_of_these_tests(container, tmp_path):
  torch = pytest.importorskip("torch")
  WRITERS[container](tmp_path / "x.pth", TREE)
  found = torch.load(tmp_path / "x.pth", weights_only=True)
  for name, value in TREE["state_dict"].items():
    np.testing.assert_array_equal(found["state_dict"][name].numpy(), value)
