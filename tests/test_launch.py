"""The command, as a user types it: every mistake is one line and exit code 2, before anything compiles."""

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from pirl_jax.configs import pirl
from pirl_jax.errors import UserError
from pirl_jax.storage.checkpoints import Checkpoints
from pirl_jax.training import pretrain

ROOT = Path(__file__).parents[1]


def launch(*arguments, timeout=120, **environment):
  return subprocess.run([sys.executable, "launch.py", *arguments], cwd=ROOT, capture_output=True, text=True,
                        timeout=timeout,
                        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment})


@pytest.mark.parametrize("arguments, said", [
  ([], "--config=configs/pirl.py"),
  (["--config=configs/pirl.py:imagnet"], "choose none or one of cifar10"),
  (["--config=configs/none.py"], "configs/none.py"),
  (["--config=configs/pirl.py", "--config.batchsize=2"], "no config field batchsize; did you mean batch_size?"),
  (["--config=configs/pirl.py", "--config.optimizer.learning_rat=2"], "did you mean optimizer.learning_rate?"),
  (["--config", "configs/pirl.py", "--config.learning_rate", "2"], "did you mean optimizer.learning_rate?"),
  (["--config=configs/pirl.py", "--config.seed=1", "--config.zzz.q=2"], "there is no config field zzz.q"),
  (["--config=configs/pirl.py", "--config.batch_size=many"], "many"),
  (["--config=configs/pirl.py", "--confg.batch_size=2"], "--confg.batch_size; did you mean --config.batch_size?"),
  (["--config=configs/pirl.py", "--num_epochs=3"], "did you mean --config.num_epochs?"),
  (["--num_epochs=3"], "did you mean --config.num_epochs?"),
  (["--config=configs/pirl.py", "--learning_rat", "3"], "did you mean --config.optimizer.learning_rate?"),
  (["--config=configs/pirl.py", "--workdr=x"], "did you mean --workdir?"),
  (["--config=configs/pirl.py", "--zzzz"], "there is no flag --zzzz; --help lists the flags"),
  (["--config=configs/none.py", "--help"], "configs/none.py"),
  (["--config=configs/pirl.py", "--config.num_epocs=3", "--help"], "did you mean num_epochs?"),
  (["--config=configs/pirl.py", "again"], "again"),
  (["--config=configs/pirl.py", "--config.job=dance"], "dance"),
])
def test_mistyped_commands(arguments, said):
  result = launch(*arguments)
  assert result.returncode == 2, result.stderr
  assert said in result.stderr and "Traceback" not in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("lines, said", [
  ("import nosuchmodule", "line 1: ModuleNotFoundError: No module named 'nosuchmodule'"),
  ("def get_config():\n  return lr * 2", "line 2: NameError: name 'lr' is not defined"),
  ("def get_config():\n  return 1 / 0", "line 2: ZeroDivisionError: division by zero"),
  ("raise RuntimeError('no\\nreason')", "line 1: RuntimeError: no reason"),
  ("class Odd(Exception): pass\nraise Odd()", "line 2: Odd"),
  ("def get_config(:", "line 1: SyntaxError"),
  ("def get_config():\n  return {}['x']", "line 2: KeyError: 'x'"),
  ("assert False, 'never'", "line 1: AssertionError: never"),
  ("def get_config():\n  return 3", "get_config must return a ConfigDict with a field job"),
  ("from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict()", "a field job"),
  ("x = 1", "get_config"),
  ("def get_config(): return get_config()", "RecursionError"),
  ("\x00", "null byte")])
