"""A real map with a complex kernel, beside two calls with real kernels."""

import jax
import jax.numpy as jnp
import numpy as np

from dcn_jax import deform_conv


def check_gradients(window, groups):
    """The gradients of map and offset are those of the two calls."""
    random = np.random.default_rng(0)
    x, offset = random.standard_normal((2, 5, 6, 4)), random.standard_normal((2, 5, 6, 2 * np.prod(window)))
    real, imaginary = random.standard_normal((2, *window, 4 // groups, 4))
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, offset)]

    def call(x, offset, kernel):
        return deform_conv(x, jnp.asarray(kernel), offset, feature_group_count=groups)

    def complex_loss(x, offset):
        y = call(x, offset, (real + 1j * imaginary).astype(np.complex64))
        return (jnp.real(y) ** 2 + jnp.sin(jnp.imag(y))).sum()

    def real_loss(x, offset):
        y, z = (call(x, offset, kernel.astype(np.float32)) for kernel in (real, imaginary))
        return (y**2 + jnp.sin(z)).sum()

    with jax.numpy_dtype_promotion("standard"):
        found = [jax.grad(loss, (0, 1))(*arrays) for loss in (complex_loss, real_loss)]
    for got, wanted in zip(*found, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
