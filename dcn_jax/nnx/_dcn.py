"""`DCNv3` and `DCNv4` for `flax.nnx`: they make the parameters, the ops do the rest."""

from typing import Any

import jax
import jax.numpy as jnp

from dcn_jax._core import checks, extras
from dcn_jax._layers import dcn
from dcn_jax._layers.dcn import Pair
from dcn_jax.ops.dcnv3 import dcnv3
from dcn_jax.ops.dcnv4 import dcnv4

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise extras.missing("dcn_jax.nnx", "flax") from error


class DCNv3(nnx.Module):
    """InternImage's layer: a depthwise convolution makes offsets and weights.

        z = act(norm(dw_conv(x)));  Δp = offset(z);  m = softmax(mask(z));  v = input_proj(x)
        y = output_proj(Σ_k  m_k · v(p0 + s · (p_k + Δp_k)))

    The sum is `dcn_jax.dcnv3`; the softmax is over the taps of each group. With
    `center_feature_scale` the sum becomes (1 - σ) · sum + σ · v before `output_proj`, where σ =
    sigmoid(weight · z + bias) is one share for each group. Offsets and logits start at zero: all
    taps count 1 / K.

    Parameters, by the published layer's names: `dw_conv.conv`, `dw_conv.norm`, `offset`, `mask`,
    `input_proj`, `output_proj`, and with `center_feature_scale` also
    `center_feature_scale_proj_weight` `(group, channels)` and `center_feature_scale_proj_bias`
    `(group,)`. Offsets and weights are computed in float32 or wider.

    Every stride, padding and window is allowed. The published layer allows only those that keep
    the size of the map. For others the depthwise convolution has the stride of the op, and its
    windows have the same centres as the op's.

    Args:
        channels: C, of the input and of the result.
        kernel_size: the taps along each axis; an int is a square, here and below.
        dw_kernel_size: the taps of the depthwise convolution; by default `kernel_size`.
        stride: pixels between neighbouring outputs.
        pad: zeros around the map: an int, one per axis, or one (low, high) pair per axis.
        dilation: pixels between neighbouring taps.
        group: G, groups of channels; each group has offsets and weights of its own.
        offset_scale: s, by which the grid of taps and the offsets are stretched.
        act_layer: "GELU", "ReLU", "SiLU" or a function.
        norm_layer: "LN", or a function that makes the norm, called as
            `norm_layer(channels, rngs=rngs)`.
        center_feature_scale: whether v is mixed into the sum.
        remove_center: leaves out the middle tap of the window, whose sizes must be odd.
        dtype: of the computation; by default that of the input and parameters, promoted.
        param_dtype: of the parameters.
        precision: of the products of `input_proj`, `output_proj` and the depthwise convolution.
        rngs: where the initializers' random keys come from.

    Raises:
        ValueError: an option does not fit; the message names it.
        TypeError: an option is of the wrong kind.

    Source: Wang et al., InternImage (arXiv 2211.05778), and its published code.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from dcn_jax.nnx import DCNv3
        >>> layer = DCNv3(channels=16, group=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 8, 8, 16))).shape
        (2, 8, 8, 16)
        >>> layer.offset.kernel.shape
        (16, 36)
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: Pair = 3,
        dw_kernel_size: Pair | None = None,
        stride: Pair = 1,
        pad: Any = 1,
        dilation: Pair = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        act_layer: Any = "GELU",
        norm_layer: Any = "LN",
        center_feature_scale: bool = False,
        remove_center: bool = False,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs,
    ):
        self.channels = channels
        self.kernel_size = kernel_size
        self.dw_kernel_size = dw_kernel_size
        self.stride = stride
        self.pad = pad
        self.dilation = dilation
        self.group = group
        self.offset_scale = offset_scale
        self.act_layer = act_layer
        self.norm_layer = norm_layer
        self.center_feature_scale = center_feature_scale
        self.remove_center = remove_center
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        dcn.check_options(self)
        weights, rows = dcn.weight_count(self), dcn.square("kernel_size", kernel_size)
        size = rows if dw_kernel_size is None else dcn.square("dw_kernel_size", dw_kernel_size)
        self.dw_conv = DepthwiseBlock(self, size, rngs)
        self.offset = _zero_dense(self, 2 * weights, rngs)
        self.mask = _zero_dense(self, weights, rngs)
        self.input_proj = _projection(self, rngs)
        self.output_proj = _projection(self, rngs)
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nnx.Param(jnp.zeros((group, channels), param_dtype))
            self.center_feature_scale_proj_bias = nnx.Param(jnp.zeros((group,), param_dtype))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """`(*batch, H, W, channels)` -> `(*batch, Ho, Wo, channels)`.

        Raises:
            ValueError: an option does not fit the input; the message names it.
            TypeError: an option or the input is of the wrong kind.
        """
        checks.one_layer(self.offset.kernel.shape, 2)
        inputs, grid = dcn.check_input(self, inputs)
        x = self.input_proj(inputs)
        z = self.dw_conv(dcn.around_centres(inputs, grid.window, self.dw_conv.conv.kernel_size))
        offset = self.offset(dcn.widen(z))
        mask = dcn.softmax(self.mask(dcn.widen(z)), self.group)
        y = dcnv3(x, offset, mask, **dcn.op_options(self))
        if self.center_feature_scale:
            y = dcn.blend(y, x, z, *_center_feature_scale(self), grid.window)
        return self.output_proj(y)


class DCNv4(nnx.Module):
    """FlashInternImage's layer: one projection makes offsets and weights, without a softmax.

        Δp, m = offset_mask(x);  v = value_proj(x)
        y = output_proj(Σ_k  m_k · v(p0 + s · (p_k + Δp_k)))

    The sum is `dcn_jax.dcnv4`. With `dw_kernel_size` a depthwise convolution, `offset_mask_dw`,
    comes before `offset_mask`. With `center_feature_scale` the sum becomes (1 - σ) · sum + σ · v
    before `output_proj`, where σ = sigmoid(weight · sum + bias) is one share for each group.
    `offset_mask` starts at zero, so the sum of a new layer is zero.

    Parameters, by the published layer's names: `offset_mask` of ⌈3 G K / 8⌉ · 8 features, the last
    ones unused; `value_proj` and `output_proj` unless `without_pointwise`; `offset_mask_dw` with
    `dw_kernel_size`; and with `center_feature_scale` also `center_feature_scale_proj_weight`
    `(group, channels)` and `center_feature_scale_proj_bias` `(group,)`. Offsets and weights are
    computed in float32 or wider.

    Every stride, padding, window and number of channels is allowed. The input is a map; the
    published layer takes a sequence and a shape. If the size of the map changes, offsets and
    weights come from the centres of the op's windows, or with `dw_kernel_size` around them.

    Args:
        channels: C, of the input and of the result.
        kernel_size: the taps along each axis; an int is a square, here and below.
        stride: pixels between neighbouring outputs.
        pad: zeros around the map: an int, one per axis, or one (low, high) pair per axis.
        dilation: pixels between neighbouring taps.
        group: G, groups of channels; each group has offsets and weights of its own.
        offset_scale: s, by which the grid of taps and the offsets are stretched.
        dw_kernel_size: the taps of the depthwise convolution; None for no such convolution.
        center_feature_scale: whether v is mixed into the sum.
        remove_center: leaves out the middle tap of the window, whose sizes must be odd.
        output_bias: whether `output_proj` has a bias.
        without_pointwise: leaves out `value_proj` and `output_proj`.
        dtype: of the computation; by default that of the input and parameters, promoted.
        param_dtype: of the parameters.
        precision: of the products of `value_proj`, `output_proj` and the depthwise convolution.
        rngs: where the initializers' random keys come from.

    Raises:
        ValueError: an option does not fit; the message names it.
        TypeError: an option is of the wrong kind.

    Source: Xiong et al., DCNv4 (arXiv 2401.06197), and its published code.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from dcn_jax.nnx import DCNv4
        >>> layer = DCNv4(channels=16, group=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 8, 8, 16))).shape
        (2, 8, 8, 16)
        >>> layer.offset_mask.kernel.shape
        (16, 56)
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        pad: Any = 1,
        dilation: Pair = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: Pair | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        without_pointwise: bool = False,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs,
    ):
        self.channels = channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.pad = pad
        self.dilation = dilation
        self.group = group
        self.offset_scale = offset_scale
        self.dw_kernel_size = dw_kernel_size
        self.center_feature_scale = center_feature_scale
        self.remove_center = remove_center
        self.output_bias = output_bias
        self.without_pointwise = without_pointwise
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        dcn.check_options(self)
        self.offset_mask_dw = nnx.data(None)
        if dw_kernel_size is not None:
            self.offset_mask_dw = _depthwise(self, dcn.square("dw_kernel_size", dw_kernel_size), rngs)
        self.offset_mask = _zero_dense(self, dcn.packed_features(self), rngs)
        self.value_proj = nnx.data(None)
        self.output_proj = nnx.data(None)
        if not without_pointwise:
            self.value_proj = _projection(self, rngs)
            self.output_proj = _projection(self, rngs, use_bias=output_bias)
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nnx.Param(jnp.zeros((group, channels), param_dtype))
            self.center_feature_scale_proj_bias = nnx.Param(jnp.zeros((group,), param_dtype))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """`(*batch, H, W, channels)` -> `(*batch, Ho, Wo, channels)`.

        Raises:
            ValueError: an option does not fit the input; the message names it.
            TypeError: an option or the input is of the wrong kind.
        """
        checks.one_layer(self.offset_mask.kernel.shape, 2)
        inputs, grid = dcn.check_input(self, inputs)
        x = inputs if self.value_proj is None else self.value_proj(inputs)
        if self.offset_mask_dw is None:
            seen = dcn.at_centres(inputs, grid.window)
        else:
            seen = self.offset_mask_dw(dcn.around_centres(inputs, grid.window, self.offset_mask_dw.kernel_size))
        y = dcnv4(x, self.offset_mask(dcn.widen(seen)), groups=self.group, **dcn.op_options(self))
        if self.center_feature_scale:
            y = dcn.blend(y, x, y, *_center_feature_scale(self), grid.window)
        return y if self.output_proj is None else self.output_proj(y)


