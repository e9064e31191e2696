"""The convolution against XLA's own, on every shape of our networks and on random ones."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pirl_jax.models import convolution
from pirl_jax.models.resnet import create_resnet

NAMES = ("result", "images' gradient", "kernel's gradient")
IN_ORDER = "b01f_01io->b01f"  # as XLA's CPU backend hands it to a library


def plain(images, kernel, window_strides, padding, **options):
  options["dimension_numbers"] = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(images, kernel, window_strides, padding, **options)


def value_and_gradients(conv, images, kernel, slope, stride, pad):
  """Returns the three arrays that `NAMES` names; the slope f[N, h, w, O] is cut to the result's size."""
  def run(images, kernel, slope):
    result, pull = jax.vjp(lambda *given: conv(*given, (stride, stride), ((pad, pad), (pad, pad))), images, kernel)
    return result, *pull(slope[:, :result.shape[1], :result.shape[2]])
  return jax.jit(run)(images, kernel, slope)


def assert_same(shape, kernel_shape, stride, pad, *, dtype, tolerance):
  rng = np.random.default_rng(0)
  images, kernel, slope = (jnp.asarray(rng.standard_normal(size), dtype) for size in (
    shape, kernel_shape, (shape[0], shape[1] + 2 * pad, shape[2] + 2 * pad, kernel_shape[-1])))
  ours, xlas = (value_and_gradients(conv, images, kernel, slope, stride, pad) for conv in (convolution.conv, plain))
  for name, found, expected in zip(NAMES, ours, xlas, strict=True):
    assert found.dtype == expected.dtype == dtype
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(found, expected, atol=tolerance * max(1e-3, np.abs(expected).max()), rtol=0,
                               err_msg=f"{name} of {shape}, kernel {kernel_shape}, stride {stride}, padding {pad}")


SHAPES = st.tuples(
  st.sampled_from([1, 2, 7, 16, 67, 131]), st.integers(1, 13), st.integers(1, 13),  # images, height, width
  st.sampled_from([(1, 1), (3, 3), (5, 5), (7, 7), (1, 3), (3, 2)]), st.integers(1, 3), st.integers(0, 4),
  st.sampled_from([1, 3, 8, 16, 17, 33]), st.sampled_from([1, 4, 8, 16, 17, 33]),  # channels in and out
).filter(lambda shape: all(side + 2 * shape[5] >= size and shape[5] <= size
                           for side, size in zip(shape[1:3], shape[3], strict=True))
  # XLA's own gradient ends the process (jaxlib 0.10.2, algebraic_simplifier.cc) for some kernels of unequal sides with
  # a stride, 131 images of 4 x 6 pixels and a kernel of 3 x 2 with stride 2, say. No network here has one.
).filter(lambda shape: shape[3][0] == shape[3][1] or shape[4] == 1)


@given(SHAPES)
@settings(max_examples=12, deadline=None)
def test_random_shapes(shape):
  compare(shape)


@pytest.mark.slow
@given(SHAPES)
@settings(max_examples=300, deadline=None)
def test_many_random_shapes(shape):
  compare(shape)


def compare(shape):
  num, height, width, size, stride, pad, channels, features = shape
  given = (num, height, width, channels), (*size, channels, features), stride, pad
  assert_same(*given, dtype=jnp.float32, tolerance=5e-6)
  with jax.enable_x64(True):
    assert_same(*given, dtype=jnp.float64, tolerance=1e-12)


def layers(arch, stem, size, num, width=1):
  """Returns the shapes of every convolution of a trunk: (images, kernel, stride, padding)."""
  found = []

  def note(images, kernel, window_strides, padding, **_):
    found.append((images.shape, kernel.shape, window_strides[0], padding[0][0]))
    return plain(images, kernel, window_strides, padding)

  trunk = create_resnet(arch, stem=stem, width=width)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(convolution, "conv", note)
    jax.eval_shape(partial(trunk.init, train=False), jax.random.key(0), jnp.zeros((num, size, size, 3)))
  return list(dict.fromkeys(found))


