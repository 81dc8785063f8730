"""The workloads are what they claim."""

import math

import jax
import numpy as np
import pytest

from benchmarks.workloads import WORKLOADS, Workload


@pytest.mark.parametrize("name", WORKLOADS)
def test_each_workload_is_a_call_of_both_convolutions(name):
    work = WORKLOADS[name]
    shapes = work.shapes("float32")
    result = (work.x[0], *work.out_spatial, work.features)
    assert jax.eval_shape(work.deform_conv, *shapes).shape == result
    assert jax.eval_shape(work.dense, *shapes[:2]).shape == result
    assert work.columns == math.prod(result[:-1]) * math.prod(work.window) * work.x[-1]


def test_a_workload_s_arrays_have_its_shapes_and_a_unit_result():
    work = WORKLOADS["small"]._replace(x=(2, 16, 16, 32), modulated=False)
    arrays = work.arrays(0, "float32")
    assert [a.shape for a in arrays] == [s.shape for s in work.shapes("float32")]
    assert np.std(arrays[2]) == pytest.approx(2, rel=0.1)
    assert np.std(work.dense(*arrays[:2])) == pytest.approx(1, rel=0.1)


def test_a_workload_in_words():
    assert str(WORKLOADS["gpu-conv3"]) == "8×100×168, 128 → 128, 3×3"
    unusual = Workload((1, 6, 8), 4, window=(5,), strides=2, dilation=3, groups=4, offset_groups=2, modulated=False)
    assert str(unusual) == "1×6, 8 → 4, 5, strides 2, dilation 3, groups 4, offset groups 2, no mask"
