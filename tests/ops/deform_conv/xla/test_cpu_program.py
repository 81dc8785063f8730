"""What XLA's CPU backend and LLVM make of the op where it reads all taps at once. Its speed depends on it.

JAX promises none of this. If a new JAX undoes it, results stay right but reading takes 2 to 10 times as long. The
README of `ops/deform_conv` explains each trick.
"""

import functools
import os
import pathlib
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dcn_jax import deform_conv
from tests.support.cpu_kernels import dump, read
from tests.support.running import value_and_gradients

# The shape of x, the features and the offset groups. A row is the channels that one offset group reads at one pixel.
ROWS = {
    "8 channels": ((1, 32, 32, 64), 64, 8),
    "16 channels": ((1, 32, 32, 16), 16, 1),
    "32 channels": ((8, 16, 16, 32), 32, 1),
}
# Of rows of up to 16 channels, `lax.reduce` sums the four corners.
NARROW = ["8 channels", "16 channels"]

# Programs without one of the tricks: which function of `lax` is replaced, and by what.
UNDONE = {
    "nothing": ("reduce", lambda reduce: reduce),
    "a reducer with +": ("reduce", lambda reduce: lambda x, zero, _, axes: reduce(x, zero, lambda a, b: a + b, axes)),
    "a term for each corner": ("reduce", lambda _: lambda x, *_: functools.reduce(lax.add, list(x))),
    "no conditional": ("cond", lambda _: lambda _, read, zeros, *operands: read(*operands)),
}

# XLA reads its flags once, when it is loaded. So a new process compiles: for AVX2, even on a newer processor.
COMPILE = """
import sys
from tests.ops.deform_conv.xla.test_cpu_program import compile_and_dump

compile_and_dump(*sys.argv[1:])
"""
X86 = platform.machine() in ("x86_64", "AMD64")
needs_x86 = pytest.mark.skipif(not X86, reason="the vectors that LLVM makes are known for x86 processors with AVX2")


