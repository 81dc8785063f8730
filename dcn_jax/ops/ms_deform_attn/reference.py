"""The formula of the op: to be read, and to test the backends by.

It keeps the samples of all points, which take L · P times the memory of the result.
"""

import jax
import jax.numpy as jnp

from dcn_jax._core.dtypes import wide
from dcn_jax.ops.ms_deform_attn.call import Arrays, Spec
from dcn_jax.sampling import linear_sample


def run(spec: Spec, arrays: Arrays) -> jax.Array:
    """Σ_t weight(q, m, t) · value_m(location(q, m, t) · size - 0.5), in float32 or wider."""
    value, locations, weights = (array.astype(wide(array.dtype)) for array in arrays)
    sample = jax.vmap(linear_sample, (-2, -3), -2)  # over the heads: (*spatial, M, D), (Q, M, P, n) -> (Q, P, M, D)
    for _ in value.shape[:-3]:
        sample = jax.vmap(sample)
    y = jnp.zeros((*weights.shape[:-1], value.shape[-1]), jnp.result_type(value, weights))
    for spatial, pixels_of_level, points_of_level in spec.levels:
        size = jnp.asarray(spatial[::-1], locations.dtype)
        points = locations[..., points_of_level, :]
        points = points * jnp.broadcast_to(size, points.shape)
        if spec.method == "discrete":
            points = jnp.clip(jnp.trunc(points + 0.5), 0, jnp.broadcast_to(size - 1, points.shape))
        elif spec.method == "nearest":
            points = jnp.round(points - 0.5)  # half to even
        else:
            points = points - 0.5
        pixels = value[..., pixels_of_level, :, :]
        pixels = pixels.reshape(*value.shape[:-3], *spatial, *value.shape[-2:])
        samples = sample(pixels, points[..., ::-1])  # (*batch, Q, P, M, D)
        y = y + jnp.einsum("...qpmd,...qmp->...qmd", samples, weights[..., points_of_level], precision="highest")
    return y.reshape(*y.shape[:-2], -1).astype(arrays.value.dtype)
