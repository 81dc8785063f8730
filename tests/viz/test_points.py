"""`into_map`: a point reads the same where it is brought to, which `linear_sample` tells."""

import numpy as np
import pytest

from dcn_jax import linear_sample
from dcn_jax.viz._points import into_map


@pytest.mark.parametrize("mode", ["zeros", "edge", "wrap", "reflect", "symmetric"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_point_reads_the_same_in_the_map(mode, size):
    rng = np.random.default_rng(size)
    ramp = rng.normal(size=(size, 1)).astype(np.float32)
    points = np.arange(-3 * size - 2, 3 * size + 2, 0.25, dtype=np.float32)[:, None]
    brought = into_map(points, (size,), (mode,))
    np.testing.assert_allclose(
        linear_sample(ramp, brought, padding_mode=mode), linear_sample(ramp, points, padding_mode=mode), atol=1e-5
    )
    if mode == "zeros":
        np.testing.assert_array_equal(brought, points)
    else:
        assert brought.min() >= 0
        assert brought.max() <= (size - 1 if mode != "wrap" else size)
