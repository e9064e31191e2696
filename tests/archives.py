"""Archives like the official ones of data sets, made here."""

import io
import tarfile

import numpy as np


def write_archive(path, members, mode="w:gz"):
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, mode) as archive:
    for name, data in members.items():
      entry = tarfile.TarInfo(name)
      entry.size = len(data)
      archive.addfile(entry, io.BytesIO(data))


def cifar_archive(root, per_file=20, cut=0):
  """Writes a small cifar-10-binary.tar.gz; returns {split: {label + pixels: count}} in the order of the
  files."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (6, per_file, 32, 32, 3), dtype=np.uint8)
  labels = rng.integers(0, 10, (6, per_file))
  names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
  members = {}
  # The official archive has its files in no order either.
  for file in (3, 0, 5, 2, 4, 1):
    # The format: label, then the red plane row by row, the green, the blue.
    records = [
      bytes([labels[file, i]]) + b"".join(images[file, i, :, :, c].tobytes() for c in range(3))
      for i in range(per_file)
    ]
    members[f"cifar-10-batches-bin/{names[file]}"] = b"".join(records)[: None if not cut else -cut]
  write_archive(root / "downloads" / "manual" / "cifar-10-binary.tar.gz", members)
  return {
    split: [(images[f, i], int(labels[f, i])) for f in files for i in range(per_file)]
    for split, files in (("train", range(5)), ("test", [5]))
  }
