"""The TPU kernels' reading between pixels, compared with `sampling.linear_sample`. No kernel runs here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax.ops.deform_conv.pallas_tpu.kernels import Points, hats
from dcn_jax.sampling import linear_sample
from tests.support.running import normal

ROWS, COLUMNS, COUNT = 5, 7, 64
# Each pixel has a channel of its own, so a point reads the weights of all pixels from this map.
PIXELS = jnp.eye(ROWS * COLUMNS).reshape(ROWS, COLUMNS, ROWS * COLUMNS)


def draw(place):
    """Whole numbers and offsets, `(COUNT, 2)` each. Half of the points are at `place` along one axis alone.

    All positions are multiples of 1/64, which float32 adds exactly.
    """
    rng, last = np.random.default_rng(0), np.array([ROWS - 1, COLUMNS - 1])
    regular, fraction = rng.integers(0, last + 1, (COUNT, 2)), rng.integers(1, 64, (COUNT, 2)) / 64
    inside = rng.integers(0, last, (COUNT, 2)) + fraction
    before_or_after = rng.choice([0, 1], (COUNT, 2))
    point = {
        "random": inside,
        "whole": np.floor(inside),
        "border": before_or_after * (last + 1) - fraction,
        "last pixel": before_or_after * last.astype(float),
        "just beyond": before_or_after * (last + 2) - 1.0,
        "far beyond": np.where(before_or_after, last + 2 + fraction, -2 - fraction),
    }[place]
    for axis, some in enumerate((slice(COUNT // 4), slice(COUNT // 4, COUNT // 2))):
        point[some, axis] = inside[some, axis]
    return jnp.asarray(regular, jnp.int32), jnp.asarray(point - regular, jnp.float32)


def points_of(regular, offset, modulation):
    axes = (hats(offset[None, :, axis], regular[None, :, axis], size) for axis, size in enumerate((ROWS, COLUMNS)))
    return Points(*axes, modulation[None])


@pytest.mark.parametrize("place", ["random", "whole", "border", "last pixel", "just beyond", "far beyond"])
def test_hats_read_as_sampling_does(place):
    """Weights, and their derivatives: at whole numbers the right-hand ones."""
    regular, offset = draw(place)
    modulation = jnp.linspace(0.5, 2, COUNT)
    points = points_of(regular, offset, modulation)

    def weights_of(offset, modulation):
        return modulation[:, None] * linear_sample(PIXELS, regular.astype(jnp.float32) + offset)

    wanted, pull = jax.vjp(weights_of, offset, modulation)
    np.testing.assert_allclose(points.weights().T, wanted, rtol=0, atol=1e-6)
    weights_bar = normal(*wanted.shape)
    found = points.gradients(weights_bar.T.reshape(ROWS, COLUMNS, COUNT))
    offset_bar, modulation_bar = pull(weights_bar)
    np.testing.assert_allclose(jnp.concatenate(found), [*offset_bar.T, modulation_bar], rtol=0, atol=1e-5)


def test_a_nan_weighs_nan_at_its_own_point_alone():
    regular, offset = draw("random")
    weights = points_of(regular, offset.at[3, 0].set(jnp.nan), jnp.ones(COUNT)).weights()
    np.testing.assert_array_equal(np.isnan(weights).any(axis=0), np.arange(COUNT) == 3)
