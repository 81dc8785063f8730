"""What the op costs beside the plain convolution, under `jax.jit`: time to compile, time to run.

The four programs take turns, round after round, so that a machine that slows down slows them all;
the median of each counts. `make bench` does this for many shapes, and for memory and accuracy too.

The last line is like "the op takes 1.8 times the plain convolution forward, 2.7 with gradients".
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax import deform_conv


def plain(x, kernel, offset, mask):
    """The plain convolution, of the same arguments."""
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def with_gradients(op: Callable, arguments: int) -> Callable:
    """The gradients of the op's sum of squares, in its first arguments."""
    return jax.grad(lambda *arrays: jnp.sum(op(*arrays) ** 2), argnums=tuple(range(arguments)))


PROGRAMS = {
    "plain, forward": plain,
    "op, forward": deform_conv,
    "plain, with gradients": with_gradients(plain, 2),
    "op, with gradients": with_gradients(deform_conv, 4),
}


def make_arguments(batch: int, size: int, channels: int) -> tuple[jax.Array, ...]:
    """x, kernel, offset ~ N(0, 2) in pixels, and mask, of a 3×3 convolution."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (batch, size, size, channels))
    kernel = jax.random.normal(keys[1], (3, 3, channels, channels)) / (9 * channels) ** 0.5
    offset = 2 * jax.random.normal(keys[2], (batch, size, size, 3 * 3 * 2))
    mask = jax.random.uniform(keys[3], (batch, size, size, 3 * 3))
    return x, kernel, offset, mask


def seconds(function: Callable, *arguments) -> float:
    """How long one call takes. JAX returns before the work is done, hence the wait."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def main(batch: int = 4, size: int = 32, channels: int = 64, rounds: int = 20) -> None:
    """Compile each program apart from running it, run them in turns, print a table."""
    arguments = make_arguments(batch, size, channels)
    compiled, compile_s = {}, {}
    for name, function in PROGRAMS.items():
        start = time.perf_counter()
        compiled[name] = jax.jit(function).lower(*arguments).compile()
        compile_s[name] = time.perf_counter() - start
        seconds(compiled[name], *arguments)  # the first run also sets things up

    runs = [{name: seconds(program, *arguments) for name, program in compiled.items()} for _ in range(rounds)]
    run_s = {name: statistics.median(run[name] for run in runs) for name in PROGRAMS}

    print(f"x {arguments[0].shape}, kernel {arguments[1].shape}, float32, on {jax.devices()[0].device_kind}")
    print(f"{'':22}{'compile, ms':>12}{'run, ms':>12}")
    for name in PROGRAMS:
        print(f"{name:22}{1000 * compile_s[name]:12.1f}{1000 * run_s[name]:12.2f}")
    forward = run_s["op, forward"] / run_s["plain, forward"]
    gradients = run_s["op, with gradients"] / run_s["plain, with gradients"]
    print(f"the op takes {forward:.1f} times the plain convolution forward, {gradients:.1f} with gradients")


if __name__ == "__main__":
    main()
