"""A TPU's spelling of reading, from rows of two pixels, beside `locate` and `sum_rows`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax.ops.deform_conv.xla import pixel_pairs
from dcn_jax.sampling import Border, Positions, locate, sum_rows
from tests.support.running import assert_close, normal
from tests.test_sampling import draw


def test_weights_spread_by_a_product_lose_no_bit():
    """Three bfloat16 hold all of a float32: each weight comes back as it was."""
    first, second = normal(3, 40), normal(3, 40, seed=1)
    spread = jax.jit(pixel_pairs._spread, static_argnums=2)(first, second, 6)
    np.testing.assert_array_equal(spread, np.repeat(np.stack([first, second], axis=-1), 3, axis=-1))


@pytest.mark.parametrize("groups", [1, 2], ids="{} offset groups".format)
@pytest.mark.parametrize("whole", [0.0, 1.0], ids=["fractions", "whole positions"])
def test_pairs_read_the_same(whole, groups):
    """In and around the map, far and infinite; the two pixels of a pair are still to be added. Gradients too."""
    features, points = draw((4, 3), 5 * groups, query=(24 * groups,), whole=whole)
    points[:4, 0] = np.inf, -np.inf, 3e9, -3e9
    border, rows = Border((4, 3), ("zeros", "zeros")), jnp.asarray(features.reshape(1, 4 * 3 * groups, 5))
    at = Positions(jnp.ones((1, 24, groups, 2), jnp.int32), jnp.asarray(points.reshape(1, 24, groups, 2)))
    scale, y_bar = jnp.linspace(0.5, 2, 24 * groups).reshape(1, 24, groups), normal(24, groups, 5)

    def by_pairs(rows, offset, scale):
        positions, modulation = Positions(at.regular, offset), scale
        if groups == 1:
            positions, modulation = Positions(at.regular[..., 0, :], offset[..., 0, :]), scale[..., 0]
        found = pixel_pairs._locate_pairs(positions, modulation, groups, border)
        if groups > 1:  # offset groups before all other axes
            found = jax.tree.map(lambda array: jnp.moveaxis(array, -1, 0), found)
        pairs = pixel_pairs._sum_pairs(pixel_pairs._pair_up(rows, border, groups), found)
        samples = (pairs[..., :5] + pairs[..., 5:]).reshape(groups, 24, 5)
        return jnp.moveaxis(samples, 0, 1)

    def by_corners(rows, offset, scale):
        return sum_rows(rows[0], locate(Positions(at.regular[0], offset[0]), scale[0], border))

    @jax.jit
    def both(rows, offset, scale):
        results = []
        for read in (by_pairs, by_corners):
            y, pull = jax.vjp(read, rows, offset, scale)
            results.append((y, *pull(y_bar)))
        return results

    for got, wanted in zip(*both(rows, at.offset, scale), strict=True):
        assert_close(got, wanted, 1e-5)
