"""Views and forward pass, as used by every step.

Letters: b this device's images of a part of the batch, H W S sides in pixels, D outputs of a head (the dimensions of an
embedding, or the logits of D labels).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from pirl_jax.method.randomness import view_keys
from pirl_jax.method.state import TrainState
from pirl_jax.models.network import Network
from pirl_jax.views.rotation import draw_turns, rotate

ANGLE = "angle"
"""Name of the logits of the angle among the outputs of `forward`."""

_ANGLE_KEY = 3
"""Number of the key of an image's angle; `views.two_views` uses those below."""


class Passed(NamedTuple):
  """What the views of a part of the batch become on one device."""

  outputs: dict[str, jax.Array]
  """Outputs of the heads, {"image", "pretext": f32[b, D]}, and the logits f32[b, 4] of `ANGLE`."""
  labels: jax.Array | None
  """Labels of the transforms, i32[b]; None if there is no pretext view."""
  batch_stats: Any
  """The running statistics after all views."""


def forward(network: Network, views_fn: Callable, state: TrainState, params: Any,
            crops: Mapping[str, jax.Array]) -> Passed:
  """Returns outputs, labels and statistics; the outputs leave out a view that the network has no head for.

  The trunk runs once for each view. Each pass has its own batch statistics, and moves the running ones, in the official
  order: the pretext views before the images (vissl/models/base_ssl_model.py). If the network has a head for the angle,
  the images after `quarter_turns` are the last.

  Args:
    network: runs in training mode: its batch norm uses the statistics of these images and updates the running ones.
    views_fn: see `views.two_views.make_views`.
    state: gives the seed, the step and the batch statistics.
    params: of the network; passed separately, because the gradient is taken with respect to them.
    crops: `image_crop` u8[b, H, W, 3] or `pretext_crop` u8[b, S, S, 3], or both, and `index` i32[b].
  """
  with jax.named_scope("views"):
    keys = view_keys(state.seed, state.step, crops["index"])
    image, pretext, labels = views_fn(keys, crops.get("image_crop"), crops.get("pretext_crop"))

  def run(method: str, view: jax.Array, batch_stats: Any) -> tuple[jax.Array, Any]:
    out, updated = network.apply({"params": params, "batch_stats": batch_stats}, view, train=True,
                                 mutable=["batch_stats"], method=method)
    return out, updated["batch_stats"]

  outputs, batch_stats = {}, state.batch_stats
  with jax.named_scope("network"):
    if pretext is not None:
      outputs["pretext"], batch_stats = run("embed_pretext", pretext, batch_stats)
    if image is not None:
      outputs["image"], batch_stats = run("embed_image", image, batch_stats)
    if network.angle_head is not None:
      assert image is not None
      turned = jax.vmap(rotate)(image, quarter_turns(state, crops["index"]))
      outputs[ANGLE], batch_stats = run("predict_angle", turned, batch_stats)
  return Passed(outputs, labels, batch_stats)


def quarter_turns(state: TrainState, index: jax.Array) -> jax.Array:
  """Returns by how many quarter turns the images with these indices i32[b] are turned in a step, i32[b] in 0..3."""
  keys = view_keys(state.seed, state.step, index)
  return jax.vmap(lambda key: draw_turns(jax.random.fold_in(key, _ANGLE_KEY)))(keys)
