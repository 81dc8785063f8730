"""Programs: compiled functions, the inputs they are timed on, and the errors of their results."""

import argparse
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.rows import reason
from benchmarks.workloads import Workload

MODES = ("forward", "forward_backward")
SORTED = 2**20


def warm_up(device: str) -> float:
    """Seconds of calls before each run: after another process's turn, cores wake up only by and by."""
    return 0.01 if device == "gpu" else 0.05


def use_device(parser: argparse.ArgumentParser, name: str | None) -> str:
    """The platform of a command's `--device`, None for JAX's own choice; ends the command where JAX has no such device."""
    if name == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        return jax.devices(name)[0].platform
    except RuntimeError as error:
        parser.error(f"--device {name}: {reason(error)}; install JAX for it, or leave --device out")


class Program:
    """A compiled function and the inputs it is timed on.

    A chained one is timed as a program of its own that calls the function once for each of the
    inputs, since a GPU may compute a call in less time than it takes to launch a program.
    """

    def __init__(self, function: Callable, inputs: Sequence[Sequence[jax.Array]], chained: bool = False):
        self.inputs = inputs
        start = time.perf_counter()
        self.compiled = jax.jit(function).lower(*inputs[0]).compile()
        self.compile_s = time.perf_counter() - start
        memory: Any = self.compiled.memory_analysis()
        self.scratch_bytes = memory.temp_size_in_bytes
        self.peak_bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        self.chain = compile_chain(function, inputs) if chained else None

    def run(self, calls: int) -> float:
        """Milliseconds of one of `calls` calls or some more, after some that count for nothing."""
        results, start, seconds = None, time.perf_counter(), warm_up(on(self.inputs))
        while results is None or time.perf_counter() - start < seconds:
            results = jax.block_until_ready(self._call(len(self.inputs) - 1))
        steps = math.ceil(calls / self._calls_of_a_step)
        start = time.perf_counter()
        for step in range(steps):
            results = self._call(step % len(self.inputs))
        jax.block_until_ready(results)
        return 1e3 * (time.perf_counter() - start) / (steps * self._calls_of_a_step)

    @property
    def _calls_of_a_step(self) -> int:
        return len(self.inputs) if self.chain else 1

    def _call(self, copy: int) -> Any:
        return self.chain(*self.inputs) if self.chain else self.compiled(*self.inputs[copy])


def compile_chain(function: Callable, inputs: Sequence[Sequence[jax.Array]]) -> Callable:
    """A program that calls the function once for each of the inputs, one call after the other.

    Each call waits for the one before in what the compiler sees, and on a GPU in one stream:
    recorded as a graph, which is what XLA would do, independent calls may run side by side.
    """

    def chain(*inputs):
        results = []
        for arguments in inputs:
            if results:
                results[-1], arguments = lax.optimization_barrier((results[-1], arguments))
            results.append(function(*arguments))
        return results

    options: dict[str, str | bool] = {"xla_gpu_enable_command_buffer": ""} if on(inputs) == "gpu" else {}
    return jax.jit(chain).lower(*inputs).compile(options)


def on(inputs: Sequence[Sequence[jax.Array]]) -> str:
    """The platform that holds the inputs."""
    return next(iter(inputs[0][0].devices())).platform


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


def make_program(
    function: Callable, inputs: Sequence[Sequence[jax.Array]], mode: str, chained: bool = False
) -> Program:
    """Compile `function` for `mode`."""
    if mode == "forward":
        return Program(function, inputs, chained)
    return Program(with_gradients(function), add_cotangent(function, inputs), chained)


@functools.cache
def exact(work: Workload, mode: str) -> Callable:
    """The XLA implementation in full float32 products, compiled."""
    function, shapes = functools.partial(work.call, implementation="xla", precision="highest"), work.shapes("float32")
    if mode == "forward":
        return jax.jit(function).lower(*shapes).compile()
    cotangent = jax.eval_shape(function, *shapes)
    return jax.jit(with_gradients(function)).lower(cotangent, *shapes).compile()


def truth(work: Workload, mode: str, inputs: Sequence[jax.Array]) -> list[np.ndarray]:
    """Result and gradients of these inputs, of full float32 products."""
    return [np.asarray(a) for a in jax.tree.leaves(exact(work, mode)(*(a.astype(jnp.float32) for a in inputs)))]


def deviation(right: Sequence[np.ndarray], results: Sequence[Any], share: float = 1) -> float:
    """The largest error of this share of each result's elements, relative to its largest value."""
    errors = []
    for ours, wanted in zip(results, right, strict=True):
        error = abs(np.asarray(ours, np.float32) - wanted)
        if share < 1:  # of a million of them: to sort them all takes a large map seconds
            error = np.quantile(error.ravel()[:: 1 + error.size // SORTED], share)
        errors.append(float(np.max(error) / (abs(wanted).max() or 1)))  # a gradient may be zero everywhere
    return max(errors, key=lambda error: (math.isnan(error), error))
