"""A TPU's cycles, by its compiler's own estimate."""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests.support import aot
from tests.support.cycles import estimate
from tests.support.scratch import DETECTOR

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# Millions of cycles on a TPU v5e and of rows gathered, forward and for the gradients alone; a little above what is found
LIMITS = {
    "dense": {"forward": (3.1, 0.55), "gradients": (5.9, 0.55)},
    "groups": {"forward": (3.7, 1.10), "gradients": (8.2, 2.19)},
    "offset groups": {"forward": (4.7, 2.20), "gradients": (8.7, 2.20)},
}


def device_of(kind):
    """A device of a kind; skips the test where its compiler is not installed."""
    if reason := aot.missing(kind):
        pytest.skip(reason)
    return aot.devices(kind)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["forward", "gradients"])
@pytest.mark.parametrize("name", LIMITS)
def test_cycles_and_rows(name, mode, dtype):
    x, kernel, *rest = DETECTOR[name].shapes(DTYPES[dtype])
    shapes = [x, kernel, *(jax.ShapeDtypeStruct(shape.shape, jnp.float32) for shape in rest)]
    forward = functools.partial(DETECTOR[name].call, implementation="xla")
    gradients = jax.grad(lambda *arrays: forward(*arrays).astype(jnp.float32).sum(), argnums=range(len(shapes)))
    program = aot.compile_for(device_of("TPU v5e"), forward if mode == "forward" else gradients, *shapes)
    found = estimate(program.as_text())
    cycles, rows = LIMITS[name][mode]
    assert 0.5 * cycles < found.cycles / 1e6 <= cycles
    assert 0.5 * rows < found.gathered / 1e6 <= rows
    assert (found.scattered > 0) == (mode == "gradients")
