"""Checksums: the same however the arrays lie, and another after any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.checksums import _sums, checksums, json_checksum

RNG = np.random.default_rng(0)
ARRAYS = {
  "float32": RNG.normal(size=(64, 6)).astype(np.float32),
  "bfloat16": jnp.asarray(RNG.normal(size=(64, 6)), jnp.bfloat16),
  "int32": RNG.integers(-9, 9, 64).astype(np.int32), "bool": RNG.integers(0, 2, 64).astype(bool),
  "scalar": np.float32(0), "uint32": np.uint32(7), "empty": np.zeros((0, 3), np.float32)}


def by_hand(x):
  """The definition once more, in Python's integers."""
  def mix(value):
    value = (value ^ (value >> 16)) * 0x85EBCA6B % 2**32
    value = (value ^ (value >> 13)) * 0xC2B2AE35 % 2**32
    return value ^ (value >> 16)

  first = second = 0
  for place, word in enumerate(np.ravel(x).view(np.uint32).tolist()):
    mixed = mix(word ^ mix(place * 0x9E3779B9 % 2**32))
    first, second = first + mixed, second + mix((mixed + 0x9E3779B9) % 2**32)
  return f"{first % 2**32:08x}{second % 2**32:08x}"


@pytest.mark.parametrize("name", ["float32", "int32", "uint32", "empty"])
def test_by_hand(name):
  assert checksums(ARRAYS[name]) == {"": by_hand(np.asarray(ARRAYS[name]))}


@pytest.mark.parametrize("num_devices", [2, 8])
def test_the_same_on_any_number_of_devices(num_devices):
  mesh = mesh_lib.create_mesh(num_devices)
  placed = {name: jax.device_put(x, mesh_lib.split(mesh) if np.ndim(x) and len(x) else mesh_lib.whole(mesh))
            for name, x in ARRAYS.items()}
  assert checksums(placed) == checksums(ARRAYS)


def test_every_flipped_bit_is_seen():
  x = ARRAYS["float32"][:8]
  before, seen = checksums(x), set()
  for bit in range(x.nbytes * 8):
    changed = np.frombuffer(x.tobytes(), np.uint8).copy()
    changed[bit // 8] ^= 1 << bit % 8
    seen |= set(checksums(changed.view(np.float32).reshape(x.shape)).values())
  assert len(seen) == x.nbytes * 8 and before[""] not in seen


def test_exchanged_values_another_shape_and_a_negative_zero_are_seen():
  x = ARRAYS["float32"]
  zeros = np.zeros(4, np.float32)
  for changed, original in ((x[::-1], x), (x.T, x), (-zeros, zeros), (zeros[:3], zeros)):
    assert checksums(np.ascontiguousarray(changed)) != checksums(original)


def test_there_is_never_a_second_copy(full_compile):
  bank = jax.ShapeDtypeStruct((100_000, 128), jnp.float32)
  assert _sums.lower({"bank": bank}).compile().memory_analysis().temp_size_in_bytes < 1_000_000


def test_json():
  assert json_checksum({"a": 1, "b": (1.5, None)}) == json_checksum({"b": [1.5, None], "a": 1})
  assert json_checksum({"a": 1}) != json_checksum({"a": 2})
  # Checkpoints have it: the first 16 digits of the SHA-256 of {"a": [1.5, null], "b": "x"}.
  assert json_checksum({"b": "x", "a": (1.5, None)}) == "5386e1f6dc1519f3"
