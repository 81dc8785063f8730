"""Index arithmetic inside kernels, and blocks that reach beyond the end of their axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax._core.pallas import blocks


def test_unravel_is_numpys():
    index = blocks.unravel(jnp.arange(60, dtype=jnp.int32), 4, 5)
    for got, want in zip(index, np.unravel_index(np.arange(60), (3, 4, 5)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_unravel_stays_in_32_bits(x64):
    """And it takes one instruction each: rounding down would add a comparison and a selection."""
    program = jax.make_jaxpr(lambda number: blocks.unravel(number, 4))(jnp.int32(7))
    assert sorted(eqn.primitive.name for eqn in program.eqns) == ["div", "rem"]
    assert {str(out.dtype) for out in program.out_avals} == {"int32"}


@pytest.mark.parametrize("count", [1, 3])
def test_a_loop_counts_in_32_bits(x64, count):
    seen = []

    def body(number, total):
        seen.append(number.dtype)
        return total + number

    assert blocks.loop(count, body, jnp.int32(0)) == sum(range(count))
    assert set(seen) == {np.dtype("int32")}


def test_a_matrix_has_a_mask_where_a_side_does_not_fit():
    whole, ragged = blocks.block(0, 4, 8), blocks.block(1, 4, 6)
    assert blocks.outer(whole, whole).exists is None
    exists = np.array([True, True, False, False])
    np.testing.assert_array_equal(blocks.outer(whole, ragged).exists, exists[None, :])
    np.testing.assert_array_equal(blocks.outer(ragged, whole).exists, exists[:, None])
    np.testing.assert_array_equal(blocks.outer(ragged, ragged).exists, exists[:, None] & exists[None, :])


def test_a_shifted_span_is_counted_from_its_start():
    whole, ragged = blocks.shift(blocks.block(1, 4, 8), 10), blocks.shift(blocks.block(1, 4, 6), 10)
    np.testing.assert_array_equal(ragged.index[0], [14, 15, 16, 17])
    np.testing.assert_array_equal(ragged.exists, [True, True, False, False])
    assert whole.exists is None