def compile_and_dump(folder, undone, mode, *names):
    """Compile the op, without one of the tricks, for each name in ROWS, into a folder of that name."""
    function, change = UNDONE[undone]
    setattr(lax, function, change(getattr(lax, function)))

    def gradients(arrays, y_bar):
        return value_and_gradients(deform_conv, arrays, y_bar)[1]

    for name in names:
        x, features, groups = ROWS[name]
        shapes = [x, (3, 3, x[-1], features), (*x[:-1], 18 * groups), (*x[:-1], 9 * groups)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        target = pathlib.Path(folder, name)
        target.mkdir()
        if mode == "forward":
            dump(target, deform_conv, *arrays)
        else:
            dump(target, gradients, arrays, jax.eval_shape(deform_conv, *arrays))


def kernels_of(folder, undone, mode, *names):
    """The kernels that gather rows of the map, for each name in ROWS.

    The first reads the samples. The gradients have a second, which reads the rows again and sums over channels.
    """
    options = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    options["XLA_FLAGS"] = "--xla_cpu_max_isa=AVX2" if X86 else ""
    command = [sys.executable, "-c", COMPILE, folder, undone, mode, *names]
    done = subprocess.run(command, env=os.environ | options, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {name: [kernel for kernel in read(folder / name) if "gather" in kernel.opcodes] for name in names}
    for name, kernels in found.items():
        assert len(kernels) == (1 if mode == "forward" else 2), (
            f"XLA gathers rows of {name} in {len(kernels)} kernels ({mode}). One should read the samples; the "
            "gradients need one more, which sums over channels. With more kernels the map is read more often. If "
            "there are none, XLA may write its programs in another way: then change tests/support/cpu_kernels.py."
        )
        kernels.sort(key=lambda kernel: not kernel.in_conditional)
    return found


@pytest.fixture(scope="module")
def forward(tmp_path_factory):
    return kernels_of(tmp_path_factory.mktemp("forward"), "nothing", "forward", *NARROW)


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    return kernels_of(tmp_path_factory.mktemp("gradients"), "nothing", "gradients", *ROWS)


def check_reading_is_in_a_conditional(kernel):
    assert kernel.in_conditional, (
        "XLA has dropped the `lax.cond` around the samples, whose condition is always true. Now XLA fuses the "
        "reshape for the matrix product into the gather, which divides to find the tap and group of each channel. "
        "Reading takes 3 times as long."
    )


def check_reading_sums_corners(kernel):
    assert "reduce" in kernel.opcodes, (
        "XLA no longer sums the corners in the kernel that gathers their rows. The reducer a - (-b) should keep XLA "
        "from handing this sum to a library. For a library XLA writes the rows of all corners to memory. Reading "
        "takes 10 times as long."
    )


def check_channels_are_summed_where_they_are_read(kernel):
    assert "reduce" in kernel.opcodes, (
        "XLA no longer sums over channels, which the gradients of the weights need, in the kernel that gathers the "
        "rows. The reducer a - (-b) should keep XLA from handing this sum to a library. For a library XLA writes "
        "the products of all corners to memory. The sum takes 5 times as long."
    )


def check_loops_are_vectors(kernel):
    assert kernel.vectors is not None, (
        "Cannot tell whether LLVM makes vectors: XLA dumped no LLVM IR for this kernel. The option that asks for "
        "it, or the names of the files, may have changed: then change tests/support/cpu_kernels.py."
    )
    assert {"load", "fmul"} <= kernel.vectors, (
        "LLVM no longer vectorises the loop over the channels of a row. It loads and multiplies them one by one, "
        "which takes 2 to 5 times as long. LLVM does not vectorise a loop that it has unrolled before. Compare the "
        "IR that XLA hands to LLVM with that of an older JAX."
    )


@pytest.mark.parametrize("name", NARROW)
def test_samples_are_read_in_a_conditional(forward, name):
    (reading,) = forward[name]
    check_reading_is_in_a_conditional(reading)


@pytest.mark.parametrize("name", NARROW)
def test_one_kernel_reads_and_sums_the_corners(forward, name):
    (reading,) = forward[name]
    check_reading_sums_corners(reading)


@needs_x86
@pytest.mark.parametrize("name", NARROW)
def test_corners_are_read_in_vectors(forward, name):
    (reading,) = forward[name]
    check_loops_are_vectors(reading)


@pytest.mark.parametrize("name", ROWS)
def test_gradients_read_samples_in_a_conditional(gradients, name):
    reading, _ = gradients[name]
    check_reading_is_in_a_conditional(reading)


@pytest.mark.parametrize("name", NARROW)
def test_gradients_read_samples_as_the_result_does(gradients, name):
    reading, _ = gradients[name]
    check_reading_sums_corners(reading)
    if X86:
        check_loops_are_vectors(reading)


@pytest.mark.parametrize("name", ROWS)
def test_one_kernel_reads_again_and_sums_over_channels(gradients, name):
    _, summing = gradients[name]
    check_channels_are_summed_where_they_are_read(summing)


@needs_x86
def test_channels_are_summed_in_vectors(gradients):
    """In rows of 32 channels. Rows of 8 and 16 are not vectorised here, but for pairs of floats on jax 0.10."""
    _, summing = gradients["32 channels"]
    check_loops_are_vectors(summing)


@needs_x86
@pytest.mark.slow
@pytest.mark.parametrize(
    ("undone", "mode", "checks"),
    [
        ("a reducer with +", "forward", [check_reading_sums_corners]),
        ("a reducer with +", "gradients", [check_channels_are_summed_where_they_are_read]),
        ("a term for each corner", "forward", [check_loops_are_vectors]),
        ("no conditional", "forward", [check_reading_is_in_a_conditional, check_loops_are_vectors]),
    ],
)
def test_what_undoes_it_would_be_found(tmp_path, undone, mode, checks):
    """Each trick is needed: without it the check fails. If a check passes, XLA may no longer need that trick."""
    for kernels in kernels_of(tmp_path, undone, mode, *NARROW).values():
        for check in checks:
            with pytest.raises(AssertionError, match="times as long"):
                check(kernels[-1])
