"""The op as fused GPU kernels, which gather, interpolate, modulate and multiply in one pass; the only file that knows Pallas.

There are four. `_forward_kernel` takes a tile of output positions and, one block of channels and one tap after another,
reads the corners around its points, interpolates, and multiplies with the tap's matrix on the tensor cores. The backward
passes recompute what they need: `_backward_x_kernel` adds a tile's gradients of x into memory, `_backward_points_kernel`
gives a tile its gradients of offset and mask, and `_backward_kernel_kernel` sums one tap's gradient of the kernel. No
sample is ever written to memory.

What a point reads, and how that changes with its place, is `sampling.corners`, run (and differentiated) inside the
kernels. Around them: `_run` gives them `jax.vmap`, `_sharded` keeps them local to where the batch lies, `_launch`
hands them to the GPU, and `_op` and `_gradients` give them derivatives.
"""

import contextlib
import functools
import importlib.util
import math
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.ref import addupdate
from jax.sharding import NamedSharding, PartitionSpec

from dcn_jax._mesh import on_any_mesh
from dcn_jax.geometry import Window
from dcn_jax.ops.deform_conv import xla
from dcn_jax.ops.deform_conv.call import Arrays, Spec
from dcn_jax.sampling import corners

DTYPES = ("float32", "bfloat16", "float16")

# How a float32 product is made, by what `precision` asks for; half-precision products are exact in any of them.
_PRODUCTS = {
    (lax.Precision.DEFAULT, lax.Precision.DEFAULT): lax.DotAlgorithmPreset.TF32_TF32_F32,
    (lax.Precision.HIGH, lax.Precision.HIGH): lax.DotAlgorithmPreset.TF32_TF32_F32,
    (lax.Precision.HIGHEST, lax.Precision.HIGHEST): lax.DotAlgorithmPreset.F32_F32_F32,
    lax.DotAlgorithmPreset.DEFAULT: lax.DotAlgorithmPreset.TF32_TF32_F32,
    lax.DotAlgorithmPreset.TF32_TF32_F32: lax.DotAlgorithmPreset.TF32_TF32_F32,
    lax.DotAlgorithmPreset.TF32_TF32_F32_X3: lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
    lax.DotAlgorithmPreset.F32_F32_F32: lax.DotAlgorithmPreset.F32_F32_F32,
}


class _Plan(NamedTuple):
    """A call, and how the kernels are to run it; hashable."""

    spec: Spec
    product: lax.DotAlgorithmPreset  # how float32 products are made
    interpret: bool

    @property
    def segments(self) -> int:
        """Channels fall into this many runs, each in one offset group and one feature group."""
        return math.lcm(self.spec.offset_groups, self.spec.feature_groups)


class _Tile(NamedTuple):
    """How much one program of a kernel holds at a time; powers of two, at least 16."""

    positions: int
    channels: int
    features: int
    warps: int
    stages: int = 1


# --- what deform_conv calls ---------------------------------------------------------------------------------------


def refusal(spec: Spec, arrays: Arrays) -> str | None:
    """Why the kernels cannot take this call, as a sentence with the way out; None if they can."""
    if spec.window.rank > 2:
        return f"it has {spec.window.rank} spatial axes; the kernels know 1 and 2"
    for name, array in (("x", arrays.x), ("kernel", arrays.kernel)):
        if array.dtype.name not in DTYPES:
            return f"{name} has dtype {array.dtype}; the kernels know {', '.join(DTYPES)}"
    if _product(spec.precision) is None:
        return f"precision={spec.precision!r} is not among those the kernels know: {', '.join(map(str, _PRODUCTS))}"
    if not _interpreting and not _gpu_in_reach():
        return (
            f"it runs on CUDA GPUs, and JAX's backend here is {jax.default_backend()!r} (to compile for a GPU ahead of time, "
            "trace under jax.sharding.use_abstract_mesh with an abstract_device of platform 'gpu', or install jax's CUDA plugin)"
        )
    return None


def run(spec: Spec, arrays: Arrays) -> jax.Array:
    """`deform_conv` of a checked call that `refusal` has nothing against."""
    if 0 in (arrays.x.size, arrays.kernel.size):
        return xla.run(spec, arrays)  # no products to make: a GPU has no kernel without programs
    out_dtype = spec.out_dtype if spec.out_dtype.name in DTYPES else jnp.dtype("float32")
    product = cast(lax.DotAlgorithmPreset, _product(spec.precision))
    plan = _Plan(spec._replace(out_dtype=out_dtype), product, _interpreting)
    rank = spec.window.rank
    return on_any_mesh(
        functools.partial(_arrange, plan, spec.out_dtype),
        arrays,
        batched=(arrays.x, arrays.offset),
        batch=arrays.x.ndim - rank - 1,
        whole=rank + 1,
    )


