"""Launching kernels on whole arrays, on a CUDA GPU, on a TPU or in Pallas's interpreter.

`launch` runs a GPU kernel. `on_platform` wraps any call of Pallas's; if the call cannot be lowered,
its error says what to do. Every array has a stack axis before its own axes, for `jax.vmap` (see
`batching`). Its size is that of the stack, or 1 for an array that all members of the stack share.
"""

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import mlir

# A user context is part of the cache key of `jax.jit`, so the interpreter and the device never
# share a trace. Each thread has its own value.
_interpreting = jax.make_user_context(False)


@contextlib.contextmanager
def interpret() -> Iterator[None]:
    """Run kernels in Pallas's interpreter, which works on any platform and is slow: for tests."""
    with _interpreting(True):
        yield


def interpreting() -> bool:
    """Whether kernels that are traced now will run in Pallas's interpreter."""
    return _interpreting.value


class _Target(NamedTuple):
    """A kind of device that kernels compile for."""

    implementation: str  # the `implementation` of `deform_conv` that needs it
    devices: str  # its name in error messages
    platforms: tuple[str, ...]  # JAX's names for it
    plugins: tuple[str, ...]  # packages that compile for it; one of them is enough


_TARGETS = {
    "cuda": _Target("pallas_gpu", "CUDA GPUs", ("gpu", "cuda"), ("jax_cuda12_plugin", "jax_cuda13_plugin")),
    "tpu": _Target("pallas_tpu", "TPUs", ("tpu",), ("libtpu",)),
}


def out_of_reach(platform: str) -> str | None:
    """Why kernels that are traced now cannot be for "cuda" or "tpu"; None if they may be. Lowering checks the platform."""
    target, device = _TARGETS[platform], jax.sharding.get_abstract_mesh().abstract_device
    here = jax.default_backend() if device is None else device.platform
    if interpreting() or here in target.platforms or any(map(importlib.util.find_spec, target.plugins)):
        return None
    name = target.platforms[0]
    return (
        f"it runs on {target.devices}, and JAX's backend here is {jax.default_backend()!r} (to compile for a "
        f"{name.upper()} ahead of time, trace under jax.sharding.use_abstract_mesh with an abstract_device of platform "
        f"{name!r}, or install {' or '.join(target.plugins)})"
    )


def stack_size(arrays: Any) -> int:
    """How many members the stack has, told from a tree of arrays with a stack axis."""
    return max(array.shape[0] for array in jax.tree.leaves(arrays))


def launch(
    body: Callable,
    operands: dict[str, jax.Array | None],
    results: dict[str, jax.Array | jax.ShapeDtypeStruct],
    *,
    name: str,
    grid: tuple[int, ...],
    warps: int,
    interpret: bool,
) -> dict[str, Any]:
    """Run the GPU kernel `body` over `grid`, for each member of the stack.

    `body` gets each operand and result by name, as `NAME_ref`: a reference to the whole array
    without its stack axis, or None for an operand that is None. A result is given by its shape and
    dtype, or by an array of initial values; its stack axis always has the size of the stack.
    """
    given = {key: a for key, a in operands.items() if a is not None}
    starts = {key: a for key, a in results.items() if isinstance(a, jax.Array)}
    references = [f"{key}_ref" for key in (*given, *results)]
    absent = {f"{key}_ref": None for key in operands if key not in given}

    def kernel(*refs):
        # Initial values come as references too. They alias their results, so `body` does not get them.
        used = (*refs[: len(given)], *refs[len(given) + len(starts) :])
        body(**dict(zip(references, used, strict=True)), **absent)

    arrays = [*given.values(), *starts.values()]
    over = jax.typeof(arrays[0]).mat  # within shard_map, a result's type names the mesh axes that it varies over
    call = pl.pallas_call(
        kernel,
        grid=(*grid, stack_size(results)),
        in_specs=[_whole(a) for a in arrays],
        out_specs=[_whole(a) for a in results.values()],
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype, manual_axis_type=over) for a in results.values()],
        input_output_aliases={len(given) + i: list(results).index(key) for i, key in enumerate(starts)},
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),  # more stages load through shared memory
        interpret=interpret,
        name=name,
    )
    run = call if interpret else functools.partial(on_platform, "cuda", call)
    return dict(zip(results, run(*arrays), strict=True))


def _whole(array) -> pl.BlockSpec:
    """One member of the stack, whole. The last axis of the grid counts the members."""
    rest = array.shape[1:]
    return pl.BlockSpec((None, *rest), lambda *at: (at[-1] if array.shape[0] > 1 else 0, *(0 for _ in rest)))


def on_platform(platform: str, call: Callable, *arrays: jax.Array) -> list[jax.Array]:
    """`call(*arrays)`, where `call` contains a kernel for one platform: "cuda" or "tpu"."""
    return _launch_p.bind(*arrays, jaxpr=jax.make_jaxpr(call)(*arrays), platform=platform)


# The platform is known only when the program is lowered. So the call is a primitive: its lowering
# raises the error for a wrong platform, and hides JAX's warning that Triton is deprecated.
_launch_p = Primitive("pallas_launch")
_launch_p.multiple_results = True
_launch_p.def_abstract_eval(lambda *_, jaxpr, platform: jaxpr.out_avals)


def _lower(context, *operands, jaxpr, platform, here=None):
    target = _TARGETS[platform]
    if platform != here:
        raise ValueError(
            f"implementation={target.implementation!r} runs on {target.devices} alone, and this program is lowered for "
            "another platform; use implementation='xla', or None"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        try:
            return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(context, *operands)
        except NotImplementedError as error:
            if "automatically partitioned" not in str(error):
                raise
            raise NotImplementedError(
                f"implementation={target.implementation!r} runs on one device, and this program is partitioned over several; "
                "call the op inside jax.shard_map, on each device's part of the batch, or use implementation='xla', which "
                "JAX partitions by itself"
            ) from error


mlir.register_lowering(_launch_p, _lower)  # on any platform but those below: `here` is None, and it raises
for _here in _TARGETS:
    mlir.register_lowering(_launch_p, functools.partial(_lower, here=_here), platform=_here)
