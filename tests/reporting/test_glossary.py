"""docs/glossary.md is up to date and complete. `python -m tests.reporting.test_glossary` writes it.

That no run and no protocol has a figure which the glossary lacks is tested where there is a run: tests/training/
test_pretrain.py, tests/evaluation/test_evaluate.py and tests/evaluation/protocols/test_learning.py.
"""

from pathlib import Path

from pirl_jax.configs import base
from pirl_jax.reporting import glossary
from pirl_jax.reporting.meanings import FIGURES
from pirl_jax.storage.settings import flatten

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "glossary.md"


def test_the_page_is_up_to_date():
  assert PAGE.read_text() == glossary.glossary_page(), "python -m tests.reporting.test_glossary writes it"


def test_every_field_stands_on_the_page():
  page = PAGE.read_text()
  for field in flatten(base.get_base().to_dict()):
    assert f"| `{field}` |" in page or field.startswith("pretext_photometric."), field
  assert "### pretext_photometric" in page


def test_no_figure_is_unknown_to_the_program():
  sources = "".join(path.read_text() for path in (ROOT / "pirl_jax").rglob("*.py") if "reporting" not in path.parts)
  assert [name for name in FIGURES if f'"{name}"' not in sources and f"{name}=" not in sources] == []


if __name__ == "__main__":
  PAGE.write_text(glossary.glossary_page())
