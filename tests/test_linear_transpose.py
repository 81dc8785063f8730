"""`jax.linear_transpose` of every op, in each argument that it is linear in, is its vjp."""

import jax
import jax.numpy as jnp
import pytest

import dcn_jax
from tests.support.running import assert_close, normal

X, GRID = normal(2, 4, 5, 8), 0.5 * normal(2, 7, 2)
OFFSET, MASK = normal(2, 4, 5, 36, seed=1), normal(2, 4, 5, 18, seed=2)


def deform_conv(x, kernel, mask, bias):
    return dcn_jax.deform_conv(x, kernel, OFFSET, mask, bias)


def ms_deform_attn(value, weights):
    return dcn_jax.ms_deform_attn(value, ((4, 5),), 0.5 + 0.2 * normal(2, 3, 2, 1, 2, 2), weights)


def deform_roi_pool(x, mask):
    rois = jnp.array([[0, 0.3, 0.2, 4.1, 3.3], [1, 1, 1, 5, 4]], jnp.float32)
    return dcn_jax.deform_roi_pool(x, rois, normal(2, 3, 4, 2), mask, output_size=(3, 4))


OPS = {
    "deform_conv": (deform_conv, (X, normal(3, 3, 8, 4), MASK, normal(4))),
    "dcnv3": (lambda x, mask: dcn_jax.dcnv3(x, OFFSET, mask), (X, MASK)),
    "grid_sample": (lambda features: dcn_jax.grid_sample(features, GRID), (X,)),
    "grid_sample, cubic": (lambda features: dcn_jax.grid_sample(features, GRID, method="cubic"), (X,)),
    "affine_grid": (lambda theta: dcn_jax.affine_grid(theta, (3, 4)), (normal(2, 2, 3),)),
    "ms_deform_attn": (ms_deform_attn, (X.reshape(2, 20, 2, 4), normal(2, 3, 2, 1, 2))),
    "deform_roi_pool": (deform_roi_pool, (X, normal(2, 3, 4))),
    "linear_sample": (lambda features: dcn_jax.linear_sample(features, 2 * GRID[0]), (X[0],)),
}
CASES = [(name, number) for name, (_, arrays) in OPS.items() for number in range(len(arrays))]


@pytest.mark.parametrize("mapped", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one", "vmap"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "number"), CASES)
def test_it_is_the_vjp(name, number, dtype, mapped):
    f, arrays = OPS[name]
    arrays = [array.astype(dtype) for array in arrays]
    if name == "deform_conv":  # linear in the bias, or in one of the others where there is no bias
        other = 0 if number == 3 else 3
        arrays[other] = jnp.zeros_like(arrays[other])

    def of_one(array):
        return f(*arrays[:number], array, *arrays[number + 1 :])

    along, at = (jax.vmap(of_one), jnp.stack(2 * [arrays[number]])) if mapped else (of_one, arrays[number])
    y, pull = jax.vjp(along, at)
    cotangent = normal(*y.shape, seed=3).astype(y.dtype)
    (found,) = jax.linear_transpose(along, at)(cotangent)
    assert found.dtype == at.dtype
    assert_close(found.astype("float32"), pull(cotangent)[0].astype("float32"), 1e-5 if dtype == "float32" else 1e-2)