def _arrange(plan: _Plan, out_dtype, x, kernel, offset, mask, bias) -> jax.Array:
    """Bring the arrays to one batch axis and to what the kernels read, and y back."""
    batch = x.ndim - len(plan.spec.window.size) - 1

    def flat(array):
        return array.reshape(-1, *array.shape[batch:])

    inside = bias if bias is not None and bias.dtype.name in DTYPES else None
    operands = flat(x), kernel, flat(_readable(offset)), None if mask is None else flat(_readable(mask)), inside
    y = cast(jax.Array, _op(plan, *jax.tree.map(_reverse_only, _same_axes(operands))))
    y = y.reshape(*x.shape[:batch], *y.shape[1:]).astype(out_dtype)
    if bias is not None and inside is None:  # one wider than the kernels' arithmetic
        y = y + lax.expand_dims(bias.astype(y.dtype), range(y.ndim - 1))
    return y


@contextlib.contextmanager
def interpret() -> Iterator[None]:
    """Run the kernels in Pallas's interpreter, on any platform: slow, for tests."""
    global _interpreting
    before, _interpreting = _interpreting, True
    try:
        with set_xla_metadata(dcn_jax="interpret"):  # part of every jit's key: the two modes share no trace
            yield
    finally:
        _interpreting = before


_interpreting = False


