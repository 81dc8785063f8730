"""What users call: the op, and which implementation it takes."""

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax

from dcn_jax.geometry import Padding
from dcn_jax.ops.deform_conv.call import Arrays, Spec, check_call

IMPLEMENTATIONS = ("xla", "pallas_gpu", "pallas_tpu")
_FORMER_NAMES = {"pallas": "pallas_gpu", "matmul": "pallas_tpu"}


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
    padding_mode: str | Sequence[str] = "zeros",
    precision: Any = None,
    preferred_element_type: Any = None,
    max_offset: int | float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Convolve with taps that read at learned, fractional offsets and are scaled by a learned modulation.

        y(p0) = Σ_n  w_n · x(p0 + p_n + Δp_n) · Δm_n  +  bias

    Without `mask` it is deformable convolution (DCNv1), with it modulated deformable convolution (DCNv2); with zero
    offsets and a mask of ones it equals `jax.lax.conv_general_dilated`. x at a fractional position is the linear
    interpolation of its neighbours; beyond its border the map is what `padding_mode` says (`linear_sample`).

    The legend of the shapes: n spatial axes (1, 2 or 3), K = prod(window) taps, OG offset groups (read off `offset`),
    C channels. OG and `feature_group_count` are independent; each divides C.

    Args:
        x: `(*batch, *spatial, C)`; any number of leading batch axes, none included.
        kernel: `(*window, C // feature_group_count, features)`; its rank fixes n.
        offset: `(*batch, *out_spatial, OG * K * n)`, in pixels of x, any float dtype. The last axis is ordered
            [offset group, tap (row-major), axis (first spatial axis first: dy, dx)], as in torchvision and mmcv.
            Its batch axes broadcast to those of x: missing or 1, one set of offsets serves all images.
        mask: `(*batch, *out_spatial, OG * K)`, ordered [offset group, tap], or None for 1 everywhere; its batch axes
            broadcast likewise.
        bias: `(features,)` or None.
        strides: pixels between neighbouring outputs; one for all axes, or one per axis.
        padding: "SAME", "SAME_LOWER" or "VALID" as XLA defines them, "CIRCULAR" or "REFLECT" as Flax does, an int, one
            int per axis, or one (low, high) pair per axis.
        kernel_dilation: pixels between neighbouring taps; one for all axes, or one per axis.
        feature_group_count: groups of channels, each convolved with its own features.
        padding_mode: what the map is beyond its border, for offsets and padding alike: "zeros", "edge", "wrap",
            "reflect" or "symmetric" (`linear_sample`); one for all axes, or one per axis: ("zeros", "wrap") for a
            panorama, which wraps in longitude alone. The paddings "CIRCULAR" and "REFLECT" set it themselves.
        precision: of the matrix products, as in `jax.lax.dot_general`.
        preferred_element_type: dtype of the result; by default the dtype of x (promoted with kernel and bias).
        max_offset: offsets are clipped to ±max_offset pixels. Where an offset is clipped, or equals the bound, its
            derivative is zero; a NaN stays NaN. None for no bound.
        implementation: "xla" (pure jax.numpy, everywhere); "pallas_gpu" (fused GPU kernels); "pallas_tpu" (TPU kernels
            without gathers, which need `max_offset`, and on several TPUs `jax.shard_map`); or None, which takes "xla"
            until the kernels have been timed beside it (`select_implementation` tells which, and why).

    Returns:
        `(*batch, *out_spatial, features)`. Positions are computed in float32 or wider and products are accumulated in
        float32 or wider, whatever the dtypes of the arguments. The whole pixels of a position and its offset are kept
        apart, so that an offset keeps its fraction however large the map is.

    Raises:
        ValueError: a shape or an option does not fit; the message names it, what was given and what was wanted.
        TypeError: an argument is of the wrong kind.

    It is differentiable with respect to every array, to any order, in forward and reverse mode. At whole-number
    positions the derivative with respect to the position is the right-hand one, as in torchvision (mmcv sets it to
    zero where a coordinate is exactly -1 or the map's size). Offsets of ±inf or 1e30 read zero (with "edge" the
    border), with a zero gradient. A NaN offset makes NaN at its own output position alone. With "pallas_tpu" an
    infinite or NaN pixel makes NaN of output positions around it too.

    Batch and spatial sizes may be symbolic (`jax.export.symbolic_shape`), with "xla".

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
    spec, arrays = check_call(
        Arrays(x, kernel, offset, mask, bias),
        strides=strides,
        padding=padding,
        kernel_dilation=kernel_dilation,
        feature_group_count=feature_group_count,
        padding_mode=padding_mode,
        precision=precision,
        preferred_element_type=preferred_element_type,
        max_offset=max_offset,
    )
    name, _ = _choose(spec, arrays, implementation)
    return _backend(name).run(spec, arrays)


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
    padding_mode: str | Sequence[str] = "zeros",
    precision: Any = None,
    preferred_element_type: Any = None,
    max_offset: int | float | None = None,
    implementation: str | None = None,
) -> tuple[str, str]:
    """Tell which implementation `deform_conv` would take for these arguments, and why not another.

    Args: those of `deform_conv`, but for bias, which makes no difference. Only shapes and dtypes are looked at, so
        arrays may be `jax.ShapeDtypeStruct` objects.

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
    spec, arrays = check_call(
        Arrays(x, kernel, offset, mask, None),
        strides=strides,
        padding=padding,
        kernel_dilation=kernel_dilation,
        feature_group_count=feature_group_count,
        padding_mode=padding_mode,
        precision=precision,
        preferred_element_type=preferred_element_type,
        max_offset=max_offset,
        shapes_alone=True,
    )
    return _choose(spec, arrays, implementation)


def check_implementation(implementation: str | None) -> None:
    """Raise if there is no such implementation."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        renamed = f" (it is called {_FORMER_NAMES[implementation]!r} now)" if implementation in _FORMER_NAMES else ""
        raise ValueError(
            f"implementation={implementation!r} is not known; wanted one of {IMPLEMENTATIONS} or None{renamed}"
        )


def _backend(name: str) -> ModuleType:
    """The backend of that name: a `refusal` and a `run`."""
    # Each is imported when it is asked for: importing Pallas takes time that most users need not spend.
    if name == "pallas_gpu":
        from dcn_jax.ops.deform_conv.pallas_gpu import backend
    elif name == "pallas_tpu":
        from dcn_jax.ops.deform_conv.pallas_tpu import backend
    else:
        from dcn_jax.ops.deform_conv.xla import backend
    return backend


def _choose(spec: Spec, arrays: Arrays, implementation: str | None) -> tuple[str, str]:
    """The implementation to take, and why."""
    if implementation is None:
        reason = "the fused GPU kernels have not been timed beside it yet, so nobody knows where they are faster"
        if _deterministic():
            reason += ", and they add gradients atomically, in any order, which --xla_gpu_deterministic_ops rules out"
        return "xla", f"{reason}; on a GPU, ask for them with implementation='pallas_gpu'"
    check_implementation(implementation)
    if problem := _backend(implementation).refusal(spec, arrays):
        raise ValueError(
            f"implementation={implementation!r} cannot take this call: {problem}; use implementation='xla', or None"
        )
    reason = "asked for by name"
    if implementation == "pallas_gpu" and _deterministic():
        reason += "; it adds gradients atomically, so that their last digits vary despite --xla_gpu_deterministic_ops"
    return implementation, reason


def _deterministic() -> bool:
    """Whether XLA was asked to order all sums on a GPU."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    return any(flag in ("--xla_gpu_deterministic_ops", "--xla_gpu_deterministic_ops=true") for flag in flags)
