"""The format of checkpoints and stored configs, and how older formats are read."""

import json
from collections.abc import Mapping
from typing import Any

from pirl_jax.configs.base import get_base
from pirl_jax.storage.settings import with_defaults

FORMAT = 5
"""The current format of a checkpoint's items and of the config in its `meta`.

1: the first format. 2: systems other than PIRL; the seed is part of the state. 3: micro-batches. 4: checksums; a
bfloat16 bank is stored as its bits. 5: the kNN accuracy is in `meta`.
"""

YOUNGER_FIELDS = ("dry_run", "init_from", "report", "export", "data.holdout", "data.kept_side", "data.grown",
                  "data.formats", "data.reduced_decoding", "data.full_range", "data.upright", "model.batch_norm_group",
                  "evaluate.views", "evaluate.source", "evaluate.root", "evaluate.name", "optimizer.nesterov",
                  "optimizer.decay_batch_norm", "own_row_is_negative", "bank.averaged", "partial_batch", "data.strict",
                  "nearest_positive", "negative_ranks", "angle_weight", "bank.encoder_momentum", "bank.max_age",
                  *(f"{group}.randaugment_{field}" for group in ("photometric", "pretext_photometric")
                    for field in ("operations", "magnitude", "deviation")))
"""Fields of a run's config that were added after November 2026. A digest that names a folder leaves a field out if the
field has its value in configs/base.py, so a program that has the field finds the folders of one that has not."""

FIRST_RESUMED = 2
"""The first format from which a run can resume; older checkpoints can be evaluated."""

FIRST_CHECKED = 4
"""The first format with checksums."""

FIRST_BITS = 4
"""The first format in which a bfloat16 bank is stored as its bits."""


def upgrade(meta: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the `meta` of a checkpoint of any format up to `FORMAT`, converted to the current format.

  The entry `format` keeps its value. Format 1 has no number of classes, because its networks do not predict classes.
  """
  upgraded = {"num_classes": 0, **meta}
  if "config" in meta:
    upgraded["config"] = upgrade_config(meta["config"])
    upgraded["model"] = upgraded["config"]["model"]
  return upgraded


def upgrade_config(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config of a run of any format with the fields of the current format, as JSON values.

  A missing field or group gets its value in configs/base.py: a new field's default is what the program did before the
  field existed. `pretext_photometric` is an exception: missing fields get the values of the run's own `photometric`.
  """
  data, jigsaw = dict(config["data"]), dict(config["jigsaw"])
  for old, new in (("pretext_size", "crop_size"), ("pretext_scale", "crop_scale")):
    if old in data:
      jigsaw[new] = data.pop(old)
  defaults = json.loads(json.dumps(get_base().to_dict()))
  defaults["pretext_photometric"] = photometric = with_defaults(config["photometric"], defaults["photometric"])
  return with_defaults({**config, "data": data, "jigsaw": jigsaw, "photometric": photometric}, defaults)
