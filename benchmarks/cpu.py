"""The training step on a CPU against PyTorch's: same network, batch and loss. `python -m benchmarks.cpu`

Three programs take turns, each in a process of its own that stays alive, one running at a time: ours without views and
bank (trunk, both passes, heads, softmax over given negatives, SGD), PyTorch's equal of that (its CPU wheel has to be
installed: pip install torch==2.13.0), and our whole step (views, memory bank, health figures). All allocate memory in
the same way, that of `launch.py`. The last line is JSON: `ratio` is the smallest ratio of PyTorch's time to ours for
equal work, over all networks and numbers of threads; above 1 ours is faster. Ours compile as `launch.py` compiles.

  python -m benchmarks.cpu                                  # both networks, one and two threads
  python -m benchmarks.cpu --networks embedded --threads 1 --rounds 20
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
from functools import partial
from typing import Any

import numpy as np

from benchmarks import turns
from pirl_jax.runtime import compiling, memory

NETWORKS = {
  # name: (variant of configs/pirl.py, what else is set, rows of the bank)
  "embedded": ("", {}, 4_096),
  "resnet18": ("cifar10", {"batch_size": 32}, 50_000),
}
PROGRAMS = ("trunk", "torch", "step")


def _config(network):
  from pirl_jax.configs import pirl
  variant, changes, _ = NETWORKS[network]
  config = pirl.get_config(variant)
  config.update(changes)
  return config


def _inputs(config):
  """Returns what a step without views and bank is given: images, patches, own rows and negatives."""
  rng, size, patch = np.random.default_rng(0), config.data.image_size, config.jigsaw.patch_size
  batch, num_patches = config.batch_size, config.jigsaw.grid**2
  rows = rng.standard_normal((batch + 2 * config.num_negatives, config.model.dim)).astype(np.float32)
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  return (rng.standard_normal((batch, size, size, 3)).astype(np.float32),
          rng.standard_normal((batch, num_patches, patch, patch, 3)).astype(np.float32),
          rows[:batch], rows[batch:].reshape(2, config.num_negatives, -1))


def _create_trunk(network):
  """Returns run() of our step without views and bank."""
  import jax
  import jax.numpy as jnp
  import optax

  from pirl_jax import system
  from pirl_jax.method import memory_bank, optimizer
  from pirl_jax.models.network import create_variables

  config = _config(network)
  model = system.network_of(config, num_classes=0)
  sgd = optimizer.create_optimizer(optax.constant_schedule(0.05), momentum=0.9, weight_decay=1e-4)
  variables = create_variables(model, jax.random.key(0), *system.network_inputs(config))
  given = tuple(map(jnp.asarray, _inputs(config)))

  def objective(params, batch_stats, images, patches, own, negatives):
    embeddings, updated = model.apply({"params": params, "batch_stats": batch_stats}, images, patches, train=True,
                                      mutable=["batch_stats"])
    loss = 0
    for embedding, others in zip(embeddings, negatives, strict=True):
      embedding = memory_bank.normalise(embedding)
      scores = jnp.concatenate([jnp.sum(embedding * own, axis=1, keepdims=True), embedding @ others.T], axis=1)
      loss += 0.5 * jnp.mean(optax.softmax_cross_entropy_with_integer_labels(
        scores / config.temperature, jnp.zeros(len(scores), int)))
    return loss, updated["batch_stats"]

  def step(state, *given):
    params, batch_stats, opt_state = state
    (loss, batch_stats), grads = jax.value_and_grad(objective, has_aux=True)(params, batch_stats, *given)
    updates, opt_state = sgd.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), batch_stats, opt_state), loss

  step = jax.jit(step, donate_argnums=0)
  state = variables["params"], variables["batch_stats"], sgd.init(variables["params"])

  def run():
    nonlocal state
    state, loss = step(state, *given)
    return float(loss)

  return run


def _create_step(network):
  """Returns run() of our whole step, on crops that are already there."""
  import jax
  import optax

  from pirl_jax import system
  from pirl_jax.method import losses, memory_bank, optimizer
  from pirl_jax.method.contrast import Contrast
  from pirl_jax.method.state import create_state
  from pirl_jax.method.step import Momenta, Weights, make_contrastive_step
  from pirl_jax.runtime import mesh as mesh_lib

  config, num_rows = _config(network), NETWORKS[network][2]
  model, mesh = system.network_of(config, num_classes=0), mesh_lib.create_mesh()
  sgd = optimizer.create_optimizer(optax.constant_schedule(0.05), momentum=0.9, weight_decay=1e-4)
  layout = memory_bank.create_layout(num_rows, num_devices=mesh.size, num_negatives=config.num_negatives)
  loss_fn = losses.make_loss("infonce", temperature=config.temperature, num_images=num_rows,
                             num_negatives=config.num_negatives)
  step = make_contrastive_step(
    model.with_batch_norm(axis=mesh_lib.AXIS), sgd, system.views_of(config),
    Contrast(loss_fn, layout, num_negatives=config.num_negatives, temperature=config.temperature), mesh,
    weights=Weights(config.pretext_weight), momenta=Momenta(config.bank.momentum))
  state = create_state(0, model, sgd, layout, mesh=mesh,
                       create_bank=partial(memory_bank.create, dim=config.model.dim),
                       inputs=system.network_inputs(config))
  rng = np.random.default_rng(0)
  batch = {name: rng.integers(0, 256, (config.batch_size, side, side, 3), np.uint8)
           for name, (side, _) in system.crops_of(config).items()}
  batch |= {"index": np.arange(config.batch_size, dtype=np.int32), "valid": np.ones(config.batch_size, bool)}
  batch = jax.device_put(batch, mesh_lib.split(mesh))

  def run():
    nonlocal state
    state, metrics = step(state, batch)
    return float(metrics["loss"])

  return run


def _create_torch(network):
  """Returns run() of PyTorch's step."""
  import torch

  from benchmarks import torch_peer
  from pirl_jax.models.resnet import ARCHITECTURES, STEMS

  config = _config(network)
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  _, blocks, channels = ARCHITECTURES[config.model.arch]
  model = torch_peer.Network(blocks, channels, STEMS[config.model.stem], config.model.dim, config.jigsaw.grid**2)
  model = model.to(memory_format=torch.channels_last)
  images, patches, own, negatives = _inputs(config)
  images, patches = (torch.from_numpy(np.ascontiguousarray(x.reshape(-1, *x.shape[-3:]).transpose(0, 3, 1, 2))).to(
    memory_format=torch.channels_last) for x in (images, patches))
  step = torch_peer.create_step(model, learning_rate=0.05, temperature=config.temperature)
  own, negatives = torch.from_numpy(own), torch.from_numpy(negatives)
  return lambda: step(images, patches, own, negatives)


