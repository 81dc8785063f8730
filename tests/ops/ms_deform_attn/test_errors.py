"""Each error of `ms_deform_attn` names the argument, what was given, what was wanted, and the way out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax import ms_deform_attn


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


GOOD = {
    "value": zeros(2, 16, 3, 4),
    "spatial_shapes": ((3, 4), (2, 2)),
    "sampling_locations": zeros(2, 5, 3, 2, 2, 2),
    "attention_weights": zeros(2, 5, 3, 2, 2),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"implementation": "pallas_gpu"}, ValueError, "implementation='pallas_gpu' is not there for ms_deform_attn, which has no GPU kernels yet; use implementation='xla'"),
        ({"implementation": "cuda"}, ValueError, "implementation='cuda' is not known; wanted 'xla' or None"),
        ({"method": "bilinear"}, ValueError, "method='bilinear' is not known; wanted one of ('linear', 'nearest', 'discrete')"),
        ({"value": zeros(16, 4)}, ValueError, "value has shape (16, 4); wanted (*batch, S, M, D)"),
        ({"value": zeros(2, 15, 3, 4)}, ValueError, "value has shape (2, 15, 3, 4); wanted (*batch, 16, M, D): the pixels of all levels one after another"),
        ({"value": zeros(2, 3, 16, 4)}, ValueError, "it looks heads-first: swap its axes -3 and -2"),
        ({"value": zeros(2, 16, 3, 4, dtype=np.int32)}, TypeError, "value has dtype int32"),
        ({"spatial_shapes": jnp.ones((2, 2), int)}, TypeError, "as ints that are known when the function is traced: a tuple, or a NumPy array"),
        ({"spatial_shapes": (3, 4)}, TypeError, "spatial_shapes=(3, 4) is no sequence of sequences"),
        ({"spatial_shapes": ((3.0, 4), (2, 2))}, TypeError, "is not made of ints"),
        ({"spatial_shapes": ((3, 4), (4,))}, ValueError, "spatial_shapes=((3, 4), (4,)); wanted 1, 2 or 3 sizes of at least 1 for each level, as many for each"),
        ({"spatial_shapes": ()}, ValueError, "spatial_shapes=() has no levels; wanted at least one, ((H1, W1),)"),
        ({"sampling_locations": zeros(2, 5, 3, 1, 4, 2)}, ValueError, "wanted (*batch, Q, M, 2, P, n): as many points on each of the 2 levels of spatial_shapes; for a number that differs, pass points_per_level"),
        ({"sampling_locations": zeros(2, 5, 4, 2, 2, 2)}, ValueError, "sampling_locations has shape (2, 5, 4, 2, 2, 2); wanted (*batch, Q, M, L, P, n) with the batch axes (2,) and the 3 heads of value"),
        ({"sampling_locations": zeros(1, 5, 3, 2, 2, 2)}, ValueError, "with the batch axes (2,)"),
        ({"sampling_locations": zeros(2, 5, 3, 2, 2, 3)}, ValueError, "and n = 2, as many coordinates as each of spatial_shapes has sizes"),
        ({"attention_weights": zeros(2, 5, 3, 2, 3)}, ValueError, "attention_weights has shape (2, 5, 3, 2, 3); wanted (2, 5, 3, 2, 2): one weight for each of sampling_locations"),
        ({"points_per_level": (3, 2)}, ValueError, "wanted (*batch, Q, M, T, n) with the batch axes (2,) and the 3 heads of value, (5,) points"),
        ({"points_per_level": (3,)}, ValueError, "points_per_level=(3,); wanted 2 ints of at least 0, one per level"),
        ({"points_per_level": 4}, TypeError, "points_per_level=4 is not made of ints; wanted 2 ints, one per level"),
    ],
)  # fmt: skip
def test_errors(change, error, message):
    arguments = GOOD | change
    names = ("value", "sampling_locations", "attention_weights")
    arrays, options = {n: arguments[n] for n in names}, {n: v for n, v in arguments.items() if n not in names}
    with pytest.raises(error) as raised:
        jax.eval_shape(lambda arrays: ms_deform_attn(**arrays, **options), arrays)
    assert message in str(raised.value)


def test_spatial_shapes_may_be_lists_or_numpy():
    value, _, locations, weights = GOOD.values()
    for shapes in ([[3, 4], [2, 2]], np.array([[3, 4], [2, 2]]), [np.array([3, 4]), (2, np.int64(2))]):
        assert ms_deform_attn(value, shapes, locations, weights).shape == (2, 5, 12)
