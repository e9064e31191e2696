"""Counts the bytes that a compiled program sends between devices, from the text of the program."""

import math
import re
from collections import Counter

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


def sent_bytes(text: str) -> Counter:
  """Returns {collective: bytes of what comes out of all of that kind on one device}, of the text of a compiled program.

  A collective inside of a loop is counted once.
  """
  found = Counter()
  for line in text.splitlines():
    # %NAME = f32[64,128]{1,0} all-gather(...), or a tuple of shapes; what follows "(" is what goes in.
    result = re.match(rf"\s*(?:ROOT )?\S+ = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
    if result:
      for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result[1]):
        found[result[2]] += BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size)
  return found
