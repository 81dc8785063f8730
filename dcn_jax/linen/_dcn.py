"""`DCNv3` and `DCNv4` for `flax.linen`: they make the parameters, the ops do the rest."""

from typing import Any

import jax
import jax.numpy as jnp

from dcn_jax._core import extras
from dcn_jax._layers import dcn
from dcn_jax._layers.dcn import Pair
from dcn_jax.ops.dcnv3 import dcnv3
from dcn_jax.ops.dcnv4 import dcnv4

try:
    import flax.linen as nn
except ModuleNotFoundError as error:
    raise extras.missing("dcn_jax.linen", "flax") from error


class DCNv3(nn.Module):
    """InternImage's layer: a depthwise convolution makes offsets and weights.

        z = act(norm(dw_conv(x)));  Δp = offset(z);  m = softmax(mask(z));  v = input_proj(x)
        y = output_proj(Σ_k  m_k · v(p0 + s · (p_k + Δp_k)))

    The sum is `dcn_jax.dcnv3`; the softmax is over the taps of each group. With
    `center_feature_scale` the sum becomes (1 - σ) · sum + σ · v before `output_proj`, where σ =
    sigmoid(weight · z + bias) is one share for each group. Offsets and logits start at zero: all
    taps count 1 / K.

    Parameters, by the published layer's names: `dw_conv/conv`, `dw_conv/norm`, `offset`, `mask`,
    `input_proj`, `output_proj`, and with `center_feature_scale` also
    `center_feature_scale_proj_weight` `(group, channels)` and `center_feature_scale_proj_bias`
    `(group,)`. Offsets and weights are computed in float32 or wider.

    Every stride, padding and window is allowed. The published layer allows only those that keep
    the size of the map. For others the depthwise convolution has the stride of the op, and its
    windows have the same centres as the op's.

    Attributes:
        channels: C, of the input and of the result.
        kernel_size: the taps along each axis; an int is a square, here and below.
        dw_kernel_size: the taps of the depthwise convolution; by default `kernel_size`.
        stride: pixels between neighbouring outputs.
        pad: zeros around the map: an int, one per axis, or one (low, high) pair per axis.
        dilation: pixels between neighbouring taps.
        group: G, groups of channels; each group has offsets and weights of its own.
        offset_scale: s, by which the grid of taps and the offsets are stretched.
        act_layer: "GELU", "ReLU", "SiLU" or a function.
        norm_layer: "LN", or a function that makes the norm, called as `norm_layer(name="norm")`.
        center_feature_scale: whether v is mixed into the sum.
        remove_center: leaves out the middle tap of the window, whose sizes must be odd.
        dtype: of the computation; by default that of the input and parameters, promoted.
        param_dtype: of the parameters.
        precision: of the products of `input_proj`, `output_proj` and the depthwise convolution.

    Source: Wang et al., InternImage (arXiv 2211.05778), and its published code.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from dcn_jax.linen import DCNv3
        >>> layer = DCNv3(channels=16, group=2)
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 16)))
        >>> y.shape
        (2, 8, 8, 16)
        >>> jax.tree.map(jnp.shape, variables["params"]["offset"])
        {'bias': (36,), 'kernel': (16, 36)}
    """

    channels: int = 64
    kernel_size: Pair = 3
    dw_kernel_size: Pair | None = None
    stride: Pair = 1
    pad: Any = 1
    dilation: Pair = 1
    group: int = 4
    offset_scale: float = 1.0
    act_layer: Any = "GELU"
    norm_layer: Any = "LN"
    center_feature_scale: bool = False
    remove_center: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """`(*batch, H, W, channels)` -> `(*batch, Ho, Wo, channels)`.

        Raises:
            ValueError: an option does not fit the input; the message names it.
            TypeError: an option or the input is of the wrong kind.
        """
        dcn.check_options(self)
        inputs, grid = dcn.check_input(self, inputs)
        size = dcn.square("dw_kernel_size", self.kernel_size if self.dw_kernel_size is None else self.dw_kernel_size)
        x = _projection(self, "input_proj")(inputs)
        z = _DepthwiseBlock(
            self.norm_layer, self.act_layer, size, grid.window.strides, **dcn.dtype_options(self), name="dw_conv"
        )(dcn.around_centres(inputs, grid.window, size))
        weights = dcn.weight_count(self)
        offset = _zero_dense(self, 2 * weights, "offset")(dcn.widen(z))
        mask = dcn.softmax(_zero_dense(self, weights, "mask")(dcn.widen(z)), self.group)
        y = dcnv3(x, offset, mask, **dcn.op_options(self))
        if self.center_feature_scale:
            y = dcn.blend(y, x, z, *_center_feature_scale(self), grid.window)
        return _projection(self, "output_proj")(y)