NETWORKS = {
  "embedded, images": layers("resnet8", "3x3s2", 32, 128), "embedded, patches": layers("resnet8", "3x3s2", 10, 1152),
  "cifar10, images": layers("resnet18", "3x3", 32, 4), "cifar10, patches": layers("resnet18", "3x3", 12, 36),
  "imagenet": layers("resnet50", "imagenet", 33, 2),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_every_layer_of_our_networks(network):
  for shape in NETWORKS[network]:
    assert_same(*shape, dtype=jnp.float32, tolerance=5e-6)


@pytest.mark.parametrize("size, stride", [((2, 2), 1), ((6, 5), 1), ((7, 7), 2), ((32, 32), 1)])
def test_bfloat16_is_rounded_once_as_the_plain_one(size, stride):
  assert_same((67, *size, 16), (3, 3, 16, 16), stride, 1, dtype=jnp.bfloat16, tolerance=2**-8)


class Stack(nn.Module):
  """Three convolutions, of which XLA would write every one another way: wide, strided, and on 2 x 2 points."""

  conv_general_dilated: object

  @nn.compact
  def __call__(self, images):
    conv = partial(nn.Conv, kernel_size=(3, 3), padding=1, conv_general_dilated=self.conv_general_dilated)
    return conv(24)(nn.relu(conv(20, strides=2)(nn.relu(conv(20)(images)))))


def gradients_in_a_loop(conv):
  """Returns a function of (parameters, parts of a batch) and what to give it: gradients summed over the parts."""
  stack = Stack(conv)
  parts = jnp.asarray(np.random.default_rng(0).standard_normal((3, 40, 4, 4, 3)), jnp.float32)
  params = stack.init(jax.random.key(0), parts[0])

  def gradients(params, parts):
    def add(total, images):
      grads = jax.grad(lambda params: jnp.mean(stack.apply(params, images) ** 2))(params)
      return jax.tree.map(jnp.add, total, grads), None
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)[0]

  return gradients, params, parts


def test_in_a_loop_every_convolution_is_in_the_order_that_is_quick(full_compile):
  def orders(conv):
    gradients, *inputs = gradients_in_a_loop(conv)
    text = jax.jit(gradients).lower(*inputs).compile().as_text()
    assert "conditional(" not in text
    return re.findall(r" convolution\(.*?dim_labels=([\w>-]+)", text)

  ours = orders(convolution.conv)
  assert ours and set(ours) == {IN_ORDER}
  assert set(orders(plain)) != {IN_ORDER}  # else XLA has learnt to, and this module is no longer needed for it


def test_in_a_loop_the_gradients_are_the_same():
  found, expected = (gradients(*inputs) for gradients, *inputs in map(gradients_in_a_loop, (convolution.conv, plain)))
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, expected)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_have_convolutions_of_xlas_own(platform):
  def counts(conv):
    gradients, *inputs = gradients_in_a_loop(conv)
    text = jax.jit(gradients).trace(*inputs).lower(lowering_platforms=(platform,)).as_text()
    operations = re.findall(r"stablehlo\.(convolution|dot_general|gather|optimization_barrier)", text)
    return sorted(operations), sorted(re.findall(r"dim_numbers = (\S+ \S+)", text))

  assert counts(convolution.conv) == counts(plain)


@pytest.mark.parametrize("split", ["images", "kernel", "both"])
def test_on_several_devices_a_gradient_is_summed_where_its_array_is_the_same(split):
  """Each of 4 devices has its own images, its own kernel, or both."""
  rng = np.random.default_rng(0)
  images, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((8, 6, 6, 3), (12, 3, 3, 5)))
  mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
  specs = tuple(P("data") if split in (name, "both") else P() for name in ("images", "kernel"))

  def gradients(conv):
    def loss(images, kernel):
      result = conv(images, jnp.reshape(kernel, (-1, 3, 3, 5))[:3].transpose(1, 2, 0, 3), (1, 1), ((1, 1), (1, 1)))
      return jax.lax.psum(jnp.sum(jnp.sin(result)), "data")
    return jax.jit(jax.shard_map(jax.grad(loss, argnums=(0, 1)), mesh=mesh, in_specs=specs, out_specs=specs))

  found, expected = (gradients(conv)(images, kernel) for conv in (convolution.conv, plain))
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_what_it_does_not_do_is_refused():
  images, kernel = jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 4, 4))
  for options in ({"window_strides": (1, 2), "padding": ((1, 1), (1, 1))},
                  {"window_strides": (1, 1), "padding": ((0, 1), (0, 1))},
                  {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "rhs_dilation": (2, 2)},
                  {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "feature_group_count": 2}):
    with pytest.raises(AssertionError):
      convolution.conv(images, kernel, **options)
