"""`deform_conv` against ONNX's DeformConv: its four node tests, random cases run by its reference evaluator, and
the values of onnxruntime's tests.
"""

import functools
import importlib
import itertools
import warnings

import jax
import numpy as np
import onnx.backend.test.case.node as onnx_cases
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

with warnings.catch_warnings():  # the module fills its arrays' shapes in place, as NumPy 2.5 deprecates
    warnings.filterwarnings("ignore", "Setting the shape on a NumPy array", DeprecationWarning)
    importlib.import_module("onnx.backend.test.case.node.deformconv")  # registers its cases, and they alone

NODE_TESTS = [case for case in onnx_cases._NodeTestCases if "deform_conv" in case.name]


def channels_last(array):
    return np.moveaxis(array, 1, -1)


def from_onnx(op, attributes, X, W, offset, B=None, mask=None):
    """Call `op` with the inputs and attributes of a DeformConv node; the result is channels first again."""
    pads = attributes.get("pads", [0] * 4)
    run = functools.partial(
        op,
        strides=attributes.get("strides", 1),
        padding=list(zip(pads[:2], pads[2:], strict=True)),
        kernel_dilation=attributes.get("dilations", 1),
        feature_group_count=attributes.get("group", 1),
    )
    mask = None if mask is None else channels_last(mask)
    y = jax.jit(run)(channels_last(X), W.transpose(2, 3, 1, 0), channels_last(offset), mask, B)
    return np.moveaxis(y, -1, 1)


def test_all_four_node_tests_are_here():
    assert len(NODE_TESTS) == 4


@pytest.mark.parametrize("case", NODE_TESTS, ids=lambda case: case.name)
def test_node_test(op, case):
    (node,) = case.model.graph.node
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    for inputs, (expected,) in case.data_sets:
        names = ["X", "W", "offset", "B", "mask"][: len(inputs)]
        actual = from_onnx(op, attributes, **dict(zip(names, inputs, strict=True)))
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


RANDOM_CASES = {
    "asymmetric pads": {"kernel_shape": [3, 2], "pads": [1, 0, 2, 1]},
    "strides and dilations": {"kernel_shape": [2, 3], "pads": [1, 2, 1, 1], "strides": [1, 2], "dilations": [2, 1]},
    "groups alike": {"kernel_shape": [2, 2], "group": 2, "offset_group": 2},
    "more groups": {"kernel_shape": [1, 3], "group": 4, "offset_group": 2},
    "more offset groups": {"kernel_shape": [3, 1], "pads": [0, 1, 0, 1], "offset_group": 4},
}


