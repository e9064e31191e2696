"""What the chip can do at most: copies through its memory, and products. `python -m benchmarks.gpu.ceilings`"""

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.gpu.setting import arguments, finish, milliseconds


def main() -> None:
  """Prints GB/s and TFLOP/s."""
  given = arguments(__doc__)
  size, numbers = (128, 2**16) if given.tiny else (8192, 2**30)
  levels = jnp.zeros(numbers, jnp.uint32)
  copy = jax.jit(lambda x: x + 1)
  runs = {"copy": lambda: copy(levels)}
  for name, dtype, precision in (("bfloat16", "bfloat16", None), ("float32", "float32", lax.Precision.HIGHEST)):
    factor = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(lambda x, precision=precision: jnp.matmul(x, x, precision=precision))
    runs[name] = lambda product=product, factor=factor: product(factor)
  times = milliseconds(runs)
  finish(gigabytes_per_second=2 * levels.nbytes / times["copy"] / 1e6,
         tflops={name: 2 * size**3 / times[name] / 1e9 for name in runs if name != "copy"}, milliseconds=times)


if __name__ == "__main__":
  main()
