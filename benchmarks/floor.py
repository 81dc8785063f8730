"""The floor: the least time of a forward pass, at the rates measured on this device."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.convolution import Convolution
from benchmarks.programs import Program


class Rates(NamedTuple):
    """What this device can do, per second, measured."""

    flops: float  # of a matrix product
    memory: float  # bytes read and written of arrays that fit no cache
    cache: float  # bytes read of an array that fits one; on a GPU not measured: a tile's pixels may fit a nearer cache


@functools.cache
def measure_rates(device: str, dtype: str, precision: str | None) -> Rates:
    """The best runs of a large matrix product, a large copy and, on a CPU, many reads of a small array."""
    gpu = device == "gpu"
    side, large = (8192, 2**28) if gpu else (1024, 2**26)
    small, step, reads = 2**18, 2**12, 32

    def per_second(amount: float, function: Callable, *arguments: jax.Array) -> float:
        program = Program(function, [arguments])
        program.run(1)
        return 1e3 * amount / min(program.run(10 if gpu else 1) for _ in range(5))

    def read_often(a):  # fused into one loop: each element out reads `reads` elements in
        return sum(a[step * i : step * i + small] for i in range(reads))

    def random(seed):  # a GPU multiplies ones faster
        return jax.random.normal(jax.random.key(seed), (side, side), dtype)

    cache = math.inf
    if not gpu:
        cache = per_second(4 * small * (reads + 1), read_often, jnp.ones(small + step * reads, "float32"))
    return Rates(
        flops=per_second(2 * side**3, lambda a, b: jnp.matmul(a, b, precision=precision), random(0), random(1)),
        memory=per_second(2 * 4 * large, lambda a: a + 1, jnp.ones(large, "float32")),
        cache=cache,
    )


def floor_ms(work: Convolution, dtype: str, rates: Rates) -> float:
    """The least milliseconds of a forward pass: its products, its corners, or its arguments."""
    itemsize = jnp.dtype(dtype).itemsize
    corners = work.columns * itemsize * 2 ** len(work.window)
    arguments = sum(math.prod(s.shape) for s in work.shapes(dtype)) * itemsize
    result = work.x[0] * math.prod(work.out_spatial) * work.features * itemsize
    return 1e3 * max(work.flops / rates.flops, corners / rates.cache, (arguments + result) / rates.memory)
