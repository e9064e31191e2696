"""What tests/mutation.py changes, on a few lines."""

from mutants import mutants_of

SOURCE = '''
def near(a: int, b=2):
  """Of 1 < 2."""
  if a < b and a == "é":
    raise ValueError(f"{a} < 1")
  return clip(a, not b, low=0)
'''


def test_one_expression_or_statement_at_a_time():
  found = mutants_of(SOURCE, "near.py")
  assert sorted(one.name.removeprefix("near.py near: ") for one in found) == sorted([
    "2 -> 3", "a < b and a == 'é' -> not (a < b and a == 'é')", "a < b and a == 'é' -> a < b or a == 'é'",
    "a < b -> a <= b", "a == 'é' -> a != 'é'", "'é' -> 'é_'", "raise ValueError(f'{a} < 1') -> pass",
    "clip(a, not b, low=0) -> clip(a, not b)", "clip(a, not b, low=0) -> clip(not b, a, low=0)", "not b -> b",
    "0 -> 1"])
  for mutant in found:
    changed = [number for number, (old, new) in enumerate(zip(SOURCE.splitlines(), mutant.text.splitlines(),
                                                              strict=True), 1) if old != new]
    assert changed == [mutant.lines[0]]
