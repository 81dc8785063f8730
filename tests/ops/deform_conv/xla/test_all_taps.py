"""The CPU's own spelling of reading, beside `locate` and `sum_rows`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax.ops.deform_conv.xla.all_taps import pull_rows, sum_corners
from dcn_jax.sampling import Border, Positions, Rows, locate, sum_rows
from tests.support.running import assert_close, normal
from tests.test_sampling import draw


@pytest.mark.parametrize("whole", [0.0, 1.0], ids=["fractions", "whole positions"])
@pytest.mark.parametrize("channels", [3, 16, 17], ids="{} channels".format)
@pytest.mark.parametrize("mode", ["zeros", "edge", "wrap", "reflect", "symmetric"])
def test_the_sum_is_the_same(mode, channels, whole):
    """At points in and around the map, far, infinite and NaN, it reads what `locate` and `sum_rows` do."""
    features, points = draw((4, 3), 2 * channels, whole=whole)
    features[3, 2, 0], points[0, :4, 0] = np.inf, (np.inf, -np.inf, np.nan, 3e9)
    rows, border = jnp.asarray(features.reshape(4 * 3 * 2, channels)), Border((4, 3), (mode, mode))
    regular = jnp.broadcast_to(jnp.array([1, -1], jnp.int32), (4, 6, 1, 2))
    at = Positions(regular, jnp.repeat(jnp.asarray(points)[:, :, None], 2, axis=2))
    scale = jnp.linspace(0.5, 2, 4 * 6 * 2, dtype=np.float32).reshape(4, 6, 2)
    wanted = jax.jit(lambda: sum_rows(rows, locate(at, scale, border)))()
    np.testing.assert_allclose(jax.jit(lambda: sum_corners(rows, at, scale, border))(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [3, 16, 17], ids="{} channels".format)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradients_are_the_same(dtype, channels):
    """Of rows, that after the last included, which has none; of a narrow map by its wide copy."""
    rows, y_bar = jnp.asarray(normal(12, channels), dtype), normal(5, 7, channels, seed=1)
    random = np.random.default_rng(2)
    at = Rows(
        *(tuple(map(jnp.asarray, found)) for found in (random.integers(0, 13, (4, 5, 7)), normal(4, 5, 7, seed=3)))
    )

    def read(wide, weight):
        narrow, summed = (wide, None) if dtype == "float32" else (rows, wide)
        return sum_rows(narrow, Rows(at.row, weight), summed)

    @jax.jit
    def both(rows, weight):
        wide = rows.astype(np.float32)
        wanted = jax.vjp(read, wide, weight)[1](y_bar)
        return pull_rows(rows, Rows(at.row, weight), y_bar, None if dtype == "float32" else wide), wanted

    for got, wanted in zip(*map(jax.tree.leaves, both(rows, at.weight)), strict=True):
        assert_close(got, wanted, 1e-6)
