"""Twenty steps twice: how many bits differ? In one process, and in two. `python -m benchmarks.gpu.repeat`

  python -m benchmarks.gpu.repeat --save=first.npz
  python -m benchmarks.gpu.repeat --against=first.npz

Both commands do the twenty steps twice with one program; the second also compares with what the first has left, and
so shows whether two starts choose the same kernels. Try both without flags, with XLA_FLAGS=--xla_gpu_autotune_level=0,
with XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true, with XLA_FLAGS=--xla_gpu_deterministic_ops=true, and with
JAX_COMPILATION_CACHE_DIR=FOLDER JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES=all.
"""

import dataclasses

import jax
import numpy as np

from benchmarks.gpu.setting import Setting, arguments, create, finish

STEPS = 20


def run(setting: Setting) -> dict[str, np.ndarray]:
  """Returns the losses of the steps, and the parameters, statistics and rows after them, by name."""
  step, state, batch = create(setting)
  losses = []
  for _ in range(STEPS):
    state, metrics = step(state, batch)
    losses.append(metrics["loss"])
  kept = {"losses": np.stack(jax.device_get(losses)), "bank": np.asarray(state.bank)}
  for name in ("params", "batch_stats"):
    kept |= {f"{name}/" + jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(value)
             for path, value in jax.tree_util.tree_leaves_with_path(jax.device_get(getattr(state, name)))}
  return kept


def differing_bits(one: dict, other: dict) -> dict[str, int]:
  """Returns the number of bits that differ: in the losses, and in everything."""
  bits = {name: int(np.bitwise_count(one[name].view(np.uint32) ^ other[name].view(np.uint32)).sum()) for name in one}
  return {"losses": bits["losses"], "all": sum(bits.values())}


def main() -> None:
  """Prints the numbers of bits."""
  given = arguments(__doc__, save="", against="", batch=128)
  setting = given.setting if given.tiny else dataclasses.replace(given.setting, batch=given.batch, images=65_536)
  first = run(setting)
  found = {"in_one_process": differing_bits(first, run(setting))}
  if given.save:
    np.savez(given.save, allow_pickle=False, **first)
  if given.against:
    with np.load(given.against) as before:
      found["in_two_processes"] = differing_bits(first, dict(before))
  finish(batch=setting.batch, steps=STEPS, losses=first["losses"].tolist(), differing_bits=found)


if __name__ == "__main__":
  main()
