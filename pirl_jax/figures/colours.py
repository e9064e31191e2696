"""One colour for a system, in every panel of every figure."""

import itertools
import re
from collections.abc import Iterable

SYSTEMS = {"PIRL": "C0", "NPID++": "C1", "Jigsaw": "C2", "RotNet": "C3", "PIRL (Rotation + Jigsaw)": "C4",
           "Supervised": "C5", "Random": "C7", "PIRL (Rotation)": "C9"}
"""The colour of each system: a colour of matplotlib's cycle."""

ALIASES = {"PIRL (Jigsaw)": "PIRL", "NPID": "NPID++", "pirl": "PIRL", "npid": "NPID++", "jigsaw": "Jigsaw",
           "rotnet": "RotNet", "supervised": "Supervised", "random_init": "Random"}
"""Other names of the systems; those in lower case are the files of configs/, with which the names of runs begin."""

CYCLE = [f"C{number}" for number in range(10)]


def system_of(name: str) -> str:
  """Returns the system that a series or a run is named after, a key of `SYSTEMS`, or "" if there is none."""
  name = name.rpartition("/")[2]
  file = re.match(f"({'|'.join(filter(str.islower, ALIASES))})(?![A-Za-z])", name)
  found = ALIASES[file[0]] if file else ALIASES.get(name, name)
  return found if found in SYSTEMS else ""


def colours_of(names: Iterable[str]) -> dict[str, str]:
  """Returns the colour of each series or run of a figure, a colour of matplotlib's cycle.

  The first series of a system has the system's colour. The others have the first colours of the cycle that are still
  free; after ten series the colours repeat.

  Args:
    names: of the series or runs, in the order in which the figure shows them; a name may come several times.
  """
  names = list(dict.fromkeys(names))
  taken: dict[str, str] = {}
  for name in names:
    taken.setdefault(SYSTEMS.get(system_of(name), ""), name)
  colours = {name: colour for colour, name in taken.items() if colour}
  free = itertools.cycle([colour for colour in CYCLE if colour not in colours.values()] or CYCLE)
  return {name: colours.get(name) or next(free) for name in names}
