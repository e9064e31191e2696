"""Checksums of arrays. A checksum does not depend on the number of devices or on how the array is split over them.

Orbax detects a file that is missing or cut short, but not a file whose bytes have changed. Therefore a checkpoint
stores the checksums of its arrays, and they are compared with the checksums of the arrays that are read.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B9
_MURMUR = 0x85EBCA6B, 0xC2B2AE35


def checksums(tree: Any) -> dict[str, str]:
  """Returns {"params/trunk/conv1/kernel": 16 hexadecimal digits} of a tree of arrays.

  A checksum has 64 bits: two sums, modulo 2**32, of a hash of each value's bits and position. A change of one value
  always changes the checksum; any other change does so almost surely. The checksums are computed on the devices that
  hold the arrays, without a copy. All processes that hold parts of the arrays must call this together.

  Args:
    tree: of arrays of numbers or booleans with at most 64 bits.
  """
  leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  return {name: f"{int(first):08x}{int(second):08x}" for name, (first, second) in
          jax.device_get(_sums(leaves)).items()}


def json_checksum(value: Any) -> str:
  """Returns 16 hexadecimal digits, a hash of a JSON value; the order of the fields does not matter."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@jax.jit
def _sums(leaves: Any) -> Any:
  return jax.tree.map(_sum, leaves)


def _sum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (u32[], u32[]): sums that do not depend on the order, so each device can sum its own part."""
  words = _words(x)
  place = jnp.zeros(words.shape, jnp.uint32)
  for dimension, size in enumerate(words.shape):
    place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, dimension)
  first = _mix(words ^ _mix(place * jnp.uint32(_GOLDEN)))
  second = _mix(first + jnp.uint32(_GOLDEN))
  zero = jnp.uint32(0)
  # Both sums are computed in one pass; in two passes XLA's CPU compiler would store the shared part in memory.
  return jax.lax.reduce((first, second), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), range(words.ndim))


def _words(x: jax.Array) -> jax.Array:
  """Returns the bits of an array as 32-bit words, u32[..., words per value]."""
  x = jnp.asarray(x)
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  size = x.dtype.itemsize
  if size < 4:
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}[size])
    return bits[..., None].astype(jnp.uint32)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return bits if size > 4 else bits[..., None]


def _mix(x: jax.Array) -> jax.Array:
  """Returns a one-to-one mix of 32 bits: the last step of MurmurHash3."""
  for shift, factor in zip((16, 13), _MURMUR, strict=True):
    x = (x ^ (x >> shift)) * jnp.uint32(factor)
  return x ^ (x >> 16)
