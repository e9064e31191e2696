"""The format of what a run stores about itself, and how older ones are read."""

import json
from collections.abc import Mapping
from typing import Any

from pirl_jax.configs.base import get_base
from pirl_jax.storage.settings import with_defaults

FORMAT = 5
"""Of the items of a checkpoint and of the config in its `meta`.

1: the first; 2: systems other than PIRL, the seed is part of the state; 3: parts of a batch; 4: checksums,
a bank of bfloat16 is stored as its bits; 5: the kNN accuracy stands in `meta`.
"""

FIRST_RESUMED = 2
"""The first format from which a run goes on; what is older can be evaluated."""

FIRST_CHECKED = 4
"""The first format with checksums."""

FIRST_BITS = 4
"""The first format with the bits of a bank of bfloat16."""


def upgrade(meta: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the `meta` of a checkpoint of any format up to `FORMAT` as this version of the program has it.

  `format` stays what it was. The classes were not counted in the first one: its networks do not predict any.
  """
  upgraded = {"num_classes": 0, **meta}
  if "config" in meta:
    upgraded["config"] = upgrade_config(meta["config"])
    upgraded["model"] = upgraded["config"]["model"]
  return upgraded


def upgrade_config(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config of a run of any format with the fields of today, JSON values.

  A field or a group that it lacks has its value in configs/base.py, which is what was done before it could be chosen;
  of the pretext views' photometric list, that of the image's list in the same run.
  """
  data, jigsaw = dict(config["data"]), dict(config["jigsaw"])
  for old, new in (("pretext_size", "crop_size"), ("pretext_scale", "crop_scale")):
    if old in data:
      jigsaw[new] = data.pop(old)
  defaults = json.loads(json.dumps(get_base().to_dict()))
  defaults["pretext_photometric"] = photometric = with_defaults(config["photometric"], defaults["photometric"])
  return with_defaults({**config, "data": data, "jigsaw": jigsaw, "photometric": photometric}, defaults)
