"""The oracle's gradients against finite differences of its own values, so that the other tests may lean on them."""

import numpy as np
import pytest

from tests.support import oracle
from tests.support.cases import draw

CASES = [
    pytest.param(draw((2, 6, 4), (3,), 6, offset_groups=2, feature_group_count=2, whole=0), id="1-D"),
    pytest.param(draw((5, 4, 4), (2, 3), 3, padding=((1, 0), (0, 1)), strides=2, whole=0), id="2-D"),
    pytest.param(
        draw((3, 3, 2, 2), (2, 1, 2), 1, strides=(1, 2, 1), padding=(0, 0, 1), kernel_dilation=(1, 1, 2), whole=0),
        id="3-D",
    ),
]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_values(case):
    rng = np.random.default_rng(0)
    arrays, options = case.astype(np.float64)
    y = oracle.deform_conv(*arrays, **options)
    cotangent = rng.standard_normal(y.shape)
    for i, gradient in enumerate(oracle.gradients(cotangent, *arrays, **options)):
        assert gradient.shape == arrays[i].shape
        direction = rng.standard_normal(arrays[i].shape)
        moved = [[a + h * direction if i == j else a for j, a in enumerate(arrays)] for h in (1e-6, -1e-6)]
        ahead, behind = (np.sum(cotangent * oracle.deform_conv(*arguments, **options)) for arguments in moved)
        np.testing.assert_allclose(np.sum(gradient * direction), (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)
