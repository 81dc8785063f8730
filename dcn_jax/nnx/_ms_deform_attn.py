"""`MSDeformAttn` for `flax.nnx`: it makes the parameters; `ms_deform_attn` does the rest."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dcn_jax._core import checks, extras
from dcn_jax._layers import ms_deform_attn

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise extras.missing("dcn_jax.nnx", "flax") from error


class MSDeformAttn(nnx.Module):
    """Deformable DETR's attention: each query looks at a few points of maps of several scales.

        Δ = sampling_offsets(query);  a = softmax(attention_weights(query));  v = value_proj(value)
        out = output_proj(Σ_l Σ_p  a_lp · v_l(reference_l + Δ_lp · step_l))

    The sum is `dcn_jax.ms_deform_attn`; each of M heads has points of its own. The softmax is over
    all L · P points of a head. If the reference of a query is a point, step is 1 / (width_l,
    height_l), so that Δ counts pixels of the level. If it is a box (x, y, width, height), step is
    (width, height) / (2 P). In a new layer each head looks in one direction, its p-th point lies p
    steps away (the last one at the edge of a box), and all points have equal weights.

    The layer adds no position embeddings to `query`. Unlike mmcv's it has no residual or dropout.

    Parameters, by the published layer's names: `sampling_offsets`, `attention_weights`,
    `value_proj`, `output_proj`, each with `kernel` and `bias`. Locations and weights are computed
    in float32 or wider. Under `nnx.capture(layer, nnx.Intermediate)` the layer sows them, as
    `sampling_locations` `(*batch, Q, M, L, P, 2)`, in [0, 1] inside a map, and `sampling_weights`
    `(*batch, Q, M, L, P)`; the name `attention_weights` is that of the projection.

    Args:
        embed_dim: E, channels of `query`, `value` and the result.
        num_heads: M, groups of channels; each group has points of its own.
        num_levels: L, how many maps there are.
        num_points: P, points of a head on each level. For levels that differ (RT-DETRv2) a tuple,
            `(P1, …)`; the sown arrays are then `(*batch, Q, M, P1 + P2 + …[, 2])`.
        method: how a map is read, "linear", "nearest" or "discrete", as in the op.
        dtype: of the computation; by default that of the input and parameters, promoted.
        param_dtype: of the parameters.
        precision: of the products of the four projections.
        kernel_init: initializer of the kernels of `value_proj` and `output_proj`.
        bias_init: initializer of their biases.
        offset_kernel_init: initializer of `sampling_offsets.kernel`.
        offset_bias_init: initializer of `sampling_offsets.bias`; by default the directions above.
        attention_kernel_init: initializer of `attention_weights.kernel`.
        attention_bias_init: initializer of `attention_weights.bias`.
        implementation: of the op: "xla", or None, which takes "xla" today.
        num_axes: n, spatial axes of the maps: 2, or 1 (sound, video) or 3 (voxels). Points are then
            (x,) or (x, y, z), and boxes twice as long. Heads look right and left in turn over one
            axis, and in directions spread over a sphere over three.
        rngs: where the initializers' random keys come from.

    Raises:
        ValueError: an option does not fit; the message names it.
        TypeError: an option is of the wrong kind.

    Source: Zhu et al., Deformable DETR (arXiv 2010.04159), and its published code.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from dcn_jax.nnx import MSDeformAttn
        >>> layer = MSDeformAttn(embed_dim=32, num_heads=4, num_levels=2, num_points=3, rngs=nnx.Rngs(0))
        >>> levels = (8, 12), (4, 6)
        >>> query, value = jnp.ones((2, 10, 32)), jnp.ones((2, 8 * 12 + 4 * 6, 32))
        >>> points = jnp.full((2, 10, 2, 2), 0.5)  # the middle of both maps, as (x, y)
        >>> layer(query, points, value, levels).shape
        (2, 10, 32)
        >>> layer.sampling_offsets.kernel.shape
        (32, 48)
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int | Sequence[int] = 4,
        *,
        method: str = "linear",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: nnx.Initializer = nnx.initializers.xavier_uniform(),
        bias_init: nnx.Initializer = nnx.initializers.zeros_init(),
        offset_kernel_init: nnx.Initializer = nnx.initializers.zeros_init(),
        offset_bias_init: nnx.Initializer | None = None,
        attention_kernel_init: nnx.Initializer = nnx.initializers.zeros_init(),
        attention_bias_init: nnx.Initializer = nnx.initializers.zeros_init(),
        implementation: str | None = None,
        num_axes: int = 2,
        rngs: nnx.Rngs,
    ):
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = tuple(num_points) if isinstance(num_points, Sequence) else num_points
        self.method = method
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.implementation = implementation
        self.num_axes = num_axes
        ms_deform_attn.check_options(self)
        points, wide = ms_deform_attn.point_count(self), ms_deform_attn.wide_dtype(self)
        linear: Any = functools.partial(nnx.Linear, embed_dim, param_dtype=param_dtype, precision=precision, rngs=rngs)
        offset_bias_init = offset_bias_init or ms_deform_attn.directions_init(self)
        offset_inits = {"kernel_init": offset_kernel_init, "bias_init": offset_bias_init}
        attention_inits = {"kernel_init": attention_kernel_init, "bias_init": attention_bias_init}
        self.sampling_offsets = linear(num_axes * points, dtype=wide, **offset_inits)
        self.attention_weights = linear(points, dtype=wide, **attention_inits)
        self.value_proj = linear(embed_dim, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init)
        self.output_proj = linear(embed_dim, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init)

    def __call__(
        self,
        query: jax.Array,
        reference_points: jax.Array,
        value: jax.Array,
        spatial_shapes: Sequence[Sequence[int]],
        padding_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Let each query look at the maps: `(*batch, Q, embed_dim)`.

        Args:
            query: `(*batch, Q, embed_dim)`, position embeddings already added. Batch axes may be 1
                or missing: one set of queries then looks at all maps (those of several cameras).
            reference_points: `(*batch, Q, num_levels, 2)`, points (x, y), or
                `(*batch, Q, num_levels, 4)`, boxes (x, y, width, height) with (x, y) the centre;
                in [0, 1] inside a map. The axis of levels may be 1, batch axes 1 or missing. With
                another `num_axes`, n or 2 n coordinates, the last spatial axis first.
            value: `(*batch, S, embed_dim)`, the pixels of all levels one after another.
            spatial_shapes: the sizes of the maps, `((H1, W1), …)`, as ints; S is the sum of H · W.
                With another `num_axes`, n sizes for each map, such as `((D1, H1, W1), …)`.
            padding_mask: `(*batch, S)` of bools; where it is True, the projected value is 0.

        Raises:
            ValueError: an option or argument does not fit; the message names it.
            TypeError: an option or argument is of the wrong kind.
        """
        checks.one_layer(self.sampling_offsets.kernel.shape, 2)
        arguments = ms_deform_attn.check_arguments(self, query, reference_points, value, spatial_shapes, padding_mask)
        locations = ms_deform_attn.place_points(self, self.sampling_offsets(arguments.query), arguments)
        weights = ms_deform_attn.softmax(self, self.attention_weights(arguments.query), arguments)
        # Only under nnx.capture: see DeformConv.
        if hasattr(self, "__captures__"):
            self.sow(nnx.Intermediate, "sampling_locations", locations)
            self.sow(nnx.Intermediate, "sampling_weights", weights)
        y = ms_deform_attn.attend(self, self.value_proj(arguments.value), arguments, locations, weights)
        return self.output_proj(y)
