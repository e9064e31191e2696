"""The views of a batch and what the network makes of them, as every step runs them. Letters: b this device's images of
a part of the batch, D outputs of a head (an embedding, or the logits of D labels)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from pirl_jax.method.randomness import view_keys
from pirl_jax.method.state import TrainState
from pirl_jax.models.network import Network


def forward(network: Network, views_fn: Callable, state: TrainState, params: Any,
            crops: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array | None, Any]:
  """Returns what the heads give, {"image" or "pretext": f32[b, D]}, the transform's labels i32[b], and batch_stats.

  The labels are None if the views have none. A head that is not there gives nothing.

  Args:
    network: in training: its batch norm takes the statistics of these images, and moves those of the state.
    views_fn: see `views.two_views.make_views`.
    state: for its seed, its step and its batch statistics.
    params: of the network; the gradient is taken by them.
    crops: `image_crop` u8[b, H, W, 3] or `pretext_crop` u8[b, S, S, 3], or both, and `index` i32[b].
  """
  with jax.named_scope("views"):
    keys = view_keys(state.seed, state.step, crops["index"])
    image, pretext, labels = views_fn(keys, crops.get("image_crop"), crops.get("pretext_crop"))
  with jax.named_scope("network"):
    outputs, updated = network.apply(
      {"params": params, "batch_stats": state.batch_stats}, image, pretext, train=True, mutable=["batch_stats"])
  outputs = zip(("image", "pretext"), outputs, strict=True)
  return {view: output for view, output in outputs if output is not None}, labels, updated["batch_stats"]
