"""The reference: the formula that readers see first, against the oracle and against the op."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax import deform_conv
from dcn_jax.ops.deform_conv import reference
from dcn_jax.ops.deform_conv.call import Arrays, check_call
from tests.support import oracle
from tests.support.cases import draw
from tests.support.running import assert_close

CASES = {
    "2-D": draw((2, 5, 4, 6), (3, 2), 4, offset_groups=3, feature_group_count=2, strides=(1, 2), padding=1),
    "1-D, v1, no batch": draw((7, 3), (3,), 2, kernel_dilation=2, mask=False, bias=False),
    "3-D, two batch axes": draw((2, 1, 3, 4, 2, 2), (2, 1, 2), 3, offset_groups=2),
}


DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(deform_conv).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "implementation"
}


def by_reference(arrays, options):
    spec, arrays = check_call(
        Arrays(*arrays),
        **DEFAULTS | options,
    )
    return reference.run(spec, arrays)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_the_formula(case):
    y = jax.jit(lambda arrays: by_reference(arrays, case.options))(case.arrays)
    assert_close(y, oracle.deform_conv(*case.arrays, **case.options), 1e-6)


def by_both(arrays, options):
    return jax.jit(lambda *arrays: (by_reference(arrays, options), deform_conv(*arrays, **options)))(*arrays)


def test_is_the_op_in_every_dtype(x64):
    for dtype in (jnp.float16, jnp.float64, jnp.complex64):
        x, kernel, offset, mask, bias = CASES["2-D"].arrays
        arrays = x.astype(dtype), kernel.astype(dtype), offset, mask, bias.astype(dtype)
        y, wanted = by_both(arrays, CASES["2-D"].options)
        assert y.dtype == wanted.dtype
        assert_close(np.asarray(y), wanted, 2 * float(jnp.finfo(dtype).eps))


def test_has_the_gradients_of_the_op():
    case = CASES["1-D, v1, no batch"]
    given = [array for array in case.arrays if array is not None]

    def gradients(f):
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1, 2)))(*given)

    of_reference = gradients(lambda *a: by_reference((*a, None, None), case.options))
    for actual, wanted in zip(of_reference, gradients(lambda *a: deform_conv(*a, **case.options)), strict=True):
        assert_close(actual, wanted, 1e-5)


def test_shares_offsets_and_knows_borders():
    x, kernel, offset, mask, bias = CASES["2-D"].arrays
    options = CASES["2-D"].options | {"padding_mode": ("wrap", "edge")}
    assert_close(*by_both((x, kernel, offset[0], mask[:1], bias), options), 1e-6)
