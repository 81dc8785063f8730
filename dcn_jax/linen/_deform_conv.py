"""`DeformConv` for `flax.linen`: owns the parameters, and leaves the rest to `dcn_jax.deform_conv`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dcn_jax import _branch, _check, _extras
from dcn_jax.geometry import Padding, canonical_padding
from dcn_jax.ops.deform_conv import deform_conv, kernel_shape

try:
    import flax.linen as nn
    from flax.linen.dtypes import promote_dtype
except ModuleNotFoundError as error:
    raise _extras.missing("dcn_jax.linen", "flax") from error


class DeformConv(nn.Module):
    """Deformable convolution that learns its own offsets and modulation; takes what `flax.linen.Conv` takes.

        z = offset_conv(x);  Δp, logits = split(z);  Δm = mask_scale · sigmoid(logits)
        y(p0) = Σ_n  w_n · x(p0 + p_n + Δp_n) · Δm_n  +  b

    The offset convolution has the geometry of the main one and emits first the OG·K·n offsets, then the OG·K logits,
    the order of mmcv's layers. It starts at zero: a fresh layer is `mask_scale / 2` times the plain convolution.

    Parameters: `kernel` `(*kernel_size, C // feature_group_count, features)`, `bias` `(features,)`, and
    `offset_conv/kernel`, `offset_conv/bias`. The layer sows `offset` and `mask` into "intermediates".

    Attributes:
        features: channels of the result.
        kernel_size: the window, one int per spatial axis; an int is a one-dimensional window, as in `flax.linen.Conv`.
        strides: pixels between neighbouring outputs; one for all axes, or one per axis.
        padding: "SAME", "VALID", an int, one int per axis, or one (low, high) pair per axis.
        kernel_dilation: pixels between neighbouring taps; one for all axes, or one per axis.
        feature_group_count: groups of channels that the main kernel convolves apart (the offsets see all channels).
        use_bias: whether the result gets a bias (the offset convolution always has one).
        dtype: of the computation; by default that of the input and parameters, promoted.
        param_dtype: of the parameters.
        precision: of the matrix products and of the offset convolution.
        kernel_init: initializer of `kernel`.
        bias_init: initializer of `bias`.
        promote_dtype: brings input, kernel and bias to the dtype of the computation.
        conv_general_dilated: computes the offset convolution, as in `flax.linen.Conv`, which deprecates it.
        conv_general_dilated_cls: makes `conv_general_dilated`, likewise.
        offset_groups: OG, groups of channels that each read at points of their own.
        modulated: whether there is a modulation (DCNv2) or not (DCNv1).
        mask_scale: the modulation's upper bound: 1.0 is the paper's, with 2.0 a fresh layer equals the plain convolution.
        max_offset: bounds each offset smoothly to ±max_offset pixels, by max_offset · tanh(z / max_offset).
        offset_kernel_init: initializer of `offset_conv/kernel`.
        offset_bias_init: initializer of `offset_conv/bias`.
        implementation: of the op: "xla", "pallas" or None for the fastest that is sound.

    Source: arXiv 1703.06211 (DCNv1), arXiv 1811.11168 (DCNv2).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from dcn_jax.linen import DeformConv
        >>> layer = DeformConv(features=16, kernel_size=(3, 3))
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 4)))
        >>> y.shape
        (2, 8, 8, 16)
        >>> jax.tree.map(jnp.shape, variables["params"])
        {'bias': (16,), 'kernel': (3, 3, 4, 16), 'offset_conv': {'bias': (27,), 'kernel': (3, 3, 4, 27)}}
        >>> y, seen = layer.apply(variables, jnp.ones((2, 8, 8, 4)), mutable=["intermediates"])
        >>> jax.tree.map(jnp.shape, seen["intermediates"])
        {'mask': ((2, 8, 8, 9),), 'offset': ((2, 8, 8, 18),)}
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: Padding = "SAME"
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    promote_dtype: Any = promote_dtype
    conv_general_dilated: Any = None
    conv_general_dilated_cls: Any = None
    offset_groups: int = 1
    modulated: bool = True
    mask_scale: float = 1.0
    max_offset: float | None = None
    offset_kernel_init: nn.initializers.Initializer = nn.initializers.zeros
    offset_bias_init: nn.initializers.Initializer = nn.initializers.zeros
    implementation: str | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolve `(*batch, *spatial, C)` into `(*batch, *out_spatial, features)`.

        Raises:
            ValueError: an option does not fit the input; the message names it.
            TypeError: an option or the input is of the wrong kind.
        """
        window = _branch.window_of(self.kernel_size)
        _branch.check_input(
            inputs, window, strides=self.strides, padding=self.padding, kernel_dilation=self.kernel_dilation
        )
        channels = inputs.shape[-1]
        _check.count("features", self.features)
        _branch.check_options(channels, self.offset_groups, self.modulated, self.mask_scale, self.max_offset)

        injected = {
            "conv_general_dilated": self.conv_general_dilated,
            "conv_general_dilated_cls": self.conv_general_dilated_cls,
        }
        z = nn.Conv(
            _branch.features(window, self.offset_groups, self.modulated),
            window,
            strides=self.strides,
            padding=canonical_padding(self.padding, len(window)),
            kernel_dilation=self.kernel_dilation,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=self.offset_kernel_init,
            bias_init=self.offset_bias_init,
            promote_dtype=self.promote_dtype,
            name="offset_conv",
            **{name: value for name, value in injected.items() if value is not None},
        )(inputs)
        offset, mask = _branch.split(
            z, window, modulated=self.modulated, mask_scale=self.mask_scale, max_offset=self.max_offset
        )
        self.sow("intermediates", "offset", offset)
        if mask is not None:
            self.sow("intermediates", "mask", mask)

        shape = kernel_shape(window, channels, self.features, self.feature_group_count)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        return deform_conv(
            inputs,
            kernel,
            offset,
            mask,
            bias,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=self.feature_group_count,
            precision=self.precision,
            implementation=self.implementation,
        )
