"""Maps so large that a float32 position has no fraction left: the regular position is a whole number, kept apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def test_zero_offsets_are_the_plain_convolution_beyond_2_to_the_24(op):
    x = (np.arange(2**24 + 9) % 97).astype(np.float32)[:, None]
    kernel, offset = np.ones((1, 1, 1), np.float32), np.zeros((8, 1), np.float32)
    y = op(x, kernel, offset, padding=((-(2**24 + 1), 0),))
    np.testing.assert_array_equal(y[:, 0], (np.arange(2**24 + 1, 2**24 + 9) % 97))


@pytest.mark.parametrize(
    "size",
    [2**10, pytest.param(2**20, marks=pytest.mark.quick), 2**24 + 64],
    ids=["thousand", "million", "16 million"],
)
def test_an_offset_keeps_its_fraction_at_any_size(op, size):
    """The last positions of a map whose pixels alternate between 0 and 1: what is read is the fraction itself."""
    x = (np.arange(size) % 2).astype(np.float32)[:, None]
    kernel, offset = np.ones((1, 1, 1), np.float32), np.float32([0.3, -0.7, 2.3, -3.7])[:, None]
    crop = ((-(size - 16), -12),)  # outputs at size - 16 to size - 13, the first at a pixel of 0

    @jax.jit
    def run(x, offset):
        return jax.vjp(lambda offset: op(x, kernel, offset, padding=crop)[:, 0], offset)

    y, pull = run(x, offset)
    whole = np.floor(offset[:, 0].astype(np.float64))
    fraction, odd = offset[:, 0] - whole, (np.arange(4) + whole) % 2 == 1
    np.testing.assert_allclose(y, np.where(odd, 1 - fraction, fraction), rtol=0, atol=1e-7)
    np.testing.assert_array_equal(pull(jnp.ones(4))[0][:, 0], np.where(odd, -1, 1))


def test_the_corner_of_a_large_image(op):
    """The last pixels of 2 x 2**20: where a tap of a 2-D window reads to one rounding."""
    x = np.random.default_rng(0).standard_normal((2, 2**20, 1)).astype(np.float32)
    kernel = np.random.default_rng(1).standard_normal((1, 3, 1, 1)).astype(np.float32)
    offset = np.random.default_rng(2).uniform(-0.9, 0.9, (2, 4, 6)).astype(np.float32)
    start = 2**20 - 8
    y = op(x, kernel, offset, padding=((0, 0), (-start, -2)))
    wanted = np.zeros((2, 4))
    for row, column, tap in np.ndindex(2, 4, 3):
        dy, dx = offset[row, column].astype(np.float64).reshape(3, 2)[tap]
        point = row + dy, start + column + tap + dx
        for i, j in np.ndindex(2, 2):
            r, c = int(np.floor(point[0])) + i, int(np.floor(point[1])) + j
            weight = max(0, 1 - abs(point[0] - r)) * max(0, 1 - abs(point[1] - c))
            if 0 <= r < 2:
                wanted[row, column] += weight * x[r, c, 0] * kernel[0, tap, 0, 0]
    np.testing.assert_allclose(y[..., 0], wanted, atol=2e-6)
