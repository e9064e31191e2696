"""Which images of a batch go into which part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pirl_jax.method.micro_batches import split_batch
from pirl_jax.runtime.mesh import SPLIT, create_mesh


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize(("micro_batches", "group"), [(1, None), (2, None), (4, None), (2, 2), (4, 2)])
def test_a_part_takes_every_mth_image_or_group(num_devices, micro_batches, group):
  batch = {"index": 100 + np.arange(16), "label": np.arange(32).reshape(16, 2)}
  parts = jax.jit(jax.shard_map(
    lambda batch: split_batch(batch, micro_batches, group=group), mesh=create_mesh(num_devices), in_specs=SPLIT,
    out_specs=jax.sharding.PartitionSpec(None, *SPLIT)))(jax.tree.map(jnp.asarray, batch))
  for part in range(micro_batches):
    expected = [place for place in range(16) if place // (group or 1) % micro_batches == part]
    np.testing.assert_array_equal(parts["position"][part], expected)
    for name, value in batch.items():
      np.testing.assert_array_equal(parts[name][part], value[expected])
