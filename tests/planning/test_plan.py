"""The plan of a run: what it prints, that it uses the compiled step if there is a compiler, and what it refuses."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pirl_jax.choosing.estimate import PASSING
from pirl_jax.configs import plan as plan_config
from pirl_jax.errors import UserError
from pirl_jax.planning import plan as plan_lib
from pirl_jax.planning.lowering import PARTS, lower_part
from pirl_jax.runtime import chips, mesh


def config_of(variant="pirl:imagenet", **fields):
  config = plan_config.get_config(variant)
  config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
  return config


def plan_of(variant="pirl:imagenet", **fields):
  return plan_lib.make_plan(config_of(variant, compile=False, **fields))[0]


def test_the_plan_of_a_small_run_on_the_chips_of_a_machine(monkeypatch, capsys):
  monkeypatch.setattr(chips, "prepare_compilers", lambda: None)
  monkeypatch.setattr(chips, "_is_installed", lambda wheel: False)
  plan_lib.run(config_of("pirl", chip="v5e-8"), "")
  said = capsys.readouterr().out
  assert "pirl on 8 x v5e: 4,096 images, batch 128, float32\nan estimate" in said
  assert 'pip install --no-deps --target=compilers "libtpu==0.0.42.*"' in said
  assert "of 16.0\ndoes it fit: yes, into the 15.7 GiB that JAX takes by default\n" in said
  assert "25 epochs of 32 steps" in said


def test_the_flags_for_a_run_that_does_not_fit_by_default():
  plan = plan_of(run__model__dtype="bfloat16")
  gib = 2**30

  def sized(passing):
    return dataclasses.replace(
      plan, needs=dataclasses.replace(plan.needs, memory={**plan.needs.memory, PASSING: passing * gib}))

  assert plan_lib.verdict(sized(50)) == "yes, into the 59.3 GiB that JAX takes by default"
  assert plan_lib.verdict(sized(59.0)) == (
    "not into the 59.3 GiB that JAX takes by default; set XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 in the environment, or "
    "--config.micro_batches=2, or --config.model.remat=True")
  assert "MEM_FRACTION" not in plan_lib.verdict(sized(80)) and "micro_batches=2," in plan_lib.verdict(sized(80))
  assert plan_lib.verdict(plan_of(run__model__dtype="bfloat16", chip="h100-8", images=10**9)).endswith(
    "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 in the environment, or --config.bank.dtype=bfloat16")
  assert plan_lib.verdict(sized(9_000)).endswith("take more devices or a smaller batch")


@pytest.mark.parametrize("memory", [16, 24, 40, 80])
def test_what_is_chosen_for_a_folder_fits_a_card_of_any_memory(memory, capsys):
  plan = plan_of(variant="pirl:folder", images=2_000, memory=float(memory))
  assert plan_lib.verdict(plan).startswith(f"yes, into the {0.75 * memory:.1f} GiB")
  assert "micro_batches" in capsys.readouterr().out and plan.run.model.arch == "resnet50"


@pytest.mark.slow
@pytest.mark.skipif(bool(chips.way_to_compile("h100")), reason="the compiler for the chip is not installed")
@pytest.mark.parametrize("memory", [16, 24, 40, 80])
def test_what_is_chosen_fits_by_the_compiled_program(memory):
  """In a process of its own, because a compiler for a chip has to be there before JAX looks for devices."""
  found = subprocess.run([
    sys.executable, "launch.py", "--config=configs/plan.py:pirl:folder", "--config.images=2000", "--config.chip=h100",
    f"--config.memory={memory}"], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
  assert "read from the step" in found.stdout and "does it fit: yes" in found.stdout


def test_the_time_of_a_step_follows_its_longest_part():
  plan = plan_of(run__model__dtype="bfloat16", run__model__batch_norm="global", chip="h100-8", efficiency=0.5)
  memory = sum(plan.needs.traffic.values()) / 3.35e12
  assert plan.needs.collectives > 212  # a batch norm has four in a step: of both views, forward and backward
  assert plan.step_seconds == pytest.approx(2 * (memory + plan.link_seconds)) and plan.arithmetic_seconds < memory
  slower = dataclasses.replace(plan, needs=dataclasses.replace(plan.needs, cycle_seconds=1.0))
  assert slower.step_seconds == pytest.approx(2 * (1 + plan.link_seconds))


def test_the_figures_of_a_compiled_step_replace_the_estimate(monkeypatch):
  monkeypatch.setattr(chips, "way_to_compile", lambda name: "")
  monkeypatch.setattr(chips, "chips_mesh", lambda name: (mesh.create_mesh(2), chips.CHIPS["h100"]))
  config = config_of("pirl", chip="h100-2", run__data__image_size=16, run__jigsaw__crop_size=18,
                     run__jigsaw__patch_size=5, run__batch_size=32)
  plan, source = plan_lib.make_plan(config)
  assert "the h100's compiler" in source and {"views", "network", "loss"} <= set(plan.needs.traffic)
  assert plan.needs.sent > 4 * 77_000 and plan.needs.flops > 0 and plan.needs.memory[PASSING] > 0


@pytest.mark.parametrize(("fields", "said"), [
  ({"chip": "h300"}, "chip='h300' is unknown; choose from a100, h100"),
  ({"chip": "h100-3"}, "batch_size=1024 does not divide among 3 devices"),
  ({"efficiency": 1.2}, "efficiency=1.2 is not possible"),
  ({"run__batch_size": 0}, "batch_size=0 is not possible"),
  ({"run__data__name": "my_set"}, "the run does not say how many images it has; give --config.images=NUMBER")])
def test_what_is_refused(fields, said):
  with pytest.raises(UserError, match=said):
    plan_of(**fields)


@pytest.mark.parametrize("num_negatives", [128, 0])
def test_the_parts_of_a_step_can_be_lowered(num_negatives):
  config = config_of("pirl").run
  config.update_from_flattened_dict({
    "num_negatives": num_negatives, "data.image_size": 16, "jigsaw.crop_size": 18, "jigsaw.patch_size": 5,
    "batch_size": 32, "model.dtype": "bfloat16"})
  devices = mesh.create_mesh(2)
  for part in ("loss",) if num_negatives == 0 else PARTS:
    assert all("stablehlo" in each.as_text() for each in lower_part(part, config, devices, 512))
  config.objective = "covariant"
  with pytest.raises(UserError, match="part=loss is not possible: pirl has none"):
    lower_part("loss", config, devices, 512)


def test_the_loss_of_a_share_has_the_shapes_of_one_device():
  config = config_of("pirl").run
  config.update(num_negatives=128, batch_size=32)
  look, write = lower_part("loss", config, mesh.create_mesh(2), 512)
  bank, _, batch, embs = look.in_avals[0]
  assert bank.shape == (256, 128) and batch["index"].shape == (32,) and embs["image"].shape == (32, 128)
  assert jax.tree.map(lambda x: x.shape, write.out_info) == (256, 128)
