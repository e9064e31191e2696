"""Several networks as one, for whoever needs nothing but features (PIRL, section 3.2: PIRL-ens.)."""

import dataclasses

from pirl_jax.models.network import Network


@dataclasses.dataclass(frozen=True)
class Ensemble:
  """Networks that look at the same picture. What each finds in a layer is put side by side, see `layer_features`.

  Its variables are a tuple with those of each network, in the same order.

  Attributes:
    networks: two or more; they may differ, but their trunks have as many stages.
  """

  networks: tuple[Network, ...]
