"""The estimate of a step's needs: layers against published numbers, memory and bytes against compiled programs."""

import pytest

from pirl_jax.choosing.estimate import PASSING, count, estimate
from pirl_jax.configs import pirl, supervised

SMALL = ("data.image_size", 64), ("jigsaw.crop_size", 72), ("jigsaw.patch_size", 20)
COMPILED = {
  # GB beside the state, GB through the memory of an H100 in a step of pirl:imagenet in bfloat16, with these fields:
  # python -m benchmarks.compile_for --chip=h100 --config=pirl:imagenet --config.model.dtype=bfloat16, jax 0.10.2
  (): (63.33, 704.3),
  (("batch_size", 128),): (9.85, 86.9),
  (("batch_size", 128), ("model.remat", True)): (4.48, 109.6),
  (("model.remat", True),): (35.83, 856.1),
  (("micro_batches", 8),): (9.78, 685.5),
  (("batch_size", 128), ("num_negatives", 0), ("loss", "infonce")): (9.23, 125.7),
  (("batch_size", 128), ("bank.encoder_momentum", 0.999)): (9.93, 97.8),
  (("model.arch", "resnet18"), *SMALL): (2.30, 20.2),
  (("model.arch", "resnet18"), ("batch_size", 128), *SMALL): (0.37, 4.1),
}


def config_of(fields):
  config = pirl.get_config("imagenet")
  config.model.dtype = "bfloat16"
  config.update_from_flattened_dict(fields)
  return config


def test_the_layers_of_a_resnet50_have_the_published_numbers():
  """torchvision: 4.09 G multiplications, 25.557 M parameters; Designing Network Design Spaces: 11.1 M activations."""
  counted = count(supervised.get_config("imagenet"), 1_000)
  assert counted.parameters == 25_557_032 and counted.norms == 53
  assert sum(layer.flops for layer in counted.layers) == pytest.approx(2 * 4.09e9, rel=2e-3)
  assert sum(layer.given for layer in counted.layers) == pytest.approx(11.1e6, rel=5e-3)


def test_both_views_are_counted():
  config = pirl.get_config("imagenet")
  both = count(config, 1_000)
  assert {layer.call for layer in both.layers} == {1, 2} and both.norms == 106
  patches, image = (sum(layer.flops for layer in both.layers if layer.call == call) for call in (1, 2))
  assert patches / image == pytest.approx(9 * 64**2 / 224**2, rel=0.02)
  assert both.kept(remat=True) < both.kept(remat=False) / 2


@pytest.mark.parametrize("fields", COMPILED)
def test_the_estimate_is_within_a_quarter_of_compiled_programs(fields):
  found = estimate(config_of(dict(fields)), num_images=1_281_167, num_classes=1_000, num_devices=1)
  memory, traffic = COMPILED[fields]
  assert found.memory[PASSING] == pytest.approx(1e9 * memory, rel=0.25)
  assert sum(found.traffic.values()) == pytest.approx(1e9 * traffic, rel=0.25)
