"""`DeformRoIPool` and `ModulatedDeformRoIPool` for `flax.nnx`: they make the parameters; `roi_pool` does the rest."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dcn_jax._core import extras
from dcn_jax._layers import roi_pool

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise extras.missing("dcn_jax.nnx", "flax") from error


class DeformRoIPool(nnx.Module):
    """Deformable RoI pooling: two poolings, of which the first moves the bins of the second.

        Δ = offset_fc(roi_align(x, rois));  y = deform_roi_pool(x, rois, Δ)

    with offset_fc = dense → ReLU → dense → ReLU → dense, of which the last starts at zero: a new
    layer is `roi_align`. Offsets are in parts of gamma times the box.

    Parameters, by mmcv's names and in its orders: `offset_fc`, whose dense layers are `layers[0]`,
    `layers[2]` and `layers[4]`.
    The first one sees the pooled bins channels first, (C, ph, pw); the last one emits
    (2, ph, pw), all x and then all y. Offsets are computed in float32 or wider. Under
    `nnx.capture(layer, nnx.Intermediate)` the layer sows them, as
    `offset`, `(R, ph, pw, 2)` as (dy, dx).

    Args:
        output_size: (ph, pw), bins of a box along (height, width); an int is a square.
        output_channels: C, of x and of the result.
        deform_fc_channels: features of the hidden dense layers.
        spatial_scale: pixels of x for one pixel of the image, such as 1 / 16.
        sampling_ratio: samples of a bin along each axis, at least 1 (mmcv's 0 is refused).
        gamma: what offsets are multiplied by, beside the box's size.
        aligned: as in `roi_align`; mmcv's is True.
        dtype: of the computation; by default that of x.
        param_dtype: of the parameters.
        precision: of the products of the dense layers.
        kernel_init: initializer of the hidden kernels.
        bias_init: initializer of the hidden biases.
        offset_kernel_init: initializer of the last kernel.
        offset_bias_init: initializer of the last bias.
        rngs: where the initializers' random keys come from.

    Raises:
        ValueError: an option does not fit; the message names it.
        TypeError: an option is of the wrong kind.

    Source: Dai et al., Deformable Convolutional Networks (arXiv 1703.06211), section 2.2;
    mmcv.ops.DeformRoIPoolPack, for names, orders and gamma.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from dcn_jax.nnx import DeformRoIPool
        >>> layer = DeformRoIPool(7, 8, spatial_scale=1 / 16, rngs=nnx.Rngs(0))
        >>> rois = jnp.array([[0, 10, 20, 200, 180], [1, 0, 0, 64, 64]], jnp.float32)
        >>> layer(jnp.ones((2, 14, 14, 8)), rois).shape
        (2, 7, 7, 8)
        >>> layer.offset_fc.layers[4].kernel.shape
        (1024, 98)
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        output_channels: int,
        deform_fc_channels: int = 1024,
        *,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 2,
        gamma: float = 0.1,
        aligned: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),
        bias_init: nnx.Initializer = nnx.initializers.zeros_init(),
        offset_kernel_init: nnx.Initializer = nnx.initializers.zeros_init(),
        offset_bias_init: nnx.Initializer = nnx.initializers.zeros_init(),
        rngs: nnx.Rngs,
    ):
        self.output_size = tuple(output_size) if isinstance(output_size, Sequence) else output_size
        self.output_channels = output_channels
        self.deform_fc_channels = deform_fc_channels
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.gamma = gamma
        self.aligned = aligned
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.kernel_init = kernel_init
        self.bias_init = bias_init
        self.offset_kernel_init = offset_kernel_init
        self.offset_bias_init = offset_bias_init
        roi_pool.check_options(self)
        self.offset_fc = _make_branch(self, 2, 2 * roi_pool.bin_count(self), rngs)

    def __call__(self, x: jax.Array, rois: jax.Array) -> jax.Array:
        """Pool boxes: `(R, ph, pw, C)`.

        Args:
            x: `(batch, H, W, C)`, channels last.
            rois: `(R, 5)`, as in `roi_align`.

        Raises:
            ValueError: an option or argument does not fit; the message names it.
            TypeError: an option or argument is of the wrong kind.
        """
        x, seen = roi_pool.look(self, x, rois)
        return roi_pool.pool(self, x, rois, self._offset(seen))

    def _offset(self, seen: jax.Array) -> jax.Array:
        """The offsets `(R, ph, pw, 2)` of what the branch sees."""
        offset = roi_pool.to_offset(self, self.offset_fc(seen))
        if hasattr(self, "__captures__"):  # only under nnx.capture: see DeformConv
            self.sow(nnx.Intermediate, "offset", offset)
        return offset