def _gpu_in_reach() -> bool:
    """Whether what is traced here may be meant for a CUDA GPU: its lowering will tell for certain."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    plugins = (f"jax_cuda{version}_plugin" for version in (12, 13))
    return platform in ("gpu", "cuda") or any(map(importlib.util.find_spec, plugins))


def _product(precision: Any) -> lax.DotAlgorithmPreset | None:
    """`precision` as lax understands it (with jax_default_matmul_precision), as the way to make a float32 product."""
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    (dot,) = jax.make_jaxpr(functools.partial(lax.dot, precision=precision))(one, one).eqns
    asked = dot.params["precision"]
    return _PRODUCTS.get(lax.DotAlgorithmPreset.DEFAULT if asked is None else asked)


def _readable(array: jax.Array) -> jax.Array:
    """An offset or a mask in a dtype the kernels load; they compute with it in float32."""
    return array if array.dtype.name in DTYPES else array.astype(jnp.float32)


# --- derivatives --------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(plan: _Plan, x, kernel, offset, mask, bias) -> jax.Array:
    """The op with one batch axis: x `(B, *spatial, C)` to `(B, *out_spatial, features)`, differentiable in reverse."""
    (y,) = _run(_FORWARD, plan, x, kernel, offset, mask, bias)
    return y


def _op_forward(plan, *operands):
    return _op(plan, *operands), operands


def _op_backward(plan, operands, g) -> tuple:
    return cast(tuple, _gradients(plan, *operands, _reverse_only(g)))


_op.defvjp(_op_forward, _op_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(plan: _Plan, x, kernel, offset, mask, bias, g):
    """The gradients of `_op` at `g`; themselves differentiated by way of the XLA implementation."""
    dx, dkernel, doffset, dmask = _run(_BACKWARD, plan, x, kernel, offset, mask, g)
    dbias = None if bias is None else jnp.sum(g, axis=range(g.ndim - 1), dtype=jnp.float32).astype(bias.dtype)
    return dx, dkernel, doffset, dmask, dbias


def _gradients_forward(plan, *operands):
    return _gradients(plan, *operands), operands


def _gradients_backward(plan, operands, cotangents):
    *operands, g = operands

    def gradients(g, *operands):
        return jax.vjp(functools.partial(_reference, plan), *operands)[1](g)

    dg, *doperands = jax.vjp(gradients, g, *operands)[1](cotangents)
    return *doperands, dg


_gradients.defvjp(_gradients_forward, _gradients_backward)


def _reference(plan, x, kernel, offset, mask, bias):
    return xla.run(plan.spec, Arrays(x, kernel, offset, mask, bias))


# A custom_vjp met by forward mode raises an error that names neither the op nor the cure. So what enters it passes
# through an identity whose derivative is a primitive that transposes to the identity, and refuses to be computed.
@jax.custom_jvp
def _reverse_only(x):
    return x


@_reverse_only.defjvp
def _(primals, tangents):
    return _reverse_only(primals[0]), _refuse_p.bind(tangents[0])


def _refuse(*_, **__):
    raise NotImplementedError(
        "implementation='pallas' is differentiated in reverse mode (jax.grad, jax.vjp) and not in forward mode (jax.jvp, "
        "jax.jacfwd, jax.linearize, jax.hessian); use implementation='xla', which is differentiable in both"
    )


_refuse_p = Primitive("deform_conv_forward_mode")
_refuse_p.def_impl(_refuse)
_refuse_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(_refuse_p, _refuse)
batching.defvectorized(_refuse_p)
ad.deflinear2(_refuse_p, lambda ct, _: [ct])


# --- from one map to many: vmap, sharding, launch -----------------------------------------------------------------


class _Pass(NamedTuple):
    """One direction of the op: arrays with a stack axis in and out, some of them `(stack, B, …)`, the others `(stack, …)`."""

    run: Callable
    operands_batched: tuple[bool, ...]
    results_batched: tuple[bool, ...]


def _run(direction: _Pass, plan: _Plan, *operands):
    """Run a pass on operands without a stack axis; `jax.vmap` makes one."""
    call = custom_vmap(functools.partial(_sharded, direction, plan))

    @call.def_vmap
    def _(size, mapped, *operands):
        stack = max(a.shape[1 if m else 0] for a, m in zip(operands, mapped, strict=True) if a is not None)

        def fold(a, mapped):
            if a is None or (not mapped and a.shape[0] == 1):
                return a  # one for the whole stack
            a = a if mapped else a[None]
            return jnp.broadcast_to(a, (size, stack, *a.shape[2:])).reshape(size * stack, *a.shape[2:])

        results = call(*map(fold, operands, mapped))
        unfolded = jax.tree.map(lambda a: a.reshape(size, stack, *a.shape[1:]), results)
        return unfolded, jax.tree.map(lambda _: True, results)

    return jax.tree.map(lambda a: a[0], call(*jax.tree.map(lambda a: a[None], operands)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sharded(direction: _Pass, plan: _Plan, *operands):
    """Run a pass where the stack and the batch lie, each device on its part.

    Left to itself the partitioner, which knows nothing of a kernel, gathers all that goes in on every device.
    """
    run = functools.partial(direction.run, plan)
    results = jax.eval_shape(run, *operands)
    stack = max(a.shape[0] for a in operands if a is not None)
    whole = [f"w{i}" for i in range(sum(len(a.shape) for a in (*operands, *results) if a is not None))]
    names = iter(whole)

    def factors(arrays, batched):  # names the axes of each array: n the stack, b the batch, the others are never split
        for a, has_batch in zip(arrays, batched, strict=True):
            if a is not None:
                split = ["n" if a.shape[0] == stack else next(names), *("b" if has_batch else "")]
                yield " ".join(split + [next(names) for _ in a.shape[len(split) :]])

    def partition(mesh, operands, results):
        over_stack, over_batch, *_ = (*operands[0].sharding.spec, None, None)

        def places(arrays, batched):
            for a, has_batch in zip(arrays, batched, strict=True):
                split = (
                    over_stack if a is not None and a.shape[0] == stack else None,
                    *([over_batch] if has_batch else []),
                )
                yield None if a is None else NamedSharding(mesh, PartitionSpec(*split))

        def local(*operands):
            return tuple(
                a if a is None or has_batch or over_batch is None else lax.psum(a, over_batch)
                for a, has_batch in zip(run(*operands), direction.results_batched, strict=True)
            )

        return (
            mesh,
            local,
            tuple(places(results, direction.results_batched)),
            tuple(places(operands, direction.operands_batched)),
        )

    rule = " -> ".join(
        (
            ", ".join(factors(operands, direction.operands_batched)),
            ", ".join(factors(results, direction.results_batched)),
        )
    )
    call = custom_partitioning(run)
    call.def_partition(
        partition, sharding_rule=rule, need_replication_factors=tuple(w for w in whole if w in rule.split())
    )
    return call(*operands)


def _same_axes(operands):
    """Inside `shard_map`, make all operands vary over the same mesh axes: what a kernel makes of them does."""
    axes = frozenset().union(*(jax.typeof(a).mat.varying for a in jax.tree.leaves(operands)))
    return jax.tree.map(lambda a: lax.pcast(a, tuple(axes - jax.typeof(a).mat.varying), to="varying"), operands)


def _launch(body: Callable, operands, results, *, name: str, grid, tile: _Tile, plan: _Plan, aliases=None):
    """Run `body` on whole arrays, each without its stack axis, over `grid`, whose last axis is the stack.

    `results` are ShapeDtypeStructs; `aliases` maps operands to the results that start as them. None operands and results
    reach `body` as None.
    """

    def whole(a):
        return pl.BlockSpec(
            (None, *a.shape[1:]), lambda *i: (i[-1] if a.shape[0] > 1 else 0, *(0 for _ in a.shape[1:]))
        )

    kind = jax.typeof(operands[0]).mat
    call = pl.pallas_call(
        body,
        grid=grid,
        in_specs=jax.tree.map(whole, operands),
        out_specs=jax.tree.map(whole, results),
        out_shape=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, manual_axis_type=kind), results),
        input_output_aliases=aliases or {},
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=plan.interpret,
        name=name,
    )
    if plan.interpret:
        return call(*operands)
    leaves, tree = jax.tree.flatten(results)
    del leaves
    flat = _launch_p.bind(*jax.tree.leaves(operands), jaxpr=jax.make_jaxpr(call)(*operands))
    return jax.tree.unflatten(tree, flat)


# The kernel call as a primitive of our own, for what only its lowering can do: say which platforms will not do, and keep
# from the user the warning that jax >= 0.11 gives each time, that this way into the GPU will be replaced.
_launch_p = Primitive("deform_conv_launch")
_launch_p.multiple_results = True
_launch_p.def_abstract_eval(lambda *_, jaxpr: jaxpr.out_avals)


def _lower_launch(context, *operands, jaxpr):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(context, *operands)


def _lower_elsewhere(*_, **__):
    raise ValueError("implementation='pallas' runs on CUDA GPUs alone; use implementation='xla' here, or None")


mlir.register_lowering(_launch_p, _lower_elsewhere)
mlir.register_lowering(_launch_p, _lower_launch, platform="cuda")


# --- inside a kernel ----------------------------------------------------------------------------------------------


def _loop(count: int, body: Callable, start):
    """`fori_loop` with 32-bit counters."""
    return body(np.int32(0), start) if count == 1 else lax.fori_loop(np.int32(0), np.int32(count), body, start)


def _divide(number, *by: int) -> list:
    """The digits of `number` to the bases `by`, the first one open: with one base, quotient and remainder."""
    digits = []
    for base in reversed(by):
        digits.append(lax.rem(number, jnp.full_like(number, base)))
        number = lax.div(number, jnp.full_like(number, base))
    return [number, *reversed(digits)]


def _span(block, size: int, limit: int):
    """The indices of a block of an axis, and which of them lie within it (None: all)."""
    index = block * size + jnp.arange(size, dtype=jnp.int32)
    return index, None if limit % size == 0 else index < limit


def _both(rows, columns):
    """Masks of rows and of columns as one (None: all)."""
    masks = [*([] if rows is None else [rows[:, None]]), *([] if columns is None else [columns[None, :]])]
    return functools.reduce(operator.and_, masks) if masks else None


def _load(ref, index, mask=None):
    """Read what `mask` lets through, zero elsewhere."""
    if mask is None:
        return triton.load(ref.at[index])
    return triton.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))


def _store(ref, index, value, mask):
    triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def _add(ref, index, value, mask):
    """Add to memory that other programs add to as well. An atomic add takes no mask: all of `index` must be in bounds."""
    addupdate(ref, index, value if mask is None else jnp.where(mask, value, 0.0))


def _within(exists, index):
    """`index`, or 0 where what it stands for does not exist."""
    return index if exists is None else jnp.where(exists, index, 0)


def _strips(window: Window) -> tuple[int, int, int]:
    """How tiles run over a map: down one strip of columns after another, so that a tile is about as wide as high.

    What neighbouring points read is then found in the first-level cache. Returns (strips, rows, columns of a strip).
    """
    *rows, columns = window.out_spatial
    strips = max(1, round(columns / 12)) if rows else 1
    return strips, math.prod(rows), pl.cdiv(columns, strips)


def _tiles(window: Window, images: int, tile: _Tile) -> int:
    """How many tiles hold all positions of all images."""
    return pl.cdiv(images * math.prod(_strips(window)), tile.positions)


def _positions(number, images: int, window: Window, tile: _Tile):
    """The indices ([image, *position], one vector each) of a tile's positions, and which of them exist."""
    strips, rows, columns = _strips(window)
    index = number * tile.positions + jnp.arange(tile.positions, dtype=jnp.int32)
    image, strip, row, column = _divide(index, strips, rows, columns)
    column = strip * columns + column
    exists = (image < images) & (column < window.out_spatial[-1])
    leading = _divide(row, *window.out_spatial[1:-1]) if len(window.out_spatial) > 1 else []
    return [image, *leading, column], exists


