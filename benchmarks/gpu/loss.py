"""Loss and bank: drawn negatives and all rows, with products of several precisions. `python -m benchmarks.gpu.loss`

Given are embeddings; what is timed is the look-up in the bank, the loss with its gradient by the embeddings, and the
update of the rows. The losses are compared with those of products in full float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.gpu.setting import DIM, arguments, compile_seconds, contrast_of, finish, milliseconds
from pirl_jax.method import memory_bank, products
from pirl_jax.planning.loss_program import loss_programs
from pirl_jax.runtime import mesh as mesh_lib


def preset(algorithm: lax.DotAlgorithmPreset) -> Callable:
  """Returns a product f32[B, K] of embeddings f32[B, D] and rows f32[K, D], see `products`, by an algorithm of XLA."""
  return lambda embeddings, rows: jnp.matmul(embeddings, rows.T, precision=algorithm)


PRODUCTS = {"exact": products.exact, "halves": products.in_halves,
            "bf16_x3": preset(lax.DotAlgorithmPreset.BF16_BF16_F32_X3),
            "tf32": preset(lax.DotAlgorithmPreset.TF32_TF32_F32),
            "tf32_x3": preset(lax.DotAlgorithmPreset.TF32_TF32_F32_X3)}


def chained(programs: tuple[Callable, Callable], bank: jax.Array, *given: Any) -> Callable[[], Any]:
  """Returns run() that looks and writes, from the bank that the call before it has left."""
  look, write = programs

  def run() -> Any:
    nonlocal bank
    *out, moved, loss = look(bank, *given)
    bank = write(bank, *moved)
    return out, loss, bank
  return run


def main() -> None:
  """Prints milliseconds and differences of the loss; a product that the device does not have is left out."""
  setting = (given := arguments(__doc__)).setting
  mesh, keys = mesh_lib.create_mesh(1), jax.random.split(jax.random.key(0), 3)
  embs = {view: memory_bank.normalise(jax.random.normal(key, (setting.batch, DIM)))
          for view, key in zip(("image", "pretext"), keys[:2], strict=True)}
  batch = {"index": jnp.arange(setting.batch, dtype=jnp.int32), "valid": jnp.ones(setting.batch, bool)}
  found = {}
  for name, negatives, loss in (("shared", setting.negatives, "nce"), ("all_rows", 0, "infonce")):
    runs, losses, seconds = {}, {}, {}
    for product_name, product in PRODUCTS.items():
      contrast = contrast_of(setting, loss=loss, negatives=negatives, product=product)
      bank, usable = memory_bank.create(keys[2], contrast.layout, dim=DIM)
      programs = loss_programs(contrast, mesh, views=tuple(embs), bank_momentum=0.5)
      try:
        out, seconds[product_name] = compile_seconds(programs[0], bank, usable, batch, embs)
      except Exception as error:  # JAX and XLA raise errors of several types for a product that a device does not have
        print(f"{name}, {product_name}: {str(error).splitlines()[0]}", flush=True)
        continue
      losses[product_name] = float(out[-1])
      runs[product_name] = chained(programs, bank, usable, batch, embs)
    each = milliseconds(runs, steps=2 if given.tiny else 10)
    found[name] = {product_name: {
      "milliseconds": each[product_name], "compile_seconds": seconds[product_name], "loss": losses[product_name],
      "difference": abs(losses[product_name] / losses["exact"] - 1)} for product_name in runs}
    print(name, found[name], flush=True)
  finish(batch=setting.batch, images=setting.images, negatives=setting.negatives, **found)


if __name__ == "__main__":
  main()
