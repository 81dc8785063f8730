"""Programs: compiled functions, the inputs they are timed on, and the errors of their results."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.workloads import WORKLOADS

MODES = ("forward", "forward_backward")


def warm_up(device: str) -> float:
    """Seconds of calls before each run: after another process's turn, cores wake up only by and by."""
    return 0.01 if device == "gpu" else 0.05


class Program:
    """A compiled function and the inputs it is timed on."""

    def __init__(self, function: Callable, inputs: Sequence[Sequence[jax.Array]]):
        self.inputs = inputs
        start = time.perf_counter()
        self.compiled = jax.jit(function).lower(*inputs[0]).compile()
        self.compile_s = time.perf_counter() - start
        memory: Any = self.compiled.memory_analysis()
        self.scratch_bytes = memory.temp_size_in_bytes
        self.peak_bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes

    def run(self, calls: int) -> float:
        """Milliseconds of one of `calls` calls, after some that count for nothing."""
        results, start, seconds = None, time.perf_counter(), warm_up(self.inputs[0][0].device.platform)
        while results is None or time.perf_counter() - start < seconds:
            results = jax.block_until_ready(self.compiled(*self.inputs[-1]))
        start = time.perf_counter()
        for call in range(calls):
            results = self.compiled(*self.inputs[call % len(self.inputs)])
        jax.block_until_ready(results)
        return 1e3 * (time.perf_counter() - start) / calls


def with_gradients(function: Callable) -> Callable:
    """`(cotangent, *arguments)` to the function's result and the gradients of its arguments."""

    def both(cotangent, *arguments):
        y, vjp = jax.vjp(function, *arguments)
        return y, vjp(cotangent)  # without y, XLA would skip a plain convolution's forward pass

    return both


def add_cotangent(function: Callable, inputs: Sequence[Sequence[jax.Array]]) -> list[list[jax.Array]]:
    """The inputs of `with_gradients(function)`."""
    y = jax.eval_shape(function, *inputs[0])
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape, np.float32)).astype(y.dtype)
    return [[cotangent, *arguments] for arguments in inputs]


def make_program(function: Callable, inputs: Sequence[Sequence[jax.Array]], mode: str) -> Program:
    """Compile `function` for `mode`."""
    if mode == "forward":
        return Program(function, inputs)
    return Program(with_gradients(function), add_cotangent(function, inputs))


@functools.cache
def exact(name: str, mode: str) -> Callable:
    """The XLA implementation in full float32 products, compiled."""
    function = functools.partial(WORKLOADS[name].call, implementation="xla", precision="highest")
    return jax.jit(function if mode == "forward" else with_gradients(function))


def parity(name: str, mode: str, program: Program) -> float:
    """The largest error of result and gradients."""
    arguments = program.inputs[0]
    return deviation(name, mode, arguments, jax.tree.leaves(program.compiled(*arguments)))


def deviation(name: str, mode: str, inputs: Sequence[jax.Array], results: Sequence[Any], share: float = 1) -> float:
    """The largest error of this share of the results' elements, relative to the largest value of each result."""
    truth = jax.tree.leaves(exact(name, mode)(*(a.astype(jnp.float32) for a in inputs)))
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(results, truth, strict=True)]
    return max(float(np.quantile(abs(a - b), share) / abs(b).max()) for a, b in pairs)
