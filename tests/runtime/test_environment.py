import jax
import pytest

from pirl_jax.runtime.environment import numeric_environment


def test_flags_that_change_no_number_are_left_out(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_cpu_enable_fast_math=true "
                                  "--xla_dump_to=programs --xla_allow_excess_precision=false")
  assert numeric_environment()["rounding"]["XLA_FLAGS"] == (
    "--xla_allow_excess_precision=false --xla_cpu_enable_fast_math=true")


@pytest.mark.parametrize("name, value", [
  ("jax_enable_x64", True), ("jax_default_prng_impl", "rbg"), ("jax_threefry_partitionable", False)])
def test_what_draws_other_numbers_is_seen(name, value):
  before = getattr(jax.config, name)
  try:
    jax.config.update(name, value)
    assert numeric_environment()["draws"][name] == value != before
  finally:
    jax.config.update(name, before)
