"""The line that names the devices, the warning of an unused card, and running out of memory."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pirl_jax.errors import UserError
from pirl_jax.runtime import devices, memory, out_of_memory


def test_a_line_names_the_devices(monkeypatch):
  monkeypatch.setattr(devices, "unused_card", lambda: "")
  assert [line.split(" (")[0] for line in devices.lines()] == ["devices: 8 x CPU"]


def test_a_container_has_the_memory_that_it_may_use(tmp_path, monkeypatch):
  whole = memory.host_bytes()
  for text, expected in (("max\n", whole), (f"{whole * 8}\n", whole), ("123456789\n", 123456789)):
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "memory.max", tmp_path / "none"))
    assert memory.host_bytes() == expected


@pytest.mark.parametrize("trace, plugin, words", [
  ("GPU_TRACES", None, ["NVIDIA GPU", 'pip install -U "jax[cuda13]"']),
  ("GPU_TRACES", "jax_cuda13_plugin", ["NVIDIA GPU", "no driver that fits"]),
  ("TPU_TRACES", None, ["TPU", 'pip install -U "jax[tpu]"']),
  ("TPU_TRACES", "libtpu", ["TPU", "another program"])])
def test_a_card_that_is_there_and_not_used_is_told(trace, plugin, words, tmp_path, monkeypatch):
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  monkeypatch.setattr(devices.shutil, "which", lambda name: None)
  monkeypatch.setattr(devices, "GPU_TRACES", (tmp_path / "none",))
  monkeypatch.setattr(devices, "TPU_TRACES", (tmp_path / "none",))
  monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: name if name == plugin else None)
  assert devices.unused_card() == ""
  monkeypatch.setattr(devices, trace, (tmp_path,))
  assert all(word in devices.unused_card() for word in ["WARNING", *words])
  assert [*devices.lines()][1] == devices.unused_card()
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert devices.unused_card() == ""


@pytest.mark.parametrize("fail", [
  lambda: jnp.zeros((2**45,)).block_until_ready(), lambda: np.zeros((2**58,)),
  lambda: (_ for _ in ()).throw(OSError(errno.ENOMEM, "Cannot allocate memory")),
  lambda: (_ for _ in ()).throw(MemoryError())])
def test_running_out_of_memory_is_one_line_with_the_way_out(fail):
  with pytest.raises(UserError, match=r"out of memory on the host.*; take less") as caught, out_of_memory.told(
      lambda: "take less"):
    fail()
  assert "\n" not in str(caught.value)


def test_on_a_device_it_is_the_device(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 62.51GiB.")
  with pytest.raises(UserError, match=r"out of memory on the device \(asked for 62.51GiB\)"), out_of_memory.told(str):
    raise error


def test_other_errors_stay_as_they_are():
  disk = OSError(errno.ENOSPC, "No space left on device")
  for error in (ValueError("RESOURCE_EXHAUSTED: no space left"), disk, KeyError("memory"), UserError("as it is")):
    with pytest.raises(type(error)) as caught, out_of_memory.told(lambda: "take less"):
      raise error
    assert caught.value is error
