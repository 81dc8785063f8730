"""Running the library on a real GPU (`make test-gpu`), and comparing with what NumPy computes in float64.

With DCN_JAX_GPU_TESTS=interpret the same tests run on a CPU, the kernels in Pallas's interpreter: to mend a test, not to
hold anything, and a few at a time (`-k`).
"""

import contextlib
import functools
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the GPU

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dcn_jax import deform_conv
from dcn_jax._core.pallas.launch import interpret
from tests.support import oracle
from tests.support.running import value_and_gradients

INTERPRETED = os.environ.get("DCN_JAX_GPU_TESTS") == "interpret"

# How products are made, and how far the results may then lie from the exact ones, as a share of the largest. TF32 has 11
# bits, of which the tensor cores cut off the rest: each factor is up to 2^-10 too small.
PRECISIONS = {
    "TF32": (None, 2e-3),
    "TF32x3": (lax.DotAlgorithmPreset.TF32_TF32_F32_X3, 1e-5),
    "HIGHEST": (lax.Precision.HIGHEST, 1e-5),
}
# The kernels make three products of bfloat16 parts where TF32 is asked for: each factor keeps 16 bits.
KERNELS_TF32 = 1e-4
HALVES = {"bfloat16": 1e-2, "float16": 1.5e-3}


def missing() -> str | None:
    """Why nothing can be run on a GPU here; None where it can."""
    platforms = jax.config.jax_platforms
    if INTERPRETED:
        return None
    if platforms and "cuda" not in platforms.split(","):
        return f"JAX_PLATFORMS={platforms} leaves out CUDA GPUs; `make test-gpu` runs these tests on one"
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        return f"there is no CUDA GPU for these tests: {error}"
    return None


def mode():
    """A context in which kernels run as these tests are to run them."""
    return interpret() if INTERPRETED else contextlib.nullcontext()


def bound(implementation, **options):
    """`deform_conv` by an implementation, with its options."""
    return functools.partial(deform_conv, implementation=implementation, **options)


def gradients_of(f):
    """A compiled function of (arrays, cotangent): y, and the gradient of each array."""
    return jax.jit(functools.partial(value_and_gradients, f))


def compiled(program, *arguments):
    """A function from such arguments to the program's results in NumPy; memory of their sizes is full of NaN before."""
    lowered = program.lower(*arguments)
    execute, results = lowered.compile(), jax.tree.leaves(lowered.out_info)
    device = jax.devices()[0]

    def run(*arguments):
        arguments = jax.device_put(arguments, device)
        poison = [jax.device_put(np.full(r.shape, np.nan, r.dtype), device) for r in results for _ in range(2)]
        jax.block_until_ready((arguments, poison))
        del poison
        return jax.tree.map(np.array, execute(*arguments))

    return run


def run(program, *arguments):
    """The results of a program that is compiled for them alone."""
    return compiled(program, *arguments)(*arguments)


def worst(actual, wanted) -> float:
    """The largest error, as a share of the largest number wanted."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape
    if not wanted.size:
        return 0.0
    error = np.max(np.abs(actual - wanted)) / max(np.max(np.abs(wanted)), 1e-3)
    return float(np.inf if np.isnan(error) else error)


def check(record, name, actual, wanted, tolerance):
    """All arrays near those wanted, by their names; one line says how far each is off, and which too far."""
    errors = {key: worst(actual[key], wanted[key]) for key in wanted}
    line = ", ".join(f"{key} {error:.1e}{' !' if not error <= tolerance else ''}" for key, error in errors.items())
    record(name, line)
    if not all(error <= tolerance for error in errors.values()):
        raise AssertionError(f"{name}: {line}; wanted {tolerance:.1e}")


def named(results, names=("y", "dx", "dkernel", "doffset", "dmask", "dbias")):
    """`(y, gradients)` by name, without the gradients of what is None."""
    y, gradients = results
    return {name: a for name, a in zip(names, (y, *gradients), strict=False) if a is not None}


def draw_cotangent(case):
    """A random gradient of the result of a case, in float32."""
    shape = jax.eval_shape(bound("xla", **case.options), *case.arrays).shape
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def exact(case, cotangent):
    """What the oracle says of a case: y and the gradients, by name."""
    arrays = tuple(None if a is None else np.float64(a) for a in case.arrays)
    y = oracle.deform_conv(*arrays, **case.options)
    gradients = oracle.gradients(np.float64(cotangent), *arrays, **case.options)
    return named((y, [None if a is None else g for a, g in zip(arrays, gradients, strict=True)]))


def on_host(f, *arguments):
    """`f` in float64 on the host's CPU, for what the oracle has no formula of or no time for."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        arguments = jax.tree.map(lambda a: jnp.asarray(np.float64(a)), arguments)
        compiled = jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})
        return jax.tree.map(np.asarray, compiled(*arguments))