def serve(program: str, network: str) -> None:
  """Runs steps of a program when asked to, see `turns.serve`."""
  memory.keep_freed()
  compiling.compile_for_cpu()
  turns.serve({"trunk": _create_trunk, "torch": _create_torch, "step": _create_step}[program](network))


def compare(network: str, *, threads: int, programs: tuple[str, ...], rounds: int, steps: int) -> dict[str, dict]:
  """Returns {program: {"wall", "processor"}}: milliseconds of each block, a step's mean, [rounds]."""
  cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
  return turns.take_turns({program: [
    "taskset", "-c", cores, sys.executable, "-m", "benchmarks.cpu", "--serve", program, network]
    for program in programs}, rounds=rounds, steps=steps)


def _ratio(found, program, clock):
  """Returns the median of PyTorch's time over ours, block by block."""
  return statistics.median(a / b for a, b in zip(found["torch"][clock], found[program][clock], strict=True))


def main() -> None:
  """Prints the table and, as the last line, JSON."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
  parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
  parser.add_argument("--rounds", type=int, default=11)
  parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
  given = parser.parse_args()
  if given.serve:
    serve(*given.serve)
    return
  with_torch = importlib.util.find_spec("torch") is not None
  programs = PROGRAMS if with_torch else tuple(program for program in PROGRAMS if program != "torch")
  if not with_torch:
    print("PyTorch is not installed (pip install torch==2.13.0): there is nothing to compare with")
  print(f"medians of {given.rounds} blocks; ms a step by the wall (processor time); load {os.getloadavg()[0]:.1f}")
  rows = []
  for network in given.networks:
    for threads in given.threads:
      found = compare(network, threads=threads, programs=programs, rounds=given.rounds,
                      steps=20 if network == "embedded" else 1)
      row: dict[str, Any] = {"network": network, "threads": threads, "load": os.getloadavg()[0]}
      for program in programs:
        row[program] = {clock: statistics.median(found[program][clock]) for clock in ("wall", "processor")}
      for program in ("trunk", "step") if with_torch else ():
        row[f"ratio_{program}"] = {clock: _ratio(found, program, clock) for clock in ("wall", "processor")}
      rows.append(row)
      times = ", ".join(f"{p} {row[p]['wall']:.1f} ({row[p]['processor']:.1f})" for p in programs)
      ratios = "; ratios to torch: " + ", ".join(
        f"{p} {row[f'ratio_{p}']['wall']:.2f} ({row[f'ratio_{p}']['processor']:.2f})" for p in ("trunk", "step")
      ) if with_torch else ""
      print(f"{network}, {threads} thread(s): {times}{ratios}", flush=True)
  smallest = min((row["ratio_trunk"]["wall"] for row in rows), default=None) if with_torch else None
  print(json.dumps({"ratio": smallest, "rows": rows}))


if __name__ == "__main__":
  main()
