"""Loss and bank by themselves, as two programs: what a step does between the embeddings and the rows of the bank."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pirl_jax.method import memory_bank
from pirl_jax.method.contrast import Contrast
from pirl_jax.method.micro_batches import split_batch
from pirl_jax.method.randomness import step_keys
from pirl_jax.runtime.mesh import AXIS, SPLIT, WHOLE


def loss_programs(contrast: Contrast, mesh: Mesh, *, views: Sequence[str], bank_momentum: float) -> tuple[
    jax.stages.Wrapped, jax.stages.Wrapped]:
  """Returns look(bank, usable, batch, embs) -> (slopes, watched, moved, loss) and write(bank, *moved) -> bank.

  Letters: R rows of the bank, D embedding, B batch. The bank [R, D], `usable` bool[R] and the batch, `index` i32[B] and
  `valid` bool[B], are split over the devices; `embs` f32[B, D] of each view, unit vectors, are whole. `slopes` are the
  gradients of the loss f32[] by these. The bank given to `write` is donated.

  Args:
    contrast: what embeddings are compared with, and the loss; Z, if the loss looks at it, is 1.
    mesh: the devices.
    views: "image", or "image" and "pretext".
    bank_momentum: weight of the old row when a row moves.
  """
  def look(bank: jax.Array, usable: jax.Array, batch: Mapping[str, jax.Array], embs: Mapping[str, jax.Array]) -> Any:
    memory = contrast.look_up(bank, usable, split_batch(batch, 1), step_keys(0, 0), views=tuple(views))
    images = jax.tree.map(lambda x: x[0], memory.images)

    def objective(embs: Mapping[str, jax.Array]) -> tuple[jax.Array, Any]:
      each, watched = contrast(memory, images, embs, jnp.ones(()))
      return jnp.sum(jnp.stack([loss @ images.share for loss in each.values()])), watched

    (loss, watched), slopes = jax.value_and_grad(objective, has_aux=True)(embs)
    return slopes, watched, memory.to_write(embs["image"][None]), loss

  write = partial(memory_bank.update, momentum=bank_momentum, axis=AXIS)
  return (jax.jit(jax.shard_map(look, mesh=mesh, in_specs=(SPLIT, SPLIT, SPLIT, WHOLE), out_specs=WHOLE)),
          jax.jit(jax.shard_map(write, mesh=mesh, in_specs=(SPLIT, *[WHOLE] * 4), out_specs=SPLIT), donate_argnums=0))
