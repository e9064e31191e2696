"""Times ways to apply the colour jitter in random order, and whole views. `python -m benchmarks.views`

Prints milliseconds per batch (median of interleaved rounds, without compilation) on the default device.
"""

import functools
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from pirl_jax.views import operations, photometric
from pirl_jax.views.jigsaw import Jigsaw
from pirl_jax.views.recipe import BASE, GBLUR, Recipe
from pirl_jax.views.two_views import make_views

ROUNDS = 5
STEPS = (
  operations.adjust_brightness,
  operations.adjust_contrast,
  operations.adjust_saturation,
  operations.adjust_hue,
)


def factors(drawn):
  """Returns the parameters of the four STEPS."""
  return drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue


def fixed_order(image, drawn):
  """Brightness, contrast, saturation, hue in this order; the random orders are compared with this time."""
  for step, value in zip(STEPS, factors(drawn), strict=True):
    image = step(image, value)
  return image


def slots(image, drawn):
  """The way of this project: three blend slots, hue, three blend slots."""
  brightness, contrast, saturation, hue = factors(drawn)
  return photometric.color_jitter(
    image, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue, places=drawn.places
  )


def select_of_four(image, drawn):
  """Four turns in a loop, as in `slots`; each turn computes all four steps and selects one."""

  def turn(number, image):
    results = [step(image, value) for step, value in zip(STEPS, factors(drawn), strict=True)]
    return jax.lax.select_n(jnp.argmax(drawn.places == number), *results)

  return jax.lax.fori_loop(0, 4, turn, image)


def switch_of_orders(image, drawn):
  """`lax.switch` over the 24 orders; under vmap every branch is computed."""

  def branch(order):
    def run(image):
      for i in order:
        image = STEPS[i](image, factors(drawn)[i])
      return image

    return run

  orders = list(itertools.permutations(range(4)))
  known = jnp.asarray(np.argsort(orders, axis=1))
  number = jnp.argmax(jnp.all(known == drawn.places[None], axis=1))
  return jax.lax.switch(number, [branch(order) for order in orders], image)


def time_all(cases):
  """Returns {name: milliseconds} of `cases` {name: function without arguments}; compiles and warms up first."""
  for run in cases.values():
    jax.block_until_ready(run())
  times = {name: [] for name in cases}
  for _ in range(ROUNDS):
    for name, run in cases.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(1e3 * (time.perf_counter() - start))
  return {name: statistics.median(values) for name, values in times.items()}


def crops(rng, num, size):
  """Returns u8[num, size, size, 3] noise on the device."""
  return jnp.asarray(rng.integers(0, 256, (num, size, size, 3), np.uint8))


def jitter_cases(rng, sizes):
  """Returns a function for each way to jitter; it runs over all `sizes`, (number of images, side in pixels)."""
  ways = (fixed_order, slots, select_of_four, switch_of_orders)
  recipe = Recipe(group_probability=0, grayscale_probability=0, flip_probability=0)
  batches = []
  for num, size in sizes:
    keys = jax.random.split(jax.random.key(0), num)
    drawn = jax.jit(jax.vmap(lambda key: photometric.draw_photometric(key, recipe=recipe)))(keys)
    batches.append((crops(rng, num, size), drawn))

  def of(way):
    def one(image, drawn):
      return jnp.moveaxis(way(jnp.moveaxis(image, -1, 0).astype(jnp.float32), drawn), 0, -1)

    step = jax.jit(lambda batches: [jax.vmap(one)(*batch) for batch in batches])
    return lambda: step(batches)

  return {way.__name__: of(way) for way in ways}


def views_cases(rng):
  """Returns functions that make whole views, cut and normalised, for the sizes of the embedded run and of ImageNet."""
  cases = {}
  for name, num, size, pretext_size, patch_size in (("embedded", 128, 32, 36, 10), ("imagenet", 64, 224, 255, 64)):
    keys = jax.random.split(jax.random.key(0), num)
    image, pretext = crops(rng, num, size), crops(rng, num, pretext_size)
    jigsaw = Jigsaw(crop_size=pretext_size, crop_scale=(0.6, 1.0), grid=3, patch_size=patch_size)
    for list_name, recipe in (("base", BASE), ("gblur", GBLUR)):
      views = jax.jit(make_views(jigsaw, recipe=recipe, pretext_recipe=recipe))
      label = f"views {list_name}, {name}: {num} x ({size} px + 9 of {patch_size} px)"
      cases[label] = functools.partial(views, keys, image, pretext)
  return cases


def main():
  """Prints the table."""
  rng = np.random.default_rng(0)
  print(f"{jax.devices()[0].device_kind}, {ROUNDS} rounds, ms a batch")
  for title, sizes in (("128 x (32 px + 9 of 10 px)", [(128, 32), (1152, 10)]),
                       ("64 x (224 px + 9 of 64 px)", [(64, 224), (576, 64)])):
    print(f"\ncolour jitter, {title}")
    for name, milliseconds in time_all(jitter_cases(rng, sizes)).items():
      print(f"  {name:<52}{milliseconds:10.1f}", flush=True)
  print("\nwhole views")
  for name, milliseconds in time_all(views_cases(rng)).items():
    print(f"  {name:<52}{milliseconds:10.1f}", flush=True)


if __name__ == "__main__":
  main()
