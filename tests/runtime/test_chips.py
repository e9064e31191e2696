"""Chips that are not there: their names, and what is missing to compile for them."""

import pytest

from pirl_jax.errors import UserError
from pirl_jax.runtime import chips


@pytest.mark.parametrize(("name", "said"), [
  ("v3-8", "chip='v3-8' is unknown; choose from a100, h100, h200, v4, v5e"), ("v5e-x", "chip='v5e-x' is unknown"),
  ("v5e-3", "there is no such slice; choose from v5e-4, v5e-8"), ("v5p-7", "choose from v5p-8, v5p-16"),
])
def test_a_chip_that_is_not_known(monkeypatch, name, said):
  monkeypatch.setattr(chips, "_is_installed", lambda wheel: True)
  with pytest.raises(UserError, match=said):
    chips.chips_mesh(name)


@pytest.mark.parametrize(("name", "wheels"), [
  ("h100", "--target=compilers .jax-cuda13-plugin==0.10.2.*nvidia-cuda-nvcc"), ("a100", "no compiler is known"),
  ("v5e-8", "pip install .*libtpu==0.0.42")])
def test_a_compiler_that_is_not_installed(monkeypatch, name, wheels):
  monkeypatch.setattr(chips, "_is_installed", lambda wheel: False)
  with pytest.raises(UserError, match=wheels):
    chips.chips_mesh(name)


@pytest.mark.parametrize(("name", "count"), [("h100", 1), ("h200-8", 8), ("v5e", 8), ("v5p-16", 8), ("a100-4", 4)])
def test_the_number_of_chips(name, count):
  assert chips.read_name(name) == (chips.CHIPS[name.partition("-")[0]], count)
