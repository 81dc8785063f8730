"""`affine_grid`: torch's numbers and gradients, its shapes, dtypes and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from dcn_jax import affine_grid, grid_sample
from tests.support import family

OPTIONS = family.OPTIONS["affine_grid"]


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_equals_torch(x64, number):
    case, options = family.read("affine_grid", number, ["theta"]), dict(OPTIONS[number])
    spatial = options.pop("spatial")
    results = family.compute(lambda theta: affine_grid(theta, spatial, **options), case, np.float64)
    for result, expected in zip(results, case.expected, strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_one_axis():
    grid = affine_grid(jnp.float32([[2.0, 0.5]]), (4,))
    np.testing.assert_allclose(grid, [[-1.0], [0.0], [1.0], [2.0]], atol=1e-6)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("spatial", [(5, 4), (1, 3), (3, 1, 2)])
def test_the_identity_reads_each_pixel(spatial, align_corners):
    rank = len(spatial)
    features = np.float32(np.random.default_rng(0).standard_normal((*spatial, 2)))
    grid = affine_grid(jnp.eye(rank, rank + 1), spatial, align_corners=align_corners)
    read = grid_sample(features, grid, align_corners=align_corners)
    np.testing.assert_allclose(read, features, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [(), (0,), (2, 3)])
def test_any_batch(batch):
    theta = np.float32(np.random.default_rng(0).standard_normal((*batch, 2, 3)))
    grid = affine_grid(theta, (3, 4))
    assert grid.shape == (*batch, 3, 4, 2)
    for i in np.ndindex(*batch):
        np.testing.assert_array_equal(grid[i], affine_grid(theta[i], (3, 4)))


def test_half_precision_makes_positions_in_float32():
    """In bfloat16 a position would be off by two pixels of 512."""
    grid = affine_grid(jnp.eye(1, 2, dtype=jnp.bfloat16), (512,))
    assert grid.dtype == np.float32
    np.testing.assert_allclose(grid[:, 0], (2 * np.arange(512) + 1) / 512 - 1, atol=1e-7)


def test_symbolic_sizes():
    b, h, w = export.symbolic_shape("b, h, w")
    exported = export.export(jax.jit(lambda theta, x: affine_grid(theta, x.shape[1:3])))(
        jax.ShapeDtypeStruct((b, 2, 3), jnp.float32), jax.ShapeDtypeStruct((b, h, w, 1), jnp.float32)
    )
    theta = np.float32(np.random.default_rng(0).standard_normal((2, 2, 3)))
    found = exported.call(theta, np.zeros((2, 3, 5, 1), np.float32))
    np.testing.assert_allclose(found, affine_grid(theta, (3, 5)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("theta", "spatial", "options", "error", "message"),
    [
        (np.zeros((2, 3, 3), np.float32), (4, 4), {}, ValueError, "theta has shape (2, 3, 3); wanted (*batch, n, n + 1)"),
        (np.zeros(3, np.float32), (4,), {}, ValueError, "theta has shape (3,); wanted (*batch, n, n + 1)"),
        (np.zeros((2, 2, 3), np.float32), (2, 1, 4, 4), {}, ValueError, "as torch's size (N, C, …) has; wanted the 2 sizes"),
        (np.zeros((2, 2, 3), np.float32), (4, 4, 4), {}, ValueError, "spatial=(4, 4, 4) has 3 entries"),
        (np.zeros((2, 2, 3), np.float32), (4, 0), {}, ValueError, "spatial=(4, 0) is too small"),
        (np.zeros((2, 2, 3), np.int32), (4, 4), {}, TypeError, "theta has dtype int32; wanted a floating-point array"),
        (np.zeros((2, 2, 3), np.float32), (4, 4), {"align_corners": None}, TypeError, "align_corners=None is a NoneType"),
    ],
)  # fmt: skip
def test_errors(theta, spatial, options, error, message):
    with pytest.raises(error) as raised:
        jax.eval_shape(lambda theta: affine_grid(theta, spatial, **options), theta)
    assert message in str(raised.value)
