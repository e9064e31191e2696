"""Images per second and core of this project's input pipeline, compared with the usual pipeline with Pillow.

  python -m benchmarks.input_pipeline FOLDER [--seconds=10] [--rounds=5]

FOLDER holds photographs of full size. Both pipelines do all work of the host for a PIRL sample of ImageNet. They read
and decode the image and crop it twice (224 px of 8-100 % of its area, 255 px of 60-100 %). In the usual pipeline the
host also makes the views: 9 patches of 64 px from the 255 px crop, colour jitter and random grey on all ten crops,
conversion to floats, normalisation, one batch. In this project the device makes the views, in about a hundredth of its
time. This project's pipeline is measured twice: with whole images decoded, and with `data.reduced_decoding`. All
pipelines run in one thread. Images are counted per CPU time of the process, so other work on the machine counts little.
The rounds are interleaved, because the speed of a machine changes.

The last line is the ceiling of one process: samples per second of wall-clock time if nothing is decoded. What remains
is the work of the Python interpreter, which one process does on one core at a time, whatever the number of threads.
"""

import argparse
import contextlib
import dataclasses
import os
import random
import statistics
import time

import numpy as np
from PIL import Image, ImageEnhance

from pirl_jax.data.batches import train_batches
from pirl_jax.data.crops import crop_box
from pirl_jax.data.records import Record, Source
from pirl_jax.data.sources import DataSettings, open_source

CROPS = {"image_crop": (224, (0.08, 1.0)), "pretext_crop": (255, (0.6, 1.0))}
"""Side in pixels and share of the image's area of both crops of a sample of ImageNet."""

_MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
_STD = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]


def main() -> None:
  """Runs both pipelines in turn and prints one table."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("folder", help="folder of photographs")
  parser.add_argument("--seconds", type=float, default=10, help="CPU seconds of each pipeline in each round")
  parser.add_argument("--rounds", type=int, default=5)
  arguments = parser.parse_args()

  settings = DataSettings("folder", root=arguments.folder, split="")
  source = open_source(settings)
  print(source.description)
  paths = [os.path.join(arguments.folder, source.image_name(i)) for i in range(len(source))]
  pipelines = {"pillow": pillow_samples(paths), "ours": our_samples(source),
               "reduced": our_samples(open_source(dataclasses.replace(settings, reduced_decoding=True)))}
  for samples in pipelines.values():  # first use: caches, tables, look-ups
    next(samples)
  speeds = {name: [] for name in pipelines}
  for _ in range(arguments.rounds):
    for name, samples in pipelines.items():
      speeds[name].append(speed(samples, arguments.seconds))

  print(
    f"\nimages per second and core, {arguments.rounds} rounds of {arguments.seconds:g} CPU seconds each"
  )
  print(f"{'pipeline':<28}{'minimum':>9}{'median':>9}{'maximum':>9}")
  titles = {"pillow": "Pillow, jitter on ten crops", "ours": "pirl_jax.data", "reduced": "... reduced decoding"}
  for name, title in titles.items():
    print(row(title, speeds[name]))
  for name in ("ours", "reduced"):
    print(row(f"{titles[name]} / Pillow", [a / b for a, b in zip(speeds[name], speeds["pillow"], strict=True)]))
  ceilings = [ceiling(arguments.seconds) for _ in range(arguments.rounds)]
  print(row("ceiling of a process (wall)", ceilings))


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
  batches = train_batches(source, crops=CROPS, batch_size=min(32, len(source)), seed=0, start_step=0, num_threads=0)
  for batch in batches:
    yield len(batch["index"])


class Decoded(Source):
  """Images of one pixel that need no decoding."""

  description, fingerprint, class_names = "one pixel", "", ()

  def __len__(self):
    """Returns the number of images."""
    return 2**20

  def __getitem__(self, index):
    """Returns the pixel."""
    return Record(np.zeros((1, 1, 3), np.uint8), -1)

  def image_name(self, index):
    """Returns the number."""
    return str(index)

  def labels(self):
    """Returns None."""


def ceiling(seconds: float, num_threads: int = 16) -> float:
  """Returns samples per second of wall-clock time of one process whose images cost next to nothing."""
  batches = train_batches(Decoded(), crops={name: (1, scale) for name, (_, scale) in CROPS.items()}, batch_size=256,
                          seed=0, start_step=0, num_threads=num_threads)
  with contextlib.closing(batches):
    next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
      count += len(next(batches)["index"])
    return count / (time.perf_counter() - start)


def pillow_samples(paths: list[str]):
  """Yields the number of samples in each batch of the usual pipeline.

  A batch is images f32[B, 3, 224, 224] and patches f32[B, 9, 3, 64, 64].
  """
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
  """Returns the image with its hue shifted by a share of the colour circle, on 8-bit HSV."""
  hue, saturation, value = image.convert("HSV").split()
  turned = Image.fromarray(np.asarray(hue) + np.uint8(int(share * 255) % 256))
  return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


if __name__ == "__main__":
  main()
