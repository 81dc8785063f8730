"""Launching the two TPU kernels, over arrays whose first axis is the stack's, S (see `_pallas.batching`)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dcn_jax._core.pallas import partitioning
from dcn_jax._core.pallas.launch import on_platform, stack_size
from dcn_jax.ops.deform_conv.call import Spec
from dcn_jax.ops.deform_conv.pallas_tpu import kernels
from dcn_jax.ops.deform_conv.pallas_tpu.tiles import (
    COLUMNS,
    LANES,
    ROWS,
    Cut,
    cut_back,
    extend,
    fill,
    from_tiles,
    regular_points,
    round_up,
    to_tiles,
)

ON_CHIP = 100 * 2**20  # bytes that a kernel may take of a core's memory, of the 128 MiB of a v5e or v6e


class Plan(NamedTuple):
    """What is known of a call beside its arrays; hashable."""

    spec: Spec
    cut: Cut
    interpret: bool


class Operands(NamedTuple):
    """What y is computed of. Where it is launched, each has the stack's axis before its own."""

    x: jax.Array  # (B, H, W, C)
    kernel: jax.Array  # (K, C, F)
    offset: jax.Array  # (B, Ho, Wo, 2 * K)
    mask: jax.Array  # (B, Ho, Wo, K)
    bias: jax.Array  # (F,)


class ForwardResults(NamedTuple):
    """The result."""

    y: jax.Array


class BackwardOperands(NamedTuple):
    """And the gradient of y; that of the bias is a sum of it."""

    x: jax.Array
    kernel: jax.Array
    offset: jax.Array
    mask: jax.Array
    g: jax.Array


class BackwardResults(NamedTuple):
    """The gradients."""

    x_bar: jax.Array
    kernel_bar: jax.Array
    offset_bar: jax.Array
    mask_bar: jax.Array


class _Block(NamedTuple):
    """An array of a launch, and what of it a program of the grid (image, strip) sees."""

    array: jax.Array | jax.ShapeDtypeStruct
    shape: tuple[Any, ...]  # of the block, without the stack's axis
    at: Callable  # (image, strip) -> the block's indices


def _forward(plan: Plan, operands: Operands) -> ForwardResults:
    given = _read(plan.cut, operands)
    features = given["kernel"].array.shape[-1]
    given["bias"] = _Block(fill(operands.bias[:, None], features), (1, features), lambda *_: (0, 0))
    stack, images = stack_size(operands), operands.x.shape[1]
    shape = jax.ShapeDtypeStruct((stack, images, *plan.spec.window.out_spatial, features), plan.spec.out_dtype)
    y = _Block(shape, (None, ROWS, plan.cut.width, features), lambda i, j: (i, j, 0, 0))
    (y,) = _launch(plan, "forward", kernels.forward, given, [y], grid=(stack, images, plan.cut.strips))
    return ForwardResults(y[..., : operands.kernel.shape[-1]])


def _backward(plan: Plan, operands: BackwardOperands) -> BackwardResults:
    cut, x, kernel = plan.cut, operands.x, operands.kernel
    given = _read(cut, operands)
    stack, images, strips = stack_size(operands), x.shape[1], cut.strips + cut.flushes
    *_, width, channels = given["x"].array.shape
    g = operands.g.astype(x.dtype)
    g = fill(g, cut.strips * ROWS, cut.tiles * COLUMNS, given["kernel"].array.shape[-1])
    given["g"] = _Block(g, (None, ROWS, *g.shape[3:]), lambda i, j: (i, jnp.minimum(j, cut.strips - 1), 0, 0))

    def result(like: _Block) -> _Block:
        return like._replace(array=jax.ShapeDtypeStruct((stack, *like.array.shape[1:]), jnp.float32))

    x_bar = jax.ShapeDtypeStruct((stack, images, strips * ROWS, width, channels), x.dtype)
    x_bar = _Block(x_bar, (None, ROWS, width, channels), lambda i, j: (i, j, 0, 0))
    x_bar, kernel_bar, points_bar = _launch(
        plan,
        "backward",
        kernels.backward,
        given,
        [x_bar, result(given["kernel"]), result(given["points"])],
        grid=(stack, images, strips),
        sums=(cut.window_rows, width, channels),
    )
    *offset_bar, mask_bar = (from_tiles(cut, points_bar[:, :, :, axis]) for axis in range(3))
    return BackwardResults(
        cut_back(cut, x_bar, (stack, *x.shape[1:])),
        kernel_bar[:, :, : kernel.shape[2], : kernel.shape[3]].astype(kernel.dtype),
        jnp.stack(offset_bar, axis=-1).reshape(*mask_bar.shape[:-1], -1),
        mask_bar,
    )