class DepthwiseBlock(nnx.Module):
    """DCNv3's `dw_conv`: a depthwise convolution, a norm and an activation."""

    def __init__(self, layer: Any, size: tuple[int, ...], rngs: nnx.Rngs):
        self.act = dcn.activation(layer.act_layer)
        dcn.check_norm(layer.norm_layer, "norm_layer(channels, rngs=rngs)")
        self.conv = _depthwise(layer, size, rngs)
        if layer.norm_layer == "LN":
            self.norm = nnx.LayerNorm(layer.channels, dtype=layer.dtype, param_dtype=layer.param_dtype, rngs=rngs)
        else:
            self.norm = layer.norm_layer(layer.channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.act(self.norm(self.conv(x)))


def _depthwise(layer: Any, size: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        layer.channels,
        layer.channels,
        size,
        layer.stride,
        padding="VALID",
        feature_group_count=layer.channels,
        kernel_init=dcn.DEPTHWISE_KERNEL_INIT,
        bias_init=dcn.depthwise_bias_init(size),
        **dcn.dtype_options(layer),
        rngs=rngs,
    )


def _projection(layer: Any, rngs: nnx.Rngs, *, use_bias: bool = True) -> nnx.Linear:
    init = nnx.initializers.xavier_uniform()
    return nnx.Linear(
        layer.channels, layer.channels, use_bias=use_bias, kernel_init=init, **dcn.dtype_options(layer), rngs=rngs
    )


def _zero_dense(layer: Any, features: int, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.zeros_init()
    return nnx.Linear(layer.channels, features, kernel_init=init, param_dtype=layer.param_dtype, rngs=rngs)


def _center_feature_scale(layer: Any) -> tuple[jax.Array, jax.Array]:
    return layer.center_feature_scale_proj_weight[...], layer.center_feature_scale_proj_bias[...]
