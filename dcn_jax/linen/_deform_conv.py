"""`DeformConv` for `flax.linen`: it makes the parameters; `offset_conv` does the rest."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dcn_jax._core import checks, extras
from dcn_jax._layers import offset_conv
from dcn_jax.geometry import Padding
from dcn_jax.ops.deform_conv import kernel_shape

try:
    import flax.linen as nn
    from flax.linen.dtypes import promote_dtype
except ModuleNotFoundError as error:
    raise extras.missing("dcn_jax.linen", "flax") from error


class DeformConv(nn.Module):
    """Deformable convolution that learns offsets and modulation; takes what Flax's `Conv` takes.

        z = offset_conv(x);  Δp, logits = split(z);  Δm = mask_scale · sigmoid(logits)
        y(p0) = Σ_n  w_n · x(p0 + p_n + Δp_n) · Δm_n  +  b

    The offset convolution, called the branch, has the geometry of the main one. It emits the
    OG·K·n offsets first, then the OG·K logits, as mmcv's layers do. It starts at zero: a new layer
    computes the plain convolution, if modulated with `mask_scale / 2` times the kernel.

    Parameters: `kernel` `(*kernel_size, C // feature_group_count, features)`, `bias`
    `(features,)`, `offset_conv/kernel` and `offset_conv/bias`. The layer sows the `offset` and
    `mask` that it used into "intermediates".

    The branch multiplies in the layer's dtype and sums in float32 or wider; offsets and logits
    keep that wider dtype. Two options of `flax.linen.Conv` are missing: `input_dilation`, since an
    offset between pixels that do not exist means nothing, and `mask`, since `kernel_init` and the
    optimizer can mask a kernel.

    Attributes:
        features: channels of the result.
        kernel_size: taps along each spatial axis; an int means one axis, as in Flax's Conv.
        strides: pixels between neighbouring outputs; one for all axes, or one per axis.
        padding: "SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", an int, or an int or a (low,
            high) pair per axis.
            "CIRCULAR" and "REFLECT" pad as Flax does and set `padding_mode`.
        kernel_dilation: pixels between neighbouring taps; one for all axes, or one per axis.
        feature_group_count: groups of channels of the main kernel; the branch sees all channels.
        use_bias: whether the result gets a bias. The branch always has one.
        dtype: of the computation; by default that of the input and parameters, promoted.
        param_dtype: of the parameters.
        precision: of the matrix products and of the branch.
        kernel_init: initializer of `kernel`.
        bias_init: initializer of `bias`.
        promote_dtype: converts input, kernel and bias to the dtype of the computation.
        conv_general_dilated: computes the default branch; deprecated, as in Flax's Conv.
        conv_general_dilated_cls: makes `conv_general_dilated`; deprecated too.
        offset_groups: OG, groups of channels; each group has offsets of its own.
        modulated: whether there is a modulation (DCNv2) or not (DCNv1).
        mask_scale: the modulation's upper bound; 2.0 makes a new layer a plain convolution.
        max_offset: bounds each offset smoothly to ±max_offset pixels, by max_offset · tanh(z /
            max_offset). One number, or one per axis: None leaves an axis unbounded, 0 undeformed.
        offset_activation: a function of the branch's offsets, `(…, OG, K, n)` in float32 or wider,
            that returns as many, before `max_offset` bounds them: `lambda z: 10 * jnp.tanh(z)`,
            as BasicVSR++ has it, or `functools.partial(jnp.clip, min=-8, max=8)`.
        offset_kernel_init: initializer of `offset_conv/kernel`.
        offset_bias_init: initializer of `offset_conv/bias`.
        implementation: of the op: "xla", "pallas_gpu", "pallas_tpu" (on a TPU, where `max_offset`
            bounds the branch's offsets), or None, which takes "xla" today.
        padding_mode: what lies beyond the border of the map: "zeros", "edge", "wrap", "reflect" or
            "symmetric", for all axes or one per axis. The default branch pads its input so too.
        offset_conv_cls: makes another branch instead of the default one, called as
            `offset_conv_cls(features, name="offset_conv")`: a module's class, or
            `functools.partial(Conv, kernel_size=(1, 1))`. The branch maps
            `(…, *spatial, channels)`, not padded, to `(…, *out_spatial, OG * K * n [+ OG * K])`.
        offset_branch: False makes a layer without a branch; each call must then give `offset`.

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
    max_offset: float | Sequence[float | None] | None = None
    offset_kernel_init: nn.initializers.Initializer = nn.initializers.zeros
    offset_bias_init: nn.initializers.Initializer = nn.initializers.zeros
    implementation: str | None = None
    padding_mode: str | Sequence[str] = "zeros"
    offset_conv_cls: Any = None
    offset_branch: bool = True
    offset_activation: Any = None

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        offset: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        offset_inputs: jax.Array | None = None,
        base_offset: jax.Array | None = None,
    ) -> jax.Array:
        """Convolve `(*batch, *spatial, C)` into `(*batch, *out_spatial, features)`.

        Args:
            inputs: `(*batch, *spatial, C)`.
            offset: `(*batch, *out_spatial, OG * K * n)`, used unchanged instead of the branch's.
                The branch does not run and, in `init`, is not made. Its batch axes may be missing
                or 1, and those of the arrays below too.
            mask: `(*batch, *out_spatial, OG * K)`, used unchanged with `offset`; by default 1.
            offset_inputs: what the branch sees instead of `inputs`, of any number of channels.
            base_offset: added to the branch's offsets after activation and bound:
                `(*batch, *out_spatial, n)`, one displacement for all taps (optical flow, as dy,
                dx), or `(*batch, *out_spatial, OG * K * n)`.

        Raises:
            ValueError: an option or argument does not fit the input; the message names it.
            TypeError: an option or argument is of the wrong kind.
        """
        checks.count("features", self.features)
        window = offset_conv.check_input(self, inputs)
        channels, call = inputs.shape[-1], 'offset_conv_cls(features, name="offset_conv")'
        offset_conv.check_options(self, channels, module=nn.Module, call=call)
        points = offset_conv.place_points(
            self, self._run_branch, window, inputs, offset, mask, offset_inputs, base_offset
        )
        self.sow("intermediates", "offset", points.offset)
        if points.mask is not None:
            self.sow("intermediates", "mask", points.mask)

        shape = kernel_shape(window.size, channels, self.features, self.feature_group_count)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        return offset_conv.convolve(self, points, inputs, kernel, bias)

    @nn.nowrap
    def _run_branch(self, seen: jax.Array) -> jax.Array:
        """Offsets and logits of the map `seen`, by the branch: `offset_conv_cls`, or by default a convolution."""
        features = offset_conv.branch_features(self)
        if self.offset_conv_cls is not None:
            return self.offset_conv_cls(features, name="offset_conv")(seen)
        convolutions = ("conv_general_dilated", "conv_general_dilated_cls")
        options: Any = {name: own for name in convolutions if (own := getattr(self, name)) is not None}
        promote: Any = self.promote_dtype
        if not options:
            options = {"conv_general_dilated": offset_conv.wide_conv}
            promote = functools.partial(_promote, promote)
        return nn.Conv(
            features,
            offset_conv.window_size(self.kernel_size),
            kernel_init=self.offset_kernel_init,
            bias_init=self.offset_bias_init,
            promote_dtype=promote,
            name="offset_conv",
            **offset_conv.branch_options(self),
            **options,
        )(seen)


def _promote(promote_dtype: Any, inputs: jax.Array, kernel: jax.Array, bias: jax.Array, *, dtype: Any) -> tuple:
    """`promote_dtype`, except that the bias gets the dtype of the sums to which it is added."""
    inputs, kernel, _ = promote_dtype(inputs, kernel, bias, dtype=dtype)
    return inputs, kernel, offset_conv.wide_bias(bias, kernel)