@pytest.mark.parametrize(("name", "modulated"), list(zip(RANDOM_CASES, itertools.cycle([True, False]), strict=False)))
def test_reference_evaluator(op, name, modulated):
    """On maps of 2 pixels or more along each axis: the reference divides by size - 1."""
    attributes, rng = RANDOM_CASES[name], np.random.default_rng(5)
    batch, channels, features, spatial = 2, 4, 4, np.array([3, 4])
    window, pads = np.array(attributes["kernel_shape"]), np.array(attributes.get("pads", [0] * 4))
    extent = (window - 1) * attributes.get("dilations", 1) + 1
    out = (spatial + pads[:2] + pads[2:] - extent) // attributes.get("strides", 1) + 1
    sampled = attributes.get("offset_group", 1) * window.prod()
    inputs = {
        "X": rng.normal(size=(batch, channels, *spatial)),
        "W": rng.normal(size=(features, channels // attributes.get("group", 1), *window)),
        "offset": rng.normal(0, 2, size=(batch, sampled * 2, *out)),
        "B": rng.normal(size=features),
    }
    if modulated:
        inputs["mask"] = rng.uniform(size=(batch, sampled, *out))
    inputs = {name: value.astype(np.float32) for name, value in inputs.items()}

    node = helper.make_node("DeformConv", list(inputs), ["Y"], **attributes)
    (expected,) = ReferenceEvaluator(node).run(None, inputs)
    np.testing.assert_allclose(from_onnx(op, attributes, **inputs), expected, rtol=1e-4, atol=1e-5)


def full(*shape_and_value):
    *shape, value = shape_and_value
    return np.full(shape, value, np.float32)


def literal(shape, *values):
    return np.array(values, np.float32).reshape(shape)


# microsoft/onnxruntime at 12b19c8a: onnxruntime/test/providers/cpu/nn/deform_conv_op_test.cc, by the names of its tests.
# Attributes, inputs and the result, channels first.
SQUARE = literal((1, 1, 2, 2), 1, 2, 3, 4)
ONES_2X2 = full(1, 1, 2, 2, 1)
RUNTIME_TESTS = {
    "MinimalBilinear": (
        {}, SQUARE, full(1, 1, 1, 1, 1), literal((1, 2, 2, 2), 0.5, 0, 0, 0, 0.5, -1, 0, 0), full(1, 0), ONES_2X2,
        literal((1, 1, 2, 2), 2.5, 1, 3, 4),
    ),
    "Opset22": (
        {}, SQUARE, full(1, 1, 1, 1, 1), literal((1, 2, 2, 2), 0.5, 0, 0, 0, 0.5, 0, 0, 0), full(1, 0), ONES_2X2,
        literal((1, 1, 2, 2), 2.5, 2, 3, 4),
    ),
    "OutOfBoundsSampling": (
        {}, SQUARE, full(1, 1, 1, 1, 1), full(1, 2, 2, 2, -5), full(1, 0), ONES_2X2, full(1, 1, 2, 2, 0),
    ),
    "TinyOffset": (
        {}, full(1, 1, 1, 1, 1), full(1, 1, 1, 1, 1), full(1, 2, 1, 1, 1e-6), full(1, 0), full(1, 1, 1, 1, 1),
        full(1, 1, 1, 1, 1),
    ),
    "OffsetAtPixelCenters": (
        {}, SQUARE, full(1, 1, 2, 2, 0.25), full(1, 8, 1, 1, 0.5), full(1, 0), full(1, 4, 1, 1, 1),
        full(1, 1, 1, 1, 1.6875),
    ),
    "ForwardWithMaskAndBias": (
        {"group": 2}, full(2, 4, 3, 3, 0.1), full(2, 2, 2, 2, 0.1), full(2, 16, 2, 2, 0), literal(2, 0.5, -0.5),
        full(2, 8, 2, 2, 1), np.broadcast_to(literal((1, 2, 1, 1), 0.58, -0.42), (2, 2, 2, 2)),
    ),
    "ForwardNoMask": (
        {}, full(1, 2, 3, 3, 0.1), full(2, 2, 2, 2, 0.1), full(1, 8, 2, 2, 0), full(2, 0), None, full(1, 2, 2, 2, 0.08),
    ),
    "EmptyBatch": (
        {}, full(0, 2, 3, 3, 0), full(2, 2, 2, 2, 0.1), full(0, 8, 2, 2, 0), full(2, 0), None, full(0, 2, 2, 2, 0),
    ),
    "NonSquareKernel": (
        {}, full(1, 1, 4, 5, 0.1), full(1, 1, 2, 3, 0.1), full(1, 12, 3, 3, 0), full(1, 0), full(1, 6, 3, 3, 1),
        full(1, 1, 3, 3, 0.06),
    ),
    "AsymmetricStride": (
        {"strides": [2, 1]}, full(1, 1, 5, 4, 0.1), full(1, 1, 2, 2, 0.1), full(1, 8, 2, 3, 0), full(1, 0),
        full(1, 4, 2, 3, 1), full(1, 1, 2, 3, 0.04),
    ),
    "DilationGt1": (
        {"dilations": [2, 2]}, full(1, 1, 5, 5, 0.1), full(1, 1, 2, 2, 0.1), full(1, 8, 3, 3, 0), full(1, 0),
        full(1, 4, 3, 3, 1), full(1, 1, 3, 3, 0.04),
    ),
    "DecoupledGroups": (
        {"group": 2}, full(1, 4, 3, 3, 0.1), full(2, 2, 2, 2, 0.1), full(1, 8, 2, 2, 0), full(2, 0), full(1, 4, 2, 2, 1),
        full(1, 2, 2, 2, 0.08),
    ),
    "AsymmetricPadding": (
        {"pads": [1, 0, 0, 1]}, full(1, 1, 3, 3, 0.1), full(1, 1, 2, 2, 0.1), full(1, 8, 3, 3, 0), full(1, 0),
        full(1, 4, 3, 3, 1), literal((1, 1, 3, 3), 0.02, 0.02, 0.01, 0.04, 0.04, 0.02, 0.04, 0.04, 0.02),
    ),
    "LargeBatchSize": (
        {}, full(64, 1, 3, 3, 0.1), full(1, 1, 2, 2, 0.1), full(64, 8, 2, 2, 0), full(1, 0), full(64, 4, 2, 2, 1),
        full(64, 1, 2, 2, 0.04),
    ),
    "Group1OffsetGroup2": (
        {}, full(1, 4, 3, 3, 0.1), full(2, 4, 2, 2, 0.1), full(1, 16, 2, 2, 0), full(2, 0), full(1, 8, 2, 2, 1),
        full(1, 2, 2, 2, 0.16),
    ),
    "MaskWithZeros": (
        {}, full(1, 1, 3, 3, 0.1), full(1, 1, 2, 2, 0.1), full(1, 8, 2, 2, 0), full(1, 0), full(1, 4, 2, 2, 0),
        full(1, 1, 2, 2, 0),
    ),
    "ExtremeAspectRatio": (
        {}, full(1, 1, 1, 100, 0.1), full(1, 1, 1, 3, 0.1), full(1, 6, 1, 98, 0), full(1, 0), full(1, 3, 1, 98, 1),
        full(1, 1, 1, 98, 0.03),
    ),
}  # fmt: skip

# microsoft/onnxruntime at 844159a3: onnxruntime/test/testdata/deform_conv_test_data.inc, the values behind its test
# GroupsWithNonZeroOffset.
RUNTIME_TESTS["GroupsWithNonZeroOffset"] = (
    {"group": 2},
    literal((1, 4, 3, 3), 0.296111941, 0.516562283, 0.251670718, 0.68855679, 0.0739724636, 0.866521955,
        0.136579871, 0.102479041, 0.184056461, 0.726446748, 0.315253913, 0.687106669, 0.075635314, 0.196638167,
        0.316411972, 0.401740134, 0.118568301, 0.82739538, 0.382084429, 0.660493851, 0.853571773, 0.593153,
        0.636725366, 0.982629359, 0.274495304, 0.658375621, 0.277541935, 0.857324839, 0.899328232, 0.0390138626,
        0.926822901, 0.738757193, 0.717883527, 0.705837429, 0.915649533, 0.433980227),
    literal((2, 2, 2, 2), -1.18204546, -0.287744999, -0.604300678, 0.600236714, -1.42047262, -0.223827749,
        0.430554837, -0.89885664, -0.0178579595, 0.426403075, -0.765740693, -0.0545141846, -0.732052684,
        1.23474216, 1.18622088, -0.220098898),
    literal((1, 16, 2, 2), -0.388483077, -0.934345901, -0.499144107, -1.08665264, 0.962421, 0.249208495,
        -0.484502077, -2.09291434, 0.0982837752, -0.0935074314, 0.266214728, -0.585035503, -0.343037993,
        -0.682147384, -0.988689423, -1.70183039, -1.2202903, 1.31385386, 1.05329967, 0.138805181, -0.204444751,
        -2.26852894, -0.913327932, -0.420362711, -0.659559608, -0.797927678, 0.18383126, 0.229347408,
        0.617742658, -0.287577927, 0.821824312, 0.151177585, -0.0443819836, 1.62355745, -2.32287097, 1.08783054,
        -0.0635453761, -0.448640704, -1.27846932, -1.14400387, -0.152640373, 0.116741188, 0.44026047,
        -1.44654655, -0.558081627, -0.0516963229, -0.90827328, 0.350683212, -0.394808769, 0.489227712,
        -0.216814891, -1.74716449, 1.72284174, 0.773806036, 0.404629797, -1.64612663, -0.59508425, -0.711217523,
        0.622964859, -1.37288189, -0.128064156, -1.28383458, -0.290120065, 1.27674019),
    literal(2, 0.983955026, 0.204511523),
    literal((1, 8, 2, 2), -0.0318612382, -0.478955716, 0.766808629, 0.0274681915, 0.0474699028, -0.92386651,
        -1.06073678, -2.32444572, -2.06281757, 0.00637452863, -0.989554703, 0.701609194, -0.982237995,
        0.277030349, 0.645495057, -0.895680785, 0.492752999, -0.0140781598, -0.274662733, -0.764091492,
        -0.58715719, 1.1951654, -1.20957518, -0.556007624, -0.0771045536, 1.27737665, -1.45962942, -2.15952778,
        -0.70670861, -0.92224431, 3.89537215, -0.602696717),
    literal((1, 2, 2, 2), 0.971546292, 1.1398586, 0.452816963, 1.86388242, -0.565265715, 1.42318761,
        -2.46283293, -0.104923099),
)  # fmt: skip


@pytest.mark.parametrize("case", RUNTIME_TESTS.values(), ids=RUNTIME_TESTS.keys())
def test_onnxruntime(op, case):
    attributes, *inputs, expected = case
    np.testing.assert_allclose(from_onnx(op, attributes, *inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("offset_channels", "mask_channels", "name"), [(2, 4, "offset"), (8, 2, "mask")])
def test_onnxruntime_refuses_wrong_channels(op, offset_channels, mask_channels, name):
    """Its tests WrongOffsetShape and WrongMaskShape."""
    x, kernel = full(1, 2, 3, 3, 0.1), full(2, 2, 2, 2, 0.1)
    with pytest.raises(ValueError, match=f"^{name} has shape"):
        from_onnx(op, {}, x, kernel, full(1, offset_channels, 2, 2, 0), None, full(1, mask_channels, 2, 2, 1))
