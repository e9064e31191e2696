"""Uploads an exported folder to the Hugging Face Hub, with the optional package huggingface_hub."""

import importlib.util
import re
from pathlib import Path

from pirl_jax.errors import UserError


def check_target(target: str, written: str) -> None:
  """Raises UserError unless `target` is USER/REPO, the format `written` is "timm" and the package is installed."""
  if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", target):
    raise UserError(f"push={target!r} is not possible: give USER/REPO, a repository of the Hugging Face Hub")
  if written != "timm":
    raise UserError(f"push={target!r} takes a folder of the format timm, and format={written!r} is given; leave one of "
                    "them out")
  if importlib.util.find_spec("huggingface_hub") is None:
    raise UserError("push needs the package huggingface_hub: pip install huggingface_hub, or leave push out and upload "
                    "the folder in a browser")


def push(folder: Path, target: str) -> str:
  """Uploads the files of the folder and returns a line that says where they are now.

  The repository is created if it does not exist.

  Raises:
    UserError: there is no network, no token, or no right to write; the folder on disk is complete all the same.
  """
  import huggingface_hub

  try:
    interface = huggingface_hub.HfApi()
    interface.create_repo(target, exist_ok=True)
    interface.upload_folder(repo_id=target, folder_path=folder, ignore_patterns=["results/*"],
                            allow_patterns=["*.safetensors", "*.json", "*.md", "*.gz"])
  except Exception as error:  # the package raises errors of its own and of three libraries for the network
    raise UserError(f"{folder} is complete, but was not uploaded to {target} ({type(error).__name__}: "
                    f"{' '.join(str(error).split())[:200]}); later: hf upload {target} {folder}") from error
  return f"uploaded to https://huggingface.co/{target}; timm loads hf-hub:{target}"