def _points(plan: _Plan, offset_ref, index, exists, group, tap) -> list[jax.Array]:
    """Where a tap of an offset group reads, one vector for each axis."""
    window, taps = plan.spec.window, _divide(tap, *plan.spec.window.size[1:])
    points = []
    for axis, (position, along) in enumerate(zip(index[1:], taps, strict=True)):
        channel = (group * window.taps + tap) * len(taps) + axis
        offset = _load(offset_ref, (*index, channel), exists).astype(jnp.float32)
        points.append(window.place(axis, position, along).astype(jnp.float32) + offset)
    return points


def _modulation(plan: _Plan, mask_ref, index, exists, group, tap):
    if mask_ref is None:
        return None
    return _load(mask_ref, (*index, group * plan.spec.window.taps + tap), exists).astype(jnp.float32)


def _pixel(x_ref, image, pixel, inside, channel, channel_exists):
    index = (image[:, None], *(p[:, None] for p in pixel), channel[None, :])
    return _load(x_ref, index, _both(inside, channel_exists)).astype(jnp.float32)


def _samples(plan: _Plan, x_ref, offset_ref, mask_ref, index, exists, group, tap, channel, channel_exists):
    """What a tap reads for a tile of positions, modulated: `(positions, channels)`, in float32."""
    points = _points(plan, offset_ref, index, exists, group, tap)
    modulation = _modulation(plan, mask_ref, index, exists, group, tap)
    total = jnp.zeros((len(exists), len(channel)), jnp.float32)
    for pixel, weight, inside in corners(points, x_ref.shape[1:-1]):
        weight = weight if modulation is None else weight * modulation
        total += weight[:, None] * _pixel(x_ref, index[0], pixel, inside & exists, channel, channel_exists)
    return total


