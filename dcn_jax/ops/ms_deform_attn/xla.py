"""The op in `jax.numpy`: makes the batch axes one, and describes the levels to `sum_readings`."""

import math

import jax
import jax.numpy as jnp

from dcn_jax._core.dtypes import wide
from dcn_jax._core.mesh import on_any_mesh, zeros_varying_like
from dcn_jax.ops.ms_deform_attn.call import Arrays, Spec
from dcn_jax.ops.weighted_reads import Level, Operands, sum_readings
from dcn_jax.sampling import Border


def run(spec: Spec, arrays: Arrays) -> jax.Array:
    """`ms_deform_attn` of a checked call."""
    batch = arrays.value.ndim - 3
    return on_any_mesh(_attend, spec, arrays, batched=arrays, batch=batch, whole=2)(*arrays)


def _attend(spec: Spec, value, locations, weights) -> jax.Array:
    """`run`, on a mesh without explicit axes."""
    batch, (heads, channels) = value.shape[:-3], value.shape[-2:]
    dtype = wide(value.dtype, locations.dtype, weights.dtype)
    real = jnp.finfo(dtype).dtype

    def flatten(array, dtype):
        return array.reshape(math.prod(batch), *array.shape[len(batch) :]).astype(dtype)

    # The sum's gradients have the dtype of its operands, so these are widened before it.
    operands = Operands(flatten(value, dtype), flatten(locations, real), flatten(weights, real))
    if levels := _levels(spec):
        y = sum_readings(levels, operands)
    else:  # no points at all
        y = zeros_varying_like(operands, dtype, (*operands.points.shape[:-2], channels))
    return y.reshape(*batch, y.shape[1], heads * channels).astype(value.dtype)


def _levels(spec: Spec) -> tuple[Level, ...]:
    """Which pixels its points read, and where both lie in the arrays, for each level that has points."""
    method, border, to_pixels = spec.method, "zeros", _from_edges
    if method == "discrete":
        method, border, to_pixels = "floor", "edge", _half_up
    return tuple(
        Level(Border(spatial, (border,) * len(spatial)), method, to_pixels, pixels.start, t.start, t.stop - t.start)
        for spatial, pixels, t in spec.levels
        if t.stop > t.start
    )


def _from_edges(location: jax.Array, size: jax.Array) -> jax.Array:
    return location * size - 0.5


def _half_up(location: jax.Array, size: jax.Array) -> jax.Array:
    return location * size + 0.5
