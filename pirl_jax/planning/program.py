"""What a compiled program does, read from its text: kernels, bytes, cycles, and what travels between devices.

XLA's text of an optimised program is the same for CPU, GPU and TPU: computations of instructions
`%NAME = TYPE OPCODE(OPERANDS), ATTRIBUTES`. The instructions of the entry computation, and of the loops and branches
that it enters, are kernels; those inside of a fusion are not.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
         "u64": 8, "f64": 8}

NO_KERNELS = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
              "replica-id", "opt-barrier", "while", "conditional", "call"}
"""Instructions that cost nothing by themselves; the last three enter other computations."""

ON_CHIP = "S(1)"
"""In a layout: the array lies in the chip's own fast memory (VMEM of a TPU), and its bytes pass no memory bus."""

HOST = "S(5)"
"""In a layout: the array lies in the host's memory."""


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a program's text.

  Attributes:
    name: without the percent sign.
    type: of the result, `f32[8,128]{1,0}` or a tuple of such.
    opcode: `fusion`, say.
    operands: names of the instructions that it reads.
    attributes: the rest of the line.
  """

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str

  def called(self, attribute: str) -> str:
    """Returns the name of the computation that an attribute (`body`, `calls`) names, "" without the attribute."""
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
    return found[1] if found else ""

  @property
  def scope(self) -> str:
    """Returns the path of named scopes and functions that traced it, "" if it is not known."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""

  @property
  def cycles(self) -> int:
    """Returns the compiler's estimate of its cycles, 0 where the compiler gives none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
    return int(found[1]) if found else 0


def nbytes(type_text: str, *, without: str = "") -> int:
  """Returns the bytes of a type, of all arrays of a tuple.

  Args:
    type_text: `(f32[8,128]{1,0:T(8,128)S(1)}, u8[3])`, say.
    without: arrays with this in their layout do not count.
  """
  total = 0
  for dtype, shape, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", type_text):
    if dtype in BYTES and not (without and without in layout):
      total += BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size)
  return total


class Program:
  """A compiled program, from its text (`compiled.as_text()`)."""

  def __init__(self, text: str) -> None:
    """Reads the text."""
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry = ""
    current = None
    for line in text.splitlines():
      if opened := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line):
        current = self.computations.setdefault(opened[2], {})
        if opened[1]:
          self.entry = opened[2]
      elif line.startswith("}"):
        current = None
      elif current is not None and (found := _instruction(line)):
        current[found.name] = found

  def kernels(self) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
    """Yields every kernel, the computation in which it stands, and how often it runs in one call of the program."""
    yield from self._kernels(self.entry, 1)

  def _kernels(self, name: str, times: int) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
    computation = self.computations[name]
    for found in computation.values():
      if found.opcode == "while":
        trips = self.trips(found)
        for inner in ("condition", "body"):
          yield from self._kernels(found.called(inner), times * trips)
      elif found.opcode == "conditional":
        for branch in self.branches(found):
          yield from self._kernels(branch, times)
      elif found.opcode == "call":
        yield from self._kernels(found.called("to_apply"), times)
      elif found.opcode not in NO_KERNELS and not found.opcode.endswith(("-done", "-update")):
        yield found, computation, times

  def trips(self, loop: Instruction) -> int:
    """Returns how often a `while` runs its body: as the compiler says, or as its condition compares; 1 if unknown."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
      return int(known[1])
    condition = self.computations[loop.called("condition")].values()
    limits = [int(found[1]) for line in condition if line.opcode == "constant"
              if (found := re.match(r"(\d+)\)?", line.operands[0] if line.operands else ""))]
    return max(limits, default=1)

  def branches(self, conditional: Instruction) -> list[str]:
    """Returns the computations of which a `conditional` runs one."""
    if found := re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes):
      return [name.strip().lstrip("%") for name in found[1].split(",")]
    return [conditional.called(f"{side}_computation") for side in ("true", "false")]

  def instructions(self) -> Iterator[tuple[Instruction, dict[str, Instruction]]]:
    """Yields every instruction of every computation, those inside of fusions included, with its computation."""
    for computation in self.computations.values():
      for found in computation.values():
        yield found, computation

  def scope(self, kernel: Instruction) -> str:
    """Returns the scope of a kernel; of a fusion without one, that of the most of what is in it."""
    inner = self.computations.get(kernel.called("calls"))
    if kernel.scope or not inner:
      return kernel.scope
    scopes = Counter(found.scope for found in inner.values() if found.scope)
    return scopes.most_common(1)[0][0] if scopes else ""

  def traffic(self, kernel: Instruction, computation: dict[str, Instruction]) -> int:
    """Returns the bytes that a kernel reads from the chip's memory and writes to it.

    Of an array from which slices or rows are taken the slices count, and of one that is updated in place the updates.
    """
    operands = [computation[name] for name in kernel.operands if name in computation]
    sizes = [nbytes(operand.type, without=ON_CHIP) for operand in operands]
    written = nbytes(kernel.type, without=ON_CHIP)
    inner = self.computations.get(kernel.called("calls"))
    if inner is None:
      inner = {**{name: dataclasses.replace(computation[name], opcode="parameter", operands=(str(i),))
                  for i, name in enumerate(kernel.operands) if name in computation}, kernel.name: kernel}
    for parameter in (found for found in inner.values() if found.opcode == "parameter"):
      users = [found for found in inner.values() if parameter.name in found.operands]
      number = int(parameter.operands[0])
      if number >= len(sizes) or not users or not sizes[number]:
        continue
      if all(user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == parameter.name
             for user in users):
        sizes[number] = min(sizes[number], sum(nbytes(user.type) for user in users))
      elif all(user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == parameter.name
               for user in users):
        updates = sum(nbytes(inner[user.operands[1 if user.opcode == "dynamic-update-slice" else 2]].type)
                      for user in users)
        written = max(0, written - sizes[number]) + updates
        sizes[number] = updates if any(user.opcode == "scatter" for user in users) else 0
    return sum(sizes) + written


