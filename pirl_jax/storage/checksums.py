"""Checksums of arrays: the same on any number of devices, wherever the parts of an array lie.

Orbax notices a file that is missing or cut short, and not one whose bytes have changed. So a checkpoint keeps the
checksums of the arrays that went into it, and they are compared with those of the arrays that came out.
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

  They are computed where the arrays lie, without a copy. A change within one value always changes the checksum, any
  other change all but surely: 64 bits, sums of a hash of each value's bits and place, modulo 2**32. All processes that
  hold parts of the arrays call this together.

  Args:
    tree: of arrays, numbers or truth values of 64 bits or less.
  """
  leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  return {name: f"{int(first):08x}{int(second):08x}" for name, (first, second) in
          jax.device_get(_sums(leaves)).items()}


def json_checksum(value: Any) -> str:
  """Returns 16 hexadecimal digits of a value that JSON can hold, whatever the order of its fields."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@jax.jit
def _sums(leaves: Any) -> Any:
  return jax.tree.map(_sum, leaves)


def _sum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (u32[], u32[]): sums in which the order does not count, so that the devices may add up their own parts."""
  words = _words(x)
  place = jnp.zeros(words.shape, jnp.uint32)
  for dimension, size in enumerate(words.shape):
    place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, dimension)
  first = _mix(words ^ _mix(place * jnp.uint32(_GOLDEN)))
  second = _mix(first + jnp.uint32(_GOLDEN))
  zero = jnp.uint32(0)
  # Both in one pass: XLA's CPU compiler would else keep what they share in memory.
  return jax.lax.reduce((first, second), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), range(words.ndim))


def _words(x: jax.Array) -> jax.Array:
  """Returns the bits of an array, u32[..., words of a value]."""
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
  """Returns a one-to-one scramble of 32 bits: the last step of MurmurHash3."""
  for shift, factor in zip((16, 13), _MURMUR, strict=True):
    x = (x ^ (x >> shift)) * jnp.uint32(factor)
  return x ^ (x >> 16)
