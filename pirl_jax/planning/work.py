"""What the compiled programs of one call do on a device: kernels, bytes by part, memory, and what they send."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

from pirl_jax.planning.program import Program, collectives, peculiarities
from pirl_jax.runtime.chips import Chip

SCOPES = ("views", "network", "loss", "bank", "optimizer")
"""Named by the step, see `method/`; the innermost of them that a kernel stands in is its part."""


def part_of(scope: str) -> str:
  """Returns which of `SCOPES` a kernel belongs to, "other" if to none.

  Args:
    scope: `jit(step)/views/vmap()/add`, say.
  """
  return next((name for name in reversed(re.split("[/()]", scope)) if name in SCOPES), "other")


def work_of(compiled: Sequence[jax.stages.Compiled], chip: Chip) -> dict[str, Any]:
  """Returns what programs do that are called one after the other, on one device.

  `bytes` are those through the chip's memory, by part, and `milliseconds_by_bytes` is their time at the maker's rate;
  `memory` is that of the program that needs most; `cycles` and `milliseconds_by_cycles` are there if the chip's
  compiler estimates cycles; the rest are numbers of kernels and see `program.peculiarities`, `program.collectives`.
  """
  traffic, cycles, counts, sent = Counter(), Counter(), Counter(), {}
  memory = {"arguments and results": 0, "temporary": 0}
  for each in compiled:
    text, stats = each.as_text(), each.memory_analysis()
    assert text is not None and stats is not None  # every backend that is known here gives both
    program = Program(text)
    for kernel, computation, times in program.kernels():
      part = part_of(program.scope(kernel))
      counts["kernels"] += times
      traffic[part] += times * program.traffic(kernel, computation)
      cycles[part] += times * kernel.cycles
    counts.update(peculiarities(program))
    size, number = collectives(program)
    for name in size:
      before = sent.get(name, {"number": 0, "bytes": 0})
      sent[name] = {"number": before["number"] + number[name], "bytes": before["bytes"] + size[name]}
    needed = {"arguments and results":
              stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes,
              "temporary": stats.temp_size_in_bytes}
    memory = max(memory, needed, key=lambda sizes: sum(sizes.values()))
  total = sum(memory.values())
  found = {**counts, "bytes": dict(traffic), "bytes_total": traffic.total(),
           "milliseconds_by_bytes": round(1e3 * traffic.total() / chip.memory_rate, 3), "memory": memory,
           "fits": total <= chip.default_pool, "collectives": sent}
  if chip.clock_rate:
    found |= {"cycles": dict(cycles), "milliseconds_by_cycles": round(1e3 * cycles.total() / chip.clock_rate, 3)}
  return found
