"""The fields that a run's config leaves open: each choice is possible, fits the memory, and follows what is given."""

import dataclasses

import pytest

from pirl_jax.choosing import choices
from pirl_jax.choosing.arranging import arrange
from pirl_jax.choosing.choices import MARGIN, choose_settings, open_fields, recalled
from pirl_jax.choosing.estimate import estimate
from pirl_jax.choosing.facts import Facts
from pirl_jax.configs import pirl, supervised
from pirl_jax.configs.data_sets import CHOSEN, leave_open
from pirl_jax.data.batches import steps_per_epoch
from pirl_jax.errors import UserError
from pirl_jax.method.memory_bank import create_layout
from pirl_jax.storage.settings import flatten
from pirl_jax.training.parts import check_config, check_shares

LAPTOP = Facts(platform="cpu", device="cpu", num_devices=1, device_bytes=8e9, bfloat16=False, num_cores=2,
               host_bytes=8 * 2**30, num_images=50_000, num_classes=0, shorter_side=32)
CARD = Facts(platform="gpu", device="a card", num_devices=1, device_bytes=0.75 * 16e9, bfloat16=True, num_cores=8,
             host_bytes=64 * 2**30, num_images=2_000, num_classes=0, shorter_side=375)


def chosen(facts, config=None, **given):
  config = config or pirl.get_config("folder")
  config.update_from_flattened_dict(given)
  return choose_settings(arrange(config)[0], facts)


def memory_of(config, facts):
  needs = estimate(config, num_images=facts.num_images, num_classes=2, num_devices=facts.num_devices)
  return sum(needs.memory.values())


def test_a_laptop_and_fifty_thousand_small_images_give_the_variant_folder_small():
  found, small = flatten(chosen(LAPTOP)[0].to_dict()), flatten(pirl.get_config("folder_small").to_dict())
  free = {"name", "data.split", "data.holdout", "data.kept_side", "checkpoint.every_steps", "log.every_steps",
          "evaluate.learning", "data.num_threads"}
  assert {name: value for name, value in found.items() if name not in free and value != small[name]} == {}


@pytest.mark.parametrize("num_images", [50, 51, 64, 180, 689, 2_000, 50_000, 999_999, 1_281_167, 10_000_000])
@pytest.mark.parametrize("platform, num_devices", [("cpu", 1), ("cpu", 2), ("gpu", 1), ("gpu", 8), ("tpu", 8)])
def test_every_size_of_a_folder_gives_a_run_that_is_possible(num_images, platform, num_devices):
  facts = dataclasses.replace(LAPTOP if platform == "cpu" else CARD, platform=platform, num_devices=num_devices,
                              num_images=num_images)
  config, made = chosen(facts)
  assert not open_fields(config) and {choice.field for choice in made} <= set(CHOSEN)
  assert all(choice.why and flatten(config.to_dict())[choice.field] == choice.value for choice in made)
  check_config(config)
  check_shares(config, num_devices)
  create_layout(num_images, num_devices=num_devices, num_negatives=config.num_negatives)
  steps = config.num_epochs * steps_per_epoch(num_images, config.batch_size)
  assert steps >= 1_000 and config.num_negatives <= num_images
  assert config.loss == ("nce" if num_images >= 1_000_000 else "infonce")


@pytest.mark.parametrize("gigabytes", [16, 24, 40, 80])
@pytest.mark.parametrize("size, arch", [(224, "resnet50"), (96, "resnet18")])
def test_the_parts_of_a_batch_fit_the_memory_of_a_card(gigabytes, size, arch):
  facts = dataclasses.replace(CARD, device_bytes=0.75 * gigabytes * 1e9)
  config, _ = chosen(facts, **{"data.image_size": size, "model.arch": arch})
  assert MARGIN * memory_of(config, facts) <= facts.device_bytes
  if config.micro_batches > 1 and not config.model.remat:  # no more parts than are needed
    fewer = choices.with_values(config, {"micro_batches": config.micro_batches // 2})
    assert MARGIN * memory_of(fewer, facts) > facts.device_bytes


def test_a_card_that_is_too_small_is_told_before_anything_compiles():
  config, _ = chosen(dataclasses.replace(CARD, device_bytes=3e9))
  assert config.model.remat
  with pytest.raises(UserError, match=r"needs about .* GiB even in small parts.*--config.model.arch=resnet18"):
    chosen(dataclasses.replace(CARD, device_bytes=1e9))


def test_given_fields_stay_and_the_others_follow():
  given = {"data.image_size": 64, "batch_size": 32, "num_epochs": 7, "loss": "nce", "evaluate.split": "val"}
  config, made = chosen(CARD, **given)
  assert given.items() <= flatten(config.to_dict()).items()
  assert not {choice.field for choice in made} & set(given)
  assert config.model.arch == "resnet18" and config.jigsaw.crop_size == 63 and config.temperature == 0.07
  assert config.data.holdout == 0 and config.evaluate.every_epochs == 3


def test_a_share_that_is_given_takes_the_place_of_a_split_that_is_found(tmp_path):
  for name in ("train", "test"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.png").touch()
  config = pirl.get_config("folder")
  config.data.root = str(tmp_path)
  found, _ = arrange(config)
  assert (found.data.split, found.evaluate.split, found.data.holdout) == ("train", "test", 0)
  config.data.holdout = 0.2
  found, _ = arrange(config)
  assert (found.data.split, found.evaluate.split, found.data.holdout) == ("train", "", 0.2)


def test_small_images_get_small_views_and_a_small_network_on_a_card():
  assert [chosen(dataclasses.replace(CARD, shorter_side=side))[0].data.image_size
          for side in (28, 64, 96, 200)] == [32, 64, 96, 224]
  assert chosen(dataclasses.replace(CARD, shorter_side=28))[0].model.arch == "resnet18"
  assert chosen(dataclasses.replace(CARD, bfloat16=False))[0].model.dtype == "float32"


def test_a_run_that_resumes_takes_the_stored_values():
  config = pirl.get_config("folder")
  stored = chosen(LAPTOP)[0]
  config.batch_size = 17
  found = recalled(config, stored.to_dict())
  assert found.batch_size == 17 and not open_fields(found)
  found.batch_size = stored.batch_size
  assert found.to_dict() == stored.to_dict()


def test_any_field_of_the_list_can_be_left_open_in_any_variant():
  config = supervised.get_config("imagenet")
  leave_open(config, ("micro_batches", "model.remat", "model.dtype"))
  found, made = chosen(dataclasses.replace(CARD, num_images=1_281_167, num_classes=1_000), config)
  assert {choice.field for choice in made} == {"micro_batches", "model.remat", "model.dtype"}
  assert found.model.dtype == "bfloat16"