def _dot(plan: _Plan, a, b, contract=((1,), (0,))):
    """Matrix product on the tensor cores, of `plan.spec.dtype` into float32."""
    if plan.interpret:  # by the machine's own product
        exact = plan.product == lax.DotAlgorithmPreset.F32_F32_F32
        precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    else:
        precision = plan.product if plan.spec.dtype == "float32" else lax.Precision.DEFAULT
    a, b = a.astype(plan.spec.dtype), b.astype(plan.spec.dtype)
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


# --- the three kernels --------------------------------------------------------------------------------------------


class _Sizes(NamedTuple):
    """How channels and features of a call fall into groups and blocks."""

    channels: int  # of a segment
    features: int  # of a feature group
    channel_blocks: int  # of a segment
    feature_blocks: int  # of a feature group
    segments_per_offset_group: int
    segments_per_feature_group: int


def _sizes(plan: _Plan, channels: int, features: int, tile: _Tile) -> _Sizes:
    channels, features = channels // plan.segments, features // plan.spec.feature_groups
    return _Sizes(
        channels, features, pl.cdiv(channels, tile.channels), pl.cdiv(features, tile.features),
        plan.segments // plan.spec.offset_groups, plan.segments // plan.spec.feature_groups,
    )  # fmt: skip


def _forward_kernel(x_ref, kernel_ref, offset_ref, mask_ref, bias_ref, y_ref, *, plan: _Plan, tile: _Tile):
    # x (B, *spatial, C), kernel (K, Cg, F), offset (B, *out, OG * K * n), mask (B, *out, OG * K), bias (F,), y (B, *out, F)
    sizes = _sizes(plan, x_ref.shape[-1], y_ref.shape[-1], tile)
    feature_group, block = _divide(pl.program_id(0), sizes.feature_blocks)
    feature, feature_exists = _span(block, tile.features, sizes.features)
    feature += feature_group * sizes.features
    index, exists = _positions(pl.program_id(1), x_ref.shape[0], plan.spec.window, tile)

    # Channels outside, taps inside: the taps of a tile read nearly the same pixels, and so few channels of those that
    # they stay in the first-level cache.
    def add_channels(number, total):
        part, block = _divide(number, sizes.channel_blocks)
        segment = feature_group * sizes.segments_per_feature_group + part
        group = lax.div(segment, jnp.full_like(segment, sizes.segments_per_offset_group))
        channel, channel_exists = _span(block, tile.channels, sizes.channels)

        def add_tap(tap, total):
            samples = _samples(
                plan, x_ref, offset_ref, mask_ref, index, exists, group, tap,
                segment * sizes.channels + channel, channel_exists,
            )  # fmt: skip
            at = (tap, (part * sizes.channels + channel)[:, None], feature[None, :])
            return total + _dot(plan, samples, _load(kernel_ref, at, _both(channel_exists, feature_exists)))

        return _loop(plan.spec.window.taps, add_tap, total)

    total = jnp.zeros((tile.positions, tile.features), jnp.float32)
    total = _loop(sizes.segments_per_feature_group * sizes.channel_blocks, add_channels, total)
    if bias_ref is not None:
        total += _load(bias_ref, (feature,), feature_exists).astype(jnp.float32)[None, :]
    _store(y_ref, (*(i[:, None] for i in index), feature[None, :]), total, _both(exists, feature_exists))


