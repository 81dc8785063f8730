"""Running the op as tests do: compiled, its gradients beside its result, and compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.support import oracle


def normal(*shape, seed=0):
    """From N(0, 1), in float32, by NumPy: JAX would compile a program for each shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def compiled(op, **options):
    """`op` with its options bound, compiled."""
    return jax.jit(functools.partial(op, **options))


def value_and_gradients(op, arrays, cotangent):
    """`y = op(*arrays)`, and the gradients of Σ cotangent · y with respect to each array (None's is None)."""
    y, pull = jax.vjp(op, *arrays)
    return y, pull(cotangent.astype(y.dtype))


def assert_close(actual, wanted, tolerance):
    """Equal within `tolerance` of the largest magnitude wanted (a sum of products is no more exact than its largest)."""
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.shape == wanted.shape
    scale = np.max(np.abs(wanted), initial=0)
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * max(scale, 1e-3))


def check_against_oracle(op, case, tolerance):
    """The result of a case and its gradients, for a random cotangent: their values and their dtypes."""
    wanted = oracle.deform_conv(*case.arrays, **case.options)
    cotangent = np.random.default_rng(1).standard_normal(wanted.shape).astype(case.arrays[0].dtype)
    run = functools.partial(value_and_gradients, functools.partial(op, **case.options))
    y, gradients = jax.jit(run)(case.arrays, cotangent)
    assert y.dtype == case.arrays[0].dtype
    assert_close(y, wanted, tolerance)
    wanted = oracle.gradients(cotangent, *case.arrays, **case.options)
    for array, gradient, exact in zip(case.arrays, gradients, wanted, strict=True):
        if array is not None:
            assert gradient.dtype == array.dtype
            assert_close(np.float64(gradient), exact, max(tolerance, float(jnp.finfo(array.dtype).eps)))
