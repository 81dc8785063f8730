"""One set of offsets for all images: their batch axes broadcast to those of x, and nothing is repeated in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.cases import draw
from tests.support.running import assert_close, value_and_gradients

ARRAYS = draw((3, 2, 4, 5, 4), (3, 2), 4, offset_groups=2).arrays


def cut(array, keep):
    """`array` `(3, 2, …)` with the batch axes that `keep` says: True, 1 or missing."""
    for axis, kept in enumerate(keep):
        if kept is not True:
            array = array[(slice(None),) * axis + (slice(0, 1),)]
    return array.reshape(array.shape[sum(kept is None for kept in keep) :])


@pytest.mark.parametrize(
    ("offset_keeps", "mask_keeps"),
    [
        pytest.param((None, None), (None, None), id="one for all"),
        pytest.param((1, 1), (True, True), id="the offsets alone"),
        pytest.param((True, True), (None, True), id="the mask alone, along the first axis"),
        pytest.param((True, 1), (1, True), id="each along another axis"),
    ],
)
def test_equals_the_call_with_repeated_offsets(op, offset_keeps, mask_keeps):
    """Also its gradients, which have the shapes given: the sums over the images."""
    x, kernel, offset, mask, bias = ARRAYS
    offset, mask = cut(offset, offset_keeps), cut(mask, mask_keeps)
    cotangent = np.random.default_rng(1).standard_normal((3, 2, 4, 5, 4)).astype(np.float32)

    def repeated(x, kernel, offset, mask, bias):
        return op(x, kernel, *(jnp.broadcast_to(a, (*x.shape[:2], *a.shape[-3:])) for a in (offset, mask)), bias)

    def run(f):
        with jax.numpy_rank_promotion("allow"):
            return jax.jit(functools.partial(value_and_gradients, f))((x, kernel, offset, mask, bias), cotangent)

    y, gradients = run(op)
    wanted, wanted_gradients = run(repeated)
    assert_close(y, wanted, 1e-6)
    for gradient, exact in zip(gradients, wanted_gradients, strict=True):
        assert_close(gradient, exact, 1e-5)


def test_a_batch_shares_offsets_without_memory_for_it(op):
    """Scratch memory does not grow by a copy of the offsets for each image."""
    if op.keywords["implementation"] != "xla":
        pytest.skip("the kernels are handed repeated offsets")
    x, kernel = jax.ShapeDtypeStruct((32, 32, 32, 2), jnp.float32), jax.ShapeDtypeStruct((3, 3, 2, 2), jnp.float32)
    offset = jax.ShapeDtypeStruct((32, 32, 18), jnp.float32)
    compiled = jax.jit(op).lower(x, kernel, offset).compile()
    repeated = 32 * 32 * 32 * 18 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < repeated
