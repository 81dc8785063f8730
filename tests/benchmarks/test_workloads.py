"""The workloads are what they claim."""

import math

import jax
import numpy as np
import pytest

import dcn_jax
from benchmarks.convolution import Convolution
from benchmarks.family import Attention, Depthwise, GridSample, RoiAlign
from benchmarks.layers import Layer
from benchmarks.workloads import CONVOLUTIONS, FAMILY, LAYERS, WORKLOADS


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_each_workload_is_a_call_of_both_convolutions(name):
    work = WORKLOADS[name]
    shapes = work.shapes("float32")
    result = (work.x[0], *work.out_spatial, work.features)
    assert jax.eval_shape(work.call, *shapes).shape == result
    assert jax.eval_shape(work.dense, *shapes[:2]).shape == result
    assert work.columns == math.prod(result[:-1]) * math.prod(work.window) * work.x[-1]


@pytest.mark.parametrize("name", FAMILY)
def test_each_workload_of_the_family_is_a_call(name):
    work = WORKLOADS[name]
    y = jax.eval_shape(work.call, *work.shapes("bfloat16"))
    assert work.sizes("bfloat16") == {"result_bytes": 2 * y.size}


@pytest.mark.lenient
@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_is_a_call_of_both_layers(name):
    work = WORKLOADS[name]
    shapes = work.shapes("float32")
    result = jax.eval_shape(work.convolution.dense, *work.convolution.shapes("float32")[:2]).shape
    assert jax.eval_shape(work.call, *shapes).shape == jax.eval_shape(work.plain, *shapes[:3]).shape == result


@pytest.mark.lenient
def test_a_layer_reads_where_its_branch_says_and_is_the_plain_one_without():
    work = Layer(WORKLOADS["small"]._replace(x=(1, 6, 6, 4), features=3))
    x, kernel, bias, branch, branch_bias = work.arrays(0, "float32")
    offsets = jax.lax.conv_general_dilated(
        x, branch[..., :18], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert 1.4 < np.std(offsets) < 2.6
    without = work.call(x, kernel, bias, 0 * branch, branch_bias)
    np.testing.assert_allclose(2 * without, work.plain(x, kernel, bias), rtol=1e-5, atol=1e-5)


def test_the_family_s_shapes():
    queries = 100 * 152 + 50 * 76 + 25 * 38 + 13 * 19
    assert jax.eval_shape(WORKLOADS["detr-encoder"].call, *WORKLOADS["detr-encoder"].shapes("float32")).shape == (
        *(1, queries),
        8 * 32,
    )
    assert WORKLOADS["detr-decoder"].shapes("float32")[2].shape == (1, 300, 8, 4, 4)
    assert [WORKLOADS[f"dcnv4-{side}"].shapes("float32")[1].shape for side in (56, 28, 14, 7)] == [
        (1, side, side, 27 * groups) for side, groups in ((56, 4), (28, 8), (14, 16), (7, 32))
    ]


SMALL = [
    GridSample((2, 20, 30, 3)),
    Attention(((8, 12), (4, 6)), batch=2, heads=2, channels=3),
    Attention(((8, 12), (4, 6)), queries=500, heads=2, channels=3),
    Depthwise("dcnv3", (2, 9, 8, 6), 3),
    Depthwise("dcnv4", (2, 9, 8, 6), 3),
    RoiAlign((2, 9, 8, 6), 3),
    Layer(WORKLOADS["small"]),
]


@pytest.mark.parametrize("work", [WORKLOADS["small"]._replace(x=(2, 16, 16, 32), modulated=False), *SMALL], ids=str)
def test_a_workload_s_arrays_have_its_shapes(work):
    arrays = work.arrays(0, "float32")
    assert [a.shape for a in arrays] == [s.shape for s in work.shapes("float32")]
    assert {a.dtype for a in arrays} == {np.dtype("float32")}


def test_offsets_are_two_pixels_wide_and_results_one():
    work = WORKLOADS["small"]._replace(x=(2, 16, 16, 32), modulated=False)
    arrays = work.arrays(0, "float32")
    assert np.std(arrays[2]) == pytest.approx(2, rel=0.1)
    assert np.std(work.dense(*arrays[:2])) == pytest.approx(1, rel=0.1)


def test_a_grid_and_locations_are_two_pixels_from_where_the_query_is():
    flow, encoder = SMALL[:2]
    pixels = (np.asarray(flow.arrays(0, "float32")[1]) + 1) / 2 * [30, 20] - 0.5  # (x, y)
    moved = pixels - np.stack(np.meshgrid(np.arange(30), np.arange(20)), -1)
    assert np.mean(moved) == pytest.approx(0, abs=0.2)
    assert np.std(moved) == pytest.approx(2, rel=0.1)
    locations = np.asarray(encoder.arrays(0, "float32")[1])
    assert locations[:, 12 * 8 - 1].mean((0, 1, 2, 3)) == pytest.approx([11.5 / 12, 7.5 / 8], abs=0.15)
    spread = locations[:, :, :, 0] - locations[:, :, :, 0].mean((0, 2, 3), keepdims=True)  # of the first level
    assert np.std(spread, axis=(0, 1, 2, 3)) == pytest.approx([2 / 12, 2 / 8], rel=0.1)  # (x, y)


@pytest.mark.parametrize("work", SMALL[3:5], ids=str)
def test_dcnv3_and_dcnv4_stand_beside_the_dense_convolution_of_their_shape(work):
    function, (arrays,) = work.beside([work.arrays(0, "float32")])
    assert arrays[1].shape == (3, 3, 6, 6)
    assert jax.eval_shape(function, *arrays).shape == work.x


def test_what_has_no_kernels_refuses_them():
    for work in SMALL:
        with pytest.raises(ValueError, match="implementation='pallas_gpu'"):
            work.call(*work.arrays(0, "float32"), implementation="pallas_gpu")


def test_a_workload_in_words():
    assert str(WORKLOADS["gpu-conv3"]) == "8×100×168, 128 → 128, 3×3"
    unusual = Convolution((1, 6, 8), 4, window=(5,), strides=2, dilation=3, groups=4, offset_groups=2, modulated=False)
    assert str(unusual) == "1×6, 8 → 4, 5, strides 2, dilation 3, groups 4, offset groups 2, no mask"
    assert str(SMALL[2]) == "1×500×2×3, 4 points on 8×12, 4×6"
    assert str(SMALL[3]) == "2×9×8, 6, dcnv3, groups 3"


def test_dcnv4_s_array_holds_offsets_then_masks():
    x, packed = SMALL[4].arrays(0, "float32")
    taps = packed.reshape(2, 9, 8, 3, 27)
    offset, mask = taps[..., :18].reshape(2, 9, 8, 54), taps[..., 18:].reshape(2, 9, 8, 27)
    np.testing.assert_allclose(SMALL[4].call(x, packed), dcn_jax.dcnv3(x, offset, mask), rtol=1e-5)
    assert mask.min() >= 0
    assert np.std(offset) == pytest.approx(2, rel=0.1)
