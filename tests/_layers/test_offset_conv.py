"""`_layers/offset_conv.py`: the convolution of the branch, in the number of channels that its platform likes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from dcn_jax._layers.offset_conv import wide_conv
from tests.support.running import assert_close, normal

OPTIONS = {"window_strides": (1, 2), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
X = normal(2, 5, 6, 4)


def ours(x, kernel):
    return wide_conv(x, kernel, (1, 2), "SAME", dimension_numbers=OPTIONS["dimension_numbers"])


def plain(x, kernel):
    return lax.conv_general_dilated(x, kernel, **OPTIONS, preferred_element_type=jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("features", [18, 27, 54, 108])
def test_equals_the_plain_convolution(features, dtype):
    """With gradients, in both modes, and mapped."""
    x, kernel = X.astype(dtype), normal(3, 3, 4, features, seed=1).astype(dtype)
    y = plain(x, kernel)
    cotangent = normal(*y.shape, seed=2)
    np.testing.assert_allclose(jax.jit(ours)(x, kernel), y, rtol=0, atol=1e-5)
    tangents = normal(*x.shape, seed=3).astype(dtype), normal(*kernel.shape, seed=4).astype(dtype)
    results = [
        jax.jit(lambda f=f: (jax.vjp(f, x, kernel)[1](cotangent), jax.jvp(f, (x, kernel), tangents)[1]))()
        for f in (ours, plain)
    ]
    for mine, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        assert_close(mine.astype(jnp.float32), theirs.astype(jnp.float32), 1e-5 if dtype == "float32" else 1e-2)
    kernels = jnp.stack([kernel, -kernel])
    mapped = jax.jit(jax.vmap(ours, (None, 0)))(x, kernels)
    np.testing.assert_allclose(mapped, jnp.stack([y, -y]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("features", "multiplied"), [(18, 18), (25, 25), (27, 32), (36, 36), (54, 64), (108, 108)])
def test_a_cpu_multiplies_27_channels_as_32(features, multiplied):
    """And no other platform does: a GPU would have a kernel more to launch."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (X.shape, (3, 3, 4, features))]
    for platform, wanted in (("cpu", multiplied), ("cuda", features), ("tpu", features)):
        text = export.export(jax.jit(ours), platforms=[platform])(*shapes).mlir_module()
        assert f"3x3x4x{wanted}xf32>) -> " in text, (platform, wanted)
        assert ("stablehlo.pad" in text) == (wanted != features), platform


def test_a_program_for_several_platforms():
    kernel = normal(3, 3, 4, 27, seed=1)
    exported = export.export(jax.jit(ours), platforms=["cpu", "cuda"])(X, kernel)
    np.testing.assert_allclose(exported.call(X, kernel), plain(X, kernel), rtol=0, atol=1e-5)
