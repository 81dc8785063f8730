"""What users call."""

from collections.abc import Sequence

import jax

from dcn_jax.ops.ms_deform_attn import xla
from dcn_jax.ops.ms_deform_attn.call import check_attention


def ms_deform_attn(
    value: jax.Array,
    spatial_shapes: Sequence[Sequence[int]],
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
    *,
    points_per_level: Sequence[int] | None = None,
    method: str = "linear",
    implementation: str | None = None,
) -> jax.Array:
    """Multi-scale deformable attention: sum values read at a few learned locations on several maps.

        out(q, m) = Σ_l Σ_p  attention_weights(q, m, l, p) · value_{l,m}(sampling_locations(q, m, l, p) · size_l - 0.5)

    with value_{l,m} the map of level l and head m, read by linear interpolation, zero outside, and
    size_l its pixels along each axis: a location of 0 is the edge of the map, 1 the opposite one.
    The weights are used as they are (the layers take a softmax over L · P).

    The letters of the shapes: L levels, whose S pixels lie one level after another; M heads of D
    channels; Q queries; P points on each level; n = 1, 2 or 3 spatial axes.

    Args:
        value: `(*batch, S, M, D)`; any number of leading batch axes, none included; floating-point
            or complex.
        spatial_shapes: the levels' sizes, `((H1, W1), …)` or `((D1, H1, W1), …)`, known when the
            function is traced; S is the sum of their products.
        sampling_locations: `(*batch, Q, M, L, P, n)`, in [0, 1] inside a map, the last spatial
            axis first: (x, y[, z]). Any float dtype; pixels are computed in float32 or wider.
        attention_weights: `(*batch, Q, M, L, P)`.
        points_per_level: if levels differ in their points, how many each has, `(P1, …)`. Locations
            are then `(*batch, Q, M, P1 + P2 + …, n)`, and weights the same without n. None: P for
            each. Without points (P of 0) a level adds nothing; without any the result is zero.
        method: "linear"; "nearest" for the nearest pixel, at a tie the even one; or "discrete", as
            RT-DETRv2 and D-FINE have it, for the pixel at trunc(location · size + 0.5), clamped to
            the map, half a pixel from "nearest". The last two give the locations no gradient.
        implementation: "xla" (pure jax.numpy, everywhere), or None, which takes "xla" today;
            there are no GPU kernels.

    Returns:
        `(*batch, Q, M * D)`, in the dtype of `value`; summed in float32 or wider.

    Raises:
        ValueError: a shape or an option does not fit; the message names it, what was given and
            what was wanted.
        TypeError: an argument is of the wrong kind.

    Every array is differentiable to any order, in forward and reverse mode. At whole pixels the
    derivative with respect to the location is the right-hand one. A location of ±inf or 1e30 reads
    zero (by "discrete" the border) with a zero gradient; a NaN makes NaN at its own query and head
    alone. Scratch memory on a CPU: a tenth of the result forward, with gradients one to three times
    the result, whatever L and P. Under plain `jit` batch or heads may be split over devices, without
    communication between them.

    Source: Zhu et al., Deformable DETR (arXiv 2010.04159), equation 3.

    Example:
        >>> import jax.numpy as jnp
        >>> value = jnp.ones((5 + 2, 1, 1))  # a map of 1×5 pixels and one of 1×2, one head of one channel
        >>> locations = jnp.array([[[0.5, 0.5], [1.0, 0.5]], [[0.5, 0.5], [3.0, 0.5]]])  # two points on each level: (x, y)
        >>> weights = jnp.array([[1.0, 10.0], [100.0, 1000.0]])
        >>> ms_deform_attn(value, ((1, 5), (1, 2)), locations[None, None], weights[None, None])
        Array([[106.]], dtype=float32)
    """
    spec, arrays = check_attention(
        value, spatial_shapes, sampling_locations, attention_weights, points_per_level=points_per_level, method=method
    )
    check_implementation(implementation)
    return xla.run(spec, arrays)


def check_implementation(implementation: str | None) -> None:
    """Raise if there is no such implementation."""
    if implementation == "pallas_gpu":
        raise ValueError(
            "implementation='pallas_gpu' is not there for ms_deform_attn, which has no GPU kernels yet; use "
            "implementation='xla', which runs everywhere, or None for the fastest there is"
        )
    if implementation not in (None, "xla"):
        raise ValueError(f"implementation={implementation!r} is not known; wanted 'xla' or None")