def _dsamples(
    plan: _Plan, tile: _Tile, sizes: _Sizes, kernel_ref, g_ref, index, exists, tap, segment, channel, channel_exists
):
    """The gradient of a tile's modulated samples, `(positions, channels)`: g times the transpose of the tap's matrix."""
    feature_group, within = _divide(segment, sizes.segments_per_feature_group)
    row = (within * sizes.channels + channel)[:, None]

    def add_features(block, total):
        feature, feature_exists = _span(block, tile.features, sizes.features)
        feature += feature_group * sizes.features
        g = _load(g_ref, (*(i[:, None] for i in index), feature[None, :]), _both(exists, feature_exists))
        matrix = _load(kernel_ref, (tap, row, feature[None, :]), _both(channel_exists, feature_exists))
        return total + _dot(plan, g, matrix, ((1,), (1,)))

    return _loop(sizes.feature_blocks, add_features, jnp.zeros((tile.positions, tile.channels), jnp.float32))


def _backward_x_kernel(kernel_ref, offset_ref, mask_ref, g_ref, zeros_ref, dx_ref, *, plan: _Plan, tile: _Tile):
    del zeros_ref  # what dx starts as
    images, *spatial, channels = dx_ref.shape
    sizes = _sizes(plan, channels, g_ref.shape[-1], tile)
    segment, channel_block = _divide(pl.program_id(0), sizes.channel_blocks)
    group = lax.div(segment, jnp.full_like(segment, sizes.segments_per_offset_group))
    channel, channel_exists = _span(channel_block, tile.channels, sizes.channels)
    column = (segment * sizes.channels + _within(channel_exists, channel))[None, :]
    index, exists = _positions(pl.program_id(1), images, plan.spec.window, tile)
    image = _within(exists, index[0])[:, None]

    def add_tap(tap, carry):
        points = _points(plan, offset_ref, index, exists, group, tap)
        modulation = _modulation(plan, mask_ref, index, exists, group, tap)
        dsamples = _dsamples(
            plan, tile, sizes, kernel_ref, g_ref, index, exists, tap, segment, channel, channel_exists
        )  # fmt: skip
        if modulation is not None:
            dsamples = dsamples * modulation[:, None]
        for pixel, weight, inside in corners(points, spatial):
            at = (image, *(p[:, None] for p in pixel), column)
            _add(dx_ref, at, weight[:, None] * dsamples, _both(inside & exists, channel_exists))
        return carry

    _loop(plan.spec.window.taps, add_tap, np.int32(0))


def _backward_points_kernel(
    x_ref, kernel_ref, offset_ref, mask_ref, g_ref, doffset_ref, dmask_ref, *, plan: _Plan, tile: _Tile
):
    sizes = _sizes(plan, x_ref.shape[-1], g_ref.shape[-1], tile)
    group = pl.program_id(0)
    index, exists = _positions(pl.program_id(1), x_ref.shape[0], plan.spec.window, tile)
    rank, taps = len(plan.spec.window.size), plan.spec.window.taps

    def add_tap(tap, carry):
        points = _points(plan, offset_ref, index, exists, group, tap)
        modulation = _modulation(plan, mask_ref, index, exists, group, tap)

        def weigh(*points):
            pixels, weights, insides = zip(*corners(points, x_ref.shape[1:-1]), strict=True)
            return weights, (pixels, insides)

        weights, pull_back, (pixels, insides) = jax.vjp(weigh, *points, has_aux=True)

        def add_channels(number, totals):
            part, block = _divide(number, sizes.channel_blocks)
            segment = group * sizes.segments_per_offset_group + part
            channel, channel_exists = _span(block, tile.channels, sizes.channels)
            dsamples = _dsamples(
                plan, tile, sizes, kernel_ref, g_ref, index, exists, tap, segment, channel, channel_exists
            )  # fmt: skip
            column = segment * sizes.channels + channel
            sums = []
            for total, pixel, inside in zip(totals, pixels, insides, strict=True):
                read = _pixel(x_ref, index[0], pixel, inside & exists, column, channel_exists)
                sums.append(total + jnp.sum(dsamples * read, axis=1))
            return tuple(sums)

        # For each corner, the gradient of its weight (before modulation): its pixel times the sample's gradient.
        dweights = _loop(
            sizes.segments_per_offset_group * sizes.channel_blocks,
            add_channels,
            tuple(jnp.zeros((tile.positions,), jnp.float32) for _ in weights),
        )
        if dmask_ref is not None:
            dmodulation = functools.reduce(operator.add, map(operator.mul, weights, dweights))
            _store(dmask_ref, (*index, group * taps + tap), dmodulation, exists)
            dweights = tuple(d * modulation for d in dweights)
        for axis, dpoint in enumerate(pull_back(dweights)):
            _store(doffset_ref, (*index, (group * taps + tap) * rank + axis), dpoint, exists)
        return carry

    _loop(taps, add_tap, np.int32(0))


