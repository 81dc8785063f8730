"""`MSDeformAttn` for `flax.linen`: it makes the parameters; `ms_deform_attn` does the rest."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dcn_jax._core import extras
from dcn_jax._layers import ms_deform_attn

try:
    import flax.linen as nn
except ModuleNotFoundError as error:
    raise extras.missing("dcn_jax.linen", "flax") from error


class MSDeformAttn(nn.Module):
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
    in float32 or wider. The layer sows them into "intermediates", as `sampling_locations`
    `(*batch, Q, M, L, P, 2)`, in [0, 1] inside a map, and `sampling_weights`
    `(*batch, Q, M, L, P)`; the name `attention_weights` is that of the projection.

    Attributes:
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
        offset_kernel_init: initializer of `sampling_offsets/kernel`.
        offset_bias_init: initializer of `sampling_offsets/bias`; by default the directions above.
        attention_kernel_init: initializer of `attention_weights/kernel`.
        attention_bias_init: initializer of `attention_weights/bias`.
        implementation: of the op: "xla", or None, which takes "xla" today.
        num_axes: n, spatial axes of the maps: 2, or 1 (sound, video) or 3 (voxels). Points are then
            (x,) or (x, y, z), and boxes twice as long. Heads look right and left in turn over one
            axis, and in directions spread over a sphere over three.

    Source: Zhu et al., Deformable DETR (arXiv 2010.04159), and its published code.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from dcn_jax.linen import MSDeformAttn
        >>> layer = MSDeformAttn(embed_dim=32, num_heads=4, num_levels=2, num_points=3)
        >>> levels = (8, 12), (4, 6)
        >>> query, value = jnp.ones((2, 10, 32)), jnp.ones((2, 8 * 12 + 4 * 6, 32))
        >>> points = jnp.full((2, 10, 2, 2), 0.5)  # the middle of both maps, as (x, y)
        >>> y, variables = layer.init_with_output(jax.random.key(0), query, points, value, levels)
        >>> y.shape
        (2, 10, 32)
        >>> jax.tree.map(jnp.shape, variables["params"]["sampling_offsets"])
        {'bias': (48,), 'kernel': (32, 48)}
    """

    embed_dim: int = 256
    num_heads: int = 8
    num_levels: int = 4
    num_points: int | Sequence[int] = 4
    method: str = "linear"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    offset_kernel_init: nn.initializers.Initializer = nn.initializers.zeros
    offset_bias_init: nn.initializers.Initializer | None = None
    attention_kernel_init: nn.initializers.Initializer = nn.initializers.zeros
    attention_bias_init: nn.initializers.Initializer = nn.initializers.zeros
    implementation: str | None = None
    num_axes: int = 2

    @nn.compact
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
        ms_deform_attn.check_options(self)
        arguments = ms_deform_attn.check_arguments(self, query, reference_points, value, spatial_shapes, padding_mask)
        points, wide = ms_deform_attn.point_count(self), ms_deform_attn.wide_dtype(self)
        offset_inits = self.offset_kernel_init, self.offset_bias_init or ms_deform_attn.directions_init(self)
        attention_inits = self.attention_kernel_init, self.attention_bias_init
        offset = self._dense("sampling_offsets", self.num_axes * points, wide, *offset_inits)(arguments.query)
        logits = self._dense("attention_weights", points, wide, *attention_inits)(arguments.query)
        locations = ms_deform_attn.place_points(self, offset, arguments)
        weights = ms_deform_attn.softmax(self, logits, arguments)
        self.sow("intermediates", "sampling_locations", locations)
        self.sow("intermediates", "sampling_weights", weights)

        inits = self.kernel_init, self.bias_init
        projected = self._dense("value_proj", self.embed_dim, self.dtype, *inits)(arguments.value)
        y = ms_deform_attn.attend(self, projected, arguments, locations, weights)
        return self._dense("output_proj", self.embed_dim, self.dtype, *inits)(y)

    @nn.nowrap
    def _dense(self, name: str, features: int, dtype: Any, kernel_init: Any, bias_init: Any) -> nn.Dense:
        return nn.Dense(
            features,
            dtype=dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            name=name,
        )
