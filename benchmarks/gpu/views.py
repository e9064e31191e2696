"""The views, with grey levels in bytes between the passes and in float32. `python -m benchmarks.gpu.views`"""

from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.gpu.setting import arguments, batch_of, compile_seconds, finish, milliseconds, views_of
from pirl_jax.method.randomness import view_keys
from pirl_jax.views import photometric, two_views


def main() -> None:
  """Prints milliseconds of a batch, and by how much the views differ."""
  setting = (given := arguments(__doc__)).setting
  crops = jax.device_put(batch_of(setting))
  used = crops["index"], crops["image_crop"], crops["pretext_crop"]
  runs, views, seconds = {}, {}, {}
  for name, applied in (("now", two_views.apply_photometric), ("float levels", photometric._in_order)):
    views_fn = jax.jit(lambda index, *crops: views_of(setting)(view_keys(0, 0, index), *crops))
    with mock.patch.object(two_views, "apply_photometric", applied):  # while it is traced
      views[name], seconds[name] = compile_seconds(views_fn, *used)
    runs[name] = lambda views_fn=views_fn: views_fn(*used)
  differences = [float(jnp.max(jnp.abs(one - other))) for one, other in zip(
    *(views[name][:2] for name in runs), strict=True)]
  del views
  finish(batch=setting.batch, compile_seconds=seconds, largest_difference=max(differences),
         milliseconds=milliseconds(runs, steps=2 if given.tiny else 10))


if __name__ == "__main__":
  main()