def _backward_kernel_kernel(x_ref, offset_ref, mask_ref, g_ref, *rest, plan: _Plan, tile: _Tile, splits: int):
    dkernel_ref = rest[-1]  # before it, where the sum is split over programs, the zeros that it starts as
    images = x_ref.shape[0]
    sizes = _sizes(plan, x_ref.shape[-1], g_ref.shape[-1], tile)
    tap, segment, channel_block, feature_block = _divide(
        pl.program_id(0), plan.segments, sizes.channel_blocks, sizes.feature_blocks
    )
    group = lax.div(segment, jnp.full_like(segment, sizes.segments_per_offset_group))
    feature_group, within = _divide(segment, sizes.segments_per_feature_group)
    channel, channel_exists = _span(channel_block, tile.channels, sizes.channels)
    feature, feature_exists = _span(feature_block, tile.features, sizes.features)
    feature += feature_group * sizes.features
    count = pl.cdiv(_tiles(plan.spec.window, images, tile), splits)
    first = pl.program_id(1) * count

    def add_positions(number, total):
        index, exists = _positions(first + number, images, plan.spec.window, tile)
        samples = _samples(
            plan, x_ref, offset_ref, mask_ref, index, exists, group, tap,
            segment * sizes.channels + channel, channel_exists,
        )  # fmt: skip
        g = _load(g_ref, (*(i[:, None] for i in index), feature[None, :]), _both(exists, feature_exists))
        return total + _dot(plan, samples, g, ((0,), (0,)))

    total = _loop(count, add_positions, jnp.zeros((tile.channels, tile.features), jnp.float32))
    channel += within * sizes.channels
    exist = _both(channel_exists, feature_exists)
    if splits == 1:
        _store(dkernel_ref, (tap, channel[:, None], feature[None, :]), total, exist)
        return
    at = (tap, _within(channel_exists, channel)[:, None], _within(feature_exists, feature)[None, :])
    _add(dkernel_ref, at, total, exist)


# --- the two passes -----------------------------------------------------------------------------------------------


def _forward(plan: _Plan, x, kernel, offset, mask, bias):
    features = kernel.shape[-1]
    tile = _tile("forward", plan, x.shape[-1], features)
    sizes = _sizes(plan, x.shape[-1], features, tile)
    stack = max(a.shape[0] for a in (x, kernel, offset, mask, bias) if a is not None)
    y = jax.ShapeDtypeStruct((stack, x.shape[1], *plan.spec.window.out_spatial, features), plan.spec.out_dtype)
    return _launch(
        functools.partial(_forward_kernel, plan=plan, tile=tile),
        (x, _matrices(plan, kernel), offset, mask, bias),
        (y,),
        name="deform_conv_forward",
        grid=(plan.spec.feature_groups * sizes.feature_blocks, _tiles(plan.spec.window, x.shape[1], tile), stack),
        tile=tile,
        plan=plan,
    )


