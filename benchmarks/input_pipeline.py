"""Images per second and core: this project's input pipeline against the usual one with Pillow.

  python -m benchmarks.input_pipeline FOLDER [--seconds=10] [--rounds=5]

FOLDER holds photographs of full size. Both pipelines do the host's whole share of a PIRL sample of ImageNet:
read and decode the image, crop it twice (224 px of 8-100 % of its area, 255 px of 60-100 %). The usual
pipeline then goes on, as the host has to when the device does not: 9 patches of 64 px from the 255 px crop,
colour jitter and random grey on all ten crops, floats, normalised, one batch. Here the device does that, in
about a hundredth of its time. Both run in one thread; the denominator is the CPU time of the process, so that
other work on the machine counts little. Rounds are interleaved, because machines change their speed.
"""

import argparse
import os
import random
import statistics
import time

import numpy as np
from PIL import Image, ImageEnhance

from pirl_jax.data.batches import train_batches
from pirl_jax.data.crops import crop_box
from pirl_jax.data.sources import DataSettings, open_source

_MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
_STD = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]


def main() -> None:
  """Runs both pipelines in turn and prints one table."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("folder", help="folder of photographs")
  parser.add_argument("--seconds", type=float, default=10, help="CPU seconds of each pipeline in each round")
  parser.add_argument("--rounds", type=int, default=5)
  arguments = parser.parse_args()

  source = open_source(DataSettings("folder", root=arguments.folder, split=""))
  print(source.description)
  paths = [os.path.join(arguments.folder, source.image_name(i)) for i in range(len(source))]
  pipelines = {"pillow": pillow_samples(paths), "ours": our_samples(source)}
  for samples in pipelines.values():  # first use: caches, tables, look-ups
    next(samples)
  speeds = {name: [] for name in pipelines}
  for _ in range(arguments.rounds):
    for name, samples in pipelines.items():
      speeds[name].append(speed(samples, arguments.seconds))
  ratios = [ours / pillow for ours, pillow in zip(speeds["ours"], speeds["pillow"], strict=True)]

  print(
    f"\nimages per second and core, {arguments.rounds} rounds of {arguments.seconds:g} CPU seconds each"
  )
  print(f"{'pipeline':<28}{'minimum':>9}{'median':>9}{'maximum':>9}")
  titles = {"pillow": "Pillow, jitter on ten crops", "ours": "pirl_jax.data"}
  for name, title in titles.items():
    print(row(title, speeds[name]))
  print(row("ratio, round by round", ratios))


def row(title: str, values: list[float]) -> str:
  """Returns a line of the table."""
  return f"{title:<28}{min(values):>9.1f}{statistics.median(values):>9.1f}{max(values):>9.1f}"


def speed(samples, seconds: float) -> float:
  """Returns samples per CPU second of this process."""
  count, start = 0, time.process_time()
  while time.process_time() - start < seconds:
    count += next(samples)
  return count / (time.process_time() - start)


def our_samples(source):
  """Yields the number of samples in each batch."""
  batches = train_batches(
    source,
    crops={"image_crop": (224, (0.08, 1.0)), "pretext_crop": (255, (0.6, 1.0))},
    batch_size=min(32, len(source)),
    seed=0,
    start_step=0,
    num_threads=0,
  )
  for batch in batches:
    yield len(batch["index"])


def pillow_samples(paths: list[str]):
  """Yields the number of samples in each batch of the usual pipeline: images f32[B, 3, 224, 224], patches
  f32[B, 9, 3, 64, 64]."""
  rng, pick = np.random.default_rng(0), random.Random(0)
  while True:
    images, patches = [], []
    for path in rng.choice(paths, min(32, len(paths)), replace=False):
      image = Image.open(path).convert("RGB")
      images.append(to_float(colour_jitter(pick, resized_crop(rng, image, 224, (0.08, 1.0)))))
      pretext = resized_crop(rng, image, 255, (0.6, 1.0))
      for cell in range(9):
        left, top = 85 * (cell % 3) + pick.randint(0, 20), 85 * (cell // 3) + pick.randint(0, 20)
        patches.append(to_float(colour_jitter(pick, pretext.crop((left, top, left + 64, top + 64)))))
    images, patches = np.stack(images), np.stack(patches).reshape(-1, 9, 3, 64, 64)
    yield len(images)


def to_float(image: Image.Image) -> np.ndarray:
  """Returns f32[3, H, W], normalised."""
  values = np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 255
  return (values - _MEAN) / _STD


def resized_crop(rng, image: Image.Image, size: int, scale: tuple[float, float]) -> Image.Image:
  """Torchvision's RandomResizedCrop on a PIL image."""
  top, left, height, width = crop_box(rng, image.height, image.width, scale, (3 / 4, 4 / 3))
  return image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)


def colour_jitter(pick: random.Random, image: Image.Image) -> Image.Image:
  """Brightness, contrast, saturation and hue in random order, then grey with probability 0.2."""
  operations = [
    lambda p: ImageEnhance.Brightness(p).enhance(pick.uniform(0.6, 1.4)),
    lambda p: ImageEnhance.Contrast(p).enhance(pick.uniform(0.6, 1.4)),
    lambda p: ImageEnhance.Color(p).enhance(pick.uniform(0.6, 1.4)),
    lambda p: turn_hue(p, pick.uniform(-0.4, 0.4)),
  ]
  pick.shuffle(operations)
  for operation in operations:
    image = operation(image)
  return image.convert("L").convert("RGB") if pick.random() < 0.2 else image


def turn_hue(image: Image.Image, share: float) -> Image.Image:
  """Turns the hue by a share of the circle, on 8-bit HSV."""
  hue, saturation, value = image.convert("HSV").split()
  turned = Image.fromarray(np.asarray(hue) + np.uint8(int(share * 255) % 256))
  return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


if __name__ == "__main__":
  main()
