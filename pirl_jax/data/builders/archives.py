"""Where an official archive comes from, and how its members are read record by record."""

import contextlib
import pathlib
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO

import numpy as np
import requests
import tensorflow_datasets as tfds

from pirl_jax.errors import UserError


def fetch(dl_manager: tfds.download.DownloadManager, url: str) -> pathlib.Path:
  """Returns the path of the archive: from TFDS's folder of manual downloads if it lies there, else
  downloaded.

  Raises:
    UserError: neither there nor to be had; says which file belongs where.
  """
  by_hand = pathlib.Path(dl_manager.download_dir) / "manual" / url.rsplit("/", 1)[1]
  if by_hand.is_file():
    return by_hand
  try:
    # TFDS tries for minutes before it gives up without a network; one look tells at once.
    requests.get(url, stream=True, timeout=20).raise_for_status()
    return pathlib.Path(dl_manager.download(url))
  except (
    Exception
  ) as error:  # requests, TFDS's own errors, time-outs: whatever it is, the archive is not here
    raise UserError(
      f"{url} cannot be downloaded ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
      f"without a network, put that file at {by_hand} and start again"
    ) from error


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[tarfile.TarFile]:
  """Opens a .tar or .tar.gz; damage found while it is open becomes a UserError."""
  try:
    with tarfile.open(path) as archive:
      yield archive
  except (tarfile.TarError, EOFError, KeyError, zlib.error, OSError) as error:
    words = " ".join(str(error).split())
    raise UserError(f"{path} is not the whole archive ({words}); delete it and fetch it again") from error


def opened_member(archive: tarfile.TarFile, member: str | tarfile.TarInfo) -> IO[bytes]:
  """Returns a file of the archive, to be closed by the caller.

  Raises:
    KeyError: no such file. `opened` makes it a UserError.
  """
  file = archive.extractfile(member)
  if file is None:
    raise KeyError(f"{member} is no file")
  return file


def records(archive: tarfile.TarFile, member: str, num_bytes: int) -> Iterator[np.ndarray]:
  """Yields the records u8[num_bytes] of one member of the archive, without holding more than one of them.

  Raises:
    KeyError, EOFError: no such member; a member that ends inside a record. `opened` makes them UserErrors.
  """
  with opened_member(archive, member) as file:
    while data := file.read(num_bytes):
      if len(data) < num_bytes:
        raise EOFError(f"{member} ends inside a record")
      yield np.frombuffer(data, np.uint8)
