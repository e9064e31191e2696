"""The settings of the photometric list. They need no JAX, so that a config which names them loads at once."""

import dataclasses

from pirl_jax.errors import UserError

# A box blur whose radius is below 2 reads 5 pixels; three passes of such boxes reach a Gaussian radius of 2.44.
_MAX_BLUR_RADIUS = 2.4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """How often and how strongly each operation is applied; the defaults are the base list of the official run.

  An operation whose strength or probability is 0 is left out of the program. Sources, below vissl's
  `configs/config/pretrain/pirl/`: `pirl_jigsaw_4node_resnet50.yaml`; for `GBLUR` `transforms/photo_gblur.yaml`.

  Raises `UserError` when a value is out of range.
  """

  brightness: float = 0.4  # factor uniform in [max(0, 1 - s), 1 + s]; so for contrast and saturation
  contrast: float = 0.4
  saturation: float = 0.4
  hue: float = 0.2  # turns of the colour circle, uniform in [-h, h], at most 0.5
  jitter_probability: float = 1.0  # one coin for the four above, which come in random order
  group_probability: float = 0.66  # one coin for posterize, sharpness, solarize, autocontrast, in this order
  grayscale_probability: float = 0.2
  blur_probability: float = 0.0
  blur_radius: tuple[float, float] = (0.1, 2.0)  # pixels, PIL's radius = standard deviation of the Gaussian
  flip_probability: float = 0.5

  def __post_init__(self) -> None:
    for name in ("brightness", "contrast", "saturation"):
      value = getattr(self, name)
      if not 0 <= value <= 8:
        raise UserError(f"{name}={value} is no jitter strength; give a number in [0, 8], 0 switches it off")
    if not 0 <= self.hue <= 0.5:
      raise UserError(f"hue={self.hue} is not in [0, 0.5] (turns of the colour circle); 0 switches it off")
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name.endswith("_probability") and not 0 <= value <= 1:
        raise UserError(f"{field.name}={value} is no probability; give a number in [0, 1], 0 switches it off")
    radius = self.blur_radius
    if len(radius) != 2 or not 0 <= radius[0] <= radius[1] <= _MAX_BLUR_RADIUS:
      raise UserError(f"blur_radius={radius} must be (smallest, largest), both in [0, {_MAX_BLUR_RADIUS}] pixels")


BASE = Recipe()
GBLUR = Recipe(
  brightness=0.8,
  contrast=0.8,
  saturation=0.8,
  jitter_probability=0.8,
  group_probability=0.0,
  blur_probability=0.5,
)
