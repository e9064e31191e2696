"""--help: what it lists, and that it is quick because it loads no JAX."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pirl_jax.configs import base, pirl
from pirl_jax.launching import config_files, usage
from pirl_jax.storage.meanings import field_meanings
from pirl_jax.storage.settings import flatten

ROOT = Path(__file__).parents[1]


def helped(*arguments):
  """Returns what the command prints, in a process that cannot import JAX."""
  script = "import sys; sys.modules['jax'] = None; import launch; sys.argv[0] = 'launch.py'; launch.start()"
  return subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True,
                        timeout=60)


def test_help_lists_every_config_with_every_variant_and_every_flag():
  result = helped("--help")
  assert result.returncode == 0 and not result.stderr
  lines = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
  assert lines[0] == "usage:"
  for name in config_files.names():
    assert f"configs/{name}.py" in lines
  for variant in pirl.VARIANTS:
    assert not variant or f":{variant}" in lines
  assert "--workdir" in lines and "--compilation_cache" in lines
  assert max(map(len, result.stdout.splitlines())) <= 120
  undescribed = [line for line in result.stdout.splitlines() if line.startswith("    :") and len(line.split()) == 1]
  assert not undescribed


def test_help_of_a_config_has_every_field_with_its_value_and_its_comment():
  result = helped("--config=configs/pirl.py:folder", "--config.batch_size=48", "-h")
  assert result.returncode == 0 and not result.stderr
  lines = result.stdout.splitlines()
  expected = flatten(pirl.get_config("folder").to_dict())
  found = [line.split("=")[0].strip() for line in lines if line.startswith("  --config.")]
  assert sorted(found) == sorted(f"--config.{field}" for field in expected)
  assert lines[lines.index("  --config.batch_size=48") + 1].strip() == "images in a step, over all devices"
  for typed in ("jigsaw.crop_scale='(0.6, 1.0)'", "num_epochs=auto", "data.root=''"):
    assert f"  --config.{typed}" in lines
  assert any(line.startswith("    :folder_small ") for line in lines)


def test_help_of_a_config_that_needs_a_variant_lists_the_variants():
  result = helped("--config=configs/evaluate.py", "--help")
  assert result.returncode == 0 and "    :linear_moco" in result.stdout
  assert "--config.knn.k=200" in helped("--config=configs/evaluate.py:knn", "--help").stdout


def test_help_of_a_file_of_ones_own(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text('"""My run."""\nfrom pirl_jax.configs import pirl\n\ndef get_config():\n  return pirl.get_config()\n')
  text = usage.of_config(str(path), pirl.get_config().to_dict())
  assert text.startswith("My run.") and "--config.model.arch=resnet8" in text and "variants:" not in text


def test_every_field_of_a_run_has_a_comment():
  meanings = field_meanings(ROOT / "configs" / "base.py")
  fields = flatten(base.get_base().to_dict())
  assert [field for field in fields if field not in meanings and not field.startswith("pretext_photometric.")] == []
  assert [field for field in meanings if field not in fields and field not in base.get_base()] == []


@pytest.mark.parametrize("source, expected", [
  ("config.a = 1  # one", {"a": "one"}),
  ("# above\nconfig.a = 1", {"a": "above"}),
  ("# above,\n# twice\nconfig.a = 1  # and behind", {"a": "above, twice and behind"}),
  ("config.g = g = C()  # group\ng.a = 1  # inner", {"g": "group", "g.a": "inner"}),
  ("config.g = g = C()\ng.a = (1,\n       2)  # inner\nh.a = 1  # not a field", {"g.a": "inner"}),
  ("config.a = 1  # first\nconfig.a = 2  # second", {"a": "first"}),
  ("config.a = '# no comment'\nconfig.b = 2\n# loose\n", {}),
])
def test_comments_are_read_beside_their_fields(tmp_path, source, expected):
  ast.parse(source)
  path = tmp_path / "base.py"
  path.write_text(source)
  assert field_meanings(path) == expected


def test_auto_leaves_a_field_open_and_is_refused_where_nothing_chooses():
  lines = helped("--config=configs/pirl.py:imagenet", "--config.micro_batches=auto", "--help").stdout.splitlines()
  assert "  --config.micro_batches=auto" in lines and "  --config.num_epochs=800" in lines
  refused = helped("--config=configs/pirl.py", "--config.seed=auto")
  assert refused.returncode == 2 and "seed=auto is not possible; the program chooses these fields: " in refused.stderr
