"""The step and PyTorch's, in turns on one GPU. `python -m benchmarks.gpu.peer --batch=256`

Each program has a process of its own that stays alive, and they run alternating blocks:

- `ours`: the main run's step but for the views, with its bank and health figures,
- `with_views`: with them,
- `torch`: PyTorch's step without views: channels last, autocast to bfloat16, torch.compile; one draw for the batch,
- `torch_per_image`: the same, with negatives drawn for each image, as PyContrast draws them.

All of them share the card: if they do not fit, take two, `--programs ours torch`. Before, PyTorch takes our weights,
bank, images and negatives and has to get our loss, to a hundredth. The last line is JSON; `ratio` is PyTorch's time
(one draw) over ours, block by block: above 1 ours is faster.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import turns
from benchmarks.gpu.setting import DIM, TEMPERATURE, TINY, Setting

PROGRAMS = ("ours", "with_views", "torch", "torch_per_image")
TOLERANCE = 1e-2


def serve_ours(setting: Setting, folder: Path, *, views: bool) -> None:
  """Serves our step; without views it leaves in `folder` what PyTorch needs to get the same first loss."""
  import jax

  from benchmarks.gpu.setting import chained, contrast_of, create
  from pirl_jax.method import memory_bank
  from pirl_jax.method.randomness import step_keys
  from pirl_jax.runtime import mesh as mesh_lib

  step, state, batch = create(setting, views=views)
  given = {}
  if not views:
    layout = contrast_of(setting).layout
    draw = jax.shard_map(
      lambda key: memory_bank.draw(key, layout, num_negatives=setting.negatives, axis=mesh_lib.AXIS),
      mesh=mesh_lib.create_mesh(1), in_specs=mesh_lib.WHOLE, out_specs=mesh_lib.SPLIT)
    given = {f"negatives/{view}": draw(step_keys(0, 0)[view]) for view in ("image", "pretext")}
    given |= {"bank": state.bank, "rows": layout.row_of(batch["index"]),
              "images": batch["image_crop"], "patches": batch["pretext_crop"]}
    for name in ("params", "batch_stats"):
      given |= {f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}": value
                for path, value in jax.tree_util.tree_leaves_with_path(getattr(state, name))}
    given = jax.device_get(given)
  state, metrics = step(state, batch)
  if given:
    np.savez(folder / "first.npz", loss=float(metrics["loss"]), **given)
  run = chained(step, state, batch)
  turns.serve(lambda: float(run()["loss"]))


def serve_torch(setting: Setting, folder: Path, *, per_image: bool) -> None:
  """Serves PyTorch's step, after it has got our first loss."""
  import torch

  from benchmarks import torch_peer

  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.backends.cudnn.benchmark = True  # the fastest kernels, as XLA chooses them
  with np.load(folder / "first.npz") as stored:
    first = dict(stored)

  def on_device(name: str) -> torch.Tensor:
    return torch.from_numpy(first[name]).to(device)

  network = torch_peer.Network(setting.blocks, setting.channels, (7, 2, True), DIM, 9, bottleneck=setting.bottleneck)
  network.load({name: value for name, value in first.items() if name.startswith(("params/", "batch_stats/"))})
  network = network.to(device=device, memory_format=torch.channels_last)
  compiled = torch.compile(network) if device == "cuda" else network  # on a CPU this would need a C++ compiler
  step = torch_peer.BankStep(compiled, on_device("bank"), num_negatives=setting.negatives, temperature=TEMPERATURE,
                             per_image=per_image, autocast=setting.dtype == "bfloat16")
  images, patches, rows = on_device("images"), on_device("patches"), on_device("rows").long()
  negatives = tuple(on_device(f"negatives/{view}").long() for view in ("image", "pretext"))
  if per_image:
    negatives = tuple(drawn.expand(len(rows), -1) for drawn in negatives)
  loss, ours = float(step(images, patches, rows, negatives)), float(first["loss"])
  print(f"loss of the first step {loss:.5f}, ours {ours:.5f}", file=sys.stderr, flush=True)
  assert abs(loss / ours - 1) < TOLERANCE, "the losses differ: the programs do not do the same"
  turns.serve(lambda: float(step(images, patches, rows)))


def main() -> None:
  """Prints the medians and, as the last line, JSON."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tiny", action="store_true", help="a tiny size in float32, for a CPU")
  parser.add_argument("--batch", type=int, default=256)
  parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
  given = parser.parse_args()
  setting = (dataclasses.replace(TINY, dtype="float32") if given.tiny
             else dataclasses.replace(Setting(), batch=given.batch))
  if given.serve:
    program, folder = given.serve[0], Path(given.serve[1])
    if program.startswith("torch"):
      serve_torch(setting, folder, per_image=program.endswith("per_image"))
    serve_ours(setting, folder, views=program == "with_views")
    return
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the programs share the card
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-m", "benchmarks.gpu.peer", f"--batch={given.batch}", *["--tiny"] * given.tiny]
    found = turns.take_turns({program: [*command, "--serve", program, folder] for program in given.programs},
                             rounds=given.rounds, steps=2 if given.tiny else 10)
  times: dict[str, Any] = {program: statistics.median(clocks["wall"]) for program, clocks in found.items()}
  ratio = None
  if {"ours", "torch"} <= found.keys():
    ratio = statistics.median(theirs / ours for ours, theirs in zip(
      found["ours"]["wall"], found["torch"]["wall"], strict=True))
  print(json.dumps({"batch": setting.batch, "milliseconds": times, "ratio": ratio}))


if __name__ == "__main__":
  main()
