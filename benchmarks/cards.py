"""The cards of the networks behind docs/results.md: what was exported, without the weights themselves.

A card is the card.json of the job `export`, with the checksum of the exported file. It lies in docs/results/cards, and
has the name of its run.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pirl_jax.studies.points import digest, younger_fields

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "docs" / "results" / "cards"
WEIGHTS = "model.safetensors"


def export(run: Path, folder: Path) -> dict[str, Any]:
  """Exports the network of a run into `folder` and returns its card.

  Returns:
    The content of card.json without histograms, and `weights` (file, bytes, sha256) and `digest`, see `digest_of`.
  """
  command = ["--config=configs/export.py", f"--config.checkpoint={run}", f"--workdir={folder}"]
  subprocess.run([sys.executable, "launch.py", *command], cwd=ROOT, check=True)
  card = json.loads((folder / "card.json").read_text())
  content = (folder / WEIGHTS).read_bytes()
  return {**_without_histograms(card), "digest": digest_of(card["config"]), "weights": {
    "file": WEIGHTS, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}


def digest_of(config: Mapping[str, Any]) -> str:
  """Returns eight hexadecimal digits, a hash of the config of a card without name and seed.

  Unlike the digest in the name of a run, it does not depend on the place of the images: of a folder a card has only the
  last name. As in that digest, a field that was added later counts only if it changes something.
  """
  return digest(ConfigDict(config), without=("name", "seed"), younger=json.loads(json.dumps(younger_fields())))


def keep(card: Mapping[str, Any], cards: Path = CARDS) -> None:
  """Writes a card into the folder of cards."""
  cards.mkdir(parents=True, exist_ok=True)
  (cards / f"{card['name']}.json").write_text(json.dumps(card, indent=1, sort_keys=True) + "\n")


def read(run: str, cards: Path = CARDS) -> dict[str, Any] | None:
  """Returns the card of a run, None if there is none."""
  path = cards / f"{run}.json"
  return json.loads(path.read_text()) if path.exists() else None


def _without_histograms(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _without_histograms(inner) for name, inner in value.items() if name not in ("counts", "edges")}
  return value
