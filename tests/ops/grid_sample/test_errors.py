"""Each error of `grid_sample` names the argument, what was given, what was wanted, and what to write."""

import jax
import numpy as np
import pytest

from dcn_jax import grid_sample

FEATURES, GRID = np.zeros((2, 5, 6, 3), np.float32), np.zeros((2, 7, 8, 2), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"padding_mode": "border"}, ValueError, 'torch\'s "border" is "edge"'),
        ({"padding_mode": "reflection"}, ValueError, '"reflection" is "reflect" with align_corners=True and "symmetric" without'),
        ({"method": "bilinear"}, ValueError, 'method=\'bilinear\' is not known; wanted one of (\'linear\', \'nearest\', \'cubic\') (torch\'s "bilinear" is "linear")'),
        ({"method": "bicubic"}, ValueError, 'torch\'s "bicubic" is "cubic"'),
        ({"align_corners": None}, TypeError, "align_corners=None is a NoneType; wanted True or False"),
        ({"grid": np.zeros((2, 2, 7, 8), np.float32)}, ValueError, "grid has shape (2, 2, 7, 8); wanted (*batch, *query, n) with n = 1, 2 or 3 coordinates, x first; it looks channels-first"),
        ({"grid": np.zeros((), np.float32)}, ValueError, "grid has shape ()"),
        ({"grid": np.zeros((3, 7, 8, 2), np.float32)}, ValueError, "grid has shape (3, 7, 8, 2); wanted (*batch, *query, 2) with the batch axes of features, (2,): features has shape (2, 5, 6, 3), that is (*batch, *spatial, C), channels last"),
        ({"grid": GRID[0]}, ValueError, "One grid for all images: jnp.broadcast_to"),
        ({"features": np.zeros((5, 6), np.float32)}, ValueError, "features has shape (5, 6); wanted (*batch, *spatial, C), channels last, with 2 spatial axes"),
        ({"features": np.zeros((2, 0, 6, 3), np.float32)}, ValueError, "features has shape (2, 0, 6, 3)"),
        ({"features": np.zeros((2, 5, 6, 3), np.int32)}, TypeError, "features has dtype int32"),
        ({"grid": GRID.astype(np.int32)}, TypeError, "grid has dtype int32; wanted a floating-point array"),
    ],
)  # fmt: skip
def test_errors(change, error, message):
    arguments = {"features": FEATURES, "grid": GRID} | change
    options = {name: arguments.pop(name) for name in list(arguments) if name not in ("features", "grid")}
    with pytest.raises(error) as raised:
        jax.eval_shape(lambda a: grid_sample(**a, **options), arguments)
    assert message in str(raised.value)
