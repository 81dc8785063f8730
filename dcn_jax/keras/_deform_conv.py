"""`DeformConv1D`, `DeformConv2D`, `DeformConv3D` for Keras: weights and shapes; `offset_conv` does the rest."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from dcn_jax._core import checks
from dcn_jax._layers import offset_conv
from dcn_jax.geometry import Padding, canonical_padding, canonical_padding_mode, resolve_window
from dcn_jax.keras import _shapes as shapes
from dcn_jax.keras._backend import keras, require_jax, serializable
from dcn_jax.keras._offset_conv import OffsetConv
from dcn_jax.ops.deform_conv import kernel_shape

_INITIALIZERS = ("kernel_initializer", "bias_initializer", "offset_kernel_initializer", "offset_bias_initializer")
_REGULARIZERS = ("kernel_regularizer", "bias_regularizer", "activity_regularizer")
_CONSTRAINTS = ("kernel_constraint", "bias_constraint")
_ACTIVATIONS = ("activation", "offset_activation")
_PLAIN = (
    *("filters", "kernel_size", "strides", "padding", "data_format", "dilation_rate", "groups", "use_bias"),
    *("offset_groups", "modulated", "mask_scale", "max_offset", "padding_mode", "offset_branch", "implementation"),
    "offset_trainable",
)
_SPATIAL = {1: ("steps",), 2: ("height", "width"), 3: ("depth", "height", "width")}
_LARGE = 2**15  # in place of a size that is not known: axes do not depend on each other, and any window fits in it


class Options(NamedTuple):
    """What the files that all layers share want to know of a layer, by the names of Flax."""

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Any
    kernel_dilation: tuple[int, ...]
    padding_mode: Any
    feature_group_count: int
    offset_groups: int
    modulated: bool
    mask_scale: float
    max_offset: Any
    offset_activation: Any
    offset_branch: bool
    implementation: str | None
    offset_conv_cls: None = None
    precision: None = None


class DeformConv(keras.Layer):
    """What `DeformConv1D`, `DeformConv2D` and `DeformConv3D` are, but for `rank`, the number of spatial axes."""

    rank: int

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: Padding = "valid",
        data_format: str | None = None,
        dilation_rate: int | Sequence[int] = 1,
        groups: int = 1,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        *,
        offset_groups: int = 1,
        modulated: bool = True,
        mask_scale: float = 1.0,
        max_offset: float | Sequence[float | None] | None = None,
        padding_mode: str | Sequence[str] = "zeros",
        offset_branch: bool = True,
        offset_kernel_initializer: Any = "zeros",
        offset_bias_initializer: Any = "zeros",
        offset_trainable: bool = True,
        offset_activation: Any = None,
        implementation: str | None = None,
        **kwargs: Any,
    ):
        require_jax(type(self).__name__)
        super().__init__(activity_regularizer=activity_regularizer, autocast=False, **kwargs)
        checks.count("filters", filters)
        checks.count("groups", groups)
        if filters % groups:
            raise ValueError(f"groups={groups} must divide filters={filters}")
        for name, value in (("use_bias", use_bias), ("offset_trainable", offset_trainable)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}; wanted True or False")
        self.filters = filters
        self.kernel_size = checks.per_axis("kernel_size", kernel_size, self.rank, minimum=1)
        self.strides = checks.per_axis("strides", strides, self.rank, minimum=1)
        self.dilation_rate = checks.per_axis("dilation_rate", dilation_rate, self.rank, minimum=1)
        padding = canonical_padding(padding, self.rank)
        self.padding = padding.lower() if isinstance(padding, str) else padding
        self.data_format = shapes.check_data_format(data_format)
        self.groups = groups
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.offset_groups = offset_groups
        self.modulated = modulated
        self.mask_scale = mask_scale
        self.max_offset = max_offset
        self.padding_mode = canonical_padding_mode(padding_mode, self.rank, padding)
        self.offset_branch = offset_branch
        self.offset_kernel_initializer = keras.initializers.get(offset_kernel_initializer)
        self.offset_bias_initializer = keras.initializers.get(offset_bias_initializer)
        self.offset_activation = keras.activations.get(offset_activation)
        self.implementation = implementation
        self.offset_trainable = offset_trainable
        self.offset_conv = None
        self._check_options(channels=0)  # which any number of groups divides: how many there are, `build` learns

    def build(self, input_shape: Any) -> None:
        """Make the weights, for inputs of this shape, or of these shapes."""
        x = self._check_shapes(shapes.shapes_of(input_shape))
        channels = x[-1]
        if channels is None:
            raise ValueError(
                f"inputs has shape {shapes.shape_in_data_format(x, self.data_format)}; wanted a known number of channels"
            )
        if channels % self.groups:
            raise ValueError(f"groups={self.groups} must divide the {channels} channels of the input")
        self._check_options(channels)
        self.kernel = self.add_weight(
            name="kernel",
            shape=kernel_shape(self.kernel_size, channels, self.filters, self.groups),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.filters,),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        if self.offset_branch:
            self.offset_conv = OffsetConv(
                self._options,
                self.offset_kernel_initializer,
                self.offset_bias_initializer,
                dtype=self.variable_dtype,
                trainable=self.trainable and self.offset_trainable,
            )
            self.offset_conv.build(x)

    def __call__(self, inputs: Any, *more: Any, **kwargs: Any) -> Any:
        """Convolve `inputs`, or `inputs[0]` with the offsets and the mask that follow it."""
        given = shapes.tensors_of(inputs, more)
        return super().__call__(given[0] if len(given) == 1 else given, **kwargs)

    def call(self, inputs: Any) -> jax.Array:
        """`__call__` of arrays."""
        x, points = self._place_points(inputs)
        bias = None if self.bias is None else keras.ops.convert_to_tensor(self.bias, dtype=x.dtype)
        kernel = keras.ops.convert_to_tensor(self.kernel, dtype=x.dtype)
        y = offset_conv.convolve(self._options, points, x, kernel, bias)
        return self.activation(shapes.in_data_format(y, self.data_format))

    def offset_and_mask(self, inputs: Any) -> tuple[jax.Array, jax.Array | None]:
        """The offsets and the mask with which a call of these inputs reads, in the layer's `data_format`.

        The mask is None if the layer has no modulation.
        """
        if not self.built:
            raise ValueError(f"the layer {self.name} has no weights yet; call it once, or its build(shape)")
        given = shapes.tensors_of(inputs)
        if any(map(keras.utils.is_keras_tensor, given)):
            raise TypeError("inputs is a symbolic tensor of a functional model; offset_and_mask takes arrays")
        _, points = self._place_points([keras.ops.convert_to_tensor(each) for each in given])
        mask = None if points.mask is None else shapes.in_data_format(points.mask, self.data_format)
        return shapes.in_data_format(points.offset, self.data_format), mask

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """The shape of the result for inputs of this shape, or of these shapes."""
        x = self._check_call(shapes.shapes_of(input_shape))
        return shapes.shape_in_data_format((x[0], *self._out_spatial(x), self.filters), self.data_format)

    def get_config(self) -> dict[str, Any]:
        """All arguments, as text and numbers."""
        config = super().get_config() | {name: getattr(self, name) for name in _PLAIN}
        if self.offset_conv is not None and self.trainable:  # a layer that is frozen whole freezes its branch too
            config["offset_trainable"] = self.offset_conv.trainable
        config |= {name: keras.initializers.serialize(getattr(self, name)) for name in _INITIALIZERS}
        config |= {name: keras.regularizers.serialize(getattr(self, name)) for name in _REGULARIZERS}
        config |= {name: keras.constraints.serialize(getattr(self, name)) for name in _CONSTRAINTS}
        config |= {name: keras.activations.serialize(getattr(self, name)) for name in _ACTIVATIONS}
        return config

    @property
    def _options(self) -> Options:
        return Options(
            kernel_size=self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.dilation_rate,
            padding_mode=self.padding_mode,
            feature_group_count=self.groups,
            offset_groups=self.offset_groups,
            modulated=self.modulated,
            mask_scale=self.mask_scale,
            max_offset=self.max_offset,
            offset_activation=None if self.offset_activation is keras.activations.linear else self.offset_activation,
            offset_branch=self.offset_branch,
            implementation=self.implementation,
        )

    def _check_options(self, channels: int) -> None:
        offset_conv.check_options(self._options, channels, module=keras.Layer, call="")

    # ---- the call

    def _place_points(self, inputs: Any) -> tuple[jax.Array, offset_conv.Points]:
        """The map, channels last and in the layer's dtype; where the call reads it, and how much each tap counts."""
        given = shapes.tensors_of(inputs)
        self._check_call([each.shape for each in given])
        arrays = [shapes.channels_last(each, self.data_format) for each in given]
        x, offset, mask = (*arrays, None, None)[:3]
        x = keras.ops.cast(x, self.compute_dtype)
        window = offset_conv.check_input(self._options, x)
        points = offset_conv.place_points(
            self._options, self.offset_conv, window, x, offset, mask, offset_inputs=None, base_offset=None
        )
        return x, points

    def _out_spatial(self, x: shapes.Shape) -> shapes.Shape:
        """Output positions along each axis of a map of this shape, channels last; None where that is not known."""
        spatial = x[1:-1]
        sizes = tuple(_LARGE if size is None else size for size in spatial)
        window = resolve_window(self.kernel_size, spatial=sizes, **offset_conv.geometry(self._options))
        return tuple(None if size is None else out for size, out in zip(spatial, window.out_spatial, strict=True))

    def _check_call(self, given: Sequence[Sequence[Any]]) -> shapes.Shape:
        """`_check_shapes`; raise also if offsets are missing."""
        if len(given) == 1 and not self.offset_branch:
            raise ValueError("offset_branch=False leaves no branch to emit offsets: call layer([inputs, offset])")
        return self._check_shapes(given)

    def _check_shapes(self, given: Sequence[Sequence[Any]]) -> shapes.Shape:
        """The shape of the map, channels last; raise if the shapes do not fit each other or the layer."""
        x = self._check_map(given[0])
        positions, taps = self._out_spatial(x), math.prod(self.kernel_size)
        every = f"each of {self.offset_groups} * {taps} taps"
        wanted = {
            "offset": (self.offset_groups * taps * self.rank, f"{self.rank} values for {every}"),
            "mask": (self.offset_groups * taps, f"one for {every}"),
        }
        for shape, (name, (channels, meaning)) in zip(given[1:], wanted.items(), strict=False):
            whole = shapes.shape_in_data_format((x[0], *positions, channels), self.data_format)
            if not shapes.fits(shape, whole):
                raise ValueError(f"{name} has shape {tuple(shape)}; wanted {whole}: at each output position {meaning}")
        return x

    def _check_map(self, given: Sequence[Any]) -> shapes.Shape:
        """The shape of the map, channels last."""
        channels = self.kernel.shape[-2] * self.groups if self.built else None
        x = shapes.shape_channels_last(given, self.data_format)
        if len(x) != self.rank + 2 or channels not in (None, x[-1]):
            wanted = shapes.shape_in_data_format(
                ("batch", *_SPATIAL[self.rank], channels or "channels"), self.data_format
            )
            raise ValueError(
                f"inputs has shape {tuple(given)}; wanted ({', '.join(map(str, wanted))}), since "
                f"data_format={self.data_format!r}"
            )
        return x


