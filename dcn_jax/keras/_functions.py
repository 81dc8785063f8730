"""`grid_sample` and `ms_deform_attn` of Keras's tensors, those of a functional model included."""

from collections.abc import Sequence
from typing import Any

from dcn_jax.keras._backend import keras, require_jax, serializable
from dcn_jax.ops.grid_sample import grid_sample as _grid_sample
from dcn_jax.ops.ms_deform_attn import ms_deform_attn as _ms_deform_attn
from dcn_jax.ops.ms_deform_attn.call import check_spatial_shapes


def grid_sample(
    features: Any,
    grid: Any,
    *,
    method: str = "linear",
    padding_mode: str | Sequence[str] = "zeros",
    align_corners: bool = False,
) -> Any:
    """`dcn_jax.grid_sample` of Keras's tensors, which may be inputs of a functional model.

        out(q) = features at the pixel that grid(q) names, between pixels by interpolation

    Arguments, result, errors and source are those of `dcn_jax.grid_sample`. Channels are last,
    whatever Keras's setting, and there is exactly one batch axis.

    Example:
        >>> import keras
        >>> from dcn_jax.keras import grid_sample
        >>> image, flow = keras.Input((None, None, 3)), keras.Input((8, 8, 2))
        >>> keras.Model([image, flow], grid_sample(image, flow)).output_shape
        (None, 8, 8, 3)
    """
    require_jax("grid_sample")
    features, grid = map(_tensor, (features, grid))
    n = grid.shape[-1]
    if n in (1, 2, 3) and len(features.shape) != n + 2:
        raise ValueError(
            f"features has shape {tuple(features.shape)}, and grid {tuple(grid.shape)} has {n} coordinates; wanted "
            f"features of {n} spatial axes: (batch, {', '.join(('height', 'width') if n == 2 else ['size'] * n)}, channels)"
        )
    return GridSample(method, padding_mode, align_corners)(features, grid)


def ms_deform_attn(
    value: Any,
    spatial_shapes: Sequence[Sequence[int]],
    sampling_locations: Any,
    attention_weights: Any,
    *,
    points_per_level: Sequence[int] | None = None,
    method: str = "linear",
) -> Any:
    """`dcn_jax.ms_deform_attn` of Keras's tensors, which may be inputs of a functional model.

        out(q, m) = Σ_l Σ_p  attention_weights(q, m, l, p) · value_{l,m}(sampling_locations(q, m, l, p) · size_l - 0.5)

    Arguments, result, errors and source are those of `dcn_jax.ms_deform_attn`.

    Example:
        >>> import keras
        >>> from dcn_jax.keras import ms_deform_attn
        >>> value = keras.Input((8 * 8, 2, 16))  # a map of 8×8 pixels, two heads of 16 channels
        >>> locations, weights = keras.Input((10, 2, 1, 4, 2)), keras.Input((10, 2, 1, 4))
        >>> ms_deform_attn(value, [(8, 8)], locations, weights).shape
        (None, 10, 32)
    """
    attend = MSDeformAttnSum(spatial_shapes, points_per_level, method)
    return attend(*map(_tensor, (value, sampling_locations, attention_weights)))


def _tensor(x: Any) -> Any:
    """Make a JAX array of x, unless it is an input or result of a functional model."""
    return x if keras.utils.is_keras_tensor(x) else keras.ops.convert_to_tensor(x)


@serializable
class GridSample(keras.Operation):
    """`grid_sample` as a node of a functional model."""

    def __init__(self, method: str, padding_mode: Any, align_corners: bool, **kwargs: Any):
        require_jax("grid_sample")
        super().__init__(**kwargs)
        self.options = {"method": method, "padding_mode": padding_mode, "align_corners": align_corners}

    def call(self, features: Any, grid: Any) -> Any:
        """Read `features` at `grid`."""
        return _grid_sample(features, grid, **self.options)

    def get_config(self) -> dict[str, Any]:
        """The options."""
        return {"name": self.name, **self.options}


@serializable
class MSDeformAttnSum(keras.Operation):
    """`ms_deform_attn` as a node of a functional model."""

    def __init__(self, spatial_shapes: Any, points_per_level: Any, method: str, **kwargs: Any):
        require_jax("ms_deform_attn")
        super().__init__(**kwargs)
        self.spatial_shapes = check_spatial_shapes(spatial_shapes)  # ints, which can be saved
        self.options = {"points_per_level": points_per_level, "method": method}

    def call(self, value: Any, sampling_locations: Any, attention_weights: Any) -> Any:
        """Sum the values read."""
        return _ms_deform_attn(value, self.spatial_shapes, sampling_locations, attention_weights, **self.options)

    def get_config(self) -> dict[str, Any]:
        """The options."""
        return {"name": self.name, "spatial_shapes": self.spatial_shapes, **self.options}
