import os
import subprocess
import sys

import pytest

from pirl_jax.runtime import compiling


@pytest.fixture
def installed(monkeypatch):
  """Returns a function that says which packages and plugins of JAX there are; XLA_FLAGS and JAX_PLATFORMS are unset."""
  def says(*packages, plugins=()):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: name in packages or None)
    monkeypatch.setattr(compiling.metadata, "entry_points", lambda group: plugins)
  for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
    monkeypatch.setenv(name, "")
  says()
  return says


def test_for_a_cpu_alone_the_level_is_1(installed, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=programs")
  assert compiling.compile_for_cpu()
  assert os.environ["XLA_FLAGS"] == "--xla_dump_to=programs --xla_backend_optimization_level=1"


def test_a_users_own_level_stays(installed, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
  assert not compiling.compile_for_cpu()
  assert os.environ["XLA_FLAGS"] == "--xla_backend_optimization_level=3"


@pytest.mark.parametrize("packages, plugins", [(("libtpu",), ()), (("jax_plugins",), ()), ((), ("rocm",))])
def test_beside_another_device_only_if_jax_is_told_to_use_the_cpu(installed, monkeypatch, packages, plugins):
  installed(*packages, plugins=plugins)
  assert not compiling.compile_for_cpu()
  monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
  assert not compiling.compile_for_cpu()
  assert os.environ["XLA_FLAGS"] == ""
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert compiling.compile_for_cpu()


def test_xla_takes_the_flag(tmp_path):
  program = ("from pirl_jax.runtime import compiling; assert compiling.compile_for_cpu(); import jax; "
             "assert jax.jit(lambda x: x + 1)(1.0) == 2")
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_dump_to={tmp_path}"}
  subprocess.run([sys.executable, "-c", program], env=environment, check=True)
  assert any("xla_backend_optimization_level: 1\n" in file.read_text() for file in tmp_path.glob("*debug_options"))
