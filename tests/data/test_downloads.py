"""Downloads of TFDS: without an answer they fail soon, and they end with the program."""

import concurrent.futures
import http.server
import threading
import time

import pytest
import requests
from tensorflow_datasets.core.download import downloader

from pirl_jax.data.builders import downloads


class Endless(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    self.send_response(200)
    self.end_headers()
    try:
      while not self.server.over.wait(0.01):
        self.wfile.write(bytes(10_000))
    except OSError:
      self.server.left.set()

  def log_message(self, *_):
    pass


@pytest.fixture
def server():
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless)
  server.over, server.left = threading.Event(), threading.Event()
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield server
  server.over.set()
  server.shutdown()
  server.server_close()


def begin(loader, port, folder):
  return loader._executor.submit(loader._sync_download, f"http://127.0.0.1:{port}/set.tar", folder)


def test_an_interruption_ends_a_download_that_is_running(server, tmp_path):
  loader = downloader._Downloader(1)
  before = vars(downloader).copy()
  with loader.tqdm(), pytest.raises(KeyboardInterrupt), downloads.bounded_downloads():
    found = begin(loader, server.server_port, tmp_path)
    with pytest.raises(concurrent.futures.TimeoutError):
      found.result(timeout=0.3)
    raise KeyboardInterrupt
  assert isinstance(found.exception(timeout=5), ConnectionAbortedError)
  assert (tmp_path / "set.tar").stat().st_size > 0 and server.left.wait(5)
  assert vars(downloader) == before


def test_a_server_that_does_not_answer_is_given_up(server, tmp_path, monkeypatch):
  monkeypatch.setattr(downloads, "READ_SECONDS", 0.1)
  monkeypatch.setattr(downloads, "RETRIES", 1)
  server.over.set()
  monkeypatch.setattr(Endless, "do_GET", lambda self: time.sleep(1))
  loader = downloader._Downloader(1)
  with loader.tqdm(), downloads.bounded_downloads():
    assert isinstance(begin(loader, server.server_port, tmp_path).exception(timeout=5), requests.ConnectionError)


def test_without_a_network_all_tries_take_seconds(tmp_path):
  loader = downloader._Downloader(1)
  began = time.perf_counter()
  with loader.tqdm(), downloads.bounded_downloads():
    error = begin(loader, 1, tmp_path).exception(timeout=20)  # nobody listens at port 1
  assert isinstance(error, requests.ConnectionError) and time.perf_counter() - began < 15
