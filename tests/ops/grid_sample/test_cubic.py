"""`grid_sample(method="cubic")` where torch has no answer: 1-D and 3-D, its other borders, second derivatives."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dcn_jax import grid_sample
from dcn_jax.geometry import PADDING_MODES
from tests.support.running import assert_close, compiled


def keys(distance):
    """Keys' kernel by the distance of a pixel, with a = -0.75, as his paper writes it."""
    a, d = -0.75, np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


MARGIN = 12


def oracle(features, pixels, mode):
    """A tensor product over the map, padded by NumPy: `(*spatial, C)`, `(Q, n)` -> `(Q, C)`."""
    rank = pixels.shape[-1]
    padded = np.pad(features, [(MARGIN, MARGIN)] * rank + [(0, 0)], "constant" if mode == "zeros" else mode)
    out = []
    for point in pixels + MARGIN:
        read = padded
        for size, along in zip(padded.shape[:rank], point, strict=True):
            read = np.tensordot(keys(along - np.arange(size)), read, axes=(0, 0))
        out.append(read)
    return np.array(out)


def to_grid(pixels, spatial):
    return ((2 * pixels + 1) / np.array(spatial) - 1)[:, ::-1]


CASES = list(itertools.product([(5,), (3, 4), (1, 1), (2, 3, 1)], PADDING_MODES))


@pytest.mark.parametrize(
    ("spatial", "mode"), [pytest.param(*c, marks=[pytest.mark.slow] if n % 4 else []) for n, c in enumerate(CASES)]
)
def test_values(x64, spatial, mode):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((*spatial, 2))
    pixels = rng.uniform(-6, np.array(spatial) + 6, (40, len(spatial)))
    pixels[:4] = np.round(pixels[:4])
    y = compiled(grid_sample, method="cubic", padding_mode=mode)(features, to_grid(pixels, spatial))
    np.testing.assert_allclose(y, oracle(features, pixels, mode), rtol=1e-11, atol=1e-12)


def test_the_second_derivative_is_that_of_the_cubic(x64):
    """Right-hand at whole pixels, where it jumps; the first does not.."""
    row = np.array([0.0, 1.0, 4.0, 2.0])[:, None]
    read = lambda p: grid_sample(row, jnp.stack([(2 * p + 1) / 4 - 1])[None], method="cubic")[0, 0]  # noqa: E731
    first, second = (jax.jit(jax.vmap(f)) for f in (jax.grad(read), jax.grad(jax.grad(read))))
    p = np.array([1.0, 1.25, 1.75])
    np.testing.assert_allclose(first(p), POLYNOMIAL.deriv()(p - 1), rtol=1e-12)
    np.testing.assert_allclose(second(p), POLYNOMIAL.deriv(2)(p - 1), rtol=1e-12)


# Between the second and the third pixel: Σ of the four weights by their pixels, each a polynomial of t.
_A, _T, _U = -0.75, np.polynomial.Polynomial([0, 1]), np.polynomial.Polynomial([1, -1])
POLYNOMIAL = (
    0.0 * _A * _T * _U**2
    + 1.0 * ((_A + 2) * _T**3 - (_A + 3) * _T**2 + 1)
    + 4.0 * ((_A + 2) * _U**3 - (_A + 3) * _U**2 + 1)
    + 2.0 * _A * _U * _T**2
)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zeros", "edge", "symmetric"])
def test_derivatives_against_finite_differences(x64, mode):
    rng = np.random.default_rng(0)
    features, pixels = rng.standard_normal((3, 4, 2)), rng.integers(-2, 5, (9, 2)) + rng.uniform(0.1, 0.9, (9, 2))
    f = jax.jit(lambda *arrays: jnp.sin(grid_sample(*arrays, method="cubic", padding_mode=mode)))
    check_grads(f, (features, to_grid(pixels, (3, 4))), order=2, modes=["fwd", "rev"], rtol=1e-5)


def test_bfloat16_rounds_the_features_alone():
    rng = np.random.default_rng(0)
    features, pixels = jnp.asarray(rng.standard_normal((6, 7, 2)), jnp.bfloat16), rng.uniform(0, 5, (30, 2))
    y = compiled(grid_sample, method="cubic")(features, np.float32(to_grid(pixels, (6, 7))))
    assert y.dtype == jnp.bfloat16
    assert_close(np.float32(y), oracle(np.float64(features), pixels, "zeros"), 4e-3)


def test_it_is_local_under_vmap():
    rng = np.random.default_rng(0)
    features, grid = np.float32(rng.standard_normal((3, 4, 5, 2))), np.float32(rng.uniform(-1.3, 1.3, (3, 6, 2)))
    read = functools.partial(grid_sample, method="cubic", padding_mode="wrap")
    assert_close(jax.jit(jax.vmap(read))(features, grid), jax.jit(read)(features, grid), 1e-6)
