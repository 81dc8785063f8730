"""The op in `jax.numpy`: a block of positions and one tap after another, so that little is in memory at once.

`run` brings the arrays to one batch axis B and one axis of positions P; `_sum_taps` is the sum over
the taps, and how it is differentiated; `_scan_blocks` is the loop; `_multiply` is the product.
"""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from dcn_jax._mesh import on_any_mesh
from dcn_jax._numerics import wide
from dcn_jax.geometry import place_taps
from dcn_jax.ops.deform_conv.call import Arrays, Spec, add_bias
from dcn_jax.sampling import locate, sum_rows


def refusal(spec: Spec, arrays: Arrays) -> str | None:
    """Why this backend cannot take a call: it takes every one."""
    del spec, arrays
    return None


def run(spec: Spec, arrays: Arrays) -> jax.Array:
    """`deform_conv` of a checked call."""
    rank = spec.window.rank
    return on_any_mesh(
        functools.partial(_convolve, spec),
        arrays,
        batched=(arrays.x, arrays.offset),
        batch=arrays.x.ndim - rank - 1,
        whole=rank + 1,
    )


def _convolve(spec: Spec, x, kernel, offset, mask, bias) -> jax.Array:
    """Flatten batch and positions, sum over the taps, and bring the result back."""
    window, groups = spec.window, spec.offset_groups
    batch, channels = x.shape[: -window.rank - 1], x.shape[-1]
    images, positions = math.prod(batch), math.prod(window.out_spatial)
    # B is kept apart from P: folded into the positions it would hide from the partitioner, and a call on a batch-sharded
    # x would gather all of x on every device.
    points = place_taps(offset, window, wide(offset.dtype, jnp.finfo(spec.accumulate).dtype))
    points = points.reshape(images, positions, groups, window.taps, window.rank)
    modulation = jnp.ones(points.shape[:-1], points.dtype) if mask is None else mask.reshape(points.shape[:-1])
    # Its gradient is summed in the dtype that is read: hence in the accumulator's already here.
    rows = x.reshape(images, math.prod(window.spatial) * groups, channels // groups).astype(spec.accumulate)
    matrices = kernel.reshape(window.taps, *kernel.shape[-2:])
    y = _jitted_sum_taps(spec, rows, matrices, points, modulation)
    return add_bias(y.reshape(*batch, *window.out_spatial, kernel.shape[-1]), bias).astype(spec.out_dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_taps(spec: Spec, rows, matrices, points, modulation) -> jax.Array:
    """Σ over taps: `(B, R, Cg)`, `(K, C / groups, F)`, `(B, P, OG, K, n)`, `(B, P, OG, K)` -> `(B, P, F)`."""
    return _scan(spec, rows, matrices, points, modulation, derivative=False)


def _sum_taps_jvp(spec, primals, tangents):
    """The derivative, a block of positions at a time: of the block's samples, no more than one tap's are ever kept."""
    active = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]

    def of_active(*arguments):
        whole = (arguments[active.index(i)] if i in active else primal for i, primal in enumerate(primals))
        return _scan(spec, *whole, derivative=True)

    # The result itself as without a derivative, in fewer blocks: nothing is kept for it.
    y = _sum_taps(spec, *primals)
    return y, jax.jvp(of_active, [primals[i] for i in active], [tangents[i] for i in active])[1]


_sum_taps.defjvp(_sum_taps_jvp, symbolic_zeros=True)
_jitted_sum_taps = jax.jit(_sum_taps, static_argnums=0)  # a call outside of jit compiles once, not each time


def _scan(spec: Spec, rows, matrices, points, modulation, *, derivative: bool) -> jax.Array:
    """`_sum_taps`, in as many blocks of positions as suit the platform that it is compiled for."""
    scans = {
        platform: functools.partial(_scan_blocks, spec, blocks=min(blocks, points.shape[1]))
        for platform, blocks in _blocks_by_platform(rows, points, derivative).items()
    }
    return lax.platform_dependent(rows, matrices, points, modulation, **scans)


def _blocks_by_platform(rows, points, derivative: bool) -> dict[str, int]:
    """Into how many blocks the positions are cut: more take less scratch memory, but each costs time."""
    images, positions, groups = points.shape[:3]
    samples = positions * groups * rows.shape[-1] * rows.dtype.itemsize  # bytes that a tap reads
    if isinstance(images, int):  # and is not symbolic, known only when an exported program is called
        samples *= images
    few = 2 if derivative else 1
    blocks = {
        "default": few,
        "cpu": few * max(1, round(samples / 1.75e6)),  # a block's samples stay in the caches
        "tpu": 8,  # it keeps the 2^n rows of each sample, and pads rows, and groups of channels, to 128 channels
    }
    return {platform: n for platform, n in blocks.items() if platform == "default" or n != few}


def _scan_blocks(spec: Spec, rows, matrices, points, modulation, *, blocks: int) -> jax.Array:
    """`_sum_taps`, one block of positions and one tap after another: each step is recomputed in the backward pass."""
    images, positions, groups, taps = modulation.shape
    channels, features = groups * rows.shape[-1], matrices.shape[-1]
    size = -(-positions // blocks)
    points, modulation = (_pad_positions(array, blocks * size) for array in (points, modulation))
    take = functools.partial(_take_step, size=size, taps=taps, groups=groups)

    # One loop, not one within the other, whose arrays are indexed where they lie and not scanned over: so none is moved,
    # and XLA sees that the gradient of the kernel is a sum over the steps, which it takes over devices once, after the loop.
    @functools.partial(jax.checkpoint, prevent_cse=False)  # keeps no samples for the backward pass
    def add_tap(total, step):
        block, tap = step
        at = locate(take(points, block, tap), take(modulation, block, tap)[..., 0], spec.window.spatial)
        samples = jax.vmap(sum_rows)(rows, at)  # (B, size, OG, Cg)
        # A flat matrix product: a batched one would make the gradient of the kernel contract two axes at once.
        samples = samples.reshape(images * size, channels)
        matrix = lax.dynamic_index_in_dim(matrices, tap, keepdims=False, allow_negative_indices=False)
        product = _multiply(spec, samples, matrix)
        if blocks == 1:
            return total + product[None], None
        return total.at[block].add(product, mode="promise_in_bounds"), None

    # Within shard_map a scan wants its sum, from the start, to vary over the devices that any of its arguments vary over.
    arguments = rows, matrices, points, modulation
    zeros = [jnp.zeros_like(array, spec.accumulate, (blocks, images * size, features)) for array in arguments]
    steps = jnp.indices((blocks, taps), jnp.int32).reshape(2, blocks * taps)
    total, _ = lax.scan(add_tap, functools.reduce(operator.add, zeros), tuple(steps))
    y = jnp.moveaxis(total.reshape(blocks, images, size, features), 0, 1)
    return y.reshape(images, blocks * size, features)[:, :positions]


def _pad_positions(array: jax.Array, length: int) -> jax.Array:
    """`(B, P, OG, K, …)` -> `(B, length, OG, K * …)`; without an axis for a single offset group."""
    images, positions, groups = array.shape[:3]
    several = (groups,) if groups > 1 else ()  # an axis of 1 would make XLA's CPU backend copy the array
    array = array.reshape(images, positions, *several, math.prod(array.shape[3:]))
    return jnp.pad(array, [(0, 0), (0, length - positions)] + [(0, 0)] * (array.ndim - 2))


def _take_step(array: jax.Array, block, tap, *, size: int, taps: int, groups: int) -> jax.Array:
    """What one block and tap need of a padded array: `(B, blocks * size, OG, K * …)` -> `(B, size, OG, …)`."""
    images, several, width = array.shape[0], array.shape[2:-1], array.shape[-1] // taps
    zero = jnp.zeros_like(tap)
    start = zero, block * size, *[zero for _ in several], tap * width
    step = lax.dynamic_slice(array, start, (images, size, *several, width), allow_negative_indices=False)
    return step.reshape(images, size, groups, width)


def _multiply(spec: Spec, samples: jax.Array, matrix: jax.Array) -> jax.Array:
    """`(N, C)` times one tap's matrices `(C / groups, F)`, feature group by feature group: `(N, F)`."""
    samples, matrix = samples.astype(spec.dtype), matrix.astype(spec.dtype)
    product: Any = functools.partial(jnp.einsum, precision=spec.precision, preferred_element_type=spec.accumulate)
    if spec.feature_groups == 1:
        return product("nc,cf->nf", samples, matrix)
    n, groups, (channels, features) = len(samples), spec.feature_groups, matrix.shape
    samples = samples.reshape(n, groups, channels)
    matrix = matrix.reshape(channels, groups, features // groups)
    return product("ngc,cgf->ngf", samples, matrix).reshape(n, features)
