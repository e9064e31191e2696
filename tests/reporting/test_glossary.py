"""docs/glossary.md is up to date and complete. `python -m tests.reporting.test_glossary` writes it."""

import json
from pathlib import Path

from pirl_jax.configs import base, pirl
from pirl_jax.reporting import glossary
from pirl_jax.reporting.meanings import FIGURES, METRICS
from pirl_jax.storage.settings import flatten
from pirl_jax.training import pretrain

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "glossary.md"


def test_the_page_is_up_to_date():
  assert PAGE.read_text() == glossary.text(), "python -m tests.reporting.test_glossary writes it"


def test_every_field_stands_on_the_page():
  page = PAGE.read_text()
  for field in flatten(base.get_base().to_dict()):
    assert f"| `{field}` |" in page or field.startswith("pretext_photometric."), field
  assert "### pretext_photometric" in page


def test_a_run_has_no_figure_that_the_glossary_lacks(tmp_path):
  config = pirl.get_config()
  config.update_from_flattened_dict({
    "data.image_size": 16, "jigsaw.crop_size": 18, "jigsaw.patch_size": 5, "data.num_images": 64, "num_negatives": 32,
    "batch_size": 32, "num_epochs": 1, "log.every_steps": 1, "evaluate.num_images": 16, "evaluate.batch_size": 32,
    "evaluate.every_epochs": 1, "optimizer.warmup_epochs": 0})
  pretrain.run(config, str(tmp_path))
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert {name for row in rows for name in row} - METRICS.keys() == set()
  learning = json.loads((tmp_path / "results" / "learning.json").read_text())
  about = {"protocol", "step", "image_size", "crop_fraction", "train", "test", "train_fingerprint", "test_fingerprint"}
  assert learning.keys() - FIGURES.keys() == about  # what was measured on, not figures


def test_no_figure_is_unknown_to_the_program():
  sources = "".join(path.read_text() for path in (ROOT / "pirl_jax").rglob("*.py") if "reporting" not in path.parts)
  assert [name for name in FIGURES if f'"{name}"' not in sources and f"{name}=" not in sources] == []


if __name__ == "__main__":
  PAGE.write_text(glossary.text())
