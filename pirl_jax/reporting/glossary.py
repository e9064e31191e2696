"""The text of docs/glossary.md: every field of a run, every column of metrics.jsonl, every figure of the results."""

from collections.abc import Mapping
from pathlib import Path

from pirl_jax import configs
from pirl_jax.configs.base import get_base
from pirl_jax.reporting.meanings import FIGURES, METRICS, Meaning
from pirl_jax.storage.meanings import field_meanings
from pirl_jax.storage.settings import flatten

START = """# Glossary

This page is made from `configs/base.py` and `pirl_jax/reporting/meanings.py` by
`python -m tests.reporting.test_glossary`; a test checks that it is complete.

## Fields of a run

The values are those of `configs/base.py`, the paper's main run; the variants change some of them.
`python launch.py --config=configs/pirl.py:VARIANT --help` shows the values of a variant. Each field is set with
`--config.FIELD=VALUE`.
"""

METRICS_START = """## Columns of metrics.jsonl

A row of `metrics.jsonl` is one step; TensorBoard shows the same figures. A healthy range is that of a run that learns.
Figures that a system does not have are left out.
"""

FIGURES_START = """## Figures of the results

`results/PROTOCOL.json` holds these figures under `figures`; [Evaluation](evaluation.md) describes the protocols.
`results/learning.json` has them on its first level.
"""


def glossary_page() -> str:
  """Returns the whole page, in Markdown."""
  return "\n".join([START, *_fields(), "",
                    METRICS_START, *_figures(METRICS), "", FIGURES_START, *_figures(FIGURES), ""])


def _fields() -> list[str]:
  """Returns the lines of a table for each group of fields."""
  folder, = configs.__path__
  meanings, fields = field_meanings(Path(folder) / "base.py"), flatten(get_base().to_dict())
  groups: dict[str, list[str]] = {"": []}
  for name in meanings:
    groups.setdefault(name.rpartition(".")[0] if name in fields else name, []).extend([name] if name in fields else [])
  lines = []
  for group, names in groups.items():
    lines += [*([f"### {group}", ""] if group else []), *([f"{meanings[group]}", ""] if meanings.get(group) else [])]
    if names:
      lines += ["| field | value | meaning |", "|---|---|---|"]
      lines += [f"| `{name}` | `{fields[name]!r}` | {_cell(meanings[name])} |" for name in names]
      lines += [""]
  return lines[:-1]


def _figures(meanings: Mapping[str, Meaning]) -> list[str]:
  return ["| name | meaning | healthy |", "|---|---|---|",
          *(f"| `{name}` | {_cell(meaning.text)} | {_cell(meaning.healthy)} |" for name, meaning in meanings.items())]


def _cell(text: str) -> str:
  return text.replace("|", "\\|").replace("*", "\\*")
