"""Writes files as PyTorch does, in both of its containers, without PyTorch: opcode by opcode."""

import io
import pickle
import struct
import zipfile

import numpy as np

KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage", "float64": "DoubleStorage"}


class Raw:
  """Opcodes that go into the pickle as they are."""

  def __init__(self, opcodes):
    self.opcodes = opcodes


def planted(path):
  """Returns the opcodes of a call that would create the file `path`."""
  code = f"open({str(path)!r}, 'w').close()"
  return Raw(b"cbuiltins\nexec\n" + _string(code) + b"\x85R")


def _string(text):
  return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _opcodes(value, storages, legacy):
  def of(inner):
    return _opcodes(inner, storages, legacy)

  if isinstance(value, Raw):
    return value.opcodes
  if isinstance(value, dict):
    items = b"".join(of(name) + of(inner) for name, inner in value.items())
    return b"ccollections\nOrderedDict\n)R(" + items + b"u"
  if isinstance(value, str):
    return _string(value)
  if isinstance(value, np.ndarray):
    key = str(len(storages))
    storages[key] = value
    kind = f"ctorch\n{KINDS[str(value.dtype)]}\n".encode()
    place = b"(" + _string("storage") + kind + _string(key) + _string("cpu") + of(value.size) + (
      b"N" if legacy else b"") + b"tQ"
    strides = tuple(step // value.itemsize for step in value.strides)
    sizes = b"".join(b"(" + b"".join(map(of, numbers)) + b"t" for numbers in (value.shape, strides))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + of(0) + sizes + b"\x89" + of({}) + b"tR"
  return pickle.dumps(value, protocol=2)[2:-1]


def _pickle(value, storages, legacy=False):
  return b"\x80\x02" + _opcodes(value, storages, legacy) + b"."


def write_zip(path, tree, compression=zipfile.ZIP_STORED):
  storages = {}
  content = _pickle(tree, storages)
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", content)
    archive.writestr("archive/version", "3\n")
    for key, value in storages.items():
      archive.writestr(f"archive/data/{key}", value.tobytes("A"))


def write_legacy(path, tree):
  storages, file = {}, io.BytesIO()
  content = _pickle(tree, storages, legacy=True)
  for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}):
    file.write(pickle.dumps(value, protocol=2))
  file.write(content)
  file.write(pickle.dumps(sorted(storages), protocol=2))
  for key in sorted(storages):
    file.write(struct.pack("<q", storages[key].size) + storages[key].tobytes("A"))
  path.write_bytes(file.getvalue())


WRITERS = {"zip": write_zip, "legacy": write_legacy}