@serializable
class DeformConv2D(DeformConv):
    """Deformable convolution over two axes, which learns offsets and modulation; takes what Keras's `Conv2D` takes.

        z = offset_conv(x);  Δp, logits = split(z);  Δm = mask_scale · sigmoid(logits)
        y(p0) = activation(Σ_n  w_n · x(p0 + p_n + Δp_n) · Δm_n  +  b)

    Call it as `layer(x)`, or with offsets from elsewhere as `layer([x, offset])` or
    `layer([x, offset, mask])`; these are used unchanged, and the branch does not run.

    The offset convolution, called the branch, has the geometry of the main one. It emits the
    OG·K·2 offsets first, ordered [offset group, tap, (y, x)], then the OG·K logits. It starts at
    zero: a new layer computes the plain convolution, if modulated with `mask_scale / 2` times the
    kernel. Under `mixed_bfloat16` and `mixed_float16` the branch adds in float32, and offsets and
    mask stay float32.

    Weights: `kernel` `(*kernel_size, C // groups, filters)`, `bias` `(filters,)`,
    `offset_conv.kernel` and `offset_conv.bias`; `offset_conv` is None if `offset_branch=False`.
    `layer.offset_and_mask(x)` gives what a call reads with.

    Args:
        filters: channels of the result.
        kernel_size: taps along each axis; one int for all axes, or one per axis. So are `strides`
            and `dilation_rate`, both of which may be more than 1 at once.
        strides: pixels between neighbouring outputs.
        padding: "valid" or "same", in any case; or an int, or an int or a (low, high) pair per axis.
        data_format: "channels_last" or "channels_first", of x, offset, mask and the result; by
            default Keras's setting.
        dilation_rate: pixels between neighbouring taps.
        groups: groups of channels of the main kernel; the branch sees all channels.
        activation: of the result, as in `Conv2D`.
        use_bias: whether the result gets a bias. The branch always has one.
        kernel_initializer: of `kernel`.
        bias_initializer: of `bias`.
        kernel_regularizer: of `kernel`.
        bias_regularizer: of `bias`.
        activity_regularizer: of the result.
        kernel_constraint: of `kernel`.
        bias_constraint: of `bias`.
        offset_groups: OG, groups of channels; each group has offsets of its own.
        modulated: whether the branch emits a modulation (DCNv2) or not (DCNv1).
        mask_scale: the modulation's upper bound; 2.0 makes a new layer a plain convolution.
        max_offset: bounds each offset smoothly to ±max_offset pixels, by max_offset · tanh(z /
            max_offset). One number, or one per axis: None leaves an axis unbounded, 0 undeformed.
        padding_mode: what lies beyond the border of the map: "zeros", "edge", "wrap", "reflect" or
            "symmetric", for all axes or one per axis. The branch pads its input so too.
        offset_branch: False makes a layer without a branch; each call must then give offsets.
        offset_kernel_initializer: of `offset_conv.kernel`.
        offset_bias_initializer: of `offset_conv.bias`.
        offset_trainable: False freezes the branch; so does `layer.offset_conv.trainable = False` of
            a layer that has its weights, and both are saved.
        offset_activation: a name or function, of the branch's offsets `(…, OG, K, 2)`, before
            `max_offset` bounds them.
        implementation: of the op: "xla", "pallas_gpu", "pallas_tpu", or None, which takes "xla" today.
        **kwargs: `name`, `dtype` and `trainable`, as in all of Keras's layers.

    Inputs:
        x: `(batch, height, width, C)`.
        offset: `(batch, out height, out width, OG * K * 2)`, in pixels; batch may be 1.
        mask: `(batch, out height, out width, OG * K)`; by default 1.

    Raises:
        RuntimeError: Keras runs on another backend than JAX.
        ValueError: an option or a shape does not fit; the message names it.
        TypeError: an option is of the wrong kind.

    Source: arXiv 1703.06211 (DCNv1), arXiv 1811.11168 (DCNv2); the arguments are `keras.layers.Conv2D`'s.

    Example:
        >>> import keras
        >>> from dcn_jax.keras import DeformConv2D
        >>> inputs = keras.Input((None, None, 3))
        >>> model = keras.Model(inputs, DeformConv2D(16, 3, padding="same", activation="relu")(inputs))
        >>> model.output_shape
        (None, None, None, 16)
        >>> model.layers[1].offset_conv.kernel.shape
        (3, 3, 3, 27)
    """

    rank = 2


