"""Gradients of calls that are odd in their dtypes or sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax import deform_conv
from tests.support import complex_kernel


def test_a_nan_that_nobody_reads_is_in_no_gradient_of_the_kernel():
    """By whatever algorithm is taken here; the positions do not divide into its blocks."""
    x, offset = np.ones((2, 5, 7, 4), np.float32), np.zeros((2, 5, 7, 2), np.float32)
    x[:, 0, 0], offset[:, 0, 0] = np.nan, 2.5
    gradient = jax.grad(lambda kernel: deform_conv(x, kernel, offset).sum())(jnp.ones((1, 1, 4, 3)))
    np.testing.assert_allclose(gradient, 70)


@pytest.mark.parametrize("window", [(1, 1), (3, 3)])
@pytest.mark.parametrize("groups", [1, 2, 4], ids="{} groups".format)  # of four: each channel alone
def test_a_real_map_with_a_complex_kernel(window, groups):
    complex_kernel.check_gradients(window, groups)


def test_no_features():
    kernel, offset = jnp.ones((3, 3, 4, 0)), jnp.zeros((1, 5, 6, 18))
    gradient = jax.grad(lambda x: deform_conv(x, kernel, offset).sum())(jnp.ones((1, 5, 6, 4)))
    assert gradient.shape == (1, 5, 6, 4)
    assert not gradient.any()
