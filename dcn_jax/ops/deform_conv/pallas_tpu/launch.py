"""Launching the two TPU kernels on whole arrays.

`FORWARD` and `BACKWARD` are the two passes. Each array has a stack axis S before the axes given
here (see `dcn_jax._core.pallas.batching`). A pass adds margins to the map, brings offsets and
modulations into the order of tiles, tells Pallas which block of each array a program of the grid
needs, and undoes all that for the results.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dcn_jax._core.pallas import partitioning
from dcn_jax._core.pallas.launch import on_platform, stack_size
from dcn_jax.ops.deform_conv.pallas_tpu import kernels, tiles
from dcn_jax.ops.deform_conv.pallas_tpu.tiles import COLUMNS, LANES, ROWS, StripLayout, TpuCall

ON_CHIP = 100 * 2**20  # bytes of a core's memory that a kernel may take; a v5e or v6e has 128 MiB


class ForwardOperands(NamedTuple):
    """The operands of the forward pass."""

    x: jax.Array  # (B, H, W, C)
    kernel: jax.Array  # (K, C, F)
    offset: jax.Array  # (B, Ho, Wo, 2 * K)
    mask: jax.Array  # (B, Ho, Wo, K)
    bias: jax.Array  # (F,)


class _ForwardResults(NamedTuple):
    y: jax.Array  # (B, Ho, Wo, F)


class BackwardOperands(NamedTuple):
    """The operands of the backward pass."""

    x: jax.Array
    kernel: jax.Array
    offset: jax.Array
    mask: jax.Array
    y_bar: jax.Array


class _BackwardResults(NamedTuple):
    x_bar: jax.Array
    kernel_bar: jax.Array
    offset_bar: jax.Array
    mask_bar: jax.Array


class _Block(NamedTuple):
    """An array, and the block of it that a program of the grid sees."""

    array: jax.Array | jax.ShapeDtypeStruct
    shape: tuple[Any, ...]  # of the block, without the stack axis
    at: Callable  # (image, strip) -> the block's indices, without the stack axis


def _forward(call: TpuCall, operands: ForwardOperands) -> _ForwardResults:
    given = _inputs(call.layout, operands)
    stack, images, features = stack_size(operands), operands.x.shape[1], given["kernel"].array.shape[-1]
    given["bias"] = _Block(tiles.pad_to(operands.bias[:, None], features), (1, features), lambda *_: (0, 0))
    shape = jax.ShapeDtypeStruct((stack, images, *call.spec.window.out_spatial, features), call.spec.out_dtype)
    y = _Block(shape, (None, ROWS, call.spec.window.out_spatial[1], features), lambda i, j: (i, j, 0, 0))
    (y,) = _launch_strips(call, "forward", kernels.forward, given, [y], grid=(stack, images, call.layout.strips))
    return _ForwardResults(y[..., : operands.kernel.shape[-1]])


def _backward(call: TpuCall, operands: BackwardOperands) -> _BackwardResults:
    layout, x, kernel = call.layout, operands.x, operands.kernel
    given = _inputs(layout, operands)
    stack, images, strips = stack_size(operands), x.shape[1], layout.strips + layout.extra_strips
    *_, width, channels = given["x"].array.shape
    y_bar = operands.y_bar.astype(x.dtype)
    y_bar = tiles.pad_to(y_bar, layout.strips * ROWS, layout.tiles * COLUMNS, given["kernel"].array.shape[-1])
    last = layout.strips - 1
    given["y_bar"] = _Block(y_bar, (None, ROWS, *y_bar.shape[3:]), lambda i, j: (i, jnp.minimum(j, last), 0, 0))

    def gradient_of(block: _Block) -> _Block:
        return block._replace(array=jax.ShapeDtypeStruct((stack, *block.array.shape[1:]), jnp.float32))

    x_bar = jax.ShapeDtypeStruct((stack, images, strips * ROWS, width, channels), x.dtype)
    x_bar = _Block(x_bar, (None, ROWS, width, channels), lambda i, j: (i, j, 0, 0))
    x_bar, kernel_bar, points_bar = _launch_strips(
        call,
        "backward",
        kernels.backward,
        given,
        [x_bar, gradient_of(given["kernel"]), gradient_of(given["points"])],
        grid=(stack, images, strips),
        scratch=(layout.patch_rows, width, channels),
    )
    *offset_bar, mask_bar = (tiles.from_tiles(layout, points_bar[:, :, :, axis]) for axis in range(3))
    return _BackwardResults(
        tiles.remove_margins(layout, x_bar, (stack, *x.shape[1:])),
        kernel_bar[:, :, : kernel.shape[2], : kernel.shape[3]].astype(kernel.dtype),
        jnp.stack(offset_bar, axis=-1).reshape(*mask_bar.shape[:-1], -1),
        mask_bar,
    )


def _inputs(layout: StripLayout, operands: ForwardOperands | BackwardOperands) -> dict[str, _Block]:
    """The blocks that both kernels read. Programs after the last strip, which only write results, read it again."""
    x, kernel, offset, mask, _ = operands
    x = tiles.add_margins(layout, x)
    kernel = tiles.pad_to(kernel, *(tiles.round_up(n, LANES) for n in kernel.shape[-2:]))
    # Stacked after they are brought into tiles: by the compiler's estimate, the other order takes a fifth longer.
    points = [tiles.to_tiles(layout, array) for array in (offset[..., ::2], offset[..., 1::2], mask)]
    points, regular = jnp.stack(points, axis=3), tiles.regular_points(layout)[None]

    def strip(j):
        return jnp.minimum(j, layout.strips - 1)

    # The rows that strips read overlap, so a block of x may begin at any row. Pallas wants its
    # index in elements then, not in blocks, along every axis.
    rows = tuple(map(pl.Element, (1, layout.patch_rows, *x.shape[3:])))
    return {
        "x": _Block(x, rows, lambda i, j: (i, strip(j) * ROWS, 0, 0)),
        "kernel": _Block(kernel, kernel.shape[1:], lambda *_: (0, 0, 0)),
        "regular": _Block(regular, regular.shape[1:], lambda *_: (0, 0)),
        "points": _Block(points, (None, None, *points.shape[3:]), lambda i, j: (i, strip(j), 0, 0, 0)),
    }


def _launch_strips(
    call: TpuCall,
    name: str,
    body: Callable,
    operands: dict[str, _Block],
    results: list[_Block],
    *,
    grid: tuple[int, int, int],
    scratch: tuple[int, ...] | None = None,
) -> list[jax.Array]:
    """Run a kernel over a grid of (stack, images, strips). A float32 array `scratch` lasts from program to program."""

    def block_spec(block: _Block) -> pl.BlockSpec:
        shared, one = block.array.shape[0] == 1, pl.Element(1) if isinstance(block.shape[0], pl.Element) else None
        return pl.BlockSpec((one, *block.shape), lambda s, i, j: (0 if shared else s, *block.at(i, j)))

    over = jax.typeof(operands["x"].array).mat
    order = "parallel" if scratch is None else "arbitrary"  # programs that share scratch run one after another
    program = pl.pallas_call(
        functools.partial(body, call=call),
        grid=grid,
        in_specs=[block_spec(block) for block in operands.values()],
        out_specs=[block_spec(block) for block in results],
        out_shape=[jax.ShapeDtypeStruct(b.array.shape, b.array.dtype, manual_axis_type=over) for b in results],
        scratch_shapes=[] if scratch is None else [pltpu.VMEM(scratch, jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=(order,) * 3, vmem_limit_bytes=ON_CHIP),
        interpret=call.interpret,
        name=f"deform_conv_{name}",
    )
    run = program if call.interpret else functools.partial(on_platform, "tpu", program)
    with jax.enable_x64(False):  # a TPU kernel cannot count in 64 bits; no array here has 64-bit numbers
        return run(*(cast(jax.Array, block.array) for block in operands.values()))


FORWARD = partitioning.Pass(_forward, batched=None)
BACKWARD = partitioning.Pass(_backward, batched=None)
