"""Calls whose offsets `max_offset` bounds, beside the oracle, which knows no bound: it is given clipped offsets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.support import oracle
from tests.support.running import assert_close, value_and_gradients


def check_against_oracle(op, case, bound, tolerance, *, gradients=None):
    """`op`, which has the bound, against the oracle; with a tolerance of their own for `gradients`."""
    arrays = x, kernel, offset, mask, bias = case.arrays
    brought = x, kernel, np.clip(np.float64(offset), -bound, bound), mask, bias
    wanted = oracle.deform_conv(*brought, **case.options)
    cotangent = np.random.default_rng(1).standard_normal(wanted.shape).astype(x.dtype)
    run = functools.partial(value_and_gradients, functools.partial(op, **case.options))
    y, found = jax.jit(run)(arrays, cotangent)
    assert y.dtype == x.dtype
    assert_close(np.float64(y), wanted, tolerance)

    exact = list(oracle.gradients(cotangent, *brought, **case.options))
    exact[2] = exact[2] * (np.abs(np.float64(offset)) < bound)
    for array, gradient, right in zip(arrays, found, exact, strict=True):
        if array is not None:
            assert gradient.dtype == array.dtype
            eps = float(jnp.finfo(array.dtype).eps)
            assert_close(np.float64(gradient), right, max(gradients or tolerance, eps))


def gradients_of(op, case):
    """The gradients of a sum of sines of `op`, as a function of the arrays."""

    def loss(*arrays):
        return jnp.sum(jnp.sin(op(*arrays, **case.options)))

    return jax.grad(loss, argnums=[i for i, array in enumerate(case.arrays) if array is not None])