def _instruction(line: str) -> Instruction | None:
  """Returns the instruction of a line, None if the line holds none."""
  found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
  if not found:
    return None
  rest = line[found.end():]
  end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
  opcode = re.match(r" ?([\w\-]+)\(", rest[end:])
  if not opcode:
    return None
  start = end + opcode.end() - 1
  stop = start + _closing(rest[start:])
  inside = re.sub(r"/\*.*?\*/", "", rest[start + 1:stop])
  named = opcode[1] not in ("constant", "parameter")
  operands = tuple(re.findall(r"%([\w.\-]+)", inside)) if named else (inside,)
  return Instruction(found[1], rest[:end], opcode[1], operands, rest[stop + 1:])


def _closing(text: str) -> int:
  """Returns the place of the parenthesis that closes the one at the beginning of the text."""
  depth = 0
  for place, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return place
  return len(text)


def sent_bytes(text: str) -> Counter:
  """Returns {collective: bytes of what comes out of all of that kind on one device} in one call of the program.

  Args:
    text: of a compiled program.
  """
  sent, _ = collectives(Program(text))
  return sent


def collectives(program: Program) -> tuple[Counter, Counter]:
  """Returns ({collective: bytes}, {collective: how many}) on one device in one call of the program."""
  sent, number = Counter(), Counter()
  for kernel, _, times in program.kernels():
    kind = kernel.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
      # The result of an asynchronous one holds its operand, too.
      holds_operand = kernel.opcode.endswith("-start") and kernel.type.startswith("((")
      sent[kind] += times * nbytes(kernel.type) // (2 if holds_operand else 1)
      number[kind] += times
  return sent, number


def peculiarities(program: Program) -> Counter:
  """Returns how many instructions of a program are of a kind that a step on a chip should not have, or not many of.

  `convolutions`, and those of them in `float32`; `scatters`, which a GPU does by atomics; `conditionals`;
  `host_transfers`.
  """
  found = Counter(convolutions=0, float32_convolutions=0, scatters=0, conditionals=0, host_transfers=0)
  for line, computation in program.instructions():
    if _is_convolution(line):
      found["convolutions"] += 1
      types = [computation[name].type for name in line.operands[:2] if name in computation]
      found["float32_convolutions"] += any(kind.startswith("f32") for kind in types)
    found["scatters"] += line.opcode in ("scatter", "select-and-scatter")
    found["conditionals"] += line.opcode == "conditional"
    found["host_transfers"] += (line.opcode in ("infeed", "outfeed", "send", "recv") or "callback" in line.attributes
                                and line.opcode == "custom-call" or HOST in line.type)
  return found


def _is_convolution(line: Instruction) -> bool:
  """Returns whether an instruction is a convolution over two axes; a TPU writes products as convolutions, too."""
  if line.opcode == "custom-call":
    return "__cudnn$conv" in line.attributes
  return line.opcode == "convolution" and re.search(r"dim_labels=\w*0\w*1", line.attributes) is not None