class ModulatedDeformRoIPool(DeformRoIPool):
    """Modulated deformable RoI pooling: `DeformRoIPool` whose bins are multiplied by a learned mask.

        s = roi_align(x, rois);  Δ = offset_fc(s);  m = sigmoid(mask_fc(s))
        y = deform_roi_pool(x, rois, Δ, m)

    with mask_fc = dense → ReLU → dense, of which the last starts at zero: a new layer is half of
    `roi_align`. All else, the arguments too, is `DeformRoIPool`'s; those for the last layer of
    `offset_fc` are for that of `mask_fc` too.

    Parameters beside `offset_fc`: `mask_fc`, whose dense layers are `layers[0]` and
    `layers[2]`. Under
    `nnx.capture(layer, nnx.Intermediate)` the layer sows
    `mask`, `(R, ph, pw)`, beside `offset`.

    Source: Zhu et al., Deformable ConvNets v2 (arXiv 1811.11168), section 3.2;
    mmcv.ops.ModulatedDeformRoIPoolPack, for names and orders.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from dcn_jax.nnx import ModulatedDeformRoIPool
        >>> layer = ModulatedDeformRoIPool(7, 8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 14, 14, 8)), jnp.array([[0, 2, 3, 9, 11]], jnp.float32))[0, 0, 0, 0].item()
        0.5
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        output_channels: int,
        deform_fc_channels: int = 1024,
        *,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(output_size, output_channels, deform_fc_channels, rngs=rngs, **options)
        self.mask_fc = _make_branch(self, 1, roi_pool.bin_count(self), rngs)

    def __call__(self, x: jax.Array, rois: jax.Array) -> jax.Array:
        """Pool boxes: `(R, ph, pw, C)`.

        Args:
            x: `(batch, H, W, C)`, channels last.
            rois: `(R, 5)`, as in `roi_align`.

        Raises:
            ValueError: an option or argument does not fit; the message names it.
            TypeError: an option or argument is of the wrong kind.
        """
        x, seen = roi_pool.look(self, x, rois)
        mask = roi_pool.to_mask(self, self.mask_fc(seen))
        if hasattr(self, "__captures__"):
            self.sow(nnx.Intermediate, "mask", mask)
        return roi_pool.pool(self, x, rois, self._offset(seen), mask)


def _make_branch(layer: DeformRoIPool, hidden: int, features: int, rngs: nnx.Rngs) -> nnx.Sequential:
    """Hidden dense layers with ReLUs and a last one."""
    dense: Any = functools.partial(nnx.Linear, param_dtype=layer.param_dtype, precision=layer.precision, rngs=rngs)
    inits = {"kernel_init": layer.kernel_init, "bias_init": layer.bias_init}
    last_inits = {"kernel_init": layer.offset_kernel_init, "bias_init": layer.offset_bias_init}
    size, layers = layer.output_channels * roi_pool.bin_count(layer), []
    for _ in range(hidden):
        layers += [dense(size, layer.deform_fc_channels, dtype=layer.dtype, **inits), nnx.relu]
        size = layer.deform_fc_channels
    return nnx.Sequential(*layers, dense(size, features, dtype=roi_pool.wide_dtype(layer), **last_inits))