@serializable
class DeformConv1D(DeformConv):
    """`DeformConv2D` over one axis: x is `(batch, steps, C)`, with an offset of one number for each tap.

        y(p0) = activation(Σ_n  w_n · x(p0 + p_n + Δp_n) · Δm_n  +  b)

    Arguments, errors and source are those of `DeformConv2D`. "causal" is no padding here, since
    offsets may read later steps.

    Example:
        >>> import numpy as np
        >>> from dcn_jax.keras import DeformConv1D
        >>> DeformConv1D(4, 3, strides=2)(np.ones((2, 9, 5), "float32")).shape
        (2, 4, 4)
    """

    rank = 1


@serializable
class DeformConv3D(DeformConv):
    """`DeformConv2D` over three axes: x is `(batch, depth, height, width, C)`, and offsets are (z, y, x).

        y(p0) = activation(Σ_n  w_n · x(p0 + p_n + Δp_n) · Δm_n  +  b)

    Arguments, errors and source are those of `DeformConv2D`.

    Example:
        >>> import numpy as np
        >>> from dcn_jax.keras import DeformConv3D
        >>> layer = DeformConv3D(4, (1, 3, 3), padding="same", max_offset=(0, 4, 4))
        >>> layer(np.ones((2, 3, 8, 8, 5), "float32")).shape
        (2, 3, 8, 8, 4)
    """

    rank = 3