class DCNv4(nn.Module):
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

    Attributes:
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

    Source: Xiong et al., DCNv4 (arXiv 2401.06197), and its published code.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from dcn_jax.linen import DCNv4
        >>> layer = DCNv4(channels=16, group=2)
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 16)))
        >>> y.shape
        (2, 8, 8, 16)
        >>> jax.tree.map(jnp.shape, variables["params"]["offset_mask"])
        {'bias': (56,), 'kernel': (16, 56)}
    """

    channels: int = 64
    kernel_size: Pair = 3
    stride: Pair = 1
    pad: Any = 1
    dilation: Pair = 1
    group: int = 4
    offset_scale: float = 1.0
    dw_kernel_size: Pair | None = None
    center_feature_scale: bool = False
    remove_center: bool = False
    output_bias: bool = True
    without_pointwise: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """`(*batch, H, W, channels)` -> `(*batch, Ho, Wo, channels)`.

        Raises:
            ValueError: an option does not fit the input; the message names it.
            TypeError: an option or the input is of the wrong kind.
        """
        dcn.check_options(self)
        inputs, grid = dcn.check_input(self, inputs)
        x = inputs if self.without_pointwise else _projection(self, "value_proj")(inputs)
        if self.dw_kernel_size is None:
            seen = dcn.at_centres(inputs, grid.window)
        else:
            size = dcn.square("dw_kernel_size", self.dw_kernel_size)
            seen = _depthwise(
                inputs.shape[-1], size, grid.window.strides, **dcn.dtype_options(self), name="offset_mask_dw"
            )(dcn.around_centres(inputs, grid.window, size))
        offset_mask = _zero_dense(self, dcn.packed_features(self), "offset_mask")(dcn.widen(seen))
        y = dcnv4(x, offset_mask, groups=self.group, **dcn.op_options(self))
        if self.center_feature_scale:
            y = dcn.blend(y, x, y, *_center_feature_scale(self), grid.window)
        return y if self.without_pointwise else _projection(self, "output_proj", use_bias=self.output_bias)(y)


class _DepthwiseBlock(nn.Module):
    """DCNv3's `dw_conv`: a depthwise convolution, a norm and an activation."""

    norm_layer: Any
    act_layer: Any
    size: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    param_dtype: Any
    precision: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        act = dcn.activation(self.act_layer)
        dcn.check_norm(self.norm_layer, 'norm_layer(name="norm")')
        x = _depthwise(x.shape[-1], self.size, self.strides, **dcn.dtype_options(self), name="conv")(x)
        if self.norm_layer == "LN":
            return act(nn.LayerNorm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(x))
        return act(self.norm_layer(name="norm")(x))


def _depthwise(channels: int, size: tuple[int, ...], strides: tuple[int, ...], **options: Any) -> nn.Conv:
    return nn.Conv(
        channels,
        size,
        strides,
        padding="VALID",
        feature_group_count=channels,
        kernel_init=dcn.DEPTHWISE_KERNEL_INIT,
        bias_init=dcn.depthwise_bias_init(size),
        **options,
    )


def _projection(layer: Any, name: str, *, use_bias: bool = True) -> nn.Dense:
    init = nn.initializers.xavier_uniform()
    return nn.Dense(layer.channels, use_bias=use_bias, kernel_init=init, **dcn.dtype_options(layer), name=name)


def _zero_dense(layer: Any, features: int, name: str) -> nn.Dense:
    return nn.Dense(features, kernel_init=nn.initializers.zeros, param_dtype=layer.param_dtype, name=name)


def _center_feature_scale(layer: Any) -> tuple[jax.Array, jax.Array]:
    zeros, name = nn.initializers.zeros, "center_feature_scale_proj"
    weight = layer.param(f"{name}_weight", zeros, (layer.group, layer.channels), layer.param_dtype)
    return weight, layer.param(f"{name}_bias", zeros, (layer.group,), layer.param_dtype)
