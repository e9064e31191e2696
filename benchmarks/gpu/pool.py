"""The max pool with its gradient: by masks, as on a GPU now, and by XLA's scatter. `python -m benchmarks.gpu.pool`"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.gpu.setting import arguments, compile_seconds, finish, milliseconds
from pirl_jax.models.pooling import max_pool


def main() -> None:
  """Prints milliseconds for the images of a batch, and by how much the gradients differ."""
  setting = (given := arguments(__doc__)).setting
  side = setting.image_size // 2
  points = jax.random.normal(jax.random.key(0), (setting.batch, side, side, setting.channels)).astype(setting.dtype)
  slope = jax.random.normal(jax.random.key(1), (setting.batch, side // 2, side // 2, setting.channels)).astype(
    setting.dtype)

  def plain(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

  runs, found, seconds = {}, {}, {}
  for name, pool in (("now", max_pool), ("scatter", plain)):
    both = jax.jit(lambda x, slope, pool=pool: (pool(x), jax.vjp(pool, x)[1](slope)[0]))
    found[name], seconds[name] = compile_seconds(both, points, slope)
    runs[name] = lambda both=both: both(points, slope)
  differences = [float(jnp.max(jnp.abs(one - other))) for one, other in zip(*found.values(), strict=True)]
  del found
  finish(batch=setting.batch, compile_seconds=seconds, forward_difference=differences[0],
         gradient_difference=differences[1], milliseconds=milliseconds(runs, steps=2 if given.tiny else 10))


if __name__ == "__main__":
  main()
