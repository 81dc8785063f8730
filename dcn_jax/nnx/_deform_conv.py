"""`DeformConv` for `flax.nnx`: owns the parameters, and leaves the rest to `dcn_jax.deform_conv`."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax import _branch, _check, _extras
from dcn_jax.geometry import Padding, canonical_padding
from dcn_jax.ops.deform_conv import deform_conv, kernel_shape

try:
    from flax import nnx
    from flax.nnx.nn.dtypes import promote_dtype
except ModuleNotFoundError as error:
    raise _extras.missing("dcn_jax.nnx", "flax") from error


class DeformConv(nnx.Module):
    """Deformable convolution that learns its own offsets and modulation; takes what `flax.nnx.Conv` takes.

        z = offset_conv(x);  Δp, logits = split(z);  Δm = mask_scale · sigmoid(logits)
        y(p0) = Σ_n  w_n · x(p0 + p_n + Δp_n) · Δm_n  +  b

    The offset convolution has the geometry of the main one and emits first the OG·K·n offsets, then the OG·K logits,
    the order of mmcv's layers. It starts at zero: a fresh layer is `mask_scale / 2` times the plain convolution.

    Parameters: `kernel` `(*kernel_size, C // feature_group_count, features)`, `bias` `(features,)`, and
    `offset_conv.kernel`, `offset_conv.bias`. Under `flax.nnx.capture(…, nnx.Intermediate)` the layer sows `offset` and
    `mask`; outside of it, it keeps nothing, so that calling it never changes the model (and `nnx.pop` finds nothing).

    Args:
        in_features: channels of the input, C.
        out_features: channels of the result, features.
        kernel_size: the window, one int per spatial axis; an int is a one-dimensional window, as in `flax.nnx.Conv`.
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
        conv_general_dilated: computes the offset convolution, as in `flax.nnx.Conv`.
        preferred_element_type: dtype of the result; by default that of the computation.
        rngs: where the initializers' random keys come from.
        kernel_metadata: metadata of the parameter `kernel`.
        bias_metadata: metadata of the parameter `bias`.
        offset_groups: OG, groups of channels that each read at points of their own.
        modulated: whether there is a modulation (DCNv2) or not (DCNv1).
        mask_scale: the modulation's upper bound: 1.0 is the paper's, with 2.0 a fresh layer equals the plain convolution.
        max_offset: bounds each offset smoothly to ±max_offset pixels, by max_offset · tanh(z / max_offset).
        offset_kernel_init: initializer of `offset_conv/kernel`.
        offset_bias_init: initializer of `offset_conv/bias`.
        implementation: of the op: "xla", "pallas" or None for the fastest that is sound.

    Raises:
        ValueError: an option does not fit; the message names it.
        TypeError: an option is of the wrong kind.

    Source: arXiv 1703.06211 (DCNv1), arXiv 1811.11168 (DCNv2).

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from dcn_jax.nnx import DeformConv
        >>> layer = DeformConv(4, 16, kernel_size=(3, 3), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 8, 8, 4))).shape
        (2, 8, 8, 16)
        >>> layer.offset_conv.kernel.shape
        (3, 3, 4, 27)
        >>> y, seen = nnx.capture(layer, nnx.Intermediate)(jnp.ones((2, 8, 8, 4)))
        >>> seen["offset"][0].shape, seen["mask"][0].shape
        ((2, 8, 8, 18), (2, 8, 8, 9))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),
        bias_init: nnx.Initializer = nnx.initializers.zeros_init(),
        conv_general_dilated: Any = lax.conv_general_dilated,
        promote_dtype: Any = promote_dtype,
        preferred_element_type: Any = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        offset_groups: int = 1,
        modulated: bool = True,
        mask_scale: float = 1.0,
        max_offset: float | None = None,
        offset_kernel_init: nnx.Initializer = nnx.initializers.zeros_init(),
        offset_bias_init: nnx.Initializer = nnx.initializers.zeros_init(),
        implementation: str | None = None,
    ):
        window = _branch.window_of(kernel_size)
        _check.count("in_features", in_features)
        _check.count("out_features", out_features)
        _branch.check_options(in_features, offset_groups, modulated, mask_scale, max_offset)
        shape = kernel_shape(window, in_features, out_features, feature_group_count)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype), **kernel_metadata)
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype), **bias_metadata)
        self.offset_conv = nnx.Conv(
            in_features,
            _branch.features(window, offset_groups, modulated),
            window,
            strides,
            padding=canonical_padding(padding, len(window)),
            kernel_dilation=kernel_dilation,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=offset_kernel_init,
            bias_init=offset_bias_init,
            conv_general_dilated=conv_general_dilated,
            promote_dtype=promote_dtype,
            rngs=rngs,
        )
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = window
        self.strides = strides
        self.padding = padding
        self.kernel_dilation = kernel_dilation
        self.feature_group_count = feature_group_count
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self.offset_groups = offset_groups
        self.modulated = modulated
        self.mask_scale = mask_scale
        self.max_offset = max_offset
        self.implementation = implementation

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolve `(*batch, *spatial, in_features)` into `(*batch, *out_spatial, out_features)`.

        Raises:
            ValueError: an option does not fit the input; the message names it.
            TypeError: the input is of the wrong kind.
        """
        _branch.check_input(
            inputs,
            self.kernel_size,
            self.in_features,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
        )
        offset, mask = _branch.split(
            self.offset_conv(inputs),
            self.kernel_size,
            modulated=self.modulated,
            mask_scale=self.mask_scale,
            max_offset=self.max_offset,
        )
        # Only under nnx.capture. Elsewhere sow would store into the model, growing with each call, and raise in any model
        # that jax.jit, grad or vmap closes over. (What newer versions of Flax call capture_noop.)
        if hasattr(self, "__captures__"):
            self.sow(nnx.Intermediate, "offset", offset)
            if mask is not None:
                self.sow(nnx.Intermediate, "mask", mask)

        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
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
            preferred_element_type=self.preferred_element_type,
            implementation=self.implementation,
        )