def _read(cut: Cut, operands: Operands | BackwardOperands) -> dict[str, _Block]:
    """What both kernels read; where strips are left to be written alone, the last one's."""
    x, kernel, offset, mask, _ = operands
    x, kernel = extend(cut, x), fill(kernel, *(round_up(size, LANES) for size in kernel.shape[-2:]))
    # Put together as tiles: done before, a TPU takes a fifth more for what is around the kernels.
    points = jnp.stack([to_tiles(cut, array) for array in (offset[..., ::2], offset[..., 1::2], mask)], axis=3)
    regular = regular_points(cut)[None]

    def strip(j):
        return jnp.minimum(j, cut.strips - 1)

    # Windows of neighbouring strips overlap, so a block of x begins at any row: it is told in elements, and has all axes.
    rows = tuple(map(pl.Element, (1, cut.window_rows, *x.shape[3:])))
    return {
        "x": _Block(x, rows, lambda i, j: (i, strip(j) * ROWS, 0, 0)),
        "kernel": _Block(kernel, kernel.shape[1:], lambda *_: (0, 0, 0)),
        "regular": _Block(regular, regular.shape[1:], lambda *_: (0, 0)),
        "points": _Block(points, (None, None, *points.shape[3:]), lambda i, j: (i, strip(j), 0, 0, 0)),
    }


def _launch(
    plan: Plan,
    name: str,
    body: Callable,
    operands: dict[str, _Block],
    results: list[_Block],
    *,
    grid: tuple[int, int, int],
    sums: tuple[int, ...] | None = None,
) -> list[jax.Array]:
    """Run a kernel over a grid of (stack, images, strips), with a float32 array `sums` that is kept from program to program."""

    def spec(block: _Block) -> pl.BlockSpec:
        shared, one = block.array.shape[0] == 1, pl.Element(1) if isinstance(block.shape[0], pl.Element) else None
        return pl.BlockSpec((one, *block.shape), lambda s, i, j: (0 if shared else s, *block.at(i, j)))

    over = jax.typeof(operands["x"].array).mat
    order = "parallel" if sums is None else "arbitrary"
    call = pl.pallas_call(
        functools.partial(body, cut=plan.cut),
        grid=grid,
        in_specs=[spec(block) for block in operands.values()],
        out_specs=[spec(block) for block in results],
        out_shape=[jax.ShapeDtypeStruct(b.array.shape, b.array.dtype, manual_axis_type=over) for b in results],
        scratch_shapes=[] if sums is None else [pltpu.VMEM(sums, jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=(order,) * 3, vmem_limit_bytes=ON_CHIP),
        interpret=plan.interpret,
        name=f"deform_conv_{name}",
    )
    run = call if plan.interpret else functools.partial(on_platform, "tpu", call)
    with jax.enable_x64(False):  # no array here is as wide, and a TPU's kernel cannot count so
        return run(*(cast(jax.Array, block.array) for block in operands.values()))


FORWARD = partitioning.Pass(_forward, batched=None)
BACKWARD = partitioning.Pass(_backward, batched=None)
