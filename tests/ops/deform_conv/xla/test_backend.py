"""The scratch memory of the XLA implementation on the CPU, against the im2col columns (P · K · C) that it does not make."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.workloads import FIVE, TEN, WORKLOADS
from tests.support.scratch import DETECTOR, LIMITS, NARROW_LIMITS, share


def compile_here(f, *shapes):
    return jax.jit(f).lower(*shapes).compile()


@pytest.mark.parametrize("mode", LIMITS)
@pytest.mark.parametrize("name", DETECTOR)
def test_scratch(name, mode):
    assert share(compile_here, DETECTOR[name], mode) <= LIMITS[mode]


@pytest.mark.slow
@pytest.mark.parametrize("mode", LIMITS)
@pytest.mark.parametrize("name", FIVE)
def test_scratch_of_the_five(name, mode):
    """The workloads by which the benchmark judges."""
    assert share(compile_here, WORKLOADS[name], mode) <= LIMITS[mode]


@pytest.mark.parametrize("mode", NARROW_LIMITS)
@pytest.mark.parametrize(
    "name", [name if name == "conv4-224" else pytest.param(name, marks=pytest.mark.slow) for name in TEN]
)
def test_scratch_of_narrow_arrays(name, mode):
    """Against their own columns, half as large: the map, offsets and cotangent are not made wide before the loop."""
    assert share(compile_here, WORKLOADS[name], mode, jnp.bfloat16) <= NARROW_LIMITS[mode]


@pytest.mark.parametrize(("mode", "limit"), [("forward", 0.1), ("forward + backward", 0.15)])
def test_scratch_of_a_large_map(mode, limit):
    """Cut into blocks that fit a CPU's caches, it takes a far smaller share of its columns than a map of one block."""
    assert share(compile_here, WORKLOADS["map224"], mode) <= limit


def test_columns_would_be_found():
    """A program that does keep columns needs as much as they take, which is above each limit."""
    workload = WORKLOADS["small"]

    def compile_with_columns(f, *shapes):
        def with_columns(x, *rest):
            columns = jax.lax.optimization_barrier(jnp.concatenate([x] * 9, axis=-1))
            return f(x, *rest), jnp.sort(columns, axis=-1)[..., 0]

        return compile_here(with_columns, *shapes)

    assert share(compile_with_columns, workload, "forward") >= 1