def test_a_config_file_that_raises(lines, said, tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(lines)
  result = launch(f"--config={file}")
  assert result.returncode == 2, result.stderr
  assert said in result.stderr and "Traceback" not in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1


def test_threads_that_never_end_do_not_keep_the_program():
  """As Orbax leaves them behind after a checkpoint that could not be written."""
  script = ("import sys, threading; from pirl_jax.launching import command; sys.argv = ['launch.py']; "
            "threading.Thread(target=threading.Event().wait).start(); command.start()")
  result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert result.returncode == 2 and "for a first run" in result.stderr


def test_an_impossible_value(tmp_path):
  result = launch("--config=configs/pirl.py", "--config.loss=nec", f"--workdir={tmp_path / 'run'}")
  assert result.returncode == 2, result.stderr
  assert "nce, infonce, eq4" in result.stderr and "Traceback" not in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field, value, said", [
  ("num_negatives", 8192, "only 4096 images; try --config.num_negatives=4096"),
  ("num_negatives", 1000, "try --config.num_negatives=768"),
  ("jigsaw.patch_size", 13, "12"),
  ("batch_size", 5000, "only 4096 images"),
  ("temperature", 0.01, "0.03"),
  ("loss", "nec", "nce, infonce, eq4"),
  ("pretext", "puzzle", "jigsaw"),
  ("model.arch", "resnet49", "resnet50"),
  ("model.dtype", "float16", "bfloat16"),
  ("photometric.hue", 0.7, "0.5"),
  ("data.image_scale", (0.5, 0.1), "image_scale"),
  ("num_epochs", -1, "num_epochs=-1"),
  ("data.source", "tdfs", "tfds"),
  ("optimizer.warmup_epochs", 25, "warm-up"),
  ("evaluate.temperature", 0.0, "evaluate.temperature"),
])
def test_impossible_values_are_refused_before_anything_is_written(tmp_path, field, value, said):
  """As the command refuses them, but in this process: a start costs seconds."""
  config = pirl.get_config()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=re.escape(said)) as caught:
    pretrain.run(config, str(tmp_path / "run"))
  assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "run").exists()


def test_devices_that_do_not_divide(tmp_path):
  script = ("import sys, jax; jax.config.update('jax_num_cpu_devices', 3); import launch; "
            "sys.argv[0] = 'launch.py'; launch.start()")
  result = subprocess.run([sys.executable, "-c", script, "--config=configs/pirl.py", f"--workdir={tmp_path / 'run'}"],
                          cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert result.returncode == 2
  assert "batch_size=128 does not divide among 3 devices; try --config.batch_size=126" in result.stderr


def test_folder_of_images_with_a_broken_one_trains_and_names_it_without_tensorflow(tmp_path):
  rng = np.random.default_rng(0)
  for split, count in (("train", 20), ("test", 8)):
    for label in ("cats", "dogs"):
      (tmp_path / split / label).mkdir(parents=True)
      for i in range(count):
        image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / split / label / f"{i}.{'png' if i % 2 else 'jpg'}"), image)
  (tmp_path / "train" / "dogs" / "broken.jpg").write_bytes(b"no image at all")
  arguments = [
    "--config=configs/pirl.py:folder", f"--config.data.root={tmp_path}", "--config.data.split=train",
    "--config.data.labels=folder", "--config.evaluate.split=test", "--config.evaluate.every_epochs=1",
    "--config.evaluate.batch_size=8", "--config.batch_size=8", "--config.num_negatives=16",
    "--config.data.image_size=16", "--config.jigsaw.crop_size=18", "--config.jigsaw.patch_size=5",
    "--config.model.arch=resnet8", "--config.model.stem=3x3s2", "--config.data.num_threads=2",
    "--config.log.every_steps=1", "--config.evaluate.views=0", "--config.evaluate.learning=False",
    f"--workdir={tmp_path / 'run'}"]
  # A TensorFlow that is installed, and tells when it is imported by whatever library.
  (tmp_path / "trap" / "tensorflow").mkdir(parents=True)
  (tmp_path / "trap" / "tensorflow" / "__init__.py").write_text(
    f"open({str(tmp_path / 'imported')!r}, 'w')\nraise ImportError('trap')")
  first = launch(*arguments, "--config.num_epochs=1", PYTHONPATH=str(tmp_path / "trap"), JAX_PLATFORMS="cpu")
  assert first.returncode == 0, first.stderr
  with Checkpoints(tmp_path / "run" / "checkpoints", keep=1) as checkpoints:
    rounding = checkpoints.read_meta(checkpoints.steps()[-1])["environment"]["rounding"]
  assert "--xla_backend_optimization_level=1" in rounding["XLA_FLAGS"]
  assert not (tmp_path / "imported").exists()
  assert "dogs/broken.jpg" in first.stdout
  assert (tmp_path / "run" / "views.png").exists()
  page = (tmp_path / "run" / "report.html").read_text()
  assert "dogs/broken.jpg" in page and "could not be made" not in page
  refused = launch(*arguments, "--config.num_epochs=3", "--config.seed=5")
  assert refused.returncode == 2
  assert "seed=0" in refused.stderr and "5" in refused.stderr and "--workdir" in refused.stderr
  (tmp_path / "train" / "cats" / "new.png").write_bytes((tmp_path / "train" / "cats" / "1.png").read_bytes())
  files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
  changed = launch(*arguments, "--config.num_epochs=3")
  assert changed.returncode == 2 and "new: 1 (cats/new.png)" in changed.stderr
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == files
