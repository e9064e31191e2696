"""Programs for chips that are not there: names, what is missing, and the parts of a report."""

import jax
import pytest

from benchmarks import compile_for
from pirl_jax.errors import UserError
from pirl_jax.runtime import chips


@pytest.mark.parametrize(("name", "said"), [
  ("v4-8", "chip='v4-8' is unknown; choose from v5e, v5p, v6e, h100, h200"), ("v5e-x", "chip='v5e-x' is unknown"),
  ("v5e-3", "there is no such slice; choose from v5e-4, v5e-8"), ("v5p-7", "choose from v5p-8, v5p-16"),
])
def test_a_chip_that_is_not_known(monkeypatch, name, said):
  monkeypatch.setattr(chips, "_is_installed", lambda wheel: True)
  with pytest.raises(UserError, match=said):
    chips.chips_mesh(name)


@pytest.mark.parametrize(("name", "wheels"), [
  ("h100", "pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc"), ("v5e-8", "pip install libtpu ")])
def test_a_compiler_that_is_not_installed(monkeypatch, name, wheels):
  monkeypatch.setattr(chips, "_is_installed", lambda wheel: False)
  with pytest.raises(UserError, match=wheels):
    chips.chips_mesh(name)


@pytest.mark.parametrize(("scope", "part"), [
  ("jit(step)/shard_map/views/vmap()/add", "views"), ("jit(step)/transpose(jvp(network))/conv", "network"),
  ("jit(step)/jvp(loss)/bank/gather", "bank"), ("jit(step)/reviews/add", "other"), ("", "other")])
def test_the_part_of_a_kernel_is_its_innermost_scope(scope, part):
  assert compile_for.part_of(scope) == part


def test_the_report_of_a_program_of_this_cpu():
  compiled = jax.jit(lambda x: jax.named_scope("views")(lambda y: y * 2)(x)).lower(
    jax.ShapeDtypeStruct((1_000,), "float32")).compile()
  found = compile_for.report([compiled], chips.CHIPS["h100"])
  assert found["bytes"] == {"views": 8_000} and found["kernels"] == 1 and found["fits"]
  assert found["milliseconds_by_bytes"] == round(8_000 / 3.35e9, 3) and "cycles" not in found