def _backward(plan: _Plan, x, kernel, offset, mask, g):
    channels, features, images = x.shape[-1], kernel.shape[-1], x.shape[1]
    stack = max(a.shape[0] for a in (x, kernel, offset, mask, g) if a is not None)
    matrices = _matrices(plan, kernel)

    tile = _tile("backward_x", plan, channels, features)
    sizes = _sizes(plan, channels, features, tile)
    start = _zeros(x, (stack, *x.shape[1:]))
    (dx,) = _launch(
        functools.partial(_backward_x_kernel, plan=plan, tile=tile),
        (matrices, offset, mask, g, start),
        (start,),
        name="deform_conv_backward_x",
        grid=(plan.segments * sizes.channel_blocks, _tiles(plan.spec.window, images, tile), stack),
        tile=tile,
        plan=plan,
        aliases={3 if mask is None else 4: 0},
    )

    tile = _tile("backward_points", plan, channels, features)
    doffset, dmask = _launch(
        functools.partial(_backward_points_kernel, plan=plan, tile=tile),
        (x, matrices, offset, mask, g),
        tuple(a if a is None else jax.ShapeDtypeStruct((stack, *a.shape[1:]), a.dtype) for a in (offset, mask)),
        name="deform_conv_backward_points",
        grid=(plan.spec.offset_groups, _tiles(plan.spec.window, images, tile), stack),
        tile=tile,
        plan=plan,
    )

    tile = _tile("backward_kernel", plan, channels, features)
    sizes = _sizes(plan, channels, features, tile)
    programs = plan.spec.window.taps * plan.segments * sizes.channel_blocks * sizes.feature_blocks
    splits = min(max(1, _PROGRAMS // (programs * stack)), _tiles(plan.spec.window, images, tile))
    operands, shape = (x, offset, mask, g), (stack, *matrices.shape[1:])
    start = _zeros(x, shape) if splits > 1 else None
    (dkernel,) = _launch(
        functools.partial(_backward_kernel_kernel, plan=plan, tile=tile, splits=splits),
        operands if start is None else (*operands, start),
        (jax.ShapeDtypeStruct(shape, kernel.dtype) if start is None else start,),
        name="deform_conv_backward_kernel",
        grid=(programs, splits, stack),
        tile=tile,
        plan=plan,
        aliases={} if start is None else {3 if mask is None else 4: 0},
    )
    return dx.astype(x.dtype), dkernel.reshape(stack, *kernel.shape[1:]).astype(kernel.dtype), doffset, dmask


_FORWARD = _Pass(_forward, (True, False, True, True, False), (True,))
_BACKWARD = _Pass(_backward, (True, False, True, True, True), (True, False, True, True))


def _matrices(plan: _Plan, kernel):
    """The kernel as one matrix for each tap: `(stack, K, C // feature groups, features)`."""
    return kernel.reshape(kernel.shape[0], plan.spec.window.taps, *kernel.shape[-2:])


def _zeros(like, shape):
    """Zeros to add into, in float32, that vary over mesh axes as `like` does."""
    return lax.pcast(jnp.zeros(shape, jnp.float32), tuple(jax.typeof(like).mat.varying), to="varying")


# --- tiles --------------------------------------------------------------------------------------------------------

_PROGRAMS = 264  # that a sum over positions is split into: two for each multiprocessor of an H100

# Chosen from what the compiler makes of them for an H100, not from times: none spills a register, and where nothing else
# is said about 128 registers a thread leave two programs of 256 threads to a multiprocessor, so that one multiplies
# while the other gathers. One stage: with more, the gathers are copied past the first-level cache, in which the taps of a
# tile find each other's pixels. Each row: what makes a product, then the largest tile of each kernel.
_TILES = {
    "half": {
        "forward": _Tile(64, 64, 128, 8),
        "forward, wide": _Tile(
            128, 32, 256, 8
        ),  # 240 registers, one program: all features of a block gathered for once
        "backward_x": _Tile(64, 64, 64, 8),
        "backward_points": _Tile(64, 64, 32, 8),
        "backward_kernel": _Tile(64, 64, 128, 8),
    },
    "half, odd": {  # channels or features not in eights are loaded one by one, each by an address of its own
        "forward": _Tile(64, 32, 64, 8),
        "forward, wide": _Tile(64, 32, 64, 8),
        "backward_x": _Tile(64, 32, 64, 8),
        "backward_points": _Tile(32, 32, 32, 8),
        "backward_kernel": _Tile(32, 32, 64, 8),
    },
    "TF32_TF32_F32": {
        "forward": _Tile(64, 32, 128, 8),
        "forward, wide": _Tile(64, 32, 256, 8),  # 190 registers, one program
        "backward_x": _Tile(64, 64, 64, 8),
        "backward_points": _Tile(64, 32, 64, 8),
        "backward_kernel": _Tile(32, 64, 128, 8),
    },
    "TF32_TF32_F32_X3": {  # 134 to 203 registers, one program: each operand is held twice
        "forward": _Tile(64, 32, 128, 8),
        "forward, wide": _Tile(64, 32, 128, 8),
        "backward_x": _Tile(64, 64, 64, 8),
        "backward_points": _Tile(64, 32, 64, 8),
        "backward_kernel": _Tile(32, 64, 128, 8),
    },
    "F32_F32_F32": {  # no tensor cores; operands are held in registers whole
        "forward": _Tile(64, 32, 128, 8),
        "forward, wide": _Tile(64, 32, 128, 8),
        "backward_x": _Tile(32, 32, 32, 8),
        "backward_points": _Tile(64, 32, 64, 8),
        "backward_kernel": _Tile(32, 64, 128, 8),
    },
}
_INTERPRETED = _Tile(16, 16, 16, 8)  # small, so that small arrays take several


def _tile(kernel: str, plan: _Plan, channels: int, features: int) -> _Tile:
    """The tile of a kernel, no larger than a segment's channels and a feature group's features need."""
    channels, features = channels // plan.segments, features // plan.spec.feature_groups
    if kernel == "forward" and features > 128:
        kernel = "forward, wide"
    half = "half, odd" if channels % 8 or features % 8 else "half"
    tile = (
        _INTERPRETED if plan.interpret else _TILES[plan.product.name if plan.spec.dtype == "float32" else half][kernel]
    )

    def fit(limit, size):
        return max(16, min(limit, pl.next_power_of_2(size)))

    return tile._replace(channels=fit(tile.channels, channels), features=fit(tile.features, features))
