"""Launching a kernel over whole arrays, on a CUDA GPU or in Pallas's interpreter; and any call of Pallas's on its platform.

Every array has one axis before its own, the stack's, which `jax.vmap` fills (see `batching`). Its
size is that of the stack, or 1 for an array that all members of the stack share.
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

# Part of the key of every jit, so that the two modes share no trace; each thread has its own.
_interpreting = jax.make_user_context(False)


@contextlib.contextmanager
def interpret() -> Iterator[None]:
    """Run the kernels in Pallas's interpreter, on any platform: slow, for tests."""
    with _interpreting(True):
        yield


def interpreting() -> bool:
    """Whether what is traced here runs in Pallas's interpreter."""
    return _interpreting.value


class _Target(NamedTuple):
    """What kernels are made for, and what messages say of it."""

    implementation: str
    devices: str
    platforms: tuple[str, ...]  # JAX's names of it
    plugins: tuple[str, ...]  # modules that compile for it
    install: str


_TARGETS = {
    "cuda": _Target(
        "pallas_gpu", "CUDA GPUs", ("gpu", "cuda"), ("jax_cuda12_plugin", "jax_cuda13_plugin"), "jax's CUDA plugin"
    ),
    "tpu": _Target("pallas_tpu", "TPUs", ("tpu",), ("libtpu",), "libtpu"),
}


def out_of_reach(platform: str) -> str | None:
    """Why what is traced here cannot be meant for "cuda" or "tpu"; None where it may be: lowering will tell for certain."""
    target, device = _TARGETS[platform], jax.sharding.get_abstract_mesh().abstract_device
    here = jax.default_backend() if device is None else device.platform
    if interpreting() or here in target.platforms or any(map(importlib.util.find_spec, target.plugins)):
        return None
    name = target.platforms[0]
    return (
        f"it runs on {target.devices}, and JAX's backend here is {jax.default_backend()!r} (to compile for a {name.upper()} "
        f"ahead of time, trace under jax.sharding.use_abstract_mesh with an abstract_device of platform {name!r}, or "
        f"install {target.install})"
    )


def stack_size(arrays: Any) -> int:
    """How many members the stack has that a tree of arrays belongs to."""
    return max(array.shape[0] for array in jax.tree.leaves(arrays))


def launch(
    body: Callable,
    operands: dict[str, jax.Array | None],
    results: dict[str, jax.Array | jax.ShapeDtypeStruct | None],
    *,
    name: str,
    grid: tuple[int, ...],
    warps: int,
    stages: int,
    interpret: bool,
) -> dict[str, Any]:
    """Run the kernel `body` over `grid` for each member of the stack.

    Operands and results go by their names: `body` gets a reference to each as `NAME_ref`, to the
    whole array without its stack axis. A result is given as its shape and dtype, or as an array
    that it starts as, always of the stack's size. What is None stays None.
    """
    given = {key: a for key, a in operands.items() if a is not None}
    made = {key: a for key, a in results.items() if a is not None}
    starts = {key: a for key, a in made.items() if isinstance(a, jax.Array)}
    references = [f"{key}_ref" for key in (*given, *made)]
    absent = {f"{key}_ref": None for key, a in (operands | results).items() if a is None}

    def kernel(*refs):
        # A start is its result's memory.
        used = (*refs[: len(given)], *refs[len(given) + len(starts) :])
        body(**dict(zip(references, used, strict=True)), **absent)

    arrays = [*given.values(), *starts.values()]
    over = jax.typeof(arrays[0]).mat
    call = pl.pallas_call(
        kernel,
        grid=(*grid, stack_size(made)),
        in_specs=[_whole(a) for a in arrays],
        out_specs=[_whole(a) for a in made.values()],
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype, manual_axis_type=over) for a in made.values()],
        input_output_aliases={len(given) + i: list(made).index(key) for i, key in enumerate(starts)},
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )
    run = call if interpret else functools.partial(on_platform, "cuda", call)
    return dict.fromkeys(results) | dict(zip(made, run(*arrays), strict=True))


def _whole(array) -> pl.BlockSpec:
    """All of one member of the stack, whose number is the last in the grid."""
    rest = array.shape[1:]
    return pl.BlockSpec((None, *rest), lambda *at: (at[-1] if array.shape[0] > 1 else 0, *(0 for _ in rest)))


def on_platform(platform: str, call: Callable, *arrays: jax.Array) -> list[jax.Array]:
    """`call(*arrays)`, a call of Pallas's, which compiles for "cuda" or "tpu" alone."""
    return _launch_p.bind(*arrays, jaxpr=jax.make_jaxpr(call)(*arrays), platform=platform)


# The launch is a primitive of our own for what only its lowering can do: say which platforms will
# not do, and keep from the user a warning. JAX >= 0.11 gives it each time: this way into the GPU
# will be replaced.
_launch_p = Primitive("pallas_launch")
_launch_p.multiple_results = True
_launch_p.def_abstract_eval(lambda *_, jaxpr, platform: jaxpr.out_avals)


def _lower(context, *operands, jaxpr, platform, here=None):
    target = _TARGETS[platform]
    if platform != here:
        raise ValueError(
            f"implementation={target.implementation!r} runs on {target.devices} alone; use implementation='xla' here, or None"
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
                "is partitioned as it is"
            ) from error


mlir.register_lowering(_launch_p, _lower)
for _here in _TARGETS:
    mlir.register_lowering(_launch_p, functools.partial(_lower, here=_here), platform=_here)
