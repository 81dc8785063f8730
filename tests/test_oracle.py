"""The oracle's gradients against finite differences of its own values, so that the other tests may lean on them."""

import numpy as np
import oracle
import pytest

CASES = {
    "1-D": dict(x=(2, 6, 4), kernel=(3, 2, 6), offset=(2, 6, 6), mask=(2, 6, 6), feature_group_count=2),
    "2-D": dict(x=(5, 4, 4), kernel=(2, 3, 4, 3), offset=(3, 2, 12), mask=(3, 2, 6), padding=((1, 0), (0, 1)), strides=2),
    "3-D": dict(x=(3, 3, 2, 2), kernel=(2, 1, 2, 2, 1), offset=(2, 2, 2, 24), mask=(2, 2, 2, 8), strides=(1, 2, 1), padding=(0, 0, 1), kernel_dilation=(1, 1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_values(name):
    case = dict(CASES[name])
    rng = np.random.default_rng(0)
    shapes = [case.pop(argument) for argument in ("x", "kernel", "offset", "mask")]
    arrays = [rng.standard_normal(shape) for shape in shapes]
    arrays[2] = rng.integers(-2, 3, shapes[2]) + rng.uniform(0.1, 0.9, shapes[2])
    arrays.append(rng.standard_normal(shapes[1][-1]))
    y = oracle.deform_conv(*arrays, **case)
    cotangent = rng.standard_normal(y.shape)
    gradients = oracle.gradients(cotangent, *arrays, **case)
    for i, gradient in enumerate(gradients):
        assert gradient.shape == arrays[i].shape
        direction = rng.standard_normal(arrays[i].shape)
        moved = [[a + h * direction if i == j else a for j, a in enumerate(arrays)] for h in (1e-6, -1e-6)]
        ahead, behind = (np.sum(cotangent * oracle.deform_conv(*arguments, **case)) for arguments in moved)
        np.testing.assert_allclose(np.sum(gradient * direction), (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)
