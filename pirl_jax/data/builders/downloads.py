"""Bounds what TFDS does for a download: how long it waits, and that it ends with the program."""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from tensorflow_datasets.core.download import downloader

CONNECT_SECONDS, READ_SECONDS = 6.0, 30.0
"""Longest wait for a server to answer, and for the next bytes of a file."""

RETRIES = 4
"""TFDS has 10 and doubles the pause each time: three and a half minutes until it says that there is no network."""


@contextlib.contextmanager
def bounded_downloads() -> Iterator[None]:
  """Within it TFDS's downloads fail after half a minute without an answer. An exception, Ctrl-C too, ends all of them.

  TFDS downloads in threads for which Python waits at the end of the program; without this it waits for whole files.
  """
  ended = threading.Event()
  opens, retries = downloader._open_with_requests, downloader.MAX_RETRIES

  def _until_ended(blocks: Iterable[bytes]) -> Iterator[bytes]:
    for block in blocks:
      if ended.is_set():
        raise ConnectionAbortedError("the preparation has ended")
      yield block

  @contextlib.contextmanager
  def _open(url: str, **kwargs: Any) -> Iterator[tuple[Any, Iterable[bytes]]]:
    with opens(url, timeout=(CONNECT_SECONDS, READ_SECONDS), **kwargs) as (response, blocks):
      yield response, _until_ended(blocks)

  downloader._open_with_requests = _open
  downloader.MAX_RETRIES = RETRIES  # pyrefly: ignore[bad-assignment]  # the checker takes the 10 for a constant
  try:
    yield
  except BaseException:
    ended.set()
    raise
  finally:
    downloader._open_with_requests, downloader.MAX_RETRIES = opens, retries
