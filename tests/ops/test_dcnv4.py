"""`dcnv4`: how its arguments are packed; all else is `dcnv3`'s."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax import dcnv4
from tests.support import dcn_oracle as oracle
from tests.support.running import assert_close, value_and_gradients


@pytest.mark.parametrize("options", [{}, {"remove_center": True, "offset_scale": 1.5, "strides": 2}])
def test_values_and_gradients(options, x64):
    """Of the packed array in its own order, zero for the channels at its end."""
    x, offset, mask = (a.astype(np.float64) for a in oracle.draw((2, 5, 6, 4), 2, **options))
    packed = oracle.pack(offset, mask, 2, padding=2)
    wanted = oracle.dcnv3(x, offset, mask, **options)
    cotangent = np.random.default_rng(1).standard_normal(wanted.shape)
    run = functools.partial(value_and_gradients, functools.partial(dcnv4, groups=2, **options))
    y, (d_x, d_packed) = jax.jit(run)((x, packed), cotangent)
    assert_close(y, wanted, 1e-12)
    exact = oracle.gradients(cotangent, x, offset, mask, **options)
    assert_close(d_x, exact[0], 1e-12)
    assert_close(d_packed[..., :-2], oracle.pack(*exact[1:], 2), 1e-12)
    assert not d_packed[..., -2:].any()


def test_one_array_serves_all_images_in_half_precision():
    x, offset, mask = oracle.draw((3, 5, 6, 4), 2)
    packed = jnp.asarray(oracle.pack(offset, mask, 2)[0])
    y = jax.jit(functools.partial(dcnv4, groups=2))(jnp.asarray(x, jnp.bfloat16), packed)
    assert y.dtype == jnp.bfloat16
    exact = np.broadcast_to(offset[0], offset.shape), np.broadcast_to(mask[0], mask.shape)
    assert_close(np.float32(y), oracle.dcnv3(np.float32(jnp.asarray(x, jnp.bfloat16)), *exact), 4e-3)


X = jnp.ones((2, 5, 6, 4))


@pytest.mark.parametrize(
    ("channels", "options", "error", "message"),
    [
        (
            53,
            {"groups": 2},
            ValueError,
            r"offset_mask has shape .*wanted \(\*batch, 5, 6, at least 54\).*K \* 3 = 9 \* 3",
        ),
        (54, {"groups": 3}, ValueError, "groups=3 must divide the 4 channels of x"),
        (54, {"groups": 2.0}, TypeError, "groups=2.0 is a float"),
        (54, {"groups": 2, "strides": 2}, ValueError, r"wanted \(\*batch, 3, 3,"),
    ],
)
def test_errors(channels, options, error, message):
    with pytest.raises(error, match=message):
        dcnv4(X, jnp.ones((2, 5, 6, channels)), **options)
