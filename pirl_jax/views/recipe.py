"""The settings of the photometric augmentations. This file does not import JAX, so configs that use it load fast."""

import dataclasses

from pirl_jax.errors import UserError

# A box blur whose radius is below 2 reads 5 pixels; three passes of such boxes reach a Gaussian radius of 2.44.
_MAX_BLUR_RADIUS = 2.4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """How often and how strongly each operation is applied; the defaults are those of the official run.

  An operation whose strength or probability is 0 is left out of the program. Sources, in vissl's
  `configs/config/pretrain/pirl/`: `pirl_jigsaw_4node_resnet50.yaml`; for `GBLUR` `transforms/photo_gblur.yaml`.

  Raises:
    UserError: a value is out of range.
  """

  brightness: float = 0.4  # factor uniform in [max(0, 1 - s), 1 + s]; the same for contrast and saturation
  contrast: float = 0.4
  saturation: float = 0.4
  hue: float = 0.2  # turns of the colour circle, uniform in [-h, h], at most 0.5
  jitter_probability: float = 1.0  # one draw for the four operations above, which are applied in random order
  group_probability: float = 0.66  # one draw for posterize, sharpness, solarize, autocontrast, in this order
  grayscale_probability: float = 0.2
  blur_probability: float = 0.0
  blur_radius: tuple[float, float] = (0.1, 2.0)  # pixels, PIL's radius = standard deviation of the Gaussian
  randaugment_operations: int = 0  # n, the operations that are chosen for an image, each applied with probability 1/2
  randaugment_magnitude: float = 10.0  # m, in [0, 10]
  randaugment_deviation: float = 0.5  # standard deviation of the magnitude, which stays in [0, 10]
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
    number, magnitude, deviation = (
      self.randaugment_operations, self.randaugment_magnitude, self.randaugment_deviation)
    if number < 0 or number != int(number):
      raise UserError(f"randaugment_operations={number} is no number of operations; give 2, as InfoMin, or 0 for none")
    if not 0 <= magnitude <= 10:
      raise UserError(f"randaugment_magnitude={magnitude} is not in [0, 10]")
    if not 0 <= deviation < float("inf"):
      raise UserError(f"randaugment_deviation={deviation} is no standard deviation; give a number of at least 0")


BASE = Recipe()
GBLUR = Recipe(
  brightness=0.8,
  contrast=0.8,
  saturation=0.8,
  jitter_probability=0.8,
  group_probability=0.0,
  blur_probability=0.5,
)
