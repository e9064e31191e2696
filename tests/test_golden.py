"""The losses of a hundred steps as they were when they were last looked at: a change of any of them is to be meant.

After a change that is meant: python tests/test_golden.py
"""

import hashlib
import json
import re
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from launching import TRAINING, launch, rows

from pirl_jax.runtime.devices import num_cores

STORED = Path(__file__).parent / "stored" / "golden.json"
# A rate at which what rounding adds stays below 1e-3: 1 and 8 devices differ by 4e-6 at worst.
RUN = (*TRAINING, "--config.num_epochs=25", "--config.optimizer.learning_rate=0.02",
       "--config.checkpoint.every_steps=100")


def machine():
  """Returns what the last bits depend on."""
  flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
  known = " ".join(sorted(flags[1].split())) if flags else ""
  return {"jaxlib": version("jaxlib"), "cpu": hashlib.sha256(known.encode()).hexdigest()[:16], "cores": num_cores()}


def losses(folder, devices=1):
  launch(*RUN, f"--workdir={folder}", devices=devices, quick=False)
  return [row["loss"] for row in rows(folder)]


def test_a_hundred_steps(tmp_path):
  stored, found = json.loads(STORED.read_text()), losses(tmp_path)
  assert len(found) == len(stored["loss"]) == 100
  if stored["machine"] == machine():
    assert found == stored["loss"]
  np.testing.assert_allclose(found, stored["loss"], rtol=1e-3)


if __name__ == "__main__":
  with tempfile.TemporaryDirectory() as temporary:
    STORED.write_text(json.dumps({"machine": machine(), "loss": losses(Path(temporary))}, indent=1) + "\n")
