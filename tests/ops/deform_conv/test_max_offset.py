"""`max_offset`: what is beyond it is brought to it, in the same way whatever computes the op."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax import deform_conv
from tests.support.bounded import check_against_oracle, gradients_of
from tests.support.cases import draw
from tests.support.running import assert_close, compiled

CASE = draw((2, 4, 3, 2), (2, 3), 2, offset_groups=2, strides=(1, 2))


@pytest.mark.parametrize(
    "bound", [2, pytest.param(1.5, marks=pytest.mark.slow), pytest.param(0, marks=pytest.mark.slow)]
)
def test_offsets_are_clipped_and_beyond_the_bound_have_no_gradient(op, bound):
    """Some of the case's offsets are ±2."""
    check_against_oracle(functools.partial(op, max_offset=bound), CASE, bound, 1e-5)


def test_infinite_offsets_read_at_the_bound_and_a_nan_stays_one(op):
    x, kernel, offset, mask, bias = CASE.arrays
    hostile = offset.copy()
    hostile[0, 0, 0, :3] = np.inf, -np.inf, 1e30
    hostile[1, 2, 1, 4] = np.nan
    y = compiled(op, max_offset=2, **CASE.options)(x, kernel, hostile, mask, bias)
    brought = np.where(np.isnan(hostile), 0, np.clip(hostile, -2, 2)).astype(np.float32)
    wanted = np.array(compiled(op, **CASE.options)(x, kernel, brought, mask, bias))
    assert np.all(np.isnan(y[1, 2, 1]))
    wanted[1, 2, 1] = np.nan
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5)


def test_in_half_precision_the_bound_is_rounded_to_it():
    x, kernel, offset, mask, bias = CASE.arrays
    offset = jnp.asarray(offset, jnp.bfloat16)
    bounded = jax.jit(functools.partial(deform_conv, max_offset=1.7, **CASE.options))
    wanted = jax.jit(functools.partial(deform_conv, **CASE.options))
    limit = jnp.bfloat16(1.7)
    np.testing.assert_array_equal(
        bounded(x, kernel, offset, mask, bias), wanted(x, kernel, jnp.clip(offset, -limit, limit), mask, bias)
    )


@pytest.mark.slow
def test_derivatives_of_derivatives(op):
    """They are those of the clipped offset."""
    case = draw((1, 3, 4, 2), (2, 2), 2, whole=0)

    def second(bounded, arrays):
        def squares(offset):
            return sum(jnp.sum(g**2) for g in gradients_of(bounded, case)(*arrays[:2], offset, *arrays[3:]))

        return jax.grad(squares)(arrays[2])

    def clipped(x, kernel, offset, *rest, **options):
        inside = jnp.abs(offset) < 2
        return op(x, kernel, jnp.where(inside, offset, 2 * jnp.sign(offset)), *rest, **options)

    ours = jax.jit(functools.partial(second, functools.partial(op, max_offset=2)))(case.arrays)
    assert_close(ours, jax.jit(functools.partial(second, clipped))(case.arrays), 1e-5)
