"""The scripts for the first hour on a GPU: they need no data library and no config library, and run at a tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks" / "gpu").glob("*.py") if path.stem != "setting")
ABSENT = """
import importlib.machinery
import sys

class Finder(importlib.machinery.PathFinder):
  @classmethod
  def find_spec(cls, name, path=None, target=None):
    absent = ("grain", "tensorflow_datasets", "tensorflow", "array_record", "ml_collections", "clu", "tensorboardX",
              "cv2", "matplotlib", "sklearn", "torchvision")
    return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)

sys.meta_path = [Finder if one is importlib.machinery.PathFinder else one for one in sys.meta_path]
"""


@pytest.fixture
def python(tmp_path):
  """Returns run(*arguments) -> lines of what a Python that lacks these libraries prints."""
  (tmp_path / "sitecustomize.py").write_text(ABSENT)
  environment = os.environ | {"PYTHONPATH": str(tmp_path), "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

  def run(*arguments):
    ended = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert ended.returncode == 0, ended.stderr[-3_000:]
    return ended.stdout.splitlines()

  return run


def test_the_scripts_import_no_data_library_and_no_config_library(python):
  imports = "; ".join(f"import benchmarks.gpu.{name}" for name in SCRIPTS)
  assert python("-c", f"import sys; {imports}; print('ml_collections' in sys.modules)") == ["False"]
  with pytest.raises(AssertionError, match="No module named 'grain'"):
    python("-c", "import pirl_jax.data.batches")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_at_a_tiny_size(python, tmp_path, script):
  if script == "peer":
    pytest.importorskip("torch")
  more = {"repeat": [f"--save={tmp_path}/first.npz"], "flags": ["--variants", "default", "micro_batches_2"]}
  found = json.loads(python("-m", f"benchmarks.gpu.{script}", "--tiny", *more.get(script, []))[-1])
  if script == "repeat":
    assert found["differing_bits"]["in_one_process"] == {"losses": 0, "all": 0}
    again = json.loads(python("-m", "benchmarks.gpu.repeat", "--tiny", f"--against={tmp_path}/first.npz")[-1])
    assert again["differing_bits"]["in_two_processes"] == {"losses": 0, "all": 0}
  elif script == "peer":
    assert set(found["milliseconds"]) == {"ours", "with_views", "torch", "torch_per_image"} and found["ratio"] > 0
  elif script == "loss":
    assert all(of["halves"]["difference"] < 1e-4 and of["exact"]["milliseconds"] > 0
               for of in (found["shared"], found["all_rows"]))
  elif script in ("pool", "views"):
    assert found["milliseconds"].keys() >= {"now"} and found.get("forward_difference", 0) == 0
  elif script == "step":
    assert found["steps"][0]["batch"] == 8 and found["steps"][0]["images_per_second"] > 0
  elif script == "flags":
    assert all(variant["steps"][0]["milliseconds"] > 0 for variant in found.values())
  else:
    assert found["gigabytes_per_second"] > 0 and found["tflops"]["bfloat16"] > 0
