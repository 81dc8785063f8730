"""`DeformConv` for `flax.nnx`: it makes the parameters; `offset_conv` does the rest."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax._core import checks, extras
from dcn_jax._layers import offset_conv
from dcn_jax.geometry import Padding
from dcn_jax.ops.deform_conv import kernel_shape

try:
    from flax import nnx
    from flax.nnx.nn.dtypes import promote_dtype
except ModuleNotFoundError as error:
    raise extras.missing("dcn_jax.nnx", "flax") from error


class DeformConv(nnx.Module):
    """Deformable convolution that learns offsets and modulation; takes what Flax's `Conv` takes.

        z = offset_conv(x);  Δp, logits = split(z);  Δm = mask_scale · sigmoid(logits)
        y(p0) = Σ_n  w_n · x(p0 + p_n + Δp_n) · Δm_n  +  b

    The offset convolution, called the branch, has the geometry of the main one. It emits the
    OG·K·n offsets first, then the OG·K logits, as mmcv's layers do. It starts at zero: a new layer
    computes the plain convolution, if modulated with `mask_scale / 2` times the kernel.

    Parameters: `kernel` `(*kernel_size, C // feature_group_count, features)`, `bias`
    `(features,)`, `offset_conv.kernel` and `offset_conv.bias`; `offset_conv` is None if
    `offset_branch=False`. Under `nnx.capture(layer, nnx.Intermediate)` the layer sows the `offset`
    and `mask` that it used. Elsewhere it sows nothing, so that a call never changes the model.

    The branch multiplies in the layer's dtype and sums in float32 or wider; offsets and logits
    keep that wider dtype. Two options of `flax.nnx.Conv` are missing: `input_dilation`, since an
    offset between pixels that do not exist means nothing, and `mask`, since `kernel_init` and the
    optimizer can mask a kernel.

    Args:
        in_features: channels of the input, C.
        out_features: channels of the result, features.
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
        conv_general_dilated: computes the default branch, as in `flax.nnx.Conv`.
        preferred_element_type: dtype of the result; by default that of the computation.
        rngs: where the initializers' random keys come from.
        kernel_metadata: metadata of the parameter `kernel`.
        bias_metadata: metadata of the parameter `bias`.
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
            `offset_conv_cls(in_features, features, rngs=rngs)`: a module's class, or
            `functools.partial(Conv, kernel_size=(1, 1))`. The branch maps
            `(…, *spatial, channels)`, not padded, to `(…, *out_spatial, OG * K * n [+ OG * K])`.
        offset_branch: False makes a layer without a branch; each call must then give `offset`.
        offset_in_features: channels that the branch sees; by default `in_features`.

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
        max_offset: float | Sequence[float | None] | None = None,
        offset_kernel_init: nnx.Initializer = nnx.initializers.zeros_init(),
        offset_bias_init: nnx.Initializer = nnx.initializers.zeros_init(),
        implementation: str | None = None,
        padding_mode: str | Sequence[str] = "zeros",
        offset_conv_cls: Any = None,
        offset_branch: bool = True,
        offset_in_features: int | None = None,
        offset_activation: Any = None,
    ):
        window = offset_conv.window_size(kernel_size)
        checks.count("in_features", in_features)
        checks.count("out_features", out_features)
        if offset_in_features is None:
            offset_in_features = in_features
        checks.count("offset_in_features", offset_in_features)
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
        self.padding_mode = padding_mode
        self.offset_conv_cls = offset_conv_cls
        self.offset_branch = offset_branch
        self.offset_in_features = offset_in_features
        self.offset_activation = offset_activation
        call = "offset_conv_cls(in_features, features, rngs=rngs)"
        offset_conv.check_options(self, in_features, module=nnx.Module, call=call)
        shape = kernel_shape(window, in_features, out_features, feature_group_count)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype), **kernel_metadata)
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype), **bias_metadata)
        self.offset_conv: Any = nnx.data(None)
        if offset_branch:
            self.offset_conv = self._make_branch(offset_kernel_init, offset_bias_init, conv_general_dilated, rngs)

    def __call__(
        self,
        inputs: jax.Array,
        offset: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        offset_inputs: jax.Array | None = None,
        base_offset: jax.Array | None = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Convolve `(*batch, *spatial, in_features)` into `(*batch, *out_spatial, out_features)`.

        Args:
            inputs: `(*batch, *spatial, in_features)`.
            offset: `(*batch, *out_spatial, OG * K * n)`, used unchanged instead of the branch's,
                which does not run. Batch axes may be missing or 1, here and below.
            mask: `(*batch, *out_spatial, OG * K)`, used unchanged with `offset`; by default 1.
            offset_inputs: the branch's input instead of `inputs`, with `offset_in_features`
                channels.
            base_offset: added to the branch's offsets after activation and bound:
                `(*batch, *out_spatial, n)`, one displacement for all taps (optical flow, as dy,
                dx), or `(*batch, *out_spatial, OG * K * n)`.
            out_sharding: of the result, as in `flax.nnx.Conv`: under a mesh of explicit axes, a
                `PartitionSpec` or `NamedSharding`; by default that of `inputs`.

        Raises:
            ValueError: an option or argument does not fit the input; the message names it.
            TypeError: an option or argument is of the wrong kind.
        """
        checks.one_layer(self.kernel.shape, len(self.kernel_size) + 2)
        window = offset_conv.check_input(self, inputs, self.in_features)
        points = offset_conv.place_points(
            self, self.offset_conv, window, inputs, offset, mask, offset_inputs, base_offset, self.offset_in_features
        )
        # Only under nnx.capture (newer versions of Flax: `capture_noop`). Otherwise sow stores into
        # the model, which grows with each call and raises if jax.jit, grad or vmap closes over it.
        if hasattr(self, "__captures__"):
            self.sow(nnx.Intermediate, "offset", points.offset)
            if points.mask is not None:
                self.sow(nnx.Intermediate, "mask", points.mask)

        bias = None if self.bias is None else self.bias[...]
        arrays = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        y = offset_conv.convolve(self, points, *arrays, preferred_element_type=self.preferred_element_type)
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)

    def _make_branch(self, kernel_init: Any, bias_init: Any, conv_general_dilated: Any, rngs: nnx.Rngs) -> Any:
        """The branch: the user's own, or a convolution like the main one."""
        features = offset_conv.branch_features(self)
        if self.offset_conv_cls is not None:
            return self.offset_conv_cls(self.offset_in_features, features, rngs=rngs)
        default = conv_general_dilated is lax.conv_general_dilated
        return nnx.Conv(
            self.offset_in_features,
            features,
            self.kernel_size,
            kernel_init=kernel_init,
            bias_init=bias_init,
            conv_general_dilated=offset_conv.wide_conv if default else conv_general_dilated,
            promote_dtype=cast(Any, _Promote(self.promote_dtype)) if default else self.promote_dtype,
            rngs=rngs,
            **offset_conv.branch_options(self),
        )


@dataclasses.dataclass(frozen=True)  # compared by value, as nnx.jit compares functions; and it can be pickled
class _Promote:
    """`promote_dtype`, except that the bias gets the dtype of the sums to which it is added."""

    promote_dtype: Any

    def __call__(self, arrays: tuple, /, *, dtype: Any = None) -> tuple:
        inputs, kernel, _ = self.promote_dtype(arrays, dtype=dtype)
        return inputs, kernel, offset_conv.wide_bias(arrays[2], kernel)
