"""Images per second of the feature export against the network's forward pass alone.

  python -m benchmarks.features [FOLDER] [--rounds=9] [--seconds=2] [--num=192] [--format=npz]

The export is all that `configs/evaluate.py:features` does for a split: it reads the images, puts them on the devices,
computes, fetches the features and writes the file. The forward pass has its batches on the devices already and leaves
the features there: the same images, batch size and program, nothing else. Both are compiled before. They take turns
of some seconds, in changing order, because machines change their speed. Weights are random: they take as long.

Without FOLDER: the network and the images of the embedded run, and a ResNet-18 on textures of 128 pixels. With a
FOLDER of photographs: a ResNet-50 at 224 pixels on `num` of them, read and decoded in as many threads as there are
cores.
"""

import argparse
import contextlib
import io
import itertools
import os
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

from pirl_jax.data.records import Source
from pirl_jax.data.sources import DataSettings, open_source
from pirl_jax.data.subsets import Subset
from pirl_jax.evaluation.inputs import Images
from pirl_jax.evaluation.layers import layer_features
from pirl_jax.evaluation.protocols.export import ExportSettings, export_features
from pirl_jax.models.heads import ImageHead
from pirl_jax.models.network import Model, Network
from pirl_jax.models.resnet import create_resnet
from pirl_jax.runtime.mesh import create_mesh, split, whole
from pirl_jax.views.normalisation import normalise_image


def main() -> None:
  """Prints a table for each case."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("folder", nargs="?", help="folder of photographs")
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--seconds", type=float, default=2, help="least length of a turn")
  parser.add_argument("--num", type=int, default=192, help="images of the larger networks")
  parser.add_argument("--size", type=int, default=128, help="of the textures of the ResNet-18, pixels")
  parser.add_argument("--embedded", type=int, default=4_096, help="images of the embedded run's network")
  parser.add_argument("--format", default="npz")
  arguments = parser.parse_args()
  mesh = create_mesh()
  print(f"{mesh.size} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, images per second")
  if arguments.folder:
    photographs = open_source(DataSettings("folder", root=arguments.folder, split=""))
    first = Subset(photographs, range(min(arguments.num, len(photographs))))
    cases = [("resnet50", "imagenet", Images(first, 224, 224 / 256, 32, os.cpu_count() or 1))]
  else:
    cases = [("resnet8", "3x3s2", Images(textures(arguments.embedded, 32), 32, 1.0, 256, 2)),
             ("resnet18", "imagenet", Images(textures(arguments.num, arguments.size), arguments.size, 1.0, 32, 2))]
  for arch, stem, images in cases:
    print(f"\n{arch}, {len(images)} images at {images.image_size} px, batches of {images.batch_size}")
    rounds = compare(create_model(arch, stem, images, mesh), images, mesh, arguments)
    print(f"{'':<10}{'forward':>10}{'export':>10}{'ratio':>8}")
    for number, (forward, export) in enumerate(rounds, 1):
      print(f"{f'round {number}':<10}{forward:>10,.1f}{export:>10,.1f}{export / forward:>8.1%}")
    forward, export, ratio = (statistics.median(values) for values in zip(
      *((forward, export, export / forward) for forward, export in rounds), strict=True))
    print(f"{'median':<10}{forward:>10,.1f}{export:>10,.1f}{ratio:>8.1%}", flush=True)


def textures(num: int, size: int) -> Source:
  """Returns embedded images."""
  return open_source(DataSettings("embedded", num_images=num, image_size=size))


def create_model(arch: str, stem: str, images: Images, mesh) -> Model:
  """Returns a network of random weights, on every device."""
  network = Network(create_resnet(arch, stem=stem), image_head=ImageHead(128))
  image = jnp.zeros((1, images.image_size, images.image_size, 3))
  init = jax.jit(lambda key: network.init(key, image, None, train=False), out_shardings=whole(mesh))
  return Model(network, init(jax.random.key(0)))


def compare(model: Model, images: Images, mesh, arguments) -> list[tuple[float, float]]:
  """Returns (forward, export) in images per second, for each round."""
  forward_fn = layer_features(model.network, ("pooled",))
  forward_jit = jax.jit(lambda variables, image: forward_fn(variables, normalise_image(image)))
  batches = [jax.device_put(batch["image"], split(mesh)) for batch in images.test_batches()]

  def forward():
    jax.block_until_ready([forward_jit(model.variables, batch) for batch in batches])

  with tempfile.TemporaryDirectory() as folder:
    def export():
      with contextlib.redirect_stdout(io.StringIO()):  # the progress line
        export_features(model, images, ExportSettings("pooled", (), arguments.format), mesh=mesh,
                        path=os.path.join(folder, "features"))

    def speed(run):
      count, start = 0, time.perf_counter()
      while time.perf_counter() - start < arguments.seconds:
        run()
        count += len(images)
      return count / (time.perf_counter() - start)

    forward(), export()  # compile
    rounds = []
    for order in itertools.islice(itertools.cycle([(forward, export), (export, forward)]), arguments.rounds):
      found = {run: speed(run) for run in order}
      rounds.append((found[forward], found[export]))
  return rounds


if __name__ == "__main__":
  main()
