"""`deform_conv` on a GPU against the oracle: values and all gradients, in what memory that was full of NaN."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dcn_jax.geometry import PADDING_MODES
from tests.support import gpu
from tests.support.cases import draw
from tests.support.running import value_and_gradients

if reason := gpu.missing():
    pytest.skip(reason, allow_module_level=True)

# Positions, channels and features that fill no tile, one, and several, and each option.
CASES = {
    "few": draw((2, 9, 11, 3), (3, 3), 5),
    "sixteen": draw((2, 9, 11, 16), (3, 3), 16),
    "odd": draw((2, 9, 11, 45), (3, 3), 21),
    "wide": draw((1, 9, 11, 24), (3, 3), 300),
    "blocks": draw((1, 9, 11, 136), (3, 3), 144, offset_groups=2),
    "groups": draw((2, 7, 9, 48), (3, 3), 72, feature_group_count=6, offset_groups=4),
    "depthwise": draw((2, 7, 9, 32), (3, 3), 32, feature_group_count=32),
    "strides": draw((2, 12, 15, 16), (3, 3), 24, strides=2, kernel_dilation=(2, 3), padding=((1, 2), (3, 0))),
    "lower": draw((2, 9, 11, 16), (2, 4), 16, strides=(1, 2), padding="SAME_LOWER"),
    "valid": draw((2, 9, 11, 16), (3, 3), 16, padding="VALID", kernel_dilation=2, mask=False),
    "row": draw((3, 70, 16), (5,), 24, kernel_dilation=3, bias=False),
    "one image": draw((9, 11, 16), (3, 3), 16, mask=False, bias=False),
    "batches": draw((2, 1, 3, 5, 6, 16), (3, 3), 16),
    "strips": draw((1, 3, 40, 8), (1, 3), 8),
    "solid": draw((1, 4, 5, 7, 16), (3, 3, 3), 24, offset_groups=2),
    "solid, odd": draw((2, 3, 4, 5, 5), (2, 3, 2), 7, strides=(1, 2, 1)),
}
IMPLEMENTATIONS = ("pallas_gpu", "xla")


def check_case(record, name, implementation, case, tolerance, **options):
    cotangent = gpu.draw_cotangent(case)
    program = gpu.gradients_of(gpu.bound(implementation, **case.options, **options))
    y, gradients = gpu.run(program, case.arrays, cotangent)
    assert y.dtype == case.arrays[0].dtype
    assert [g.dtype for g in gradients if g is not None] == [a.dtype for a in case.arrays if a is not None]
    gpu.check(record, name, gpu.named((y, gradients)), gpu.exact(case, cotangent.astype(y.dtype)), tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_float32(record_property, name, implementation):
    precision, tolerance = gpu.PRECISIONS["HIGHEST"]
    check_case(record_property, name, implementation, CASES[name], tolerance, precision=precision)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("precision", ["TF32", "TF32x3"])
@pytest.mark.parametrize("name", ["sixteen", "odd", "blocks", "groups", "solid"])
def test_tensor_cores(record_property, name, precision, implementation):
    if gpu.INTERPRETED and (precision, implementation) == ("TF32x3", "xla"):
        pytest.skip("a CPU makes no such products")
    precision, tolerance = gpu.PRECISIONS[precision]
    if (precision, implementation) == (None, "pallas_gpu"):
        tolerance = gpu.KERNELS_TF32
    check_case(record_property, name, implementation, CASES[name], tolerance, precision=precision)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", [*PADDING_MODES[1:], ("wrap", "symmetric")], ids=str)
def test_borders(record_property, mode, implementation):
    case, (precision, tolerance) = CASES["groups"], gpu.PRECISIONS["HIGHEST"]
    cotangent = gpu.draw_cotangent(case)

    def run(implementation):
        op = gpu.bound(implementation, padding_mode=mode, precision=precision, **case.options)
        return functools.partial(value_and_gradients, op)

    got = gpu.run(jax.jit(run(implementation)), case.arrays, cotangent)
    wanted = gpu.on_host(run("xla"), case.arrays, cotangent)
    gpu.check(record_property, str(mode), gpu.named(got), gpu.named(wanted), tolerance)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [*((name, "pallas_gpu") for name in ("sixteen", "odd", "wide", "groups", "valid", "solid")), ("blocks", "xla")],
)
@pytest.mark.parametrize("dtype", gpu.HALVES)
def test_halves(record_property, dtype, name, implementation):
    case = CASES[name].astype(jnp.dtype(dtype))
    check_case(record_property, name, implementation, case, gpu.HALVES[dtype])


@pytest.mark.parametrize("dtype", gpu.HALVES)
def test_halves_with_offsets_in_float32(record_property, dtype):
    """As layers call it."""
    case = CASES["blocks"]
    x, kernel, _, _, bias = case.astype(jnp.dtype(dtype)).arrays
    case = case._replace(arrays=(x, kernel, *case.arrays[2:4], bias))
    check_case(record_property, "mixed", "pallas_gpu", case, gpu.HALVES[dtype])


def test_the_fastest(record_property):
    check_case(record_property, "blocks", None, CASES["blocks"], gpu.PRECISIONS["TF32"][1])
