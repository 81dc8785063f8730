"""The formula of the op, as it is written in the papers: to be read, and to test the backends by.

It keeps every sample of every tap, K · C numbers in float32 for each output position, and is slow.
"""

import functools

import jax
import jax.numpy as jnp

from dcn_jax._core.dtypes import wide
from dcn_jax.geometry import place_taps
from dcn_jax.ops.deform_conv.call import Arrays, Spec, add_bias
from dcn_jax.sampling import linear_sample


def run(spec: Spec, arrays: Arrays) -> jax.Array:
    """y(p0) = Σ_n  w_n · x(p0 + p_n + Δp_n) · Δm_n  +  bias, all in float32 or wider."""
    window, groups, features = spec.window, spec.offset_groups, arrays.kernel.shape[-1]
    batch = arrays.x.shape[: -window.rank - 1]
    x, kernel = arrays.x.astype(spec.accumulate), arrays.kernel.astype(spec.accumulate)

    # p0 + p_n + Δp_n, and x there: each image, and in it each offset group, reads at points of its own.
    dtype = wide(arrays.offset.dtype, jnp.finfo(spec.accumulate).dtype)
    points = place_taps(arrays.offset, window, dtype)  # (*batch, *out_spatial, OG, K, n)
    points = jnp.broadcast_to(points, (*batch, *points.shape[len(batch) :]))
    read = functools.partial(linear_sample, padding_mode=window.padding_mode)
    sample = jax.vmap(read, in_axes=(-2, -3), out_axes=-2)  # over offset groups
    for _ in batch:
        sample = jax.vmap(sample)
    samples = sample(x.reshape(*x.shape[:-1], groups, -1), points)  # (*batch, *out_spatial, K, OG, Cg)

    if arrays.mask is not None:  # Δm_n
        modulation = arrays.mask.reshape(*arrays.mask.shape[:-1], groups, window.taps)
        samples = samples * jnp.swapaxes(modulation, -1, -2)[..., None].astype(spec.accumulate)

    # Σ_n w_n ·, the channels in feature groups f of c channels
    samples = samples.reshape(*batch, *window.out_spatial, window.taps, spec.feature_groups, -1)
    kernel = kernel.reshape(window.taps, -1, spec.feature_groups, features // spec.feature_groups)
    y = jnp.einsum("...nfc,ncfo->...fo", samples, kernel, precision="highest")
    y = y.reshape(*batch, *window.out_spatial, features)
    return add_bias(y, arrays.bias).astype(spec.out_dtype)
