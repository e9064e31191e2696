"""Exports a run's network for other programs: python launch.py --config=configs/export.py --config.checkpoint=RUN

The folder is RUN/export, or RUN/export-FORMAT for another format than timm; --workdir=DIR writes it to DIR.
"""

from ml_collections import ConfigDict

from pirl_jax.errors import UserError

VARIANTS = ("",)


def get_config(variant: str = "") -> ConfigDict:
  """Returns the config, which has no variants.

  Raises:
    UserError: a variant is given.
  """
  if variant not in VARIANTS:
    raise UserError(f"configs/export.py has no variant {variant!r}")
  config = ConfigDict()
  config.job = "export"  # the job that launch.py runs
  config.checkpoint = ""  # the run's folder, or a file of weights
  config.step = 0  # of the checkpoint; 0: the newest
  # "timm" (a folder for timm and the Hugging Face Hub), "torchvision" (the same names, one file), "detectron2", "onnx"
  # (needs the package onnx), or "flax" (msgpack).
  config.format = "timm"
  config.heads = False  # True: heads.safetensors holds the heads f and g, too
  config.bank = False  # True: bank.safetensors holds the memory bank, with the list of the images
  config.license = "unknown"  # of the weights: an identifier of the Hugging Face Hub, such as cc-by-nc-4.0
  # USER/REPO of the Hugging Face Hub to which the folder is uploaded; needs the package huggingface_hub and a token.
  config.push = ""
  return config
