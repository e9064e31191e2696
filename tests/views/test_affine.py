"""Affine transforms against PIL, in both forms, and the matrices against their formulas in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pil_randaugment
import pytest
from PIL import Image

from pirl_jax.views import affine

FORMS = {"gather": affine._by_gather, "shifts": affine._by_shifts}


def matrices(rng, height, width):
  """Returns every kind of matrix with the largest values that RandAugment draws, both signs, and random ones."""
  for share in (-1, 1, 0, *rng.uniform(-1, 1, 4)):
    yield affine.rotation(jnp.float32(share * math.pi / 6), height=height, width=width)
    yield affine.shear(x=jnp.float32(0.3 * share))
    yield affine.shear(y=jnp.float32(0.3 * share))
    yield affine.translation(x=jnp.float32(0.45 * share * width))
    yield affine.translation(y=jnp.float32(0.45 * share * height))


def differences(form, images, chosen):
  """Returns the number of levels that differ from PIL's; images u8[N, H, W, 3], matrices i32[N, 6]."""
  planes = jnp.moveaxis(jnp.asarray(images), -1, 1)
  found = np.moveaxis(np.asarray(jax.jit(jax.vmap(FORMS[form]))(planes, jnp.stack(chosen))), 1, -1)
  return sum((one != np.asarray(pil_randaugment.transformed(Image.fromarray(image), matrix))).sum()
             for one, image, matrix in zip(found, images, chosen, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(17, 23), (40, 9), (1, 5)])
def test_transforms_equal_pil(form, size):
  rng = np.random.default_rng(1)
  chosen = [*matrices(rng, *size)]
  assert differences(form, rng.integers(0, 256, (len(chosen), *size, 3), np.uint8), chosen) == 0


@pytest.mark.parametrize("form", FORMS)
def test_transforms_of_large_images_equal_pil(form):
  rng = np.random.default_rng(2)
  chosen = [*matrices(rng, 224, 224)][:6]  # both largest angles are among them
  assert differences(form, rng.integers(0, 256, (len(chosen), 224, 224, 3), np.uint8), chosen) == 0


def test_any_matrix_equals_pil():
  rng = np.random.default_rng(3)
  chosen = [jnp.asarray(rng.integers(-1500, 1500, 6) * [1, 1, 20, 1, 1, 20], jnp.int32) for _ in range(30)]
  assert differences("gather", rng.integers(0, 256, (30, 17, 23, 3), np.uint8), chosen) == 0


def test_a_rotation_is_that_of_pil():
  """The matrix of Image.rotate in Pillow's Image.py, rounded, and with the centre where it was."""
  for degrees in (-30, -7.3, 0, 12, 30):
    a, b, c, d, e, f = np.divide(affine.rotation(jnp.float32(math.radians(degrees)), height=40, width=60),
                                 [1024, 1024, 2048] * 2)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    np.testing.assert_allclose([a, b, d, e], [cos, -sin, sin, cos], atol=0.5001 / 1024)
    assert (a * 30 + b * 20 + c, d * 30 + e * 20 + f) == (30, 20)


def test_shears_and_translations_have_their_units():
  np.testing.assert_array_equal(affine.shear(x=jnp.float32(0.25)), [1024, 256, 0, 0, 1024, 0])
  np.testing.assert_array_equal(affine.shear(y=jnp.float32(-0.25)), [1024, 0, 0, -256, 1024, 0])
  np.testing.assert_array_equal(affine.translation(x=jnp.float32(1.5)), [1024, 0, 3072, 0, 1024, 0])
  np.testing.assert_array_equal(affine.translation(y=jnp.float32(-2)), [1024, 0, 0, 0, 1024, -4096])
