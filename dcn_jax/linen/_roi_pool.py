"""`DeformRoIPool` and `ModulatedDeformRoIPool` for `flax.linen`: they make the parameters; `roi_pool` does the rest."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dcn_jax._core import extras
from dcn_jax._layers import roi_pool

try:
    import flax.linen as nn
except ModuleNotFoundError as error:
    raise extras.missing("dcn_jax.linen", "flax") from error


class DeformRoIPool(nn.Module):
    """Deformable RoI pooling: two poolings, of which the first moves the bins of the second.

        Δ = offset_fc(roi_align(x, rois));  y = deform_roi_pool(x, rois, Δ)

    with offset_fc = dense → ReLU → dense → ReLU → dense, of which the last starts at zero: a new
    layer is `roi_align`. Offsets are in parts of gamma times the box.

    Parameters, by mmcv's names and in its orders: `offset_fc`, whose dense layers are `layers_0`,
    `layers_2` and `layers_4`.
    The first one sees the pooled bins channels first, (C, ph, pw); the last one emits
    (2, ph, pw), all x and then all y. Offsets are computed in float32 or wider. The
    layer sows them into "intermediates", as
    `offset`, `(R, ph, pw, 2)` as (dy, dx).

    Attributes:
        output_size: (ph, pw), bins of a box along (height, width); an int is a square.
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

    Source: Dai et al., Deformable Convolutional Networks (arXiv 1703.06211), section 2.2;
    mmcv.ops.DeformRoIPoolPack, for names, orders and gamma.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from dcn_jax.linen import DeformRoIPool
        >>> layer = DeformRoIPool(7, spatial_scale=1 / 16)
        >>> rois = jnp.array([[0, 10, 20, 200, 180], [1, 0, 0, 64, 64]], jnp.float32)
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 14, 14, 8)), rois)
        >>> y.shape
        (2, 7, 7, 8)
        >>> jax.tree.map(jnp.shape, variables["params"]["offset_fc"]["layers_4"])
        {'bias': (98,), 'kernel': (1024, 98)}
    """

    output_size: int | Sequence[int]
    deform_fc_channels: int = 1024
    spatial_scale: float = 1.0
    sampling_ratio: int = 2
    gamma: float = 0.1
    aligned: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    offset_kernel_init: nn.initializers.Initializer = nn.initializers.zeros
    offset_bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
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
        branch = _Dense(2, 2 * roi_pool.bin_count(self), **_inits(self), name="offset_fc")
        offset = roi_pool.to_offset(self, branch(seen))
        self.sow("intermediates", "offset", offset)
        return offset


class ModulatedDeformRoIPool(DeformRoIPool):
    """Modulated deformable RoI pooling: `DeformRoIPool` whose bins are multiplied by a learned mask.

        s = roi_align(x, rois);  Δ = offset_fc(s);  m = sigmoid(mask_fc(s))
        y = deform_roi_pool(x, rois, Δ, m)

    with mask_fc = dense → ReLU → dense, of which the last starts at zero: a new layer is half of
    `roi_align`. All else, the attributes too, is `DeformRoIPool`'s; those for the last layer of
    `offset_fc` are for that of `mask_fc` too.

    Parameters beside `offset_fc`: `mask_fc`, whose dense layers are `layers_0` and
    `layers_2`. The layer sows
    `mask`, `(R, ph, pw)`, beside `offset`.

    Source: Zhu et al., Deformable ConvNets v2 (arXiv 1811.11168), section 3.2;
    mmcv.ops.ModulatedDeformRoIPoolPack, for names and orders.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from dcn_jax.linen import ModulatedDeformRoIPool
        >>> layer = ModulatedDeformRoIPool(7)
        >>> rois = jnp.array([[0, 2, 3, 9, 11]], jnp.float32)
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 14, 14, 8)), rois)
        >>> y[0, 0, 0, 0].item()
        0.5
    """

    @nn.compact
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
        branch = _Dense(1, roi_pool.bin_count(self), **_inits(self), name="mask_fc")
        mask = roi_pool.to_mask(self, branch(seen))
        self.sow("intermediates", "mask", mask)
        return roi_pool.pool(self, x, rois, self._offset(seen), mask)


class _Dense(nn.Module):
    """Hidden dense layers with ReLUs and a last one, named as in a Sequential."""

    hidden: int
    features: int
    hidden_features: int
    dtype: Any
    last_dtype: Any
    common: Any  # options of all dense layers
    inits: Any  # of the hidden ones
    last_inits: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.hidden):
            name = f"layers_{2 * i}"
            x = nn.relu(nn.Dense(self.hidden_features, dtype=self.dtype, **self.common, **self.inits, name=name)(x))
        name = f"layers_{2 * self.hidden}"
        return nn.Dense(self.features, dtype=self.last_dtype, **self.common, **self.last_inits, name=name)(x)


def _inits(layer: DeformRoIPool) -> dict[str, Any]:
    """The options of a branch."""
    return {
        "hidden_features": layer.deform_fc_channels,
        "dtype": layer.dtype,
        "last_dtype": roi_pool.wide_dtype(layer),
        "common": {"param_dtype": layer.param_dtype, "precision": layer.precision},
        "inits": {"kernel_init": layer.kernel_init, "bias_init": layer.bias_init},
        "last_inits": {"kernel_init": layer.offset_kernel_init, "bias_init": layer.offset_bias_init},
    }
