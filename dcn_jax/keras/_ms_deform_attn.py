"""`MSDeformAttn` for Keras: it makes the weights; `ms_deform_attn` does the rest."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dcn_jax._core.dtypes import wide
from dcn_jax._layers import ms_deform_attn
from dcn_jax.keras._backend import keras, require_jax, serializable
from dcn_jax.ops.ms_deform_attn.call import check_spatial_shapes

_INITIALIZERS = (
    *("kernel_initializer", "bias_initializer", "offset_kernel_initializer"),
    *("attention_kernel_initializer", "attention_bias_initializer"),
)
_PLAIN = ("embed_dim", "num_heads", "num_levels", "num_points", "method", "implementation", "num_axes")


@serializable
class MSDeformAttn(keras.Layer):
    """Deformable DETR's attention: each query looks at a few points of maps of several scales.

        Δ = sampling_offsets(query);  a = softmax(attention_weights(query));  v = value_proj(value)
        out = output_proj(Σ_l Σ_p  a_lp · v_l(reference_l + Δ_lp · step_l))

    Call it as `layer(query, reference_points, value, ((H1, W1), …))`, with `padding_mask=` if
    pixels of `value` are padding.

    The sum is `dcn_jax.ms_deform_attn`; each of M heads has points of its own. The softmax is over
    all L · P points of a head. If the reference of a query is a point, step is 1 / (width_l,
    height_l), so that Δ counts pixels of the level. If it is a box (x, y, width, height), step is
    (width, height) / (2 P). In a new layer each head looks in one direction, its p-th point lies p
    steps away (the last one at the edge of a box), and all points have equal weights. The layer
    adds no position embeddings to `query`, and has no residual or dropout.

    Weights, by the published layer's names: `sampling_offsets`, `attention_weights`, `value_proj`,
    `output_proj`, each with `kernel` and `bias`. Locations and weights are computed in float32 or
    wider, under `mixed_bfloat16` and `mixed_float16` too.

    Args:
        embed_dim: E, channels of `query`, `value` and the result.
        num_heads: M, groups of channels; each group has points of its own.
        num_levels: L, how many maps there are.
        num_points: P, points of a head on each level; for levels that differ a tuple, `(P1, …)`.
        method: how a map is read, "linear", "nearest" or "discrete", as in the op.
        kernel_initializer: of the kernels of `value_proj` and `output_proj`.
        bias_initializer: of their biases.
        offset_kernel_initializer: of `sampling_offsets.kernel`.
        offset_bias_initializer: of `sampling_offsets.bias`; by default the directions above.
        attention_kernel_initializer: of `attention_weights.kernel`.
        attention_bias_initializer: of `attention_weights.bias`.
        implementation: of the op: "xla", or None, which takes "xla" today.
        num_axes: n, spatial axes of the maps: 2, or 1 (sound, video) or 3 (voxels).
        **kwargs: `name`, `dtype` and `trainable`, as in all of Keras's layers.

    Inputs:
        query: `(batch, Q, E)`, position embeddings already added; batch may be 1.
        reference_points: `(batch, Q, L, 2)`, points (x, y), or `(batch, Q, L, 4)`, boxes with (x, y)
            the centre; in [0, 1] inside a map. The axis of levels, and batch, may be 1.
        value: `(batch, S, E)`, the pixels of all levels one after another.
        spatial_shapes: the sizes of the maps, `((H1, W1), …)`, as ints; S is the sum of H · W.
        padding_mask: `(batch, S)` of bools; where it is True, the projected value is 0.

    Raises:
        RuntimeError: Keras runs on another backend than JAX.
        ValueError: an option or argument does not fit; the message names it.
        TypeError: an option or argument is of the wrong kind.

    Source: Zhu et al., Deformable DETR (arXiv 2010.04159), and its published code.

    Example:
        >>> import numpy as np
        >>> from dcn_jax.keras import MSDeformAttn
        >>> layer = MSDeformAttn(embed_dim=32, num_heads=4, num_levels=2, num_points=3)
        >>> levels = (8, 12), (4, 6)
        >>> query, value = np.ones((2, 10, 32), "float32"), np.ones((2, 8 * 12 + 4 * 6, 32), "float32")
        >>> points = np.full((2, 10, 2, 2), 0.5, "float32")  # the middle of both maps, as (x, y)
        >>> layer(query, points, value, levels).shape
        (2, 10, 32)
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int | Sequence[int] = 4,
        *,
        method: str = "linear",
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        offset_kernel_initializer: Any = "zeros",
        offset_bias_initializer: Any = None,
        attention_kernel_initializer: Any = "zeros",
        attention_bias_initializer: Any = "zeros",
        implementation: str | None = None,
        num_axes: int = 2,
        **kwargs: Any,
    ):
        require_jax("MSDeformAttn")
        super().__init__(autocast=False, **kwargs)
        # As Keras's own layers say that they take more than tensors; where Keras drops it, spatial_shapes goes by name.
        self._allow_non_tensor_positional_args = True
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = tuple(num_points) if isinstance(num_points, Sequence) else num_points
        self.method = method
        self.implementation = implementation
        self.num_axes = num_axes
        ms_deform_attn.check_options(self)
        for name in ("embed_dim", "num_heads", "num_levels", "num_axes"):
            setattr(self, name, operator.index(getattr(self, name)))  # a Python int, which Keras and JSON want
        points = ms_deform_attn.points_per_level(self)
        self.num_points = points if isinstance(num_points, Sequence) else points[0]
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.offset_kernel_initializer = keras.initializers.get(offset_kernel_initializer)
        self.offset_bias_initializer = offset_bias_initializer and keras.initializers.get(offset_bias_initializer)
        self.attention_kernel_initializer = keras.initializers.get(attention_kernel_initializer)
        self.attention_bias_initializer = keras.initializers.get(attention_bias_initializer)
        wide_dtype = str(wide(jnp.dtype(self.compute_dtype)))
        points = ms_deform_attn.point_count(self)
        self.sampling_offsets = keras.layers.Dense(
            self.num_axes * points,
            kernel_initializer=self.offset_kernel_initializer,
            bias_initializer=self.offset_bias_initializer or _directions(self),
            dtype=wide_dtype,
            trainable=self.trainable,
            name="sampling_offsets",
        )
        self.attention_weights = keras.layers.Dense(
            points,
            kernel_initializer=self.attention_kernel_initializer,
            bias_initializer=self.attention_bias_initializer,
            dtype=wide_dtype,
            trainable=self.trainable,
            name="attention_weights",
        )
        self.value_proj, self.output_proj = (
            keras.layers.Dense(
                self.embed_dim,
                kernel_initializer=_another(self.kernel_initializer),
                bias_initializer=_another(self.bias_initializer),
                dtype=self.dtype_policy,
                trainable=self.trainable,
                name=name,
            )
            for name in ("value_proj", "output_proj")
        )

    def build(self, query_shape: Any, reference_points_shape: Any = None, value_shape: Any = None) -> None:
        """Make the weights; of the shapes only `embed_dim` matters, which the layer knows."""
        for projection in (self.sampling_offsets, self.attention_weights, self.value_proj, self.output_proj):
            projection.build((None, self.embed_dim))

    def __call__(
        self, query: Any, reference_points: Any, value: Any, spatial_shapes: Any = None, *more: Any, **kwargs: Any
    ) -> Any:
        """Let each query look at the maps: `(batch, Q, embed_dim)`."""
        # Keras turns NumPy arrays into JAX arrays, and under jit the numbers in those cannot be read: take them now.
        shapes = None if spatial_shapes is None else check_spatial_shapes(spatial_shapes)
        return super().__call__(query, reference_points, value, shapes, *more, **kwargs)

    def call(
        self, query: Any, reference_points: Any, value: Any, spatial_shapes: Any = None, padding_mask: Any = None
    ) -> jax.Array:
        """`__call__` of arrays."""
        arguments = self._arguments(query, reference_points, value, spatial_shapes, padding_mask)
        locations, weights = self._place_points(arguments)
        y = ms_deform_attn.attend(self, self.value_proj(arguments.value), arguments, locations, weights)
        return self.output_proj(y)

    def locations_and_weights(
        self, query: Any, reference_points: Any, value: Any, spatial_shapes: Any = None, padding_mask: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """Where a call of these arguments reads, `(batch, Q, M, L, P, n)`, and how much each point counts.

        With a `num_points` for each level `(batch, Q, M, P1 + P2 + …, n)`; weights have no last axis.
        """
        if not self.built:
            raise ValueError(f"the layer {self.name} has no weights yet; call it once, or its build(query.shape)")
        if any(map(keras.utils.is_keras_tensor, (query, reference_points, value))):
            raise TypeError(
                "query, reference_points or value is a symbolic tensor of a functional model; wanted arrays"
            )
        query, points, value = map(keras.ops.convert_to_tensor, (query, reference_points, value))
        return self._place_points(self._arguments(query, points, value, spatial_shapes, padding_mask))

    def compute_output_shape(
        self, query_shape: Any, reference_points_shape: Any = None, value_shape: Any = None
    ) -> Any:
        """The shape of the result."""
        batch = query_shape[0] if value_shape is None else value_shape[0]
        return (batch, query_shape[1], self.embed_dim)

    def compute_output_spec(
        self, query: Any, reference_points: Any, value: Any, spatial_shapes: Any = None, padding_mask: Any = None
    ) -> Any:
        """The result's shape and dtype. Sizes that are not known yet are taken to fit the others."""
        batch = value.shape[0] or query.shape[0] or 1
        queries = query.shape[-2] or reference_points.shape[1] or 1
        pixels = value.shape[-2] or sum(math.prod(shape) for shape in check_spatial_shapes(spatial_shapes))
        filled = [
            _filled(query, batch, queries),
            _filled(reference_points, batch, queries),
            _filled(value, batch, pixels),
            None if padding_mask is None else _filled(padding_mask, batch, pixels),
        ]

        def check(query, points, value, mask):
            return self._arguments(query, points, value, spatial_shapes, mask).query

        jax.eval_shape(check, *filled)
        return keras.KerasTensor(self.compute_output_shape(query.shape, None, value.shape), dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """All arguments, as text and numbers."""
        config = super().get_config() | {name: getattr(self, name) for name in _PLAIN}
        config |= {name: keras.initializers.serialize(getattr(self, name)) for name in _INITIALIZERS}
        own = self.offset_bias_initializer
        return config | {"offset_bias_initializer": own and keras.initializers.serialize(own)}

    def _arguments(self, query, reference_points, value, spatial_shapes, padding_mask) -> ms_deform_attn.Arguments:
        if spatial_shapes is None:
            raise ValueError("spatial_shapes is missing; give the sizes of the maps: spatial_shapes=((H1, W1), …)")
        return ms_deform_attn.check_arguments(self, query, reference_points, value, spatial_shapes, padding_mask)

    def _place_points(self, arguments: ms_deform_attn.Arguments) -> tuple[jax.Array, jax.Array]:
        locations = ms_deform_attn.place_points(self, self.sampling_offsets(arguments.query), arguments)
        return locations, ms_deform_attn.softmax(self, self.attention_weights(arguments.query), arguments)


def _filled(tensor: Any, batch: int, second: int) -> jax.ShapeDtypeStruct:
    """A symbolic tensor whose first two sizes, if they are not known, are those that fit the other tensors."""
    first = tensor.shape[0] or batch, tensor.shape[1] or second
    return jax.ShapeDtypeStruct((*first, *tensor.shape[2:]), tensor.dtype)


def _another(initializer: Any) -> Any:
    """The same once more: an initializer of Keras gives the same numbers each time that it is called."""
    return initializer.clone() if isinstance(initializer, keras.Initializer) else initializer


def _directions(layer: MSDeformAttn) -> Any:
    """The published initializer of the offsets' bias, in the form that Keras calls."""
    init = ms_deform_attn.directions_init(layer)
    return lambda shape, dtype=None: init(None, shape, dtype)
