"""What compiled programs do on a device, by part."""

import jax
import pytest

from pirl_jax.planning.work import part_of, work_of
from pirl_jax.runtime import chips


@pytest.mark.parametrize(("scope", "part"), [
  ("jit(step)/shard_map/views/vmap()/add", "views"), ("jit(step)/transpose(jvp(network))/conv", "network"),
  ("jit(step)/jvp(loss)/bank/gather", "bank"), ("jit(step)/reviews/add", "other"), ("", "other")])
def test_the_part_of_a_kernel_is_its_innermost_scope(scope, part):
  assert part_of(scope) == part


def test_a_program_of_this_cpu():
  compiled = jax.jit(lambda x: jax.named_scope("views")(lambda y: y * 2)(x)).lower(
    jax.ShapeDtypeStruct((1_000,), "float32")).compile()
  found = work_of([compiled], chips.CHIPS["h100"])
  assert found["bytes"] == {"views": 8_000} and found["kernels"] == 1 and found["fits"]
  assert found["milliseconds_by_bytes"] == round(8_000 / 3.35e9, 3) and "cycles" not in found


def test_the_memory_is_that_of_the_program_that_needs_most():
  many, most = (jax.jit(run).lower(jax.ShapeDtypeStruct(shape, "float32")).compile() for run, shape in (
    (lambda x: x @ x.T @ x, (500, 10)), (lambda x: x * 2, (200_000,))))
  assert work_of([many], chips.CHIPS["h100"])["memory"]["temporary"] >= 1_000_000  # the product in between
  found = work_of([many, most], chips.CHIPS["h100"])["memory"]
  assert found == {"arguments and results": 1_600_000, "temporary": 0}
