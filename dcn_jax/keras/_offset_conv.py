"""The convolution in a Keras `DeformConv` that computes offsets and modulation, in float32 or wider."""

from typing import Any

import jax

from dcn_jax._layers import offset_conv
from dcn_jax.geometry import resolve_window
from dcn_jax.keras._backend import keras

_AXES = "DHW"


class OffsetConv(keras.Layer):
    """The convolution that emits offsets, then logits, channels last.

    z = conv(x) + b

    It multiplies in the dtype of x, and adds and returns in float32 or wider. `options` are those
    of the layer to which it belongs, which makes it anew whenever it is loaded.
    """

    def __init__(self, options: Any, kernel_initializer: Any, bias_initializer: Any, **kwargs: Any):
        super().__init__(name="offset_conv", autocast=False, **kwargs)
        self.supports_masking = True  # its layer says what becomes of a mask
        self._options = options
        self._initializers = kernel_initializer, bias_initializer

    def build(self, input_shape: Any) -> None:
        """Make the weights for this many channels."""
        features = offset_conv.branch_features(self._options)
        shape = (*self._options.kernel_size, input_shape[-1], features)
        kernel_initializer, bias_initializer = self._initializers
        self.kernel = self.add_weight(name="kernel", shape=shape, initializer=kernel_initializer)
        self.bias = self.add_weight(name="bias", shape=(features,), initializer=bias_initializer)

    def compute_output_shape(self, input_shape: Any) -> tuple[Any, ...]:
        """The shape of what `call` returns."""
        options = offset_conv.geometry(self._options)
        options |= {"padding": offset_conv.branch_padding(self._options), "padding_mode": "zeros"}
        window = resolve_window(self._options.kernel_size, spatial=tuple(input_shape[1:-1]), **options)
        return (input_shape[0], *window.out_spatial, offset_conv.branch_features(self._options))

    def call(self, x: jax.Array) -> jax.Array:
        """The branch at each output position: `(B, *out_spatial, OG * K * n [+ OG * K])`."""
        options, axes = self._options, _AXES[-len(self._options.kernel_size) :]
        kernel = keras.ops.convert_to_tensor(self.kernel, dtype=x.dtype)
        bias = offset_conv.wide_bias(keras.ops.convert_to_tensor(self.bias), kernel)
        z = offset_conv.wide_conv(
            x,
            kernel,
            options.strides,
            offset_conv.branch_padding(options),
            rhs_dilation=options.kernel_dilation,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        )
        return z + bias
