"""What is read off the text of compiled programs, against programs whose work is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pirl_jax.planning.program import Program, collectives, nbytes, peculiarities, sent_bytes

TEXT = """HloModule jit_step, is_scheduled=true

%fused_rows (param_0: f32[1000,8], param_1: s32[4,1]) -> f32[4,8] {
  %param_0 = f32[1000,8]{1,0} parameter(0)
  %param_1 = s32[4,1]{1,0} parameter(1)
  ROOT %gather.1 = f32[4,8]{1,0} gather(%param_0, %param_1), offset_dims={1}, metadata={op_name="jit(step)/bank/gather"}
}

%fused_update (param_0.1: f32[1000,8], param_1.1: f32[1,8], param_2: s32[]) -> f32[1000,8] {
  %param_0.1 = f32[1000,8]{1,0} parameter(0)
  %param_1.1 = f32[1,8]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %dus = f32[1000,8]{1,0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2, %zero)
}

%body (state: (s32[], f32[1000,8], /*index=2*/f32[1,8])) -> (s32[], f32[1000,8], f32[1,8]) {
  %state = (s32[], f32[1000,8]{1,0}, f32[1,8]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %bank = f32[1000,8]{1,0} get-tuple-element(%state), index=1
  %row = f32[1,8]{1,0} get-tuple-element(%state), index=2
  %moved = f32[1000,8]{1,0} fusion(%bank, %row, %count), calls=%fused_update, backend_config={"estimated_cycles":"70"}
  ROOT %next = (s32[], f32[1000,8]{1,0}, f32[1,8]{1,0}) tuple(%count, %moved, %row)
}

%condition (state.1: (s32[], f32[1000,8], f32[1,8])) -> pred[] {
  %state.1 = (s32[], f32[1000,8]{1,0}, f32[1,8]{1,0}) parameter(0)
  %count.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(12)
  ROOT %less = pred[] compare(%count.1, %limit), direction=LT
}

ENTRY %main (bank.1: f32[1000,8], rows: s32[4,1], row.1: f32[1,8]) -> f32[4,8] {
  %bank.1 = f32[1000,8]{1,0} parameter(0)
  %rows = s32[4,1]{1,0} parameter(1)
  %row.1 = f32[1,8]{1,0:T(8,128)S(1)} parameter(2)
  %start = s32[] constant(0)
  %first = (s32[], f32[1000,8]{1,0}, f32[1,8]{1,0}) tuple(%start, %bank.1, %row.1)
  %loop = (s32[], f32[1000,8]{1,0}, f32[1,8]{1,0}) while(%first), condition=%condition, body=%body
  %last = f32[1000,8]{1,0} get-tuple-element(%loop), index=1
  %sum = (f32[4,8]{1,0}, f32[4,8]{1,0}) all-reduce-start(%rows), replica_groups={}
  ROOT %found = f32[4,8]{1,0} fusion(%last, %rows), kind=kLoop, calls=%fused_rows
}
"""


def test_a_program_of_loops_and_fusions():
  program = Program(TEXT)
  work = {kernel.name: (times, program.traffic(kernel, computation), kernel.cycles)
          for kernel, computation, times in program.kernels()}
  assert work["moved"] == (12, 36 + 32, 70)  # of the bank one row is written; what is read is the row and its place
  assert work["found"] == (1, 128 + 16 + 128, 0)  # four rows, their numbers, the result: not the bank
  assert set(work) == {"moved", "less", "found", "sum"} and work["less"][0] == 12
  scopes = {kernel.name: program.scope(kernel) for kernel, _, _ in program.kernels()}
  assert scopes["found"] == "jit(step)/bank/gather" and scopes["moved"] == ""


@pytest.mark.parametrize(("text", "size", "off_chip"), [
  ("f32[8,128]{1,0}", 4096, 4096), ("pred[]", 1, 1), ("(bf16[3]{0:T(8)S(1)}, u8[2,2])", 10, 4), ("token[]", 0, 0)])
def test_bytes_of_a_type(text, size, off_chip):
  assert nbytes(text) == size and nbytes(text, without="S(1)") == off_chip


def test_a_loop_of_this_cpu():
  def run(x):
    return jax.lax.scan(lambda total, row: (jnp.sin(total + row), None), jnp.zeros(1_000), x)[0]

  program = Program(jax.jit(run).lower(np.zeros((7, 1_000), np.float32)).compile().as_text())
  times = [times for kernel, _, times in program.kernels() if program.traffic(kernel, {}) >= 4_000]
  assert 7 in times and max(times) == 7


def test_what_devices_send():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  summed = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()))
  text = summed.lower(jax.ShapeDtypeStruct((8, 100), jnp.float32)).compile().as_text()
  assert sent_bytes(text) == {"all-reduce": 400} and collectives(Program(text))[1] == {"all-reduce": 1}


ODD = """ENTRY %main (x: bf16[4,8,8,3], kernel: f32[3,3,3,5]) -> f32[4,8,8,5] {
  %x = bf16[4,8,8,3]{3,2,1,0} parameter(0)
  %kernel = f32[3,3,3,5]{3,2,1,0} parameter(1)
  %wide = f32[4,8,8,3]{3,2,1,0} convert(%x)
  %narrow = bf16[3,3,3,5]{3,2,1,0} convert(%kernel)
  %in_float32 = f32[4,8,8,5]{3,2,1,0} convolution(%wide, %kernel), dim_labels=b01f_01io->b01f
  %in_bfloat16 = bf16[4,8,8,5]{3,2,1,0} convolution(%x, %narrow), dim_labels=b01f_01io->b01f
  %product = f32[4,5]{1,0} convolution(%wide, %kernel), dim_labels=bf_io->bf
  %cudnn = (bf16[4,8,8,5]{3,2,1,0}, u8[0]{0}) custom-call(%x, %narrow), custom_call_target="__cudnn$convForward"
  %pooled = f32[4,8,8,5]{3,2,1,0} select-and-scatter(%in_float32, %wide, %kernel), select=%ge, scatter=%add
  %out = token[] outfeed(%pooled, %x)
  ROOT %branch = f32[4,8,8,5]{3,2,1,0} conditional(%x, %wide, %pooled), branch_computations={%main, %main}
}
"""


def test_peculiarities():
  assert peculiarities(Program(ODD)) == {
    "convolutions": 3, "float32_convolutions": 1, "scatters": 1, "conditionals": 1, "host_transfers": 1}
