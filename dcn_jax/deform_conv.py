"""Deformable convolution: the op's checks, its choice of an implementation, and the XLA implementation.

The op is Σ over taps of (read x where the tap points) · (modulation) · (the tap's matrix of the kernel). The XLA
implementation does just that, one tap after another, so that no more than one tap's readings are ever in memory.
"""

import functools
import math
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from dcn_jax import _check
from dcn_jax.geometry import Padding, Window, check_offset_shape, place_taps, resolve_window
from dcn_jax.sampling import locate, weighted_rows

IMPLEMENTATIONS = ("xla", "pallas")


def deform_conv(
    x: jax.Array,
    kernel: jax.Array,
    offset: jax.Array,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
    feature_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """Convolve with taps that read at learned, fractional offsets and are scaled by a learned modulation.

        y(p0) = Σ_n  w_n · x(p0 + p_n + Δp_n) · Δm_n  +  bias

    Without `mask` it is deformable convolution (DCNv1), with it modulated deformable convolution (DCNv2); with zero
    offsets and a mask of ones it equals `jax.lax.conv_general_dilated`. x at a fractional position is the linear
    interpolation of its neighbours, those outside the map counting as zero (`linear_sample`).

    The legend of the shapes: n spatial axes (1, 2 or 3), K = prod(window) taps, OG offset groups (read off `offset`),
    C channels. OG and `feature_group_count` are independent; each divides C.

    Args:
        x: `(*batch, *spatial, C)`; any number of leading batch axes, none included.
        kernel: `(*window, C // feature_group_count, features)`; its rank fixes n.
        offset: `(*batch, *out_spatial, OG * K * n)`, in pixels of x, any float dtype. The last axis is ordered
            [offset group, tap (row-major), axis (first spatial axis first: dy, dx)], as in torchvision and mmcv.
        mask: `(*batch, *out_spatial, OG * K)`, ordered [offset group, tap], or None for 1 everywhere.
        bias: `(features,)` or None.
        strides: pixels between neighbouring outputs; one for all axes, or one per axis.
        padding: "SAME" or "VALID" as XLA defines them, an int, one int per axis, or one (low, high) pair per axis.
        kernel_dilation: pixels between neighbouring taps; one for all axes, or one per axis.
        feature_group_count: groups of channels that are convolved apart.
        precision: of the matrix products, as in `jax.lax.dot_general`.
        preferred_element_type: dtype of the result; by default the dtype of x (promoted with kernel and bias).
        implementation: "xla" (pure jax.numpy, everywhere), "pallas" (fused GPU kernels), or None for the fastest that
            is sound for these arguments here (`select_implementation` tells which).

    Returns:
        `(*batch, *out_spatial, features)`. Positions are computed in float32 or wider and products are accumulated in
        float32 or wider, whatever the dtypes of the arguments.

    Raises:
        ValueError: a shape or an option does not fit; the message names it, what was given and what was wanted.
        TypeError: an argument is of the wrong kind.

    Derivatives of every order, in both modes, with respect to every array. At whole-number positions the derivative
    with respect to the position is the right-hand one, as in torchvision (mmcv sets it to zero where a coordinate is
    exactly -1 or the map's size). Offsets of ±inf or 1e30 read zero with a zero gradient; a NaN offset makes NaN at its
    own output position alone.

    Source: arXiv 1703.06211 (DCNv1), arXiv 1811.11168 (DCNv2).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
        >>> kernel = jax.random.normal(jax.random.key(1), (3, 3, 4, 16))
        >>> offset = jnp.full((2, 8, 8, 18), 0.5)
        >>> mask = jnp.ones((2, 8, 8, 9))
        >>> deform_conv(x, kernel, offset, mask).shape
        (2, 8, 8, 16)
    """
    call = _check_arguments(
        x, kernel, offset, mask, bias,
        strides=strides, padding=padding, kernel_dilation=kernel_dilation, feature_group_count=feature_group_count,
        preferred_element_type=preferred_element_type,
    )  # fmt: skip
    if _choose(call, precision, implementation)[0] == "pallas":
        from dcn_jax import pallas_gpu

        return pallas_gpu.deform_conv(call, precision)
    return _deform_conv_xla(call, precision)


def select_implementation(
    x: jax.Array,
    kernel: jax.Array,
    offset: jax.Array,
    mask: jax.Array | None = None,
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
    feature_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> tuple[str, str]:
    """Tell which implementation `deform_conv` would take for these arguments, and why not another.

    Args: those of `deform_conv` but for bias, which makes no difference; arrays may be `jax.ShapeDtypeStruct`s, since
    only shapes and dtypes are looked at.

    Returns:
        (implementation, reason), for example `("xla", "…")`.

    Raises:
        ValueError, TypeError: where `deform_conv` would.

    Example:
        >>> import jax.numpy as jnp
        >>> x, kernel, offset = jnp.ones((8, 8, 4)), jnp.ones((3, 3, 4, 16)), jnp.ones((8, 8, 18))
        >>> select_implementation(x, kernel, offset)[0]
        'xla'
    """
    call = _check_arguments(
        x, kernel, offset, mask, None,
        strides=strides, padding=padding, kernel_dilation=kernel_dilation, feature_group_count=feature_group_count,
        preferred_element_type=preferred_element_type, shapes_alone=True,
    )  # fmt: skip
    return _choose(call, precision, implementation)


def kernel_shape(window: Sequence[int], channels: int, features: int, feature_group_count: int) -> tuple[int, ...]:
    """`(*window, C // feature_group_count, features)`, once the groups are known to divide both."""
    if not _check.is_int(feature_group_count):
        raise TypeError(
            f"feature_group_count={feature_group_count!r} is a {type(feature_group_count).__name__}; wanted an int"
        )
    if feature_group_count < 1 or channels % feature_group_count or features % feature_group_count:
        raise ValueError(
            f"feature_group_count={feature_group_count} must divide the {channels} channels of the input and the {features} "
            "features of the result"
        )
    return (*window, channels // feature_group_count, features)


class _Call(NamedTuple):
    """The arguments of one call, checked, and what follows from them."""

    x: jax.Array
    kernel: jax.Array
    offset: jax.Array
    mask: jax.Array | None
    bias: jax.Array | None
    window: Window
    offset_groups: int
    feature_groups: int
    dtype: jnp.dtype  # of x and kernel in the products
    out_dtype: jnp.dtype


def _check_arguments(
    x,
    kernel,
    offset,
    mask,
    bias,
    *,
    strides,
    padding,
    kernel_dilation,
    feature_group_count,
    preferred_element_type,
    shapes_alone=False,
) -> _Call:
    array = functools.partial(_check.array, shape_alone=shapes_alone)
    x = array("x", x, jnp.inexact)
    kernel = array("kernel", kernel, jnp.inexact)
    offset = array("offset", offset, jnp.floating)

    rank = len(kernel.shape) - 2
    if rank not in (1, 2, 3) or 0 in kernel.shape[:rank]:
        raise ValueError(
            f"kernel has shape {kernel.shape}; wanted (*window, C // feature_group_count, features) with a window of "
            "1, 2 or 3 axes, none of them empty"
        )
    if len(x.shape) < rank + 1:
        raise ValueError(
            f"x has shape {x.shape}; wanted (*batch, *spatial, C) with {rank} spatial axes, the rank of the window of "
            f"kernel, whose shape is {kernel.shape}"
        )
    *window_size, _, features = kernel.shape
    batch, spatial, channels = x.shape[: -rank - 1], x.shape[-rank - 1 : -1], x.shape[-1]
    if 0 in spatial:
        raise ValueError(f"x has shape {x.shape}, a map without pixels; wanted at least one along each spatial axis")
    window = resolve_window(
        window_size, spatial=spatial, strides=strides, padding=padding, kernel_dilation=kernel_dilation
    )

    wanted = kernel_shape(window.size, channels, features, feature_group_count)
    if kernel.shape != wanted:
        raise ValueError(
            f"kernel has shape {kernel.shape}; wanted {wanted}: (*window, C // feature_group_count, features) with "
            f"C = {channels}, the channels of x, and feature_group_count={feature_group_count}"
        )

    offset_groups = check_offset_shape(offset.shape, window)
    if channels % offset_groups:
        raise ValueError(
            f"offset has shape {offset.shape}, that is {offset_groups} offset groups of {window.taps} taps; wanted a number "
            f"of groups that divides the {channels} channels of x"
        )
    _check_batch("offset", offset, batch, rank)
    if mask is not None:
        mask = array("mask", mask, jnp.floating)
        wanted = (*batch, *window.out_spatial, offset_groups * window.taps)
        if mask.shape != wanted:
            raise ValueError(
                f"mask has shape {mask.shape}; wanted {wanted}: one value for each tap ({window.taps}) of each offset "
                f"group ({offset_groups}, as in offset)"
            )
    if bias is not None:
        bias = array("bias", bias, jnp.inexact)
        if bias.shape != (features,):
            raise ValueError(f"bias has shape {bias.shape}; wanted {(features,)}: one value per feature of kernel")

    dtype = jnp.result_type(x.dtype, kernel.dtype)
    out_dtype = dtype if bias is None else jnp.result_type(dtype, bias.dtype)
    if preferred_element_type is not None:
        preferred = _check.floating_dtype("preferred_element_type", preferred_element_type)
        if jnp.issubdtype(out_dtype, jnp.complexfloating) and not jnp.issubdtype(preferred, jnp.complexfloating):
            raise TypeError(
                f"preferred_element_type={preferred} cannot hold the result, which is {out_dtype}; wanted a complex dtype"
            )
        out_dtype = preferred
    return _Call(x, kernel, offset, mask, bias, window, offset_groups, int(feature_group_count), dtype, out_dtype)


def _check_batch(name: str, array: jax.Array, batch: tuple[int, ...], rank: int) -> None:
    if array.shape[: -rank - 1] != batch:
        raise ValueError(
            f"{name} has shape {array.shape}, batch axes {array.shape[: -rank - 1]}; wanted those of x, {batch}"
        )


def _choose(call: _Call, precision: Any, implementation: str | None) -> tuple[str, str]:
    if implementation is None:
        # Not by looking at the platform: nothing that could come of it would choose otherwise, and a CPU user pays nothing.
        reason = "the fused GPU kernels have not been timed on a GPU yet, so nobody knows where they are faster"
        if _deterministic():
            reason += ", and they add gradients atomically, in any order, which --xla_gpu_deterministic_ops rules out"
        return "xla", f"{reason}; ask for them with implementation='pallas'"
    if implementation == "xla":
        return "xla", "asked for by name"
    if implementation == "pallas":
        from dcn_jax import pallas_gpu  # here, because importing Pallas takes time that most users need not spend

        if problem := pallas_gpu.refusal(call, precision):
            raise ValueError(
                f"implementation='pallas' cannot take this call: {problem}; use implementation='xla', or None for the "
                "fastest there is"
            )
        reason = "asked for by name"
        if _deterministic():
            reason += (
                "; it adds gradients atomically, so that their last digits vary despite --xla_gpu_deterministic_ops"
            )
        return "pallas", reason
    raise ValueError(f"implementation={implementation!r} is not known; wanted one of {IMPLEMENTATIONS} or None")


def _deterministic() -> bool:
    """Whether XLA was asked to order all sums on a GPU."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    return any(flag in ("--xla_gpu_deterministic_ops", "--xla_gpu_deterministic_ops=true") for flag in flags)


def _deform_conv_xla(call: _Call, precision: Any) -> jax.Array:
    """The op in jax.numpy."""
    return _on_any_mesh(call, functools.partial(_arrange, call, precision))


def _on_any_mesh(call: _Call, compute: Callable) -> jax.Array:
    """`compute` of the arrays of `call`, on a mesh of any kind: its axes are left to the partitioner."""
    arrays = [call.x, call.kernel, call.offset, call.mask, call.bias]
    if jax.sharding.AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        batch = call.x.ndim - len(call.window.size) - 1
        specs = [jax.typeof(array).sharding.spec[:batch] for array in (call.x, call.offset)]
        sharded = [next((axis for axis in axes if axis is not None), None) for axes in zip(*specs, strict=True)]
        out_sharding = jax.sharding.PartitionSpec(*sharded, *[None] * len(call.window.size), None)
        compute = cast(Any, jax.sharding.auto_axes(compute, out_sharding=out_sharding))
    return compute(*arrays)


def _arrange(call: _Call, precision: Any, x, kernel, offset, mask, bias) -> jax.Array:
    """Bring the arrays of `call` to one batch axis B and one axis of positions P, sum over the taps, and bring y back."""
    window, groups, rank = call.window, call.offset_groups, len(call.window.size)
    batch, spatial, channels = x.shape[: -rank - 1], x.shape[-rank - 1 : -1], x.shape[-1]
    accumulate = _check.wide(call.dtype)

    # B is kept apart from P: folded into the positions it would hide from the partitioner, and a call on a batch-sharded
    # x would gather all of x on every device.
    images, positions = math.prod(batch), math.prod(window.out_spatial)
    points = place_taps(offset, window, _check.wide(offset.dtype, jnp.finfo(accumulate).dtype))
    points = points.reshape(images, positions, groups, window.taps, rank)
    y = _jitted_sum_taps(
        _Products(call.dtype, accumulate, call.feature_groups, precision),
        spatial,
        # In the accumulator's dtype already here, because the gradient of x is summed in the dtype that is gathered from.
        x.reshape(images, math.prod(spatial) * groups, channels // groups).astype(accumulate),
        kernel.reshape(window.taps, *kernel.shape[-2:]),
        points,
        jnp.ones(points.shape[:-1], points.dtype) if mask is None else mask.reshape(points.shape[:-1]),
    ).reshape(*batch, *window.out_spatial, kernel.shape[-1])
    if bias is not None:
        y = y.astype(_check.wide(y.dtype, bias.dtype))  # a bias may be wider than the rest
        y = y + lax.expand_dims(bias.astype(y.dtype), range(y.ndim - 1))
    return y.astype(call.out_dtype)


class _Products(NamedTuple):
    """How samples are multiplied with the kernel."""

    dtype: jnp.dtype  # of both factors
    accumulate: jnp.dtype
    groups: int
    precision: Any


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _sum_taps(products: _Products, spatial, x, kernel, points, mask) -> jax.Array:
    """Σ over taps: `(B, R, Cg)`, `(K, C / groups, F)`, `(B, P, OG, K, n)`, `(B, P, OG, K)` -> `(B, P, F)`."""
    return _in_blocks(products, spatial, x, kernel, points, mask, derivative=False)


def _sum_taps_jvp(products, spatial, primals, tangents):
    """The derivative, a block of positions at a time: of the block's samples, no more than one tap's are ever kept."""
    active = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]

    def derive(*arguments):
        whole = (arguments[active.index(i)] if i in active else primal for i, primal in enumerate(primals))
        return _in_blocks(products, spatial, *whole, derivative=True)

    # The result itself as without a derivative, in fewer blocks: nothing is kept for it.
    y = _sum_taps(products, spatial, *primals)
    return y, jax.jvp(derive, [primals[i] for i in active], [tangents[i] for i in active])[1]


_sum_taps.defjvp(_sum_taps_jvp, symbolic_zeros=True)
_jitted_sum_taps = jax.jit(_sum_taps, static_argnums=(0, 1))  # a call outside of jit compiles once, not each time


def _in_blocks(products: _Products, spatial, x, kernel, points, mask, *, derivative: bool) -> jax.Array:
    """`_sum_taps`, in as many blocks of positions as suit the platform that it is compiled for."""
    scans = {
        platform: functools.partial(_scan_taps, products, spatial, blocks=min(blocks, points.shape[1]))
        for platform, blocks in _blocks(x, points, derivative).items()
    }
    return lax.platform_dependent(x, kernel, points, mask, **scans)


def _blocks(x, points, derivative: bool) -> dict[str, int]:
    """Into how many blocks of positions each platform cuts the sum: more take less scratch memory, but each costs time."""
    images, positions, groups = points.shape[:3]
    samples = positions * groups * x.shape[-1] * x.dtype.itemsize  # bytes that a tap reads
    if isinstance(images, int):  # and is not symbolic, known only when an exported program is called
        samples *= images
    few = 2 if derivative else 1
    blocks = {
        "default": few,
        "cpu": few * max(1, round(samples / 1.75e6)),  # a block's samples stay in the caches
        "tpu": 8,  # it keeps the 2^n rows of each sample, and pads rows, and groups of channels, to 128 channels
    }
    return {platform: n for platform, n in blocks.items() if platform == "default" or n != few}


def _scan_taps(products: _Products, spatial, x, kernel, points, mask, *, blocks: int) -> jax.Array:
    """`_sum_taps`, one block of positions and one tap after another: each step is recomputed in the backward pass."""
    images, positions, groups, taps = mask.shape
    channels, features = groups * x.shape[-1], kernel.shape[-1]
    size = -(-positions // blocks)
    several = (groups,) if groups > 1 else ()  # no axis for one group, or XLA's CPU backend would copy the arrays

    def whole_blocks(array):  # (B, P, OG, K, …) -> (B, blocks * size, OG, K * …)
        array = array.reshape(images, positions, *several, math.prod(array.shape[3:]))
        return jnp.pad(array, [(0, 0), (0, blocks * size - positions)] + [(0, 0)] * (array.ndim - 2))

    def take(array, block, tap):  # (B, blocks * size, OG, K * …) -> (B, size, OG, …)
        width, zero = array.shape[-1] // taps, jnp.zeros_like(tap)
        start, shape = (zero, block * size, *[zero for _ in several], tap * width), (images, size, *several, width)
        return lax.dynamic_slice(array, start, shape, allow_negative_indices=False).reshape(images, size, groups, width)

    points, mask = whole_blocks(points), whole_blocks(mask)

    # One loop, not one within the other, whose arrays are indexed where they lie and not scanned over: so none is moved,
    # and XLA sees that the gradient of the kernel is a sum over the steps, which it takes over devices once, after the loop.
    @functools.partial(jax.checkpoint, prevent_cse=False)  # keeps no samples for the backward pass
    def add_tap(total, step):
        block, tap = step
        at = locate(take(points, block, tap), take(mask, block, tap)[..., 0], spatial)
        samples = jax.vmap(weighted_rows)(x, at)  # (B, size, OG, Cg)
        # A flat matrix product: a batched one would make the gradient of the kernel contract two axes at once.
        samples = samples.reshape(images * size, channels).astype(products.dtype)
        matrix = lax.dynamic_index_in_dim(kernel, tap, keepdims=False, allow_negative_indices=False)
        product = _multiply(samples, matrix.astype(products.dtype), products)
        if blocks == 1:
            return total + product[None], None
        return total.at[block].add(product, mode="promise_in_bounds"), None

    # Within shard_map a scan wants its sum, from the start, to vary over the devices that any of its arguments vary over.
    total = [
        jnp.zeros_like(array, products.accumulate, (blocks, images * size, features))
        for array in (x, kernel, points, mask)
    ]
    steps = jnp.indices((blocks, taps), jnp.int32).reshape(2, blocks * taps)
    total, _ = lax.scan(add_tap, functools.reduce(operator.add, total), tuple(steps))
    y = jnp.moveaxis(total.reshape(blocks, images, size, features), 0, 1)
    return y.reshape(images, blocks * size, features)[:, :positions]


def _multiply(samples: jax.Array, kernel: jax.Array, products: _Products) -> jax.Array:
    """`(N, C)` times one tap's matrices `(C / groups, F)`, group by group: `(N, F)`."""
    product = functools.partial(jnp.einsum, precision=products.precision, preferred_element_type=products.accumulate)
    if products.groups == 1:
        return product("nc,cf->nf", samples, kernel)
    rows, channels, features = len(samples), *kernel.shape
    samples = samples.reshape(rows, products.groups, channels)
    kernel = kernel.reshape(channels, products.groups, features // products.groups)
    return product("ngc,cgf->ngf", samples, kernel).reshape(rows, features)
